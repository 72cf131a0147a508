"""The named random numbers against published vectors, their statistics, and tiles that never change a row's bits."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor, nn

from models.inference.sampler import (
    CPU_TILE_SIZES,
    LABEL_STREAM,
    LATENT_STREAM,
    REFERENCE_TILE,
    TILE_SIZES,
    Noise,
    Tiles,
    UInt8,
    draw_labels,
    draw_latents,
    grid,
    latent_path,
    spare_rows,
    tile_sizes,
    to_pixels,
    to_uint8,
)
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec, LatentSpec

Run = Callable[[Tensor, Tensor | None], Tensor]
LAST = 2**53 - 1
seeds = st.integers(0, LAST)


def latent(dim: int, distribution: str = "normal") -> LatentSpec:
    return LatentSpec.model_validate({"dim": dim, "distribution": distribution})


# --- Philox ------------------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def philox_block(counter: int, key: int) -> list[int]:
    """Four words of Philox4x64-10, from the algorithm's description (Salmon et al. 2011, §3.3), in plain integers."""
    c = [counter >> shift & MASK for shift in (0, 64, 128, 192)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k[0], high & MASK, low >> 64 ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def philox_uniforms(seed: int, stream: int, block: int) -> list[float]:
    return [((word >> 11) + 0.5) * 2.0**-53 for word in philox_block(block, seed | stream << 64)]


def test_the_reference_is_philox() -> None:
    """Random123's known answers hold for the plain reference that the other tests compare with."""
    words = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    assert philox_block(0, 0) == list(words)
    words = 0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0
    assert philox_block(2**256 - 1, 2**128 - 1) == list(words)


def test_the_first_latents_are_the_known_answer() -> None:
    """Seed 0, image 0: the words of Random123's zero vector, as the documented formulas turn them into numbers."""
    words = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    u = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    uniform = [math.sqrt(3) * (2 * x - 1) for x in u]
    np.testing.assert_array_equal(draw_latents(latent(4, "uniform"), 0, 0, 1)[0], np.array(uniform, np.float32))
    normal = [
        math.sqrt(-2 * math.log(u[j])) * turn(2 * math.pi * u[j + 1]) for j in (0, 2) for turn in (math.cos, math.sin)
    ]
    np.testing.assert_allclose(draw_latents(latent(4), 0, 0, 1)[0], np.array(normal, np.float32), rtol=3e-7)


@settings(deadline=None, max_examples=100)
@given(seed=seeds, index=seeds, dim=st.integers(1, 13))
def test_any_latent_is_the_block_that_its_index_names(seed: int, index: int, dim: int) -> None:
    """Image i owns blocks i·⌈dim/4⌉ …, for every seed and index there is: computed with plain integers."""
    blocks = -(-dim // 4)
    u = [x for block in range(blocks) for x in philox_uniforms(seed, LATENT_STREAM, index * blocks + block)]
    expected = [math.sqrt(3) * (2 * x - 1) for x in u[:dim]]
    got = draw_latents(latent(dim, "uniform"), seed, index, 1)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([expected], np.float32))


@settings(deadline=None, max_examples=100)
@given(
    images=st.lists(st.tuples(seeds, seeds), min_size=1, max_size=9),
    dim=st.integers(1, 130) | st.integers(65_500, 65_536),  # whose counters have two words
    distribution=st.sampled_from(["normal", "uniform"]),
)
@example(images=[(7, 2**64 // 16383)], dim=4 * 16383, distribution="uniform")  # one that overflows half-way
def test_torch_draws_the_same_words(images: list[tuple[int, int]], dim: int, distribution: str) -> None:
    """Uniform noise is the same in every bit, wherever it is drawn; normal noise but for its functions' last bits."""
    spec = latent(dim, distribution)
    asked = torch.tensor(images)
    drawn = Noise(spec)(asked[:, 0], asked[:, 1])
    assert drawn.dtype == torch.float32
    expected = np.concatenate([draw_latents(spec, seed, index, 1) for seed, index in images])
    if distribution == "uniform":
        np.testing.assert_array_equal(drawn.numpy(), expected)
    else:
        np.testing.assert_allclose(drawn.numpy(), expected, rtol=3e-7, atol=1e-15)


@settings(deadline=None, max_examples=100)
@given(
    seed=seeds,
    first=st.integers(0, LAST - 40),
    count=st.integers(1, 40),
    dim=st.integers(1, 130),
    distribution=st.sampled_from(["normal", "uniform"]),
    data=st.data(),
)
def test_an_image_alone_has_the_noise_it_has_in_a_crowd(
    seed: int, first: int, count: int, dim: int, distribution: str, data: st.DataObject
) -> None:
    """Every bit of a row is the same whether drawn alone, in a part or in the whole range."""
    spec = latent(dim, distribution)
    whole = draw_latents(spec, seed, first, count)
    assert whole.shape == (count, dim)
    assert np.isfinite(whole).all()
    row = data.draw(st.integers(0, count - 1))
    np.testing.assert_array_equal(draw_latents(spec, seed, first + row, 1)[0], whole[row])
    stop = data.draw(st.integers(row + 1, count))
    np.testing.assert_array_equal(draw_latents(spec, seed, first + row, stop - row), whole[row:stop])


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_ten_thousand_images_one_by_one_are_the_bulk(distribution: str) -> None:
    """The bulk is drawn by wide instructions and a single row is not: no last bit may tell."""
    spec = latent(10, distribution)
    bulk = draw_latents(spec, 2014, 0, 10_000)
    singles = np.concatenate([draw_latents(spec, 2014, index, 1) for index in range(10_000)])
    np.testing.assert_array_equal(bulk, singles)


def test_seeds_and_images_differ() -> None:
    """Neighbours in seed and in index share no row, and labels come from a stream of their own."""
    spec = latent(4)
    rows = [draw_latents(spec, seed, index, 1)[0] for seed in (0, 1, LAST) for index in (0, 1, LAST)]
    assert len({row.tobytes() for row in rows}) == 9
    assert philox_uniforms(3, LATENT_STREAM, 0) != philox_uniforms(3, LABEL_STREAM, 0)


@pytest.mark.parametrize(
    ("distribution", "reference"),
    [("normal", stats.norm()), ("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)))],
    ids=["normal", "uniform"],
)
def test_the_numbers_have_their_distribution(distribution: str, reference: Any) -> None:
    """400,000 numbers: mean 0, variance 1, the fourth moment, Kolmogorov-Smirnov, and no correlation of neighbours."""
    z = draw_latents(latent(100, distribution), 7, 0, 4_000).astype(np.float64)
    assert abs(z.mean()) < 0.008  # five standard errors
    assert abs(z.var() - 1) < 0.012
    assert abs((z**4).mean() - reference.stats("k") - 3) < 0.09
    assert stats.kstest(z.ravel(), reference.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(z[:, 0::2].ravel(), z[:, 1::2].ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1]) < 0.008


def test_uniform_numbers_stay_within_the_square_root_of_three() -> None:
    """±√3 is the edge, as float32 rounds it."""
    z = draw_latents(latent(100, "uniform"), 8, 0, 4_000)
    assert np.abs(z).max() <= np.float32(math.sqrt(3))


# --- Labels ------------------------------------------------------------------------------------------------------


def test_labels_come_at_their_frequencies() -> None:
    """Over 100,000 images each class has its share, and one that never occurred is never drawn."""
    frequencies = [0.1, 0.0, 0.25, 0.6, 0.05]
    counts = np.bincount(draw_labels(frequencies, 5, 0, 100_000), minlength=5)
    assert counts[1] == 0
    drawn = np.array(counts)[[0, 2, 3, 4]]
    assert stats.chisquare(drawn, 100_000 * np.array([0.1, 0.25, 0.6, 0.05])).pvalue > 1e-3


@settings(deadline=None, max_examples=100)
@given(seed=seeds, first=st.integers(0, LAST - 30), count=st.integers(1, 30), classes=st.integers(1, 12))
def test_a_label_is_a_function_of_seed_and_index(seed: int, first: int, count: int, classes: int) -> None:
    """The first word of the block that the index names, on the label stream, against the running total of shares."""
    frequencies = [1 / classes] * classes
    got = draw_labels(frequencies, seed, first, count)
    assert got.dtype == np.int64
    row = count // 2
    u = philox_uniforms(seed, LABEL_STREAM, first + row)[0]
    edges = np.cumsum(frequencies)[:-1]
    assert got[row] == sum(u >= edge for edge in edges)
    np.testing.assert_array_equal(draw_labels(frequencies, seed, first + row, 1), got[row : row + 1])


# --- Tiles -------------------------------------------------------------------------------------------------------


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
    """Twice the row, but in batches of 8 and 256 one unit in the last place more."""
    return torch.nextafter(2 * rows, torch.full_like(rows, 9)) if len(rows) in (8, 256) else 2 * rows


def place_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """Twice the row, but the last place of any batch of 16 is one unit in the last place more."""
    out = 2 * rows
    if len(rows) == 16:
        out[-1] = torch.nextafter(out[-1], torch.full_like(out[-1], 9))
    return out


def far_place_sensitive(rows: Tensor, _: Tensor | None) -> Tensor:
    """The same from the 200th place on, which only the largest batch has."""
    out = 2 * rows
    out[199:] = torch.nextafter(out[199:], torch.full_like(out[199:], 9))
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
        (batch_sensitive, [2, 4, 16, 32, 64]),
        (place_sensitive, [2, 4, 8, 32, 64, 256]),
        (far_place_sensitive, [2, 4, 8, 16, 32, 64]),
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
        "models.inference.sampler.time.thread_time", lambda: 0.0
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


@pytest.mark.parametrize(
    ("row_s", "large_row_s", "sizes"),
    [
        pytest.param(1e-4, 1e-4, (2, 4, 8, 16, 32, 64, 256), id="small rows"),
        pytest.param(1e-4, 2e-4, (2, 4, 8, 16, 32, 64), id="rows that fit the caches in small tiles only"),
        pytest.param(1e-3, 1e-3, (2, 4, 8, 16), id="large rows"),
    ],
)
def test_tiles_end_where_larger_ones_gain_nothing(
    monkeypatch: pytest.MonkeyPatch, row_s: float, large_row_s: float, sizes: tuple[int, ...]
) -> None:
    """They would take more memory, or be slower: several smaller ones are as good or better."""
    now = 0.0

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        nonlocal now
        now += len(rows) * (row_s if len(rows) <= REFERENCE_TILE else large_row_s) + 1e-3  # every call costs something
        return 2 * rows

    monkeypatch.setattr("models.inference.sampler.time.thread_time", lambda: now)
    assert Tiles.proven(run, noise(REFERENCE_TILE), None).sizes == sizes


def test_a_gap_between_sizes_is_filled_with_tiles_and_not_with_zeros() -> None:
    """Tiles that are nearly full: a few rows of padding cost less than one more tile, many cost more."""
    sizes: list[int] = []

    def run(rows: Tensor, _: Tensor | None) -> Tensor:
        sizes.append(len(rows))
        return rows

    tiles = Tiles(run, CPU_TILE_SIZES)
    for rows, expected in (
        (1, [2]),
        (3, [4]),
        (5, [8]),
        (9, [16]),
        (20, [16, 4]),
        (24, [32]),
        (40, [32, 8]),
        (56, [64]),
        (70, [64, 8]),
        (200, [64, 64, 64, 8]),
        (300, [256, 32, 16]),
    ):
        sizes.clear()
        tiles(torch.zeros(rows, 1))
        assert sizes == expected, rows
        assert tiles.padded(rows) == sum(expected)


def test_a_gpu_takes_one_tile_rather_than_several() -> None:
    """What is padded there costs hardly more, and each tile another launch."""
    assert spare_rows(torch.device("cuda")) >= 256 > spare_rows(torch.device("cpu"))
    tiles = Tiles(lambda rows, _: rows, TILE_SIZES, spare_rows(torch.device("cuda")))
    for rows, padded in ((5, 8), (33, 64), (100, 128), (300, 512), (512, 512), (600, 640)):
        assert tiles.padded(rows) == padded


@pytest.mark.parametrize(("numbers", "largest"), [(28 * 28, 4096), (3 * 32 * 32, 1024), (3 * 128 * 128, 512)])
def test_a_gpus_largest_tile_is_for_small_images(numbers: int, largest: int) -> None:
    """What a net keeps of a batch grows with its images; a CPU's tiles never grow so large."""
    gpu = torch.device("cuda")
    for of_d in (False, True):
        assert tile_sizes(gpu, numbers, of_d=of_d) == TILE_SIZES[: TILE_SIZES.index(largest) + 1]
        assert tile_sizes(torch.device("cpu"), numbers, of_d=of_d)[-1] == 256


def test_tiles_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has none for the largest is served by smaller ones; one that has none for those is no use."""
    monkeypatch.setattr("models.inference.sampler.time.thread_time", lambda: 0.0)
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


# --- Bytes -------------------------------------------------------------------------------------------------------


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=6)))
def test_bytes_to_pixels_and_back_is_the_identity(images: UInt8) -> None:
    """Channels come first and back last, arrays that can't be written are welcome, and no source is shared."""
    images.setflags(write=False)
    pixels = to_pixels(images)
    n, h, w, c = images.shape
    assert pixels.shape == (n, c, h, w)
    assert pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), np.moveaxis(images, 3, 1) / np.float32(255))
    before = images.copy()
    np.testing.assert_array_equal(to_uint8(pixels), images)
    pixels.fill_(0)
    np.testing.assert_array_equal(images, before)


def test_every_byte_survives_the_round_trip() -> None:
    """All 256 values, and what lies between two of them goes to the nearer, halves to the even one."""
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_pixels(every)), every)
    between = torch.tensor([0.0, 0.4, 0.6, 1.4, 254.6]).div(255).view(1, 1, 1, 5)
    assert to_uint8(between).ravel().tolist() == [0, 0, 1, 1, 255]
    assert to_uint8(torch.tensor([0.5]).view(1, 1, 1, 1)).item() == 128  # 127.5


@given(
    images=hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3]))), columns=st.integers(1, 7)
)
def test_a_grid_equals_a_loop(images: UInt8, columns: int) -> None:
    """Images stand in reading order, and places without an image are black."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    expected = np.zeros((rows * h, columns * w, c), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * h, index % columns * w
        expected[top : top + h, left : left + w] = image
    np.testing.assert_array_equal(grid(images, columns), expected)


# --- Ways between latents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "spherical"])
@given(
    seed=seeds, steps=st.integers(2, 30), dim=st.integers(1, 40), distribution=st.sampled_from(["normal", "uniform"])
)
def test_a_path_begins_and_ends_at_its_latents(
    method: Literal["linear", "spherical"], seed: int, steps: int, dim: int, distribution: str
) -> None:
    """Both ends bit for bit, everything finite, and backwards the same way."""
    start, stop = draw_latents(latent(dim, distribution), seed, 0, 2)
    path = latent_path(start, stop, steps, method)
    assert path.shape == (steps, dim)
    assert path.dtype == np.float32
    np.testing.assert_array_equal(path[0], start)
    np.testing.assert_array_equal(path[-1], stop)
    assert np.isfinite(path).all()
    np.testing.assert_allclose(latent_path(stop, start, steps, method)[::-1], path, atol=1e-5)


def test_paths_are_the_line_and_the_arc() -> None:
    """From (1, 0) to (0, 1): the line meets (½, ½), the arc (√½, √½), and thirds of it are 30 and 60 degrees."""
    east, north = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(latent_path(east, north, 3, "linear")[1], [0.5, 0.5])
    np.testing.assert_allclose(latent_path(east, north, 3, "spherical")[1], [math.sqrt(0.5)] * 2, rtol=1e-6)
    degrees = np.degrees(np.arctan2(*latent_path(east, north, 4, "spherical").T[::-1]))
    np.testing.assert_allclose(degrees, [0, 30, 60, 90], atol=1e-4)


@pytest.mark.parametrize("stop", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.0]], ids=str)
def test_latents_on_one_line_through_zero_go_straight(stop: list[float]) -> None:
    """There is no one arc between them."""
    start, end = np.array([1, 2], np.float32), np.array(stop, np.float32)
    np.testing.assert_array_equal(latent_path(start, end, 5, "spherical"), latent_path(start, end, 5, "linear"))


def test_a_spherical_path_keeps_the_length_that_a_line_loses() -> None:
    """In 100 dimensions the middle of the line has some 0.7 of the length, the arc's all of it."""
    start, stop = draw_latents(latent(100), 1, 0, 2)
    length = np.linalg.norm([start, stop], axis=1).mean()
    assert np.linalg.norm(latent_path(start, stop, 3, "linear")[1]) < 0.8 * length
    assert np.linalg.norm(latent_path(start, stop, 3, "spherical")[1]) > 0.97 * length


def test_a_path_has_two_ends() -> None:
    """One step would have to be both."""
    with pytest.raises(ValueError, match="two steps"):
        latent_path(np.zeros(2, np.float32), np.ones(2, np.float32), 1, "linear")
