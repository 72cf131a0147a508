"""The engine: a row's bytes whatever its company, what becomes of errors, and what is said of a precision."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.bundle import GENERATOR, Bundle, BundleError, write_bundle
from models.inference.fast_nets import FastGenerator, fast_generator
from models.inference.noise import draw_latents
from models.inference.pixels import to_pixels
from models.inference.tiles import REFERENCE_TILE, TILE_SIZES, Tiles
from models.networks import Generator, build_networks
from models.spec import PRESETS, ImageSpec, LatentSpec
from service.engine.batching.batch import BatchSlice, DeviceFailed, OutOfMemory, Rows
from service.engine.device import MAX_BATCH_ROWS, Device
from service.engine.engine import Engine, Loaded, tiles_that_fit
from service.engine.payloads import UNKNOWN_LABEL, DiscriminatePayload, SamplePayload
from service.engine.runners import SampleRunner

ROOT = Path(__file__).parents[3]
KINDS = ("tiny", "rgb", "cond", "paper")
ROWS = 12  # of each seed, known from batches of a single row
SEEDS, TRUNCATIONS = (0, 2**53 - 1), (1.0, 0.7)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("cpu", exact=True)


@pytest.fixture(scope="module")
def paper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's nets with random weights."""
    options, image = PRESETS["mlp-paper"], ImageSpec(channels=1, height=28, width=28)
    rng = torch.Generator().manual_seed(5)
    states = [
        {name: torch.randn(tensor.shape, generator=rng) * 0.05 for name, tensor in net.state_dict().items()}
        for net in build_networks(options.network, image, options.latent)
    ]
    return written(tmp_path_factory.mktemp("bundles") / "paper", options.network, image, options.latent, states)


def written(folder: Path, network: Any, image: ImageSpec, latent: LatentSpec, states: list[dict[str, Any]]) -> Path:
    facts = {
        "name": folder.name,
        "created": "2026-01-02T03:04:05Z",
        "network": network,
        "image": image,
        "latent": latent,
        "labels": None,
        "calibration": None,
        "training": {},
        "evaluation": {},
    }
    write_bundle(folder, facts, states[0], states[1], np.zeros((4, 4, 1), np.uint8))
    return folder


@pytest.fixture(scope="module")
def loaded(engine: Engine, tiny_bundles: dict[str, Bundle], paper_folder: Path) -> dict[str, Loaded]:
    """A bundle of each kind, on one engine."""
    folders = [tiny_bundles["tiny"].folder, tiny_bundles["rgb"].folder, tiny_bundles["cond"].folder, paper_folder]
    return {folder.name: engine.load(folder, {}) for folder in folders}


def labels_of(one: Loaded, count: int) -> Any:
    """A label for each row, where the bundle has labels."""
    names = one.manifest.labels
    return None if names is None else np.arange(count, dtype=np.int64) % len(names)


def sample_part(one: Loaded, seed: int, truncation: float, start: int, stop: int) -> BatchSlice[SamplePayload]:
    return BatchSlice(SamplePayload(seed, 0, labels_of(one, ROWS), truncation), start, stop)


# Bytes

crowds = st.lists(
    st.tuples(st.sampled_from(SEEDS), st.sampled_from(TRUNCATIONS), st.integers(0, ROWS - 1), st.integers(1, ROWS)),
    min_size=1,
    max_size=20,
)


