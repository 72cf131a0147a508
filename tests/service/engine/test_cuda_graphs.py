"""Tapes of a net: what they give is the net's, whatever was played before, on buffers that stay; or there are none."""

import asyncio
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.bundle import Bundle, write_bundle
from models.inference.tiles import Tiles
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec
from service.engine.batcher import Part
from service.engine.cuda_graphs import GraphRecorder, Play, Replayed, Work, replayed
from service.engine.engine import (
    UNKNOWN_LABEL,
    DiscriminatePayload,
    Engine,
    Precision,
    SamplePayload,
)

SIZES = (4, 8, 32)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class CpuRecorder:
    """What a CUDA graph does, done by a CPU: the same work again, on the same memory."""

    works = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorded: list[int] = []
        self.turns = 0
        self.in_turn = False
        self.is_released = False

    def record(self, work: Work) -> tuple[Tensor, Play]:  # noqa: D102
        out = work()
        self.recorded.append(len(out))
        return out, lambda: out.copy_(work())

    @contextmanager
    def turn(self) -> Iterator[None]:  # noqa: D102
        assert not self.in_turn
        self.in_turn = True
        yield
        self.in_turn, self.turns = False, self.turns + 1

    def release(self) -> None:  # noqa: D102
        self.is_released = True


def net(rows: Tensor, labels: Tensor | None) -> Tensor:
    return 2 * rows if labels is None else 2 * rows + labels[:, None]


def tapes(recorder: CpuRecorder, *, has_labels: bool = False) -> Replayed:
    return Replayed(net, recorder, torch.randn(8, 3), torch.arange(8) if has_labels else None, SIZES)


@given(counts=st.lists(st.integers(1, 100), min_size=1, max_size=6), has_labels=st.booleans())
def test_tapes_give_what_the_net_gives(counts: list[int], *, has_labels: bool) -> None:
    """Batches of many sizes, tile after tile of one tape: no answer is overwritten by a later one."""
    tiles = Tiles(tapes(CpuRecorder(CPU), has_labels=has_labels), SIZES)
    asked = [(torch.randn(n, 3), torch.arange(n) if has_labels else None) for n in counts]
    answers = [tiles(*rows) for rows in asked]
    for rows, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer, net(*rows))


def test_tapes_are_made_at_once_and_never_later() -> None:
    """The largest first; a size that has none is computed without."""
    recorder = CpuRecorder(CPU)
    played = tapes(recorder)
    assert recorder.recorded == [32, 8, 4]
    for size in (4, 5, 8, 32, 4):
        rows = torch.randn(size, 3)
        assert torch.equal(played(rows), net(rows, None))
    assert recorder.recorded == [32, 8, 4]


def test_threads_take_turns() -> None:
    """A tape has one place for rows: each thread's answer is for its own, and the GPU is told of each turn."""
    recorder = CpuRecorder(CPU)
    played = tapes(recorder, has_labels=True)
    before, rounds = recorder.turns, 300
    answers: dict[int, list[Tensor]] = {n: [] for n in range(3)}

    def play(n: int) -> None:
        for _ in range(rounds):
            answers[n].append(played(torch.full((8, 3), float(n)), torch.full((8,), n)))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=play, args=(n,)) for n in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert recorder.turns == before + len(answers) * rounds
    for n, given_back in answers.items():
        assert all((answer == 3 * n).all() for answer in given_back)


def test_a_net_that_goes_lets_others_record() -> None:
    """A bundle that is replaced gives its stream back, once its tapes are gone."""
    recorder = Watched(CPU)
    played = tapes(recorder)
    assert (len(recorder.alive), recorder.is_released) == (len(SIZES), False)
    del played
    assert (len(recorder.alive), recorder.is_released) == (0, True)
    assert recorder.alive_at_release == 0


class Watched(CpuRecorder):
    """Knows which of its tapes are still there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.alive_at_release: int | None = None

    def record(self, work: Work) -> tuple[Tensor, Play]:  # noqa: D102
        out, play = super().record(work)
        self.alive.add(play)
        return out, play

    def release(self) -> None:  # noqa: D102
        super().release()
        self.alive_at_release = len(self.alive)


class Failing(CpuRecorder):
    """Can't record the third size."""

    def record(self, work: Work) -> tuple[Tensor, Play]:  # noqa: D102
        if len(self.recorded) == 2:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return super().record(work)


class WrongAtFirst(CpuRecorder):
    """Plays something else than it recorded."""

    def record(self, work: Work) -> tuple[Tensor, Play]:  # noqa: D102
        out, play = super().record(work)
        return out, lambda: (play(), out.add_(1))


