"""Tiles never change a row's bits, and few of them are run."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.inference.noise import draw_latents
from models.inference.tiles import CPU_TILE_SIZES, REFERENCE_TILE, TILE_SIZES, Tiles, spare_rows, tile_sizes
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec

Run = Callable[[Tensor, Tensor | None], Tensor]


@pytest.fixture(scope="module")
def paper_nets() -> tuple[nn.Module, nn.Module]:
    """G and D of the paper's size with random weights."""
    options = PRESETS["mlp-paper"]
    nets = build_networks(options.network, ImageSpec(channels=1, height=28, width=28), options.latent)
    rng = torch.Generator().manual_seed(0)
    for net in nets:
        net.to_empty(device="cpu").requires_grad_(requires_grad=False)
        for parameter in net.parameters():
            parameter.data.uniform_(-0.05, 0.05, generator=rng)
    return nets


def noise(count: int, seed: int = 3) -> Tensor:
    return torch.from_numpy(draw_latents(PRESETS["mlp-paper"].latent, seed, 0, count))


@pytest.mark.parametrize("side", [0, 1], ids=["generator", "discriminator"])
def test_any_number_of_rows_has_the_bits_of_the_reference_tile(
    paper_nets: tuple[nn.Module, nn.Module], side: int
) -> None:
    """A net of the paper's size, through every proven size: each row is what it is one reference tile at a time."""
    with torch.inference_mode():
        rows = noise(600) if side == 0 else paper_nets[0](noise(600))
    net = paper_nets[side]

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        out: Tensor = net(rows)
        return out

    tiles = Tiles.proven(run, rows[:REFERENCE_TILE], None)
    assert tiles.sizes
    expected = Tiles(run, [REFERENCE_TILE])(rows)
    for count in (1, 2, 3, 5, 8, 33, 65, 127, 513):
        assert torch.equal(tiles(rows[:count]), expected[:count]), count
        assert torch.equal(tiles(rows[-count:]), expected[-count:]), count
    assert torch.equal(tiles(rows.flip(0)), expected.flip(0))


def batch_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """Twice the row, but in batches of 8 one unit in the last place more."""
    return torch.nextafter(2 * rows, torch.full_like(rows, 9)) if len(rows) == 8 else 2 * rows


def place_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """Twice the row, but the last place of any batch of 16 is one unit in the last place more."""
    out = 2 * rows
    if len(rows) == 16:
        out[-1] = torch.nextafter(out[-1], torch.full_like(out[-1], 9))
    return out


def far_place_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """The same from the 40th place of a batch of 48 on."""
    out = 2 * rows
    if len(rows) == 48:
        out[39:] = torch.nextafter(out[39:], torch.full_like(out[39:], 9))
    return out


def constant_place_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """In every batch the odd places differ, whatever its size: only rows alone are safe."""
    out = 2 * rows
    out[1::2] = torch.nextafter(out[1::2], torch.full_like(out[1::2], 9))
    return out


def reference_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """The reference tile gives its last row other bits than its first: there is nothing to compare with."""
    out = 2 * rows
    if len(rows) == REFERENCE_TILE:
        out[-1] = torch.nextafter(out[-1], torch.full_like(out[-1], 9))
    return out


@pytest.mark.parametrize(
    ("run", "sizes"),
    [
        (batch_sensitive, [1, 2, 3, 4, 6, 12, 16, 24, 32, 48, 64]),
        (place_sensitive, [1, 2, 3, 4, 6, 8, 12, 24, 32, 48, 64]),
        (far_place_sensitive, [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]),
        (constant_place_sensitive, [1]),
        (reference_sensitive, [1]),
    ],
)
def test_sizes_that_would_change_a_row_are_refused(run: Run, sizes: Sequence[int]) -> None:
    """A size whose results differ in one last bit, at any place of the tile, is not admitted."""
    tiles = Tiles.proven(run, noise(REFERENCE_TILE), None)
    assert tiles.sizes == tuple(sizes)
    rows = noise(77, seed=9)
    assert torch.equal(tiles(rows), 2 * rows)


