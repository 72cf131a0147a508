"""Joins rows from many callers into batches for one engine, and gives each caller its own rows back.

- A batch closes when it is full or an engine instance is free. `policy` says how long a free one waits.
- `request_queue` says whose rows are next.
- An engine may have several instances, which run batches side by side and never wait for one another. The next batch
  of an instance runs while the rows of its last one are handed out.
- However an entry ends (result, failure, deadline, cancellation, shutdown), no batch takes rows of it from then on, and
  those that wait leave the queue with its caller.
- If a batch fails it is halved until only the guilty callers fail. After a device error nothing is tried again.
- Everything here runs on the event loop but `ModelRunner.run`, which runs on the engine's threads; there are no locks.
- An answer holds its caller's own rows only, never the batches that they came from.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from service.engine.batching.batch import (
    BatchSlice,
    DeviceFailed,
    ModelRunner,
    OutOfMemory,
    Rows,
    Then,
    TraceBatch,
    count_rows,
    split_slices,
)
from service.engine.batching.policy import EAGER, ArrivalWait, BatchingPolicy
from service.engine.batching.request_queue import Entry, RequestQueue, Result
from service.engine.batching.throughput import Throughput
from service.errors import Draining, EngineFailed, NotReady, QueueFull, ServiceError
from service.logs import current_key, current_route, current_span, request_if_any
from service.metrics import Metrics, WorkSeries

Run = Callable[[int, ModelRunner, Sequence[BatchSlice[Any]], Then[Rows]], None]

GROW_AFTER_BATCHES = 64  # batches without an out-of-memory error before a lowered limit is doubled

MIN_SHARE_ROWS = 16  # fewer rows are not divided among idle engine instances
UNDIVIDED_S = 0.01  # nor is what one instance computes in so short a time, where several callers wait

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """A batch that an engine instance works on.

    `next` has the instance's next batch once this one is done; None where that has not begun.
    """

    slices: list[BatchSlice[Entry]]
    rows: int
    started: float
    next: "asyncio.Future[_Call | None]"
    seconds: float = 0.0
    end_trace: Callable[[Exception | None], None] | None = None

    @property
    def runner(self) -> ModelRunner:
        """What computes it."""
        return self.slices[0].source.runner


class Batcher:
    """Rows in, batches to the engine, rows out.

    Args:
        run: Runs `runner.run(slices)` on the thread of an engine instance (0 … instances − 1), and then calls back on
            the event loop with the result, or None and the error.
        metrics: Where the queue, batch and compute series go.
        device: Label of the queue's gauges.
        instances: Batches that the engine runs side by side.
        max_rows: Largest batch.
        max_queued_rows: Rows that may wait. Past it `submit` refuses instead of waiting.
        policy: What a free engine instance waits for before it starts a batch.
        clock: Seconds, rising; deadlines end by the event loop's own.

    Use as an asynchronous context manager, or call `start` and `close`.

    Attributes:
        failure: Once it is set, nothing is computed any more.
        trace_batch: Begins a batch's trace; None where there are none.
        has_several_keys: Called to learn whether clients with different keys share the queue. A key that has rows
            waiting then leaves as much room free as these take, so that there is room for another key's.
    """

    def __init__(
        self,
        run: Run,
        metrics: Metrics,
        *,
        device: str,
        instances: int = 1,
        max_rows: int,
        max_queued_rows: int,
        policy: BatchingPolicy = EAGER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failure: str | None = None
        self.trace_batch: TraceBatch | None = None
        self.has_several_keys: Callable[[], bool] = bool
        self._run = run
        self._metrics = metrics
        self._clock = clock
        self._device = device
        self._instances = instances
        self._max_rows = self._limit_rows = max_rows  # the latter is lowered where memory is short
        self._good_batches = 0  # of the lowered limit's size
        self._max_queued_rows = max_queued_rows
        self._max_queue_delay_s = policy.max_queue_delay_s
        self._queue = RequestQueue()
        self._failed: deque[list[BatchSlice[Entry]]] = deque()  # halves of failed batches, tried before all others
        self._numbers = itertools.count()
        self._unfinished: set[Entry] = set()
        self._throughput = Throughput(instances)
        self._arrivals = ArrivalWait(policy, lambda: self._queue.rows, lambda: len(self._unfinished), clock)
        self._workers: list[asyncio.Task[None]] = []
        self._idle: list[tuple[int, asyncio.Future[_Call | None]]] = []  # instances whose workers wait to be woken
        self._delay: asyncio.TimerHandle | None = None
        self._calls: set[_Call] = set()
        self._all_done = asyncio.Event()
        self._all_done.set()
        self._draining = self._has_ended = False
        self._accepted = 0  # callers whose rows come in several submits
        metrics.queue_images.labels(device).set_function(lambda: self._queue.rows)
        metrics.queue_requests.labels(device).set_function(lambda: len(self._queue))
        metrics.queue_capacity_images.labels(device).set(max_queued_rows)
        metrics.queue_oldest_age.labels(device).set_function(self.oldest_age_s)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        """Begin to work, on the running loop."""
        loop = asyncio.get_running_loop()
        for instance in range(self._instances):
            worker = loop.create_task(self._work(instance), name=f"batcher {instance}")
            worker.add_done_callback(self._worker_ended)
            self._workers.append(worker)

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return self._queue.rows

    @property
    def is_draining(self) -> bool:
        """Whether newcomers are refused because the end is near."""
        return self._draining

    def busy_s(self) -> float:
        """Seconds since the oldest of the running engine calls began; 0 when none runs."""
        return max((self._clock() - call.started for call in self._calls), default=0.0)

    def oldest_age_s(self) -> float:
        """Seconds since the arrival of the oldest entry that has rows waiting; 0 when none has."""
        arrival = self._queue.oldest_arrival()
        return 0.0 if arrival is None else self._clock() - arrival

    def retry_after_s(self) -> int:
        """Whole seconds until what waits now is computed, at the measured rate."""
        return max(1, math.ceil(self._throughput.seconds_for(self._queue.rows)))

    def admit(self, rows: int = 1) -> None:
        """Raise what `submit` would raise at once for this many rows: Draining, NotReady or QueueFull."""
        if self._draining:
            raise Draining
        self._check_alive()
        if not self._has_room(rows):
            raise QueueFull(self.retry_after_s())

    def _has_room(self, rows: int) -> bool:
        free = self._max_queued_rows - self._queue.rows - rows
        if free < 0 or not self.has_several_keys():
            return free >= 0
        own = self._queue.rows_of(current_key())
        return not own or own + rows <= free

    def _check_alive(self) -> None:
        if self._has_ended:
            raise Draining
        if self.failure is not None:
            raise NotReady(self.failure)

    @contextlib.contextmanager
    def accept(self, rows: int) -> Iterator[None]:
        """Accept a caller whose rows come in several submits, if there is room for all of them now.

        A drain waits until the block ends.

        Raises:
            Draining, NotReady, QueueFull: As `submit`.
        """
        self.admit(rows)
        self._accepted += 1
        self._all_done.clear()
        try:
            yield
        finally:
            self._accepted -= 1
            self._note_if_all_done()

    async def submit(
        self, runner: ModelRunner, payload: object, rows: int, deadline_s: float, *, is_accepted: bool = False
    ) -> Result:
        """Wait for one caller's rows.

        Args:
            runner: What computes them.
            payload: Handed to `runner.run`, with the rows wanted of it.
            rows: How many there are, at least 1.
            deadline_s: Seconds from now in which the result is worth something.
            is_accepted: Whether they are more rows of a caller that was accepted (`accept`): these are refused neither
                for what waits nor while draining.

        Raises:
            QueueFull: No room, or so much is waiting that it would come too late. Nothing was queued, so a retry is
                safe.
            DeadlinePassed: It took too long. What still waited never reached the engine.
            Draining, NotReady: The service ends, or its engine has failed for good.
            EngineFailed: The engine raised for these rows, or returned another number of rows.
            ValueError: No rows. The schema should have refused: our bug.
        """
        if rows < 1:
            raise ValueError(f"cannot submit {rows} rows")
        if is_accepted:
            self._check_alive()
        else:
            self.admit(rows)
            if self._comes_too_late(rows, deadline_s):
                raise QueueFull(self.retry_after_s())
        loop = asyncio.get_running_loop()
        now, number = self._clock(), next(self._numbers)
        entry = Entry(runner, payload, rows, deadline_s, now, number, loop.create_future(), current_key())
        if self.trace_batch is not None:
            entry.span = current_span()
        self._enqueue(entry)
        timer = loop.call_later(deadline_s, entry.expire)
        try:
            return await entry.future
        except asyncio.CancelledError:
            self._count_departure(entry)
            raise
        finally:
            timer.cancel()
            self._forget(entry)

    def _count_departure(self, entry: Entry) -> None:
        """Count a client that has left, once for all entries of its request, which may also end for other reasons."""
        request = request_if_any()
        if request is not None:
            if request.has_dropped_work or not request.has_left:
                return
            request.has_dropped_work = True
        self._metrics.cancelled.labels(current_route(), "queued" if entry.taken == 0 else "running").inc()

    def _comes_too_late(self, rows: int, deadline_s: float) -> bool:
        """Whether this many rows, coming now, would wait until after their deadline."""
        seconds_for = self._throughput.seconds_for
        if not self._throughput.is_reliable or seconds_for(self._queue.rows) <= deadline_s:
            return False
        return seconds_for(self._queue.rows_ahead(rows, current_key())) > deadline_s > 0

    def _enqueue(self, entry: Entry) -> None:
        self._queue.add(entry)
        self._unfinished.add(entry)
        self._all_done.clear()
        if not self._max_queue_delay_s or self._queue.rows >= self._limit_rows:
            self._wake_one()
        elif self._delay is None:
            self._delay = asyncio.get_running_loop().call_later(self._max_queue_delay_s, self._wake_one)

    def _forget(self, entry: Entry) -> None:
        self._queue.remove(entry)
        self._unfinished.discard(entry)
        self._note_if_all_done()

    def _note_if_all_done(self) -> None:
        if not self._unfinished and not self._accepted:
            self._all_done.set()

    def _wake_one(self) -> None:
        """Have an idle worker look at the queue; the busy ones will anyway."""
        if self._delay is not None:
            self._delay.cancel()
            self._delay = None
        while self._idle:
            instance, waker = self._idle.pop()
            if not waker.done():
                _step(waker, partial(self._launch_alone, instance))
                return

    def _launch_alone(self, instance: int) -> _Call | None:
        """Start a lone caller's batch, who need not wait until a worker gets its turn; None for all others."""
        return self._launch_next(instance, self._closed_by) if self._arrivals.expects_nobody_else() else None

    async def _work(self, instance: int) -> None:
        """Run batches on one engine instance, for as long as the batcher lives."""
        call = None
        while self.failure is None:
            call = call or self._launch_next(instance, "idle") or await self._wait_for_rows(instance)
            if call is not None:
                call = await call.next
                if call is None and not self._failed:
                    await self._arrivals.wait(self._limit_rows)

    async def _wait_for_rows(self, instance: int) -> _Call | None:
        """Wait until rows come, and start the batch that they are for, unless that has happened already."""
        waker: asyncio.Future[_Call | None] = asyncio.get_running_loop().create_future()
        self._idle.append((instance, waker))
        if (call := await waker) is not None:
            return call
        await self._arrivals.wait(self._limit_rows)
        return self._launch_next(instance, self._closed_by)

    @property
    def _closed_by(self) -> str:
        return "window" if self._max_queue_delay_s else "idle"

    def _room(self, runner: ModelRunner) -> int:
        """Rows that a batch of this runner may have."""
        return min(self._limit_rows, runner.most_rows)

    def _launch_next(self, instance: int, closed_by: str) -> _Call | None:
        """Start a half of a failed batch, else the batch that is next in the queue; None where there is nothing."""
        if slices := self._next_retry():
            return self._launch(instance, slices)
        share = self._fair_share()
        slices = self._queue.take(lambda runner: min(self._room(runner), share), self._clock())
        if not slices:
            return None
        call = self._launch(instance, slices)
        self._note_start(call, closed_by)  # while the engine works already
        if self._queue:
            self._wake_one()
        return call

    def _fair_share(self) -> int:
        """Rows of those that wait that the next batch may have, so that idle engine instances get as many.

        Instances beside each other hold up the event loop. Where one instance is done soon, several callers are better
        off in one batch.
        """
        alone_s = self._instances * self._throughput.seconds_for(self._queue.rows)
        if len(self._unfinished) > 1 and 0 < alone_s < UNDIVIDED_S:
            return self._queue.rows
        takers = 1 + len(self._idle) + self._arrivals.waiting_instances
        return max(MIN_SHARE_ROWS, math.ceil(self._queue.rows / takers))

    def _next_retry(self) -> list[BatchSlice[Entry]]:
        """What is to be tried again. Some of its callers may have left since, and the limit may be lower."""
        while self._failed:
            slices = [one for one in self._failed.popleft() if not one.source.future.done()]
            if count_rows(slices) > self._limit_rows:
                slices, rest = split_slices(slices, self._limit_rows)
                self._failed.appendleft(rest)
            if slices:
                return slices
        return []

    def _launch(self, instance: int, slices: list[BatchSlice[Entry]]) -> _Call:
        payloads = [BatchSlice(entry.payload, start, stop) for entry, start, stop in slices]
        call = _Call(slices, count_rows(slices), self._clock(), asyncio.get_running_loop().create_future())
        self._calls.add(call)
        self._run(instance, call.runner, payloads, partial(self._end, instance, call))
        if self.trace_batch is not None:  # while the engine works already
            spans = [entry.span for entry, _, _ in slices if entry.span is not None]
            call.end_trace = self.trace_batch(call.runner, call.rows, spans)
        return call

    def _series(self, call: _Call) -> WorkSeries:
        runner = call.runner
        return self._metrics.of_work(runner.bundle, runner.version, runner.operation)

    def _note_start(self, call: _Call, closed_by: str) -> None:
        series = self._series(call)
        for entry, start, _ in call.slices:
            if start == 0:
                entry.queue_s = call.started - entry.arrival
                series.queue_wait.observe(entry.queue_s)
        series.batches("full" if call.rows == self._room(call.runner) else closed_by).inc()
        series.batch_images.observe(call.rows)

    def _end(self, instance: int, call: _Call, rows: Rows | None, error: Exception | None) -> None:
        """Called when an engine call is over."""
        if call in self._calls:  # as it is until the batcher is closed
            self._note_end(call, error)
            _step(call.next, partial(self._finish, instance, call, rows, error))

    def _note_end(self, call: _Call, error: Exception | None = None) -> None:
        if call.end_trace is not None:
            call.end_trace(error)
        self._calls.discard(call)
        call.seconds = self._clock() - call.started
        self._series(call).compute.observe(call.seconds)

    def _finish(self, instance: int, call: _Call, rows: Rows | None, error: Exception | None) -> _Call | None:
        """Give callers their rows or an error, or have them tried again.

        Returns the instance's next call where that has begun: if enough rows wait, they are computed while these are
        handed out.
        """
        if rows is None or len(rows) != call.rows:
            returned = f"the engine was given {call.rows} rows and returned {0 if rows is None else len(rows)}"
            self._blame(call.slices, error or EngineFailed(returned))
            return None
        self._throughput.note(call.rows, call.seconds, self._room(call.runner))
        self._raise_limit(call.rows)
        self._arrivals.note_done(call.rows)
        following = self._launch_next(instance, "idle") if self._arrivals.has_enough(self._limit_rows) else None
        self._hand_out(call, rows)
        return following

    def _hand_out(self, call: _Call, rows: Rows) -> None:
        """Give every caller its rows."""
        series = self._series(call)
        self._metrics.engine_last_progress.labels(self._device).set_to_current_time()
        series.images.inc(call.rows)
        series.batch_padding_images.inc(call.runner.padded(call.rows) - call.rows)
        place = 0
        for entry, start, stop in call.slices:
            entry.add_rows(start, rows[place : place + stop - start], call.seconds)
            place += stop - start

    def _blame(self, slices: list[BatchSlice[Entry]], error: Exception) -> None:
        """After a failure: end those whose fault it is, or halve the batch to find out."""
        if isinstance(error, DeviceFailed):
            self._metrics.engine_errors.labels("device").inc()
            self.fail_all("the device failed", error)
        elif isinstance(error, OutOfMemory):
            self._shrink(slices, error)
        elif len(slices) == 1:
            self._metrics.engine_errors.labels("failed_rows").inc()
            failure = EngineFailed(f"the engine failed on these rows: {error!r}")
            failure.__cause__ = error
            slices[0].source.fail(failure)
        else:
            self._metrics.engine_errors.labels("batch").inc()
            middle = len(slices) // 2
            self._failed.extendleft([slices[middle:], slices[:middle]])

    def _shrink(self, slices: list[BatchSlice[Entry]], error: OutOfMemory) -> None:
        """Try the rows again in halves, and make later batches no larger than these."""
        rows = count_rows(slices)
        self._metrics.out_of_memory.inc()
        self._metrics.engine_errors.labels("out_of_memory").inc()
        log.warning("out of memory with %d rows: %s", rows, error)
        # Another instance may have lowered the limit further.
        self._limit_rows, self._good_batches = min(self._limit_rows, max(1, rows // 2)), 0
        if rows == 1:
            slices[0].source.fail(EngineFailed("out of memory with a single row"))
        else:
            self._failed.extendleft(reversed(split_slices(slices, rows // 2)))

    def _raise_limit(self, rows: int) -> None:
        """Double a lowered limit after enough batches of its size have run; smaller ones say nothing about it."""
        if self._limit_rows == self._max_rows or rows < self._limit_rows:
            return
        self._good_batches += 1
        if self._good_batches >= GROW_AFTER_BATCHES:
            self._limit_rows, self._good_batches = min(self._max_rows, 2 * self._limit_rows), 0

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
        """A worker that ends unasked has met a bug of ours: its callers are told."""
        if self.failure is None:
            self.fail_all("the batcher died", None if worker.cancelled() else worker.exception())

    async def drain(self, timeout_s: float) -> bool:
        """Refuse newcomers, finish what was accepted; after the time-out end the rest. True if nothing was ended."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_done.wait(), timeout_s)
        finished = not self._unfinished and not self._accepted
        self._has_ended = True
        self._end_all(Draining)
        return finished

    async def close(self) -> None:
        """End at once; callers that still wait get Draining."""
        self._draining = self._has_ended = True
        self._end_all(Draining)
        for call in list(self._calls):  # first: the workers that wait for their ends are about to be cancelled
            self._note_end(call)
        for worker in self._workers:
            worker.remove_done_callback(self._worker_ended)
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)


def _step(future: "asyncio.Future[_Call | None]", step: Callable[[], _Call | None]) -> None:
    """Do a worker's step now, which is sooner than in its turn. A bug in it ends the worker, as it would there."""
    try:
        future.set_result(step())
    except Exception as bug:  # noqa: BLE001 - whatever it is
        future.set_exception(bug)