class Deaf(CpuRecorder):
    """Plays what it recorded, whatever the input is by then."""

    def record(self, work: Work) -> tuple[Tensor, Play]:  # noqa: D102
        out, _ = super().record(work)
        return out, lambda: None


@pytest.mark.parametrize(
    ("recorder", "sizes", "reason"),
    [
        (Failing, SIZES, "not permitted"),
        (WrongAtFirst, SIZES, "a tape of 32 rows"),
        (Deaf, SIZES, "a tape of 32 rows"),
        (Deaf, (1,), "a tape of 1 rows"),
    ],
)
def test_where_one_tape_fails_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recorder: type[CpuRecorder],
    sizes: tuple[int, ...],
    reason: str,
) -> None:
    """The net runs as it is, the log says why, and no other net of this process is recorded: it might fail worse."""
    monkeypatch.setattr("service.engine.cuda_graphs.GraphRecorder", recorder)
    monkeypatch.setattr(recorder, "works", True)
    rows = torch.randn(8, 3)
    assert replayed(net, rows, None, sizes) is net
    assert "nets are launched kernel by kernel until a restart: " in caplog.text
    assert reason in caplog.text
    caplog.clear()
    assert replayed(net, rows, None, sizes) is net
    assert not caplog.text


def test_where_no_stream_is_left_only_that_net_has_no_tapes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others that come when a stream is free again are recorded."""

    class Crowded(CpuRecorder):
        is_full = True

        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            if self.is_full:
                raise RuntimeError("no stream is left to record on")

    monkeypatch.setattr("service.engine.cuda_graphs.GraphRecorder", Crowded)
    rows = torch.randn(8, 3)
    assert replayed(net, rows, None, SIZES) is net
    assert "no stream is left" in caplog.text
    Crowded.is_full = False
    assert isinstance(replayed(net, rows, None, SIZES), Replayed)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["tiny", "rgb", "cond"])
def test_lanes_with_tapes_give_what_lanes_without_give(
    monkeypatch: pytest.MonkeyPatch, tiny_bundles: dict[str, Bundle], kind: str, *, exact: bool
) -> None:
    """Images and verdicts of every size of tile, with labels and unknown ones, bit for bit."""
    monkeypatch.setattr("service.engine.cuda_graphs.GraphRecorder", CpuRecorder)
    plain, taped = (Engine("cpu", exact=exact) for _ in range(2))
    taped.has_graphs = True
    one, other = (engine.load(tiny_bundles[kind].folder, {}) for engine in (plain, taped))
    assert isinstance(other.discriminate.tiles.run, Replayed)
    assert one.sample.tiles.sizes == other.sample.tiles.sizes
    names = one.manifest.labels
    for count in (1, 2, 5, 70, 300):
        labels = None if names is None else np.arange(count) % len(names)
        asked = None if labels is None else np.where(np.arange(count) % 2, labels, UNKNOWN_LABEL)
        wanted = [Part(SamplePayload(3, 0, labels, 1.0), 0, count)]
        images = one.sample.run(wanted)
        np.testing.assert_array_equal(images, other.sample.run(wanted))
        sent = [Part(DiscriminatePayload(images, asked), 0, count)]
        np.testing.assert_array_equal(one.discriminate.run(sent), other.discriminate.run(sent))


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("kind", ["tiny", "rgb", "cond"])
def test_an_engine_may_draw_its_own_noise(
    monkeypatch: pytest.MonkeyPatch, tiny_bundles: dict[str, Bundle], kind: str, *, has_graphs: bool
) -> None:
    """As a GPU does where it need not agree with CPUs: whatever is asked, images are a grey level apart at most."""
    monkeypatch.setattr("service.engine.cuda_graphs.GraphRecorder", CpuRecorder)
    engine = Engine("cpu", exact=False)
    engine.draws_noise, engine.has_graphs = True, has_graphs
    one, other = (made.load(tiny_bundles[kind].folder, {}) for made in (Engine("cpu", exact=True), engine))
    assert other.sample.draws_there
    names = one.manifest.labels
    for count in (1, 3, 20, 100):
        labels = None if names is None else np.arange(count + 7) % len(names)
        parts = [
            Part(SamplePayload(seed, first_index, labels, truncation), start, start + count)
            for seed in (0, 2**53 - 1)
            for first_index in (0, 2**53 - 200)
            for truncation in (1.0, 0.7)
            for start in (0, 7)
        ]
        ours, theirs = (lane.run(parts).astype(int) for lane in (other.sample, one.sample))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1


def test_where_all_tapes_are_right_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows that they were not tried with too."""
    monkeypatch.setattr("service.engine.cuda_graphs.GraphRecorder", CpuRecorder)
    rows = torch.randn(8, 3)
    played = replayed(net, rows, None, SIZES)
    assert isinstance(played, Replayed)
    assert torch.equal(played(rows[:4] + 1, None), net(rows[:4] + 1, None))