@pytest.mark.parametrize("size", CPU_TILE_SIZES)
def test_every_place_of_a_tile_is_proven(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Each place of each size is given two rows or more, and none of them where it stood in the reference tile."""
    monkeypatch.setattr(
        "models.inference.tiles.time.thread_time", lambda: 0.0
    )  # taking notes must not make a size look slow
    seen: dict[int, set[int]] = {place: set() for place in range(size)}

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        if len(rows) == size:
            for place, row in enumerate(rows[:, 0].tolist()):
                seen[place].add(int(row))
        return rows

    assert size in Tiles.proven(run, torch.arange(float(REFERENCE_TILE))[:, None], None).sizes
    assert all(len(rows) >= 2 for rows in seen.values())
    assert set().union(*seen.values()) == set(range(REFERENCE_TILE))
    if size == REFERENCE_TILE:  # the reference itself has seen one more at each
        assert all(rows == {place, (place + 1) % size} for place, rows in seen.items())


@pytest.mark.parametrize(("row_s", "largest"), [(1e-4, 64), (1e-3, 16)])
def test_tiles_end_where_larger_ones_gain_nothing(monkeypatch: pytest.MonkeyPatch, row_s: float, largest: int) -> None:
    """Where rows take long, several small tiles take no longer than a large one, and less memory."""
    now = 0.0

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        nonlocal now
        now += len(rows) * row_s
        return 2 * rows

    monkeypatch.setattr("models.inference.tiles.time.thread_time", lambda: now)
    assert Tiles.proven(run, noise(REFERENCE_TILE), None).sizes[-1] == largest


def test_a_gap_between_sizes_is_filled_with_tiles_and_not_with_zeros() -> None:
    """Tiles that are nearly full: a few rows of padding cost less than one more tile, many cost more."""
    sizes: list[int] = []

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        sizes.append(len(rows))
        return rows

    tiles = Tiles(run, CPU_TILE_SIZES)
    for rows, expected in (
        (1, [1]),
        (3, [3]),
        (5, [4, 1]),
        (7, [6, 1]),
        (9, [8, 1]),
        (11, [12]),
        (20, [16, 4]),
        (22, [24]),
        (40, [32, 8]),
        (57, [64]),
        (70, [64, 6]),
        (200, [64, 64, 64, 8]),
    ):
        sizes.clear()
        tiles(torch.zeros(rows, 1))
        assert sizes == expected, rows
        assert tiles.padded(rows) == sum(expected)


def test_a_gpu_takes_one_tile_rather_than_several() -> None:
    """What is padded there costs hardly more, and each tile another launch."""
    assert spare_rows(torch.device("cuda")) >= 256
    tiles = Tiles(lambda rows, _: rows, TILE_SIZES, spare_rows(torch.device("cuda")))
    for rows, padded in ((5, 8), (33, 64), (100, 128), (300, 512), (512, 512), (600, 640)):
        assert tiles.padded(rows) == padded


@pytest.mark.parametrize(("numbers", "largest"), [(28 * 28, 4096), (3 * 32 * 32, 1024), (3 * 128 * 128, 512)])
def test_a_gpus_largest_tile_is_for_small_images(numbers: int, largest: int) -> None:
    """What a net keeps of a batch grows with its images; a CPU's tiles never grow so large."""
    gpu = torch.device("cuda")
    assert tile_sizes(gpu, numbers) == TILE_SIZES[: TILE_SIZES.index(largest) + 1]
    assert tile_sizes(torch.device("cpu"), numbers)[-1] == REFERENCE_TILE


def test_tiles_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has none for the largest is served by smaller ones; one that has none for those is no use."""
    monkeypatch.setattr("models.inference.tiles.time.thread_time", lambda: 0.0)
    most = 1024

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    assert Tiles.proven(run, noise(REFERENCE_TILE), None, TILE_SIZES).sizes[-1] == 1024
    most = 256
    with pytest.raises(torch.OutOfMemoryError):
        Tiles.proven(run, noise(REFERENCE_TILE), None, TILE_SIZES)


def test_labels_travel_with_their_rows() -> None:
    """Padding and cutting keep row and label together."""
    tiles = Tiles(lambda rows, labels: rows + labels[:, None], [4, 16])  # type: ignore[index]
    rows, labels = torch.zeros(23, 2), torch.arange(23)
    assert torch.equal(tiles(rows, labels), labels[:, None].expand(23, 2).to(torch.float32))


@given(rows=st.integers(1, 3000), sizes=st.lists(st.sampled_from(TILE_SIZES), min_size=1, unique=True).map(sorted))
def test_padded_says_how_many_rows_are_run(rows: int, sizes: list[int]) -> None:
    """What is reported as padding is what the net is given."""
    given_rows = []

    def run(batch: Tensor, _: Tensor | None) -> Tensor:
        given_rows.append(len(batch))
        return batch

    tiles = Tiles(run, sizes)
    out = tiles(torch.arange(rows)[:, None])
    assert torch.equal(out[:, 0], torch.arange(rows))
    assert set(given_rows) <= set(sizes)
    assert sum(given_rows) == tiles.padded(rows)
