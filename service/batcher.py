"""Joins rows from many callers into batches for one engine, and gives each caller its own rows back.

The design, in short:

- A *lane* is what may share a batch: one net of one bundle. Lanes take turns; within a lane callers do.
- A batch closes when it is full or the engine is free: an idle engine never waits for company.
- Rows, not requests, are counted. Every caller of a lane gets an equal share of the next batch, and what the small ones
  leave goes to the large ones in turn: a request of thousands of rows never delays one of a single row by more than
  the batch that runs.
- An entry carries its own future, deadline and arrival. However it ends (result, failure, deadline, cancellation,
  shutdown), no batch takes rows of it from then on, and those that wait leave the queue with its caller.
- Everything here runs on the event loop but `Lane.run`, which runs on the engine's thread; there are no locks.
- If a batch fails it is halved until only the guilty callers fail. After a device error nothing is tried again.
- What is kept for a caller is its own rows and no more: no answer holds on to the batches that it came from.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from service.errors import DeadlinePassed, Draining, EngineFailed, NotReady, QueueFull, ServiceError
from service.logs import current_route
from service.metrics import Metrics

Rows = NDArray[Any]

GROW_AFTER_BATCHES = 64  # batches without an out-of-memory error before a lowered cap is doubled
RATE_MEMORY = 0.9  # what a batch counts in the measured rate when the next one has run

log = logging.getLogger(__name__)


class OutOfMemory(Exception):  # noqa: N818 — what happened, as the errors of service.errors say it
    """The device has no memory for a batch of this size; a smaller one may do."""


class DeviceFailed(Exception):  # noqa: N818 — as above
    """The device is lost to this process: nothing that it says from now on can be trusted."""


class Part(NamedTuple):
    """Rows start … stop − 1 of one caller's payload."""

    payload: Any
    start: int
    stop: int


class Lane(Protocol):
    """One net of one bundle, ready to run."""

    bundle: str  # these two label its metrics
    operation: str

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        ...

    def run(self, parts: Sequence[Part]) -> Rows:
        """Compute every part's rows, in order, as one array. Called on the engine's thread.

        Raises:
            OutOfMemory, DeviceFailed: See there. Anything else is blamed on the rows.
        """
        ...


