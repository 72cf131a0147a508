"""What the batcher hands to an engine: slices of many callers' rows, what runs them, and the two failures it knows."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray

Rows = NDArray[Any]
Source = TypeVar("Source")
T = TypeVar("T")
# What the event loop does with the outcome of a call: it gets the result, or None and the error.
Then = Callable[[T | None, Exception | None], None]


class OutOfMemory(Exception):  # noqa: N818 — what happened, as the errors of service.errors say it
    """The device has no memory for a batch of this size; a smaller one may do."""


class DeviceFailed(Exception):  # noqa: N818 — as above
    """The device is lost to this process: nothing that it says from now on can be trusted."""


class BatchSlice(NamedTuple, Generic[Source]):
    """Rows start … stop − 1 of a source: of one caller in the batcher, of that caller's payload in an engine."""

    source: Source
    start: int
    stop: int


class ModelRunner(Protocol):
    """One net of one bundle, ready to run. Only rows for the same runner share a batch."""

    bundle: str  # these three label its metrics
    version: str
    operation: str
    most_rows: int  # in one batch; the batcher may have less room

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        ...

    def run(self, slices: Sequence[BatchSlice[Any]]) -> Rows:
        """Compute every slice's rows, in order, as one array. Called on one of the engine's threads.

        Raises:
            OutOfMemory, DeviceFailed: See there. Anything else is blamed on the rows.
        """
        ...


def count_rows(slices: Sequence[BatchSlice[Any]]) -> int:
    """Rows of all slices together."""
    return sum([stop - start for _, start, stop in slices])


def split_slices(slices: Sequence[BatchSlice[Source]], rows: int) -> list[list[BatchSlice[Source]]]:
    """The same rows in order, as two batches, the first of this many rows."""
    first, second = list[BatchSlice[Source]](), list[BatchSlice[Source]]()
    for source, start, stop in slices:
        middle = min(stop, start + rows - count_rows(first))
        if middle > start:
            first.append(BatchSlice(source, start, middle))
        if middle < stop:
            second.append(BatchSlice(source, middle, stop))
    return [first, second]
