"""A net on a GPU as one launch for each size of tile: a CUDA graph, played on buffers that stay where they are.

Launched one by one, the few kernels of a small net take the processor longer than the GPU. A tape is what was launched
once for rows of one size; to play it is a single call, whose input and output are always the same memory. So an input
is copied in and the output copied out, in order on the caller's stream. Threads take turns at that, and each turn's
stream begins where the last one's has come to.

Tapes are made when a bundle is warmed and never later, and only if every one can be made and gives the net's bits: a
recording that fails may leave torch's allocator in a state in which another would fail worse.
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
Play = Callable[[], object]  # launches them again
WARMING_RUNS = 3  # in which libraries choose their kernels and take their workspace, which no tape may hold


class Recorder(Protocol):
    """What makes tapes, for one net."""

    def record(self, work: Work) -> tuple[torch.Tensor, Play]:
        """Run work once; its output, and how to run it again."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """What is launched meanwhile begins where the turn before has come to. One thread at a time."""
        ...

    def release(self) -> None:
        """Its tapes are gone."""
        ...


class _Tape(NamedTuple):
    rows: torch.Tensor
    labels: torch.Tensor | None
    out: torch.Tensor
    play: Play


class Replayed:
    """`run` by tapes for these sizes of batch, and as it is for all others.

    Args:
        run: (n, *row) tensor and (n,) labels or None → (n, *out) tensor, on one device.
        recorder: Makes the tapes.
        example, labels: Some rows for it.
        sizes: Of batches that get a tape.

    Raises:
        RuntimeError: A tape could not be made, or gave other bits than `run`.
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
        self._tapes: dict[int, _Tape] = {}
        self._turn = threading.Lock()
        for size in sorted(sizes, reverse=True):  # so that the smaller find room in the larger ones' memory
            for shift in (0, 1):  # played again, with other rows than it was made with
                place = (torch.arange(size, device=example.device) + shift) % len(example)
                rows, given = example[place], None if labels is None else labels[place]
                if not shift:
                    self._tapes[size] = self._taped(rows.clone(), None if given is None else given.clone())
                if not torch.equal(self(rows, given), run(rows, given)):
                    raise RuntimeError(f"a tape of {size} rows gives other bits")

    def __call__(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As `run`, in memory of its own."""
        tape = self._tapes.get(len(rows))
        if tape is None or (tape.labels is None) != (labels is None):
            return self._run(rows, labels)
        with self._turn, self._recorder.turn():
            tape.rows.copy_(rows)
            if tape.labels is not None and labels is not None:
                tape.labels.copy_(labels)
            tape.play()
            return tape.out.clone()

    def __del__(self) -> None:
        self._tapes.clear()  # before others may record where these were recorded
        self._recorder.release()

    def _taped(self, rows: torch.Tensor, labels: torch.Tensor | None) -> _Tape:
        run = self._run  # of its own: a tape that led back here would keep all this
        out, play = self._recorder.record(lambda: run(rows, labels))
        return _Tape(rows, labels, out, play)


def replayed(net: Run, example: torch.Tensor, labels: torch.Tensor | None, sizes: Sequence[int]) -> Run:
    """The net as tapes of its GPU; as it is where one can't be made, or could not before.

    Memory is given back before, for while something is recorded torch can't do so by itself, and after: that of tapes
    which are gone is used for nothing else.
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
        tapes = Replayed(net, recorder, example, labels, sizes)
        give_back(example.device)
    except RuntimeError as error:
        GraphRecorder.works = False
        log.warning("nets are launched kernel by kernel until a restart: %s", error)
        return net
    return tapes


def give_back(device: torch.device) -> None:
    """Give a GPU's memory that torch keeps for later back, unless a recording has failed: see above."""
    if device.type == "cuda" and GraphRecorder.works:
        torch.cuda.empty_cache()


class GraphRecorder:
    """Records CUDA graphs that share their intermediate memory: they are never played at the same time.

    Its stream is its own. What is recorded keeps that stream's priority, which is higher than that of warming, whoever
    plays it. torch keeps a library's workspace for each stream, tapes hold on to the workspace of the
    stream that they were recorded on, and there are only some 32 streams, which torch gives out in turns.
    """

    works = True  # until a recording fails in this process
    _free: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}
    _taken: ClassVar[set[int]] = set()  # handles of streams
    _streams: ClassVar[threading.RLock] = threading.RLock()  # of both; whoever holds it may have to let go of a net

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        with self._streams:
            free = self._free.setdefault(device, [])
            self._stream: torch.cuda.Stream = free.pop() if free else torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            if self._stream.cuda_stream in self._taken:
                raise RuntimeError("no stream is left to record on")
            self._taken.add(self._stream.cuda_stream)
        self._done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # the turn before's end

    def record(self, work: Work) -> tuple[torch.Tensor, Play]:
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