@pytest.fixture(scope="module")
def alone(loaded: dict[str, Loaded]) -> dict[tuple[str, int, float], Rows]:
    """Every row of every kind, seed and truncation, each computed in a batch of its own."""
    return {
        (kind, seed, truncation): np.concatenate(
            [one.sample.run([sample_part(one, seed, truncation, row, row + 1)]) for row in range(ROWS)]
        )
        for kind, one in loaded.items()
        for seed in SEEDS
        for truncation in TRUNCATIONS
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_latent_gives_the_bytes_of_the_seed_that_it_was_drawn_from(
    loaded: dict[str, Loaded], alone: dict[tuple[str, int, float], Rows], kind: str, truncation: float
) -> None:
    """Also beside rows of a seed in one batch, and when a batch takes only some of a request's rows."""
    one, seed = loaded[kind], SEEDS[1]
    latents = draw_latents(one.manifest.latent, seed, 0, ROWS)
    before = latents.copy()
    given = SamplePayload(0, 0, labels_of(one, ROWS), truncation, latents)
    got = one.sample.run([BatchSlice(given, 3, ROWS), sample_part(one, 0, 0.7, 0, 5), BatchSlice(given, 0, 1)])
    expected = alone[kind, seed, truncation]
    np.testing.assert_array_equal(got, np.concatenate([expected[3:], alone[kind, 0, 0.7][:5], expected[:1]]))
    np.testing.assert_array_equal(latents, before)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(crowd=crowds)
def test_an_image_has_the_same_bytes_alone_and_in_any_crowd(
    loaded: dict[str, Loaded],
    alone: dict[tuple[str, int, float], Rows],
    kind: str,
    crowd: list[tuple[int, float, int, int]],
) -> None:
    """Whatever else is in the batch, and wherever in it the row stands, an image is the one that it is alone."""
    slices = [(seed, truncation, start, min(ROWS, start + count)) for seed, truncation, start, count in crowd]
    got = loaded[kind].sample.run([sample_part(loaded[kind], *part) for part in slices])
    expected = np.concatenate([alone[kind, seed, truncation][start:stop] for seed, truncation, start, stop in slices])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, MAX_BATCH_ROWS - 1), max_size=6, unique=True), count=st.integers(1, MAX_BATCH_ROWS))
def test_a_logit_has_the_same_bits_however_images_are_cut_into_batches(
    loaded: dict[str, Loaded], kind: str, cuts: list[int], count: int
) -> None:
    """D's answer about an image is the same number to the last bit, in one large batch and in many small ones."""
    one = loaded[kind]
    channels, height, width = one.manifest.image.shape
    images = np.random.default_rng(3).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    payload = DiscriminatePayload(images, labels_of(one, count))
    edges = [0, *sorted(cut for cut in cuts if cut < count), count]
    whole = one.discriminate.run([BatchSlice(payload, 0, count)])
    cut = [one.discriminate.run([BatchSlice(payload, a, b)]) for a, b in pairwise(edges)]
    mixed = one.discriminate.run([BatchSlice(payload, a, b) for a, b in pairwise(edges)])
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(cut), whole)
    np.testing.assert_array_equal(mixed, whole)


def test_every_thread_of_an_engine_gives_a_row_the_same_bits(
    paper_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a thread for each processor, it makes no difference which of them computes a row, nor what the others do."""
    monkeypatch.setattr("service.engine.device.cpu_limit", lambda: 3)
    engine = Engine("cpu", exact=True)
    one = engine.load(paper_folder, {})
    images = one.sample.run([BatchSlice(SamplePayload(3, 0, None, 1.0), 0, 70)])
    payload = DiscriminatePayload(images, None)
    logits = one.discriminate.run([BatchSlice(payload, 0, 70)])

    async def story() -> None:
        rows = [(0, 1), (5, 8), (33, 46), (69, 70), (0, 70), (2, 66)]
        calls = [
            thread.run(runner.run, [BatchSlice(payload, start, stop)])
            for thread in engine.threads
            for start, stop in rows
            for runner, payload in ((one.sample, SamplePayload(3, 0, None, 1.0)), (one.discriminate, judged))
        ]
        results = iter(await asyncio.gather(*calls))
        for _ in engine.threads:
            for start, stop in rows:
                np.testing.assert_array_equal(next(results), images[start:stop])
                np.testing.assert_array_equal(next(results), logits[start:stop])

    judged = payload
    asyncio.run(story())
    assert len(engine.threads) == 3
    assert torch.get_num_threads() == 1  # each of them is one, and torch starts no others


def test_truncation_labels_and_seeds_make_a_difference(alone: dict[tuple[str, int, float], Rows]) -> None:
    """The comparisons above would hold for a net that ignores its input; this one doesn't."""
    for kind in KINDS:
        pictures = [alone[kind, seed, truncation] for seed in SEEDS for truncation in TRUNCATIONS]
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)
        assert len({row.tobytes() for row in pictures[0]}) == ROWS


