"""What only a GPU needs, imitated by a CPU: its graphs and noise give what the plain way gives, or are not used."""

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.bundle import Bundle
from models.inference.noise import draw_latents
from models.inference.tiles import Tiles
from service.engine.batching.batch import BatchSlice
from service.engine.device import Device
from service.engine.engine import Engine
from service.engine.gpu.cuda_graphs import GraphedNet, Replay, Work, graphed
from service.engine.gpu.device import GPU
from service.engine.gpu.noise import image_keys
from service.engine.payloads import UNKNOWN_LABEL, DiscriminatePayload, SamplePayload

SIZES = (4, 8, 32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_on_an_engines_thread() -> Iterator[None]:
    """Where nothing needs gradients."""
    with torch.inference_mode():
        yield


class Imitation(GPU):
    """A GPU's ways on the CPU, but for what torch refuses there."""

    def __init__(self, *, exact: bool, cuda_graphs: bool) -> None:
        super().__init__(CPU, exact=exact, precision="float32", cuda_graphs=cuda_graphs)

    begin_thread = Device.begin_thread
    send = Device.send
    fetch = Device.fetch


def imitated(*, exact: bool, cuda_graphs: bool) -> Engine:
    engine = Engine("cpu", exact=exact)
    engine.device = Imitation(exact=exact, cuda_graphs=cuda_graphs)
    return engine


class CpuRecorder:
    """What a CUDA graph does, done by a CPU: the same work again, on the same memory."""

    works = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.recorded: list[int] = []
        self.turns = 0
        self.in_turn = False
        self.is_released = False

    def record(self, work: Work) -> tuple[Tensor, Replay]:  # noqa: D102
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


def graphs(recorder: CpuRecorder, *, has_labels: bool = False) -> GraphedNet:
    return GraphedNet(net, recorder, torch.randn(8, 3), torch.arange(8) if has_labels else None, SIZES)


@given(counts=st.lists(st.integers(1, 100), min_size=1, max_size=6), has_labels=st.booleans())
def test_graphs_give_what_the_net_gives(counts: list[int], *, has_labels: bool) -> None:
    """Batches of many sizes, tile after tile of one graph: no answer is overwritten by a later one."""
    tiles = Tiles(graphs(CpuRecorder(CPU), has_labels=has_labels), SIZES)
    asked = [(torch.randn(n, 3), torch.arange(n) if has_labels else None) for n in counts]
    answers = [tiles(*rows) for rows in asked]
    for rows, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer, net(*rows))


def test_graphs_are_made_at_once_and_never_later() -> None:
    """The largest first; a size that has none is computed without."""
    recorder = CpuRecorder(CPU)
    replayed = graphs(recorder)
    assert recorder.recorded == [32, 8, 4]
    for size in (4, 5, 8, 32, 4):
        rows = torch.randn(size, 3)
        assert torch.equal(replayed(rows), net(rows, None))
    assert recorder.recorded == [32, 8, 4]


def test_threads_take_turns() -> None:
    """A graph has one place for rows: each thread's answer is for its own, and the GPU is told of each turn."""
    recorder = CpuRecorder(CPU)
    replayed = graphs(recorder, has_labels=True)
    before, rounds = recorder.turns, 300
    answers: dict[int, list[Tensor]] = {n: [] for n in range(3)}

    @torch.inference_mode()
    def run(n: int) -> None:
        for _ in range(rounds):
            answers[n].append(replayed(torch.full((8, 3), float(n)), torch.full((8,), n)))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=run, args=(n,)) for n in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert recorder.turns == before + len(answers) * rounds
    for n, given_back in answers.items():
        assert all((answer == 3 * n).all() for answer in given_back)


def test_a_net_that_goes_lets_others_record() -> None:
    """A bundle that is replaced gives its stream back, once its graphs are gone."""
    recorder = Watched(CPU)
    replayed = graphs(recorder)
    assert (len(recorder.alive), recorder.is_released) == (len(SIZES), False)
    del replayed
    assert (len(recorder.alive), recorder.is_released) == (0, True)
    assert recorder.alive_at_release == 0