class Result(NamedTuple):
    """One caller's rows in order, and where its time went: waiting for its first batch, and in its batches."""

    rows: Rows
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class _Entry:
    """One caller's rows on their way through."""

    lane: Lane
    payload: Any
    rows: int
    deadline_s: float
    arrival: float
    future: "asyncio.Future[Result]"
    taken: int = 0  # rows handed to a batch so far
    given: int = 0  # rows that came back
    answer: Rows | None = None  # room for all of them, from the first that came back on
    queue_s: float = 0.0
    compute_s: float = 0.0

    def is_late(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return now >= self.arrival + self.deadline_s

    def expire(self) -> None:
        """End because the deadline has passed."""
        self.fail(DeadlinePassed(self.deadline_s))

    def give(self, rows: Rows, seconds: float) -> None:
        """Add the next computed rows; with the last of them the caller has its answer."""
        if self.future.done():
            return
        if self.answer is None:
            self.answer = np.empty((self.rows, *rows.shape[1:]), rows.dtype)
        # Copied: a view would keep the whole batch in memory for as long as the slowest of its callers.
        self.answer[self.given : self.given + len(rows)] = rows
        self.given += len(rows)
        self.compute_s += seconds
        if self.given == self.rows:
            self.future.set_result(Result(self.answer, self.queue_s, self.compute_s))

    def fail(self, error: Exception) -> None:
        """End with an error, unless something else ended it before."""
        if not self.future.done():
            self.future.set_exception(error)


class _Slice(NamedTuple):
    """Rows start … stop − 1 of an entry, in a batch."""

    entry: _Entry
    start: int
    stop: int


class Batcher:
    """Rows in, batches to the engine, rows out.

    Args:
        run: Runs `lane.run(parts)` on the engine's thread and returns a future of its result.
        metrics: Where the queue, batch and compute series go.
        device: Label of the queue's gauges.
        max_rows: Largest batch.
        max_queued_rows: Rows that may wait. Past it `submit` refuses instead of waiting.
        clock: Seconds, rising; deadlines end by the event loop's own.

    Use as an asynchronous context manager, or call `start` and `close`.
    """

    def __init__(
        self,
        run: Callable[[Lane, Sequence[Part]], "asyncio.Future[Rows]"],
        metrics: Metrics,
        *,
        device: str,
        max_rows: int,
        max_queued_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._clock = clock
        self._device = device
        self._max_rows = self._cap = max_rows
        self._max_queued_rows = max_queued_rows
        self._lanes: OrderedDict[Lane, OrderedDict[_Entry, None]] = OrderedDict()
        self._unfinished: set[_Entry] = set()
        self._queued_rows = 0
        self._recent_rows = self._recent_s = 0.0  # of recent batches, the older the less
        self._good_batches = 0
        self._wake = asyncio.Event()
        self._all_done = asyncio.Event()
        self._all_done.set()
        self._draining = False
        self._worker: asyncio.Task[None] | None = None
        self._busy_since: float | None = None  # when the running engine call began
        self.failure: str | None = None  # once set, nothing is computed any more
        metrics.queue_images.labels(device).set_function(lambda: self._queued_rows)
        metrics.queue_capacity_images.labels(device).set(max_queued_rows)
        metrics.queue_oldest_age.labels(device).set_function(self.oldest_age_s)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begin to work, on the running loop."""
        self._worker = asyncio.get_running_loop().create_task(self._work(), name="batcher")
        self._worker.add_done_callback(self._worker_ended)

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return self._queued_rows

    @property
    def is_draining(self) -> bool:
        """Whether newcomers are refused because the end is near."""
        return self._draining

    def busy_s(self) -> float:
        """Seconds since the running engine call began; 0 when none runs."""
        return 0.0 if self._busy_since is None else self._clock() - self._busy_since

    def oldest_age_s(self) -> float:
        """Seconds since the arrival of the oldest entry that has rows waiting; 0 when none has."""
        arrivals = [entry.arrival for waiting in self._lanes.values() for entry in waiting]
        return self._clock() - min(arrivals) if arrivals else 0.0

    def retry_after_s(self) -> int:
        """Whole seconds until the queue of now is computed, at the measured rate."""
        return max(1, math.ceil(self._queued_rows * self._recent_s / self._recent_rows)) if self._recent_rows else 1

    def admit(self, rows: int = 1) -> None:
        """Raise what `submit` would raise at once for this many rows: Draining, NotReady or QueueFull."""
        if self._draining:
            raise Draining
        if self.failure is not None:
            raise NotReady(self.failure)
        if self._queued_rows + rows > self._max_queued_rows:
            raise QueueFull(self.retry_after_s())

    async def submit(self, lane: Lane, payload: object, rows: int, deadline_s: float) -> Result:
        """Wait for one caller's rows.

        Args:
            lane: Where they are computed.
            payload: Handed to `lane.run`, with the rows wanted of it.
            rows: How many there are, at least 1.
            deadline_s: Seconds from now in which the result is worth something.

        Raises:
            QueueFull: No room. Nothing was queued, so a retry is safe.
            DeadlinePassed: It took too long. What still waited never reached the engine.
            Draining, NotReady: The service ends, or its engine has failed for good.
            EngineFailed: The engine raised for these rows, or returned another number of rows.
            ValueError: No rows. The schema should have refused: our bug.
        """
        if rows < 1:
            raise ValueError(f"cannot submit {rows} rows")
        self.admit(rows)
        loop = asyncio.get_running_loop()
        entry = _Entry(lane, payload, rows, deadline_s, self._clock(), loop.create_future())
        self._enqueue(entry)
        timer = loop.call_later(deadline_s, entry.expire)
        try:
            return await entry.future
        except asyncio.CancelledError:
            phase = "queued" if entry.taken == 0 else "running"
            self._metrics.cancelled.labels(current_route(), phase).inc()
            raise
        finally:
            timer.cancel()
            self._forget(entry)

    def _enqueue(self, entry: _Entry) -> None:
        self._lanes.setdefault(entry.lane, OrderedDict())[entry] = None
        self._queued_rows += entry.rows
        self._unfinished.add(entry)
        self._all_done.clear()
        self._wake.set()

    def _forget(self, entry: _Entry) -> None:
        waiting = self._lanes.get(entry.lane)
        if waiting is not None and entry in waiting:
            del waiting[entry]
            self._queued_rows -= entry.rows - entry.taken
            if not waiting:
                del self._lanes[entry.lane]
        self._unfinished.discard(entry)
        if not self._unfinished:
            self._all_done.set()

    def _take(self) -> list[_Slice]:
        """The next batch: from the lane whose turn it is, an equal share for each, then what is left in turn.

        Empty where all who were looked at are gone or late.
        """
        lane, waiting = next(iter(self._lanes.items()))
        self._lanes.move_to_end(lane)
        room, batch, now = self._cap, dict[_Entry, _Slice](), self._clock()
        candidates = list(itertools.islice(waiting, room))  # no batch has room for more
        for entry in candidates:
            if entry.is_late(now):  # its timer is due, and the loop has not come to it
                entry.expire()
        candidates = [entry for entry in candidates if not entry.future.done()]
        share = room // max(1, len(candidates))
        for limit in (share, room):
            for entry in candidates:
                rows = min(entry.rows - entry.taken, limit, room)
                if not rows:
                    continue
                start = batch[entry].start if entry in batch else entry.taken
                entry.taken += rows
                room -= rows
                self._queued_rows -= rows
                batch[entry] = _Slice(entry, start, entry.taken)
        for entry in batch:
            if entry.taken == entry.rows:
                del waiting[entry]
            else:
                waiting.move_to_end(entry)
        if not waiting:
            del self._lanes[lane]
        return list(batch.values())

    async def _work(self) -> None:
        while self.failure is None:
            if not self._lanes:
                self._wake.clear()
                await self._wake.wait()
                continue
            if batch := self._take():
                self._note_start(batch)
                await self._compute(batch)
            else:
                await asyncio.sleep(0)  # let those leave who are over

    def _note_start(self, batch: Sequence[_Slice]) -> None:
        lane, rows, now = batch[0].entry.lane, _count(batch), self._clock()
        labels = lane.bundle, lane.operation
        for entry, start, _ in batch:
            if start == 0:
                entry.queue_s = now - entry.arrival
                self._metrics.queue_wait.labels(*labels).observe(entry.queue_s)
        self._metrics.batches.labels(*labels, "full" if rows == self._cap else "idle").inc()
        self._metrics.batch_images.labels(*labels).observe(rows)

    async def _compute(self, batch: Sequence[_Slice]) -> None:
        """Run a batch; whatever happens, every entry in it gets its rows or an error."""
        pending = deque([list(batch)])
        while pending:
            # Halves run after a failure: some of their callers may have left since.
            slices = [s for s in pending.popleft() if not s.entry.future.done()]
            if not slices or self.failure is not None:
                continue
            rows = _count(slices)
            error = await self._attempt(slices)
            if isinstance(error, DeviceFailed):
                self._metrics.engine_errors.labels("device").inc()
                self.fail_all("the device failed", error)
            elif isinstance(error, OutOfMemory):
                self._metrics.out_of_memory.inc()
                self._metrics.engine_errors.labels("out_of_memory").inc()
                self._cap, self._good_batches = max(1, rows // 2), 0
                log.warning("out of memory with %d rows: %s", rows, error)
                if rows == 1:
                    slices[0].entry.fail(EngineFailed("out of memory with a single row"))
                else:
                    pending.extendleft(reversed(_halved(slices, rows // 2)))
            elif error is not None and len(slices) == 1:
                self._metrics.engine_errors.labels("failed_rows").inc()
                failure = EngineFailed(f"the engine failed on these rows: {error!r}")
                failure.__cause__ = error
                slices[0].entry.fail(failure)
            elif error is not None:
                self._metrics.engine_errors.labels("batch").inc()
                middle = len(slices) // 2
                pending.extendleft([slices[middle:], slices[:middle]])

    async def _attempt(self, slices: Sequence[_Slice]) -> Exception | None:
        """One engine call: None and every entry has its rows, or the error and nothing has changed."""
        lane, rows = slices[0].entry.lane, _count(slices)
        labels = lane.bundle, lane.operation
        started = self._busy_since = self._clock()
        try:
            result = await self._run(lane, [Part(s.entry.payload, s.start, s.stop) for s in slices])
            if len(result) != rows:
                raise EngineFailed(f"the engine was given {rows} rows and returned {len(result)}")  # noqa: TRY301
        except OutOfMemory as error:
            return OutOfMemory(str(error))  # a new one: this one's traceback holds the tensors
        except Exception as error:  # noqa: BLE001 — whatever it is, it belongs to these callers
            return error
        finally:
            self._busy_since = None
            seconds = self._clock() - started
            self._metrics.compute.labels(*labels).observe(seconds)
        self._metrics.engine_last_progress.labels(self._device).set_to_current_time()
        self._metrics.images.labels(*labels).inc(rows)
        self._metrics.batch_padding_images.labels(*labels).inc(lane.padded(rows) - rows)
        self._note_success(rows, seconds)
        place = 0
        for entry, start, stop in slices:
            entry.give(result[place : place + stop - start], seconds)
            place += stop - start
        return None

    def _note_success(self, rows: int, seconds: float) -> None:
        # Rows and seconds apart, so that a large batch counts for what it is worth among many small ones.
        self._recent_rows = RATE_MEMORY * self._recent_rows + rows
        self._recent_s = RATE_MEMORY * self._recent_s + seconds
        self._good_batches += 1
        if self._cap < self._max_rows and self._good_batches >= GROW_AFTER_BATCHES:
            self._cap, self._good_batches = min(self._max_rows, 2 * self._cap), 0

    def fail_all(self, reason: str, error: BaseException | None) -> None:
        """Latch a failure that nothing here can mend: every caller gets NotReady, now and from now on.

        The reason goes to clients and probes, the error to the log.
        """
        log.critical("%s; nothing is computed any more", reason, exc_info=error)
        self.failure = reason
        self._end_all(partial(NotReady, reason))

    def _end_all(self, make_error: Callable[[], ServiceError]) -> None:
        for entry in self._unfinished:
            entry.fail(make_error())

    def _worker_ended(self, worker: "asyncio.Task[None]") -> None:
        """A worker that ends unasked (our bug) takes no caller's answer with it into the grave."""
        if self.failure is None:
            self.fail_all("the batcher died", None if worker.cancelled() else worker.exception())

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers, finish what was accepted; after the time-out end the rest. True if nothing was ended."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        finished = not self._unfinished
        self._end_all(Draining)
        return finished

    async def close(self) -> None:
        """End at once; callers that still wait get Draining."""
        self._draining = True
        self._end_all(Draining)
        if self._worker is not None:
            self._worker.remove_done_callback(self._worker_ended)
            self._worker.cancel()
            await asyncio.wait([self._worker])


def _count(slices: Sequence[_Slice]) -> int:
    return sum(s.stop - s.start for s in slices)


def _halved(slices: Sequence[_Slice], rows: int) -> list[list[_Slice]]:
    """The same rows in order, as two batches, the first of this many rows."""
    first, second = list[_Slice](), list[_Slice]()
    for entry, start, stop in slices:
        middle = min(stop, start + rows - _count(first))
        if middle > start:
            first.append(_Slice(entry, start, middle))
        if middle < stop:
            second.append(_Slice(entry, middle, stop))
    return [first, second]
