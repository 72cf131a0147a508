"""A net on a GPU as one launch for each size of tile: a CUDA graph, replayed on buffers that stay where they are.

Launching the few kernels of a small net one by one takes the processor longer than the GPU takes to run them. A CUDA
graph records them once, for batches of one size, and launches them in a single call, whose input and output are always
the same memory. So inputs are copied in and outputs copied out, in order, on the caller's stream. Threads take turns,
and the stream of each turn waits for the last one's.

Graphs are recorded when a bundle is warmed and never later, and used only if every one can be recorded and gives the
net's bits: a recording that fails may leave torch's allocator in a state in which the next one fails worse.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, NamedTuple, Protocol

import torch

log = logging.getLogger(__name__)

Run = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Work = Callable[[], torch.Tensor]  # launches kernels that read and write fixed memory; returns where they write
Replay = Callable[[], object]  # launches them again
WARMING_RUNS = 3  # in which libraries choose their kernels and allocate workspace, which no graph may hold


class Recorder(Protocol):
    """Records the graphs of one net."""

    def record(self, work: Work) -> tuple[torch.Tensor, Replay]:
        """Run work once; its output, and how to run it again."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Order what is launched inside after the last turn. One thread at a time."""
        ...

    def release(self) -> None:
        """The graphs are gone."""
        ...


class _Graph(NamedTuple):
    rows: torch.Tensor
    labels: torch.Tensor | None
    out: torch.Tensor
    replay: Replay


class GraphedNet:
    """`run` as graphs for these sizes of batch, and as it is for all others.

    Args:
        run: (n, *row) tensor and (n,) labels or None → (n, *out) tensor, on one device.
        recorder: Records the graphs.
        example, labels: Some rows for it.
        sizes: Of batches that get a graph.

    Raises:
        RuntimeError: A graph could not be recorded, or gave other bits than `run`.
    """

    def __init__(
        self,
        run: Run,
        recorder: Recorder,
        example: torch.Tensor,
        labels: torch.Tensor | None,
        sizes: Sequence[int],
    ) -> None:
        self._run = run
        self._recorder = recorder
        self._graphs: dict[int, _Graph] = {}
        self._turn = threading.Lock()
        for size in sorted(sizes, reverse=True):  # so that the smaller find room in the larger ones' memory
            self._add(size, example, labels)

    def __call__(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As `run`, in memory of its own."""
        graph = self._graphs.get(len(rows))
        if graph is None or (graph.labels is None) != (labels is None):
            return self._run(rows, labels)
        with self._turn, self._recorder.turn():
            graph.rows.copy_(rows)
            if graph.labels is not None and labels is not None:
                graph.labels.copy_(labels)
            graph.replay()
            return graph.out.clone()

    def __del__(self) -> None:
        self._graphs.clear()  # before others may record where these were recorded
        self._recorder.release()

    def _add(self, size: int, example: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Record a graph, and replay it with the rows that it was recorded with and with others."""
        for shift in (0, 1):
            place = (torch.arange(size, device=example.device) + shift) % len(example)
            rows, given = example[place], None if labels is None else labels[place]
            if shift == 0:
                self._graphs[size] = self._record(rows.clone(), None if given is None else given.clone())
            if not torch.equal(self(rows, given), self._run(rows, given)):
                raise RuntimeError(f"a graph of {size} rows gives other bits")

    def _record(self, rows: torch.Tensor, labels: torch.Tensor | None) -> _Graph:
        run = self._run  # not `self`: a graph that refers to this object would keep it for ever
        out, replay = self._recorder.record(lambda: run(rows, labels))
        return _Graph(rows, labels, out, replay)


def graphed(net: Run, example: torch.Tensor, labels: torch.Tensor | None, sizes: Sequence[int]) -> Run:
    """The net as CUDA graphs; as it is where one can't be recorded, or an earlier recording failed.

    torch's unused memory is given back before, because torch can't do that while something is recorded, and after,
    because the memory of graphs that are gone is used for nothing else.
    """
    if not GraphRecorder.works:
        return net
    try:
        recorder = GraphRecorder(example.device)
    except RuntimeError as error:
        log.warning("%s is launched kernel by kernel: %s", type(net).__name__, error)
        return net
    try:
        give_back(example.device)
        graphs = GraphedNet(net, recorder, example, labels, sizes)
        give_back(example.device)
    except RuntimeError as error:
        GraphRecorder.works = False
        log.warning("nets are launched kernel by kernel until a restart: %s", error)
        return net
    return graphs


def give_back(device: torch.device) -> None:
    """Give a GPU's memory back that torch keeps for later, unless a recording has failed: see above."""
    if device.type == "cuda" and GraphRecorder.works:
        torch.cuda.empty_cache()


class GraphRecorder:
    """Records CUDA graphs that share their intermediate memory, because they never run at the same time.

    Each recorder has a stream of its own, of a higher priority than the streams that warm bundles; its graphs keep that
    priority, whoever replays them. A stream belongs to one recorder at a time: torch keeps a library's workspace for
    each stream, graphs hold on to the workspace of theirs, and torch hands out only some 32 streams, in turns.
    """

    works = True  # until a recording fails in this process
    _free: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}
    _taken: ClassVar[set[int]] = set()  # handles of streams
    _streams: ClassVar[threading.RLock] = threading.RLock()  # guards both; a net may be released while it is held

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with self._streams:
            free = self._free.setdefault(device, [])
            self._stream: torch.cuda.Stream = free.pop() if free else torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            if self._stream.cuda_stream in self._taken:
                raise RuntimeError("no stream is left to record on")
            self._taken.add(self._stream.cuda_stream)
        self._done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # when the last turn's work is done

    def record(self, work: Work) -> tuple[torch.Tensor, Replay]:
        """See `Recorder`. Other threads may launch batches meanwhile: only what this one does is recorded."""
        with torch.cuda.device(self._device):
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARMING_RUNS):
                    work()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = work()
                finally:
                    graph.capture_end()
            current.wait_stream(self._stream)
            return out, graph.replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """See `Recorder`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done)  # of no effect before the first turn
        yield
        self._done.record(current)

    def release(self) -> None:
        """See `Recorder`."""
        with self._streams:
            self._taken.discard(self._stream.cuda_stream)
            self._free[self._device].append(self._stream)