def test_labels_reach_the_nets(loaded: dict[str, Loaded]) -> None:
    """The same latent with another label is another image, and the same image another logit."""
    one = loaded["cond"]
    made = [one.sample.run([BatchSlice(SamplePayload(1, 0, np.array([label]), 1.0), 0, 1)]) for label in range(3)]
    assert len({image.tobytes() for image in made}) == 3
    judged = [
        one.discriminate.run([BatchSlice(DiscriminatePayload(made[0], np.array([n])), 0, 1)])[0] for n in range(3)
    ]
    assert len({logit for logit, _ in judged}) == 3
    assert [label for _, label in judged] == [0, 1, 2]


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(1, 299), max_size=6, unique=True), data=st.data())
def test_the_class_head_names_an_image_alone_as_beside_others(
    loaded: dict[str, Loaded], cuts: list[int], data: st.DataObject
) -> None:
    """Label and logit have the same bits in any batch, given labels or named ones beside them, and are the head's."""
    one = loaded["cond"]
    images = np.random.default_rng(4).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    unknown = np.full(300, UNKNOWN_LABEL)
    named = one.discriminate.run([BatchSlice(DiscriminatePayload(images, unknown), 0, 300)])
    _, labels, scores = one.discriminator.judge(to_pixels(images[:REFERENCE_TILE]), torch.full((REFERENCE_TILE,), -1))
    np.testing.assert_array_equal(named[:REFERENCE_TILE, 1], labels.numpy())
    assert torch.equal(labels, scores.argmax(dim=1))
    assert set(named[:, 1]) == {0, 1, 2}
    given_too = data.draw(st.lists(st.booleans(), min_size=300, max_size=300))
    mixed = np.where(given_too, named[:, 1].astype(np.int64), unknown)  # to be given the head's own label is no change
    edges = [0, *sorted(cuts), 300]
    slices = [one.discriminate.run([BatchSlice(DiscriminatePayload(images, mixed), a, b)]) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(slices), named)


def test_runners_say_what_they_really_compute(loaded: dict[str, Loaded]) -> None:
    """Padding comes from the tiles that were proven, which hold the largest batch."""
    for one in loaded.values():
        for runner in (one.sample, one.discriminate):
            assert runner.padded(1) == runner.tiles.sizes[0]
            assert runner.padded(MAX_BATCH_ROWS) == MAX_BATCH_ROWS