class Watched(CpuRecorder):
    """Knows which of its graphs are still there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.alive_at_release: int | None = None

    def record(self, work: Work) -> tuple[Tensor, Replay]:  # noqa: D102
        out, replay = super().record(work)
        self.alive.add(replay)
        return out, replay

    def release(self) -> None:  # noqa: D102
        super().release()
        self.alive_at_release = len(self.alive)


class Failing(CpuRecorder):
    """Can't record the third size."""

    def record(self, work: Work) -> tuple[Tensor, Replay]:  # noqa: D102
        if len(self.recorded) == 2:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return super().record(work)


class WrongAtFirst(CpuRecorder):
    """Plays something else than it recorded."""

    def record(self, work: Work) -> tuple[Tensor, Replay]:  # noqa: D102
        out, replay = super().record(work)
        return out, lambda: (replay(), out.add_(1))


class Deaf(CpuRecorder):
    """Plays what it recorded, whatever the input is by then."""

    def record(self, work: Work) -> tuple[Tensor, Replay]:  # noqa: D102
        out, _ = super().record(work)
        return out, lambda: None


@pytest.mark.parametrize(
    ("recorder", "sizes", "reason"),
    [
        (Failing, SIZES, "not permitted"),
        (WrongAtFirst, SIZES, "a graph of 32 rows"),
        (Deaf, SIZES, "a graph of 32 rows"),
        (Deaf, (1,), "a graph of 1 rows"),
    ],
)
def test_where_one_graph_fails_there_are_none(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recorder: type[CpuRecorder],
    sizes: tuple[int, ...],
    reason: str,
) -> None:
    """The net runs as it is, the log says why, and no other net of this process is recorded: it might fail worse."""
    monkeypatch.setattr("service.engine.gpu.cuda_graphs.GraphRecorder", recorder)
    monkeypatch.setattr(recorder, "works", True)
    rows = torch.randn(8, 3)
    assert graphed(net, rows, None, sizes) is net
    assert "nets are launched kernel by kernel until a restart: " in caplog.text
    assert reason in caplog.text
    caplog.clear()
    assert graphed(net, rows, None, sizes) is net
    assert not caplog.text


