"""A net on a GPU as one launch for each size of tile: a CUDA graph, replayed on buffers that stay where they are.

Launched one by one, the few kernels of a small net take the processor longer than the GPU. A tape is what was launched
once for rows of one size; to play it is a single call, whose input and output are always the same memory. So an input
is copied in, and the output copied out, in the same order on the same stream; what may not come between is enqueued
under a lock, and nobody waits for the GPU under it.
"""

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch

log = logging.getLogger(__name__)

Run = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Work = Callable[[], torch.Tensor]  # launches kernels that read and write fixed memory; returns where they write
Play = Callable[[], object]  # launches them again
WARMING_RUNS = 3  # in which libraries choose their kernels and take their workspace, which no tape may hold
_recording = threading.Lock()  # torch records one graph at a time


class _Tape(NamedTuple):
    rows: torch.Tensor
    labels: torch.Tensor | None
    out: torch.Tensor
    play: Play


class Replayed:
    """`run` by tapes, one for each size of batch, made when a size first comes: in warm-up.

    Args:
        run: (n, *row) tensor and (n,) labels or None → (n, *out) tensor, on one device.
        record: Runs work once, and returns its output and how to run it again.
    """

    def __init__(self, run: Run, record: Callable[[Work], tuple[torch.Tensor, Play]]) -> None:
        self._run = run
        self._record = record
        self._tapes: dict[int, _Tape] = {}
        self._lock = threading.Lock()

    def __call__(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As `run`, in memory of its own."""
        with self._lock:
            tape = self._tapes.get(len(rows))
            if tape is None:
                tape = self._tapes[len(rows)] = self._taped(rows, labels)
            tape.rows.copy_(rows)
            if tape.labels is not None and labels is not None:
                tape.labels.copy_(labels)
            tape.play()
            return tape.out.clone()

    def _taped(self, rows: torch.Tensor, labels: torch.Tensor | None) -> _Tape:
        rows, labels = rows.clone(), None if labels is None else labels.clone()
        out, play = self._record(lambda: self._run(rows, labels))
        return _Tape(rows, labels, out, play)


def replayed(net: Run, example: torch.Tensor, labels: torch.Tensor | None, expected: torch.Tensor) -> Run:
    """The net as tapes of its GPU, where they can be made and give the example its expected bits; else as it is."""
    reason = "its bits differ"
    try:
        tapes = Replayed(net, _graph_recorder(example.device))
        if all(torch.equal(tapes(example, labels), expected) for _ in range(2)):
            return tapes
    except RuntimeError as error:
        reason = str(error)
    log.warning("%s is launched kernel by kernel: %s", type(net).__name__, reason)
    return net


def _graph_recorder(device: torch.device) -> Callable[[Work], tuple[torch.Tensor, Play]]:
    """Records CUDA graphs that share their intermediate memory: they are never played at the same time."""
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(work: Work) -> tuple[torch.Tensor, Play]:
        with _recording, torch.cuda.device(device):
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(WARMING_RUNS):
                    work()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may launch batches meanwhile: only what this one does is recorded.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                out = work()
            return out, graph.replay

    return record