@pytest.mark.parametrize(("most", "largest"), [(10**6, 4096), (2048, 2048), (600, 512)])
def test_an_engine_that_need_not_be_exact_ends_where_memory_does_too(most: int, largest: int) -> None:
    """Tiles that don't fit the device's memory are left out."""

    def net(rows: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    tiles = tiles_that_fit(net, torch.zeros(64, 1), None, TILE_SIZES)  # a GPU's
    assert tiles.sizes[0] == 1
    assert tiles.sizes[-1] == largest


def test_a_cpus_thread_runs_a_single_row_first(loaded: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """That is all that it needs before its first request."""
    run, rows = Tiles.__call__, list[int]()

    def note(tiles: Tiles, given: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(len(given))
        return run(tiles, given, labels)

    monkeypatch.setattr(Tiles, "__call__", note)
    loaded["cond"].run_first_batches()
    assert rows == [1, 1]


@pytest.mark.slow
def test_nothing_of_a_gpu_is_imported_where_there_is_none() -> None:
    """An error in that code can't break a service on a CPU."""
    program = """
import sys
from service.app import create_app
from service.settings import Settings
create_app(Settings(device="cpu"))
print(*[name for name in sys.modules if name.startswith("service.engine.gpu")])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# Loading


def test_two_engines_of_one_kind_have_the_same_fingerprints(
    loaded: dict[str, Loaded], tiny_bundles: dict[str, Bundle], engine: Engine
) -> None:
    """A replica on the same kind of device says that it makes the same bytes; other bundles say something else."""
    other = Engine("cpu", exact=True)
    for kind in ("tiny", "cond"):
        again = other.load(tiny_bundles[kind].folder, {})
        assert again.fingerprint == loaded[kind].fingerprint
        assert again.version == loaded[kind].version
    assert len({one.fingerprint for one in loaded.values()}) == len(loaded)
    assert engine.memory() == {}


def test_what_is_loaded_already_is_not_warmed_again(
    loaded: dict[str, Loaded], tiny_bundles: dict[str, Bundle], engine: Engine
) -> None:
    """A folder that still holds the loaded version gives the very same object back."""
    assert engine.load(tiny_bundles["tiny"].folder, loaded) is loaded["tiny"]
    assert engine.load(tiny_bundles["tiny"].folder, {"tiny": loaded["rgb"]}) is not loaded["tiny"]


def test_what_is_proven_of_a_net_is_not_proven_again_for_other_weights(
    make_tiny: Callable[..., Bundle], tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of a bundle runs in the same sizes of tile, and gives the images that its nets give."""
    engine, image = Engine("cpu", exact=True), tiny_bundles["tiny"].manifest.image
    first = engine.load(tiny_bundles["tiny"].folder, {})
    other = make_tiny(tmp_path / "tiny", image, None, None, 1)

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("service.engine.engine.Tiles.proven", fail)
    second = engine.load(other.folder, {})
    assert second.sample.tiles.sizes == first.sample.tiles.sizes
    drawn = second.sample.run([BatchSlice(SamplePayload(7, 0, None, 1.0), 0, 5)])
    np.testing.assert_array_equal(drawn, other.draw(5, seed=7))


def test_without_exactness_every_size_may_run(tiny_bundles: dict[str, Bundle], loaded: dict[str, Loaded]) -> None:
    """GAN_EXACT off: single rows are not padded, and images differ by a grey level at most."""
    free = Engine("cpu", exact=False).load(tiny_bundles["cond"].folder, {})
    assert free.sample.padded(1) == free.discriminate.padded(1) == 1
    for count in (1, 2, 3, ROWS):
        part = sample_part(loaded["cond"], 0, 1.0, 0, count)
        ours, exact = (one.sample.run([part]).astype(int) for one in (free, loaded["cond"]))
        assert np.abs(ours - exact).max() <= 1


@pytest.mark.parametrize("kind", ["cond", "paper"])
def test_bfloat16_says_how_far_it_is_off_and_keeps_its_own_bits(
    loaded: dict[str, Loaded], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The log's average holds for other seeds too; rows are the same in any batch, under another fingerprint."""
    caplog.set_level("INFO", "service.engine")
    exact = loaded[kind]
    half = Engine("cpu", exact=True, precision="bfloat16").load(exact.folder, {})
    said = re.search(
        rf"{kind} in bfloat16: 64 images differ from float32's by ([\d.]+) grey levels on average", caplog.text
    )
    assert said
    assert half.fingerprint != exact.fingerprint
    whole, plain = (one.sample.run([sample_part(exact, 7, 1.0, 0, ROWS)]) for one in (half, exact))
    assert np.abs(whole.astype(int) - plain).mean() < 2 * float(said[1]) + 0.5
    for row in range(ROWS):
        np.testing.assert_array_equal(half.sample.run([sample_part(exact, 7, 1.0, row, row + 1)])[0], whole[row])


@pytest.mark.parametrize(("half_s", "warnings"), [(2.5, ["2.5 times as long"]), (1.0, []), (0.4, [])])
def test_bfloat16_is_warned_of_where_single_images_take_longer(
    loaded: dict[str, Loaded],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    half_s: float,
    warnings: list[str],
) -> None:
    """It may be chosen for speed, and a lone client would wait longer; where it doesn't, nothing is said."""
    clock = SimpleNamespace(now=0.0)

    def timed(net: Generator, *, half: bool = False) -> FastGenerator:
        """G whose images each take a second of the clock, or `half_s` in bfloat16."""
        fast = fast_generator(net, half=half)
        compute = fast.levels

        def levels(latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            clock.now += len(latents) * (half_s if half else 1.0)
            return compute(latents, labels)

        monkeypatch.setattr(fast, "levels", levels)
        return fast

    monkeypatch.setattr("service.engine.reference.fast_generator", timed)
    monkeypatch.setattr("service.engine.reference.time", SimpleNamespace(thread_time=lambda: clock.now))
    Engine("cpu", exact=True, precision="bfloat16").load(loaded["cond"].folder, {})
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [f"cond in bfloat16: a single image takes {words} as in float32" for words in warnings]


def test_float32_is_float32_on_every_device() -> None:
    """torch's own choice for a GPU's convolutions is tf32."""
    switches: tuple[Any, ...] = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        Engine("cpu", exact=True)
        assert [switch.allow_tf32 for switch in switches] == [False, False]
    finally:
        for switch, had in zip(switches, before, strict=True):
            switch.allow_tf32 = had


def test_a_corrupt_bundle_is_refused_and_harms_nothing(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], loaded: dict[str, Loaded], engine: Engine
) -> None:
    """One flipped bit in the weights: an error that names the file, and what is loaded works as before."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in tiny_bundles["tiny"].folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = bytearray((folder / GENERATOR).read_bytes())
    content[-1] ^= 1
    (folder / GENERATOR).write_bytes(content)
    part = sample_part(loaded["tiny"], 0, 1.0, 0, 5)
    before = loaded["tiny"].sample.run([part])
    with pytest.raises(BundleError, match=GENERATOR):
        engine.load(folder, loaded)
    np.testing.assert_array_equal(loaded["tiny"].sample.run([part]), before)


@pytest.mark.parametrize("guilty", ["generator", "discriminator"])
def test_a_bundle_whose_nets_give_no_numbers_is_refused(tmp_path: Path, engine: Engine, guilty: str) -> None:
    """Finite weights so large that sums overflow verify, and are found out before a request meets them."""
    preset = PRESETS["mlp-paper"]
    image, latent = ImageSpec(channels=1, height=4, width=4), LatentSpec(dim=4, distribution="normal")
    network = preset.network.model_copy(
        update={"generator": preset.network.generator.model_copy(update={"hidden": (8, 8)})}
    )
    rng = torch.Generator().manual_seed(0)
    states = [
        {
            name: torch.randn(tensor.shape, generator=rng) * (1e30 if which == guilty else 0.1)
            for name, tensor in net.state_dict().items()
        }
        for which, net in zip(("generator", "discriminator"), build_networks(network, image, latent), strict=True)
    ]
    folder = written(tmp_path / "large", network, image, latent, states)
    with pytest.raises(BundleError, match=f"its {guilty} gives NaN or Inf"):
        engine.load(folder, {})


@pytest.mark.parametrize("name", ["cuda:99", "cuda:1000000"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    """The error says which device was asked for."""
    with pytest.raises(ValueError, match=f"no device {name} here"):
        Engine(name, exact=True)


# Errors of the device


def raising(error: Exception) -> Callable[..., torch.Tensor]:
    def run(*_: Any) -> torch.Tensor:
        raise error

    return run


def absurd(*_: Any) -> torch.Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        pytest.param(absurd, OutOfMemory, id="more than this machine has"),
        pytest.param(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), OutOfMemory, id="cuda"),
        pytest.param(raising(RuntimeError("CUDA error: out of memory")), OutOfMemory, id="cuda runtime"),
        pytest.param(raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")), OutOfMemory, id="cublas"),
        pytest.param(raising(MemoryError("Unable to allocate 8.00 EiB")), OutOfMemory, id="numpy"),
        pytest.param(
            raising(RuntimeError("CUDA error: device-side assert triggered\nmore")), DeviceFailed, id="assert"
        ),
        pytest.param(raising(RuntimeError("CUDA driver error: unknown error")), DeviceFailed, id="driver"),
        pytest.param(
            raising(RuntimeError("CUDA error: operation not permitted when stream is capturing")),
            RuntimeError,
            id="while another thread records",
        ),
        pytest.param(raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), RuntimeError, id="shapes"),
        pytest.param(raising(IndexError("out of range")), IndexError, id="any other"),
    ],
)
def test_a_runner_says_what_kind_of_failure_it_was(run: Callable[..., Any], expected: type[Exception]) -> None:
    """Short of memory, a lost device, or the rows' own fault: the batcher treats each in its own way."""
    runner = SampleRunner("toy", "0123456789ab", Tiles(run, [4]), Device(), draw=lambda _: np.zeros((1, 4), np.float32))
    with pytest.raises(expected) as failure:
        runner.run([BatchSlice(SamplePayload(0, 0, None, 1.0), 0, 1)])
    assert failure.type is expected


@pytest.mark.parametrize(
    ("workers", "processors", "instances"), [(1, None, 8), (1, 2, 2), (1, 99, 8), (2, 6, 3), (2, 1, 1), (4, None, 2)]
)
def test_a_cpu_has_an_instance_for_each_processor_that_it_may_use(
    monkeypatch: pytest.MonkeyPatch, workers: int, processors: int | None, instances: int
) -> None:
    """Those of the machine, or fewer where the setting says so, divided among the workers."""
    monkeypatch.setattr("service.engine.device.cpu_limit", lambda: 8)
    assert Device(workers=workers, processors=processors).instances == instances