@pytest.fixture(params=["tiny", "rgb", "cond", "mnist", "conv rgb"])
def folder(
    request: pytest.FixtureRequest, tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bundle of each kind, convolutions among them, in a process in which nothing has failed to be recorded."""
    monkeypatch.setattr(GraphRecorder, "works", True)
    if request.param == "mnist":
        return Path(__file__).parents[3] / "bundles" / "mnist"
    if request.param != "conv rgb":
        return tiny_bundles[request.param].folder
    options, image = PRESETS["conv-ns"], ImageSpec(channels=3, height=32, width=32)
    first, second = (
        {name: 0.05 * torch.randn(tensor.shape) for name, tensor in net.state_dict().items()}
        for net in build_networks(options.network, image, options.latent)
    )
    facts = dict.fromkeys(("labels", "calibration")) | {"training": {}, "evaluation": {}}
    facts |= {"name": "conv", "created": "2026-01-02T03:04:05Z", "image": image, "latent": options.latent}
    write_bundle(tmp_path / "conv", facts | {"network": options.network}, first, second, np.zeros((4, 4, 3), np.uint8))
    return tmp_path / "conv"


def labels_of(one: Bundle, count: int) -> Any:
    names = one.manifest.labels
    return None if names is None else np.arange(count) % len(names)


@needs_gpu
def test_a_gpu_gives_rows_the_same_bits_in_any_batch_and_its_memory_stays(folder: Path) -> None:
    """Alone and in the largest batch; a thousand batches later as much memory is reserved as before."""
    engine = Engine("cuda", exact=True, cuda_graphs=True)
    one = engine.load(folder, {})
    assert isinstance(one.sample.tiles.run.generator, Replayed)  # type: ignore[attr-defined]
    assert isinstance(one.discriminate.tiles.run, Replayed)
    most = one.sample.most_rows
    labels = labels_of(one, most)
    images = SamplePayload(1, 0, labels, 1.0)
    whole = one.sample.run([Part(images, 0, most)])
    judged = one.discriminate.run([Part(DiscriminatePayload(whole, labels), 0, most)])
    before = engine.memory()["reserved"]
    for n in range(1000):
        row = n * most // 1000
        np.testing.assert_array_equal(one.sample.run([Part(images, row, row + 1)])[0], whole[row])
        alone = one.discriminate.run([Part(DiscriminatePayload(whole, labels), row, row + 1)])
        np.testing.assert_array_equal(alone[0], judged[row])
    assert engine.memory()["reserved"] == before


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpus_two_threads_do_not_disturb_each_other(folder: Path, *, cuda_graphs: bool) -> None:
    """Batches of both at once, each on a stream of its own: every image has the bits that it has alone."""
    engine = Engine("cuda", exact=True, cuda_graphs=cuda_graphs)
    one = engine.load(folder, {})
    labels = labels_of(one, 5000)
    payload = SamplePayload(1, 0, labels, 1.0)
    whole = one.sample.run([Part(payload, 0, 5000)])

    async def story() -> None:
        parts = [
            Part(payload, start, start + rows) for rows in (1, 5, 64, 300, 700, 4096) for start in range(0, 900, 9)
        ]
        runs = [engine.threads[n % 2].run(one.sample.run, [part]) for n, part in enumerate(parts)]
        for part, images in zip(parts, await asyncio.gather(*runs), strict=True):
            np.testing.assert_array_equal(images, whole[part.start : part.stop])

    asyncio.run(story())
    for thread in engine.threads:
        thread.stop()


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpus_own_noise_is_the_cpus(folder: Path, *, cuda_graphs: bool) -> None:
    """But for last bits, which a grey level may show."""
    free = Engine("cuda", exact=False, cuda_graphs=cuda_graphs).load(folder, {})
    exact = Engine("cpu", exact=True).load(folder, {})
    assert free.sample.draws_there
    labels = labels_of(exact, 300)
    part = Part(SamplePayload(2**53 - 1, 5, labels, 0.7), 0, 300)
    ours, theirs = (one.sample.run([part]).astype(int) for one in (free, exact))
    assert np.abs(ours - theirs).max() <= 1


@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_of_a_gpu_say_how_far_they_are_off(
    tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture, precision: Precision
) -> None:
    """As on a CPU."""
    caplog.set_level("INFO")
    Engine("cuda", exact=True, precision=precision).load(tiny_bundles["cond"].folder, {})
    assert f"cond in {precision}: 64 images differ from float32's by" in caplog.text