def test_where_no_stream_is_left_only_that_net_has_no_graphs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Others that come when a stream is free again are recorded."""

    class Crowded(CpuRecorder):
        is_full = True

        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            if self.is_full:
                raise RuntimeError("no stream is left to record on")

    monkeypatch.setattr("service.engine.gpu.cuda_graphs.GraphRecorder", Crowded)
    rows = torch.randn(8, 3)
    assert graphed(net, rows, None, SIZES) is net
    assert "no stream is left" in caplog.text
    Crowded.is_full = False
    assert isinstance(graphed(net, rows, None, SIZES), GraphedNet)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["tiny", "rgb", "cond"])
def test_runners_with_graphs_give_what_runners_without_give(
    monkeypatch: pytest.MonkeyPatch, tiny_bundles: dict[str, Bundle], kind: str, *, exact: bool
) -> None:
    """Images and verdicts of every size of tile, with labels and unknown ones, bit for bit."""
    monkeypatch.setattr("service.engine.gpu.cuda_graphs.GraphRecorder", CpuRecorder)
    engines = Engine("cpu", exact=exact), imitated(exact=exact, cuda_graphs=True)
    # On the CPU's own noise, so that all bits can be compared.
    engines[1].device.draws_noise = False  # type: ignore[attr-defined]
    one, other = (engine.load(tiny_bundles[kind].folder, {}) for engine in engines)
    assert isinstance(other.discriminate.tiles.run, GraphedNet)
    assert one.sample.tiles.sizes == other.sample.tiles.sizes
    names = one.manifest.labels
    for count in (1, 2, 5, 70, 300):
        labels = None if names is None else np.arange(count) % len(names)
        asked = None if labels is None else np.where(np.arange(count) % 2, labels, UNKNOWN_LABEL)
        wanted = [BatchSlice(SamplePayload(3, 0, labels, 1.0), 0, count)]
        images = one.sample.run(wanted)
        np.testing.assert_array_equal(images, other.sample.run(wanted))
        sent = [BatchSlice(DiscriminatePayload(images, asked), 0, count)]
        np.testing.assert_array_equal(one.discriminate.run(sent), other.discriminate.run(sent))


@pytest.mark.parametrize("has_graphs", [True, False])
@pytest.mark.parametrize("kind", ["tiny", "rgb", "cond"])
def test_an_engine_may_draw_its_own_noise(
    monkeypatch: pytest.MonkeyPatch, tiny_bundles: dict[str, Bundle], kind: str, *, has_graphs: bool
) -> None:
    """As a GPU does where it need not agree with CPUs: whatever is asked, images are a grey level apart at most."""
    monkeypatch.setattr("service.engine.gpu.cuda_graphs.GraphRecorder", CpuRecorder)
    engines = Engine("cpu", exact=True), imitated(exact=False, cuda_graphs=has_graphs)
    one, other = (engine.load(tiny_bundles[kind].folder, {}) for engine in engines)
    assert other.sample.draw is image_keys
    names = one.manifest.labels
    for count in (1, 3, 20, 100):
        labels = None if names is None else np.arange(count + 7) % len(names)
        slices = [
            BatchSlice(SamplePayload(seed, first_index, labels, truncation), start, start + count)
            for seed in (0, 2**53 - 1)
            for first_index in (0, 2**53 - 200)
            for truncation in (1.0, 0.7)
            for start in (0, 7)
        ]
        ours, theirs = (runner.run(slices).astype(int) for runner in (other.sample, one.sample))
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1
        latents = draw_latents(one.manifest.latent, 3, 0, count + 7)
        given = [BatchSlice(SamplePayload(0, 0, labels, 0.7, latents), 7, 7 + count), *slices[:2]]
        ours, theirs = (runner.run(given).astype(int) for runner in (other.sample, one.sample))
        assert np.abs(ours - theirs).max() <= 1


def test_where_all_graphs_are_right_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows that they were not tried with too."""
    monkeypatch.setattr("service.engine.gpu.cuda_graphs.GraphRecorder", CpuRecorder)
    rows = torch.randn(8, 3)
    replayed = graphed(net, rows, None, SIZES)
    assert isinstance(replayed, GraphedNet)
    assert torch.equal(replayed(rows[:4] + 1, None), net(rows[:4] + 1, None))


def test_a_device_that_draws_other_noise_leaves_it_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    """Its libraries' functions are tried before they are relied on, and the log says so."""
    monkeypatch.setattr(
        "models.inference.noise.Noise.forward", lambda noise, seeds, _: torch.zeros(len(seeds), noise.latent.dim)
    )
    folder = tiny_bundles["tiny"].folder
    one = imitated(exact=False, cuda_graphs=False).load(folder, {})
    assert one.sample.draw is not image_keys
    assert "noise is drawn on the CPU: cpu draws another" in caplog.text
    exact = Engine("cpu", exact=True).load(folder, {})
    slices = [BatchSlice(SamplePayload(0, 0, None, 1.0), 0, 12)]
    ours, theirs = (loaded.sample.run(slices).astype(int) for loaded in (one, exact))
    assert np.abs(ours - theirs).max() <= 1


def test_a_gpus_thread_runs_every_size_first(tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """It plans convolutions for each thread."""
    one = imitated(exact=True, cuda_graphs=False).load(tiny_bundles["cond"].folder, {})
    run, rows = Tiles.__call__, list[int]()

    def note(tiles: Tiles, given: Tensor, labels: Tensor | None = None) -> Tensor:
        rows.append(len(given))
        return run(tiles, given, labels)

    monkeypatch.setattr(Tiles, "__call__", note)
    one.run_first_batches()
    sizes = sorted({*one.sample.tiles.sizes, *one.discriminate.tiles.sizes})
    assert rows == [size for size in sizes for _ in range(2)]
