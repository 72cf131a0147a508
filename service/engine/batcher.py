"""Joins rows from many callers into batches for one engine, and gives each caller its own rows back.

The design, in short:

- A *lane* is what may share a batch: one net of one bundle. Lanes take turns.
- A batch closes when it is full or the engine is free: an idle engine never waits for company, unless a window is set.
  But the event loop goes first while it has requests in hand, for it gets through them sooner without the engine beside
  it, in its caches and at the interpreter's lock; and those requests then share a batch. Where both have one processor
  between them, nothing is gained by a batch that begins sooner, and the fewer batches there are, the less each row
  costs: clients who were just answered have a moment to come again.
- Rows, not requests, are counted. Half of a batch belongs to those who came first, so that nobody waits for ever; the
  other half to those who need the fewest rows, so that a request of thousands never delays one of a single row by more
  than the batch that runs. Equal requests are thus served in the order of their coming. (Equal shares for all, which
  went before, made a full queue's requests finish all together, late, and in a burst.)
- The engine may have several slots, which run batches beside each other and wait for one another at no point: what one
  of them is delayed by delays no other. The next batch runs while the rows of the last are handed out.
- An entry carries its own future, deadline and arrival. However it ends (result, failure, deadline, cancellation,
  shutdown), no batch takes rows of it from then on, and those that wait leave the queue with its caller.
- Everything here runs on the event loop but `Lane.run`, which runs on the engine's threads; there are no locks.
- If a batch fails it is halved until only the guilty callers fail. After a device error nothing is tried again.
- What is kept for a caller is its own rows and no more: no answer holds on to the batches that it came from.
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import math
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
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
NEAR_FULL = 0.25  # of the largest batch: fewer rows say little about the rate, for a batch has a cost of its own
# Fewer rows, and what takes less time, are not divided among idle slots: a batch of so few costs little less than one
# of twice as many, and slots that run beside one another hold up the event loop.
SHARE_ROWS, SHARE_S = 16, 0.01
# The loop goes first for so many turns, or until two of them in a row bring nothing: one reads what clients have sent,
# and the next begins to answer it.
SETTLING_TURNS, QUIET_TURNS = 8, 2
# And where it shares the engine's processor, for up to SETTLING_S until as many rows wait as did when the last batch
# was done, if any come within a lull. That is halved where less than half of them came, else doubled.
LEAST_LULL_S, MOST_LULL_S, SETTLING_S = 0.0002, 0.002, 0.003

# Whoever waits for this processor: clients on this machine, which have answers to read.
_let_others_go_first: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # Windows has none

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
    most_rows: int  # in one batch; the batcher may have less room

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        ...

    def run(self, parts: Sequence[Part]) -> Rows:
        """Compute every part's rows, in order, as one array. Called on one of the engine's threads.

        Raises:
            OutOfMemory, DeviceFailed: See there. Anything else is blamed on the rows.
        """
        ...


class Patience(NamedTuple):
    """What a free engine waits for before it begins a batch.

    Attributes:
        window_s: So long for company, if it was idle, unless a batch is full before.
        settled_rows: For the event loop, while it has requests in hand, until so many rows wait.
        shares_processor: Whether engine and loop have one processor between them.
    """

    window_s: float = 0.0
    settled_rows: int = 64
    shares_processor: bool = False


EAGER = Patience()
SHARING = Patience(settled_rows=256, shares_processor=True)


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
    number: int  # in the order of arrival
    future: "asyncio.Future[Result]"
    taken: int = 0  # rows handed to a batch so far
    given: int = 0  # rows that came back
    answer: Rows | None = None  # room for all of them, from the first that came back on
    queue_s: float = 0.0
    compute_s: float = 0.0

    @property
    def needed(self) -> int:
        """Rows that no batch has taken yet."""
        return self.rows - self.taken

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for it: it has ended, or its deadline has passed and the loop has not come to that."""
        if now >= self.arrival + self.deadline_s:
            self.expire()
        return self.future.done()

    def expire(self) -> None:
        """End because the deadline has passed."""
        self.fail(DeadlinePassed(self.deadline_s))

    def give(self, start: int, rows: Rows, seconds: float) -> None:
        """Add computed rows, `start` being the first one's place; with the last of them the caller has its answer."""
        if self.future.done():
            return
        if self.answer is None:
            self.answer = np.empty((self.rows, *rows.shape[1:]), rows.dtype)
        # Copied: a view would keep the whole batch in memory for as long as the slowest of its callers.
        self.answer[start : start + len(rows)] = rows
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


@dataclass(eq=False)
class _Call:
    """A batch that the engine works on."""

    slices: list[_Slice]
    rows: int
    started: float
    future: "asyncio.Future[Rows]"
    seconds: float = 0.0

    @property
    def lane(self) -> Lane:
        """Whose rows they are."""
        return self.slices[0].entry.lane


class _Queue:
    """Who waits for one lane: by age, and by need."""

    def __init__(self) -> None:
        self._by_age: dict[int, _Entry] = {}  # by number
        # A heap of needs and numbers; void where the entry has gone or needs less by now. No entry is kept by it.
        self._by_need: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[_Entry]:
        return iter(self._by_age.values())

    def add(self, entry: _Entry) -> None:
        """Join the queue."""
        self._by_age[entry.number] = entry
        heapq.heappush(self._by_need, (entry.needed, entry.number))

    def remove(self, entry: _Entry) -> bool:
        """Leave it. Whether the entry was there."""
        if self._by_age.pop(entry.number, None) is None:
            return False
        if len(self._by_need) > 2 * len(self._by_age) + 64:
            self._by_need = [(one.needed, number) for number, one in self._by_age.items()]
            heapq.heapify(self._by_need)
        return True

    def take(self, room: int, now: float) -> list[_Slice]:
        """Rows for a batch: half of the room for the oldest, and the rest for those who need least."""
        taken: dict[_Entry, int] = {}  # where each one's slice begins

        def give(entry: _Entry, most: int) -> int:
            rows = min(entry.needed, most)
            taken.setdefault(entry, entry.taken)
            entry.taken += rows
            if entry.needed:
                heapq.heappush(self._by_need, (entry.needed, entry.number))
            return rows

        left = room - room // 2
        for entry in self._by_age.values():
            if not left:
                break
            if not entry.is_over(now):
                left -= give(entry, left)
        left += room // 2
        while left and self._by_need:
            needed, number = heapq.heappop(self._by_need)
            smallest = self._by_age.get(number)
            if smallest is not None and needed == smallest.needed and not smallest.is_over(now):
                left -= give(smallest, left)
        for entry in taken:
            if not entry.needed:
                self.remove(entry)
        return [_Slice(entry, start, entry.taken) for entry, start in taken.items()]


class Batcher:
    """Rows in, batches to the engine, rows out.

    Args:
        run: Runs `lane.run(parts)` on the thread of an engine's slot (0 … slots − 1); returns a future of its result.
        metrics: Where the queue, batch and compute series go.
        device: Label of the queue's gauges.
        slots: Batches that the engine runs beside each other.
        max_rows: Largest batch.
        max_queued_rows: Rows that may wait. Past it `submit` refuses instead of waiting.
        patience: What a free engine waits for before it begins a batch.
        clock: Seconds, rising; deadlines end by the event loop's own.

    Use as an asynchronous context manager, or call `start` and `close`.
    """

    def __init__(
        self,
        run: Callable[[int, Lane, Sequence[Part]], "asyncio.Future[Rows]"],
        metrics: Metrics,
        *,
        device: str,
        slots: int = 1,
        max_rows: int,
        max_queued_rows: int,
        patience: Patience = EAGER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._metrics = metrics
        self._clock = clock
        self._device = device
        self._max_rows = self._cap = max_rows
        self._max_queued_rows = max_queued_rows
        self._patience = patience
        self._lull_s = MOST_LULL_S
        self._usual_rows = 0  # that waited or were in a batch when the last one was done
        self._usual_callers, self._done_at = 0, -math.inf  # of these rows, and when it was done
        self._lanes: OrderedDict[Lane, _Queue] = OrderedDict()
        self._failed: deque[list[_Slice]] = deque()  # halves of batches that failed, to be tried before all others
        self._numbers = itertools.count()
        self._unfinished: set[_Entry] = set()
        self._queued_rows = 0
        self._recent_rows = self._recent_s = 0.0  # of recent batches, the older the less
        self._rate_is_known = False  # whether these are nearly full ones
        self._good_batches = 0
        self._slots = slots
        self._workers: list[asyncio.Task[None]] = []
        self._idle: list[asyncio.Future[None]] = []  # of workers that wait to be woken
        self._settling = 0  # workers that let the loop go first
        self._window: asyncio.TimerHandle | None = None
        self._calls: set[_Call] = set()
        self._all_done = asyncio.Event()
        self._all_done.set()
        self._draining = False
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
        loop = asyncio.get_running_loop()
        for slot in range(self._slots):
            worker = loop.create_task(self._work(slot), name=f"batcher {slot}")
            worker.add_done_callback(self._worker_ended)
            self._workers.append(worker)

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return self._queued_rows

    @property
    def is_draining(self) -> bool:
        """Whether newcomers are refused because the end is near."""
        return self._draining

    def busy_s(self) -> float:
        """Seconds since the oldest of the running engine calls began; 0 when none runs."""
        return max((self._clock() - call.started for call in self._calls), default=0.0)

    def oldest_age_s(self) -> float:
        """Seconds since the arrival of the oldest entry that has rows waiting; 0 when none has."""
        arrivals = [next(iter(waiting)).arrival for waiting in self._lanes.values()]
        return self._clock() - min(arrivals) if arrivals else 0.0

    def retry_after_s(self) -> int:
        """Whole seconds until the queue of now is computed, at the measured rate."""
        return max(1, math.ceil(self._seconds(self._queued_rows)))

    def _seconds(self, rows: int) -> float:
        """What so many rows take with every slot at work, at the measured rate; 0 before anything was measured."""
        return rows * self._recent_s / self._recent_rows / self._slots if self._recent_rows else 0.0

    def _comes_too_late(self, rows: int, deadline_s: float) -> bool:
        """Whether this many rows, coming now, would wait until after their deadline."""
        if not self._rate_is_known or self._seconds(self._queued_rows) <= deadline_s:
            return False
        waiting = (entry.needed for queue in self._lanes.values() for entry in queue)
        ahead = 2 * sum(needed for needed in waiting if needed <= rows)  # half of each batch is theirs
        return self._seconds(min(ahead, self._queued_rows)) > deadline_s > 0

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
            QueueFull: No room, or so many before it that it came too late. Nothing was queued, so a retry is safe.
            DeadlinePassed: It took too long. What still waited never reached the engine.
            Draining, NotReady: The service ends, or its engine has failed for good.
            EngineFailed: The engine raised for these rows, or returned another number of rows.
            ValueError: No rows. The schema should have refused: our bug.
        """
        if rows < 1:
            raise ValueError(f"cannot submit {rows} rows")
        self.admit(rows)
        if self._comes_too_late(rows, deadline_s):
            raise QueueFull(self.retry_after_s())
        loop = asyncio.get_running_loop()
        entry = _Entry(lane, payload, rows, deadline_s, self._clock(), next(self._numbers), loop.create_future())
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
        self._lanes.setdefault(entry.lane, _Queue()).add(entry)
        self._queued_rows += entry.rows
        self._unfinished.add(entry)
        self._all_done.clear()
        if not self._patience.window_s or self._queued_rows >= self._cap:
            self._wake_one()
        elif self._window is None:
            self._window = asyncio.get_running_loop().call_later(self._patience.window_s, self._wake_one)

    def _wake_one(self) -> None:
        """Have an idle worker look at the queue; the busy ones will anyway."""
        if self._window is not None:
            self._window.cancel()
            self._window = None
        while self._idle:
            waker = self._idle.pop()
            if not waker.done():
                waker.set_result(None)
                return

    def _forget(self, entry: _Entry) -> None:
        waiting = self._lanes.get(entry.lane)
        if waiting is not None and waiting.remove(entry):
            self._queued_rows -= entry.needed
            if not waiting:
                del self._lanes[entry.lane]
        self._unfinished.discard(entry)
        if not self._unfinished:
            self._all_done.set()

    async def _work(self, slot: int) -> None:
        call = None
        while self.failure is None:
            closed_by = "idle"
            if call is None and (call := self._launch_next(slot, closed_by)) is None:
                waker = asyncio.get_running_loop().create_future()
                self._idle.append(waker)
                await waker
                await self._settle()
                call = self._launch_next(slot, "window" if self._patience.window_s else "idle")
                continue
            call = await self._finish(slot, call)

    async def _settle(self) -> None:
        """Let the loop take in what clients have sent already, unless there is a good batch, or one client alone."""
        self._settling += 1
        turns = quiet = 0
        began = came = self._clock()
        while self._has_company and not self._is_settled:
            if turns >= SETTLING_TURNS or quiet >= QUIET_TURNS:
                if not self._may_come_again(came, began):
                    self._adapt_lull()
                    break
                _let_others_go_first()
            before = self._queued_rows
            await asyncio.sleep(0)
            turns, quiet = turns + 1, quiet + 1
            if self._queued_rows > before:
                quiet, came = 0, self._clock()
        self._settling -= 1

    @property
    def _has_company(self) -> bool:
        """Whether there are several callers; where they have their moment, also one who was just answered with others.

        Two who ask again and again would otherwise take turns for ever, each alone in a batch.
        """
        if len(self._unfinished) > 1:
            return True
        is_early = self._usual_callers > 1 and self._clock() < self._done_at + self._lull_s
        return bool(self._unfinished) and self._patience.shares_processor and is_early

    def _may_come_again(self, came: float, began: float) -> bool:
        """Whether clients who were just answered still have their moment; `came` is when the last rows did."""
        is_early = self._clock() < min(came + self._lull_s, began + SETTLING_S)
        return self._patience.shares_processor and self._queued_rows < self._usual_rows and is_early

    def _adapt_lull(self) -> None:
        if 2 * self._queued_rows >= self._usual_rows:
            self._lull_s = min(MOST_LULL_S, 2 * self._lull_s)
        else:
            self._lull_s = max(LEAST_LULL_S, self._lull_s / 2)

    @property
    def _is_settled(self) -> bool:
        """Whether a good batch waits."""
        return self._queued_rows >= min(self._patience.settled_rows, self._cap)

    def _share(self) -> int:
        """Rows of those that wait that the next batch may have, so that other idle slots get as many."""
        alone_s = self._slots * self._seconds(self._queued_rows)
        if len(self._unfinished) > 1 and 0 < alone_s < SHARE_S:
            return self._queued_rows
        return max(SHARE_ROWS, math.ceil(self._queued_rows / (1 + len(self._idle) + self._settling)))

    def _room(self, lane: Lane) -> int:
        """Rows that a batch of this lane may have."""
        return min(self._cap, lane.most_rows)

    def _launch_next(self, slot: int, closed_by: str) -> _Call | None:
        """Start a half of a failed batch, else a batch from the lane whose turn it is; None where there is nothing."""
        while self._failed:
            # Some of their callers may have left since, and what fits may have become less.
            if slices := [s for s in self._failed.popleft() if not s.entry.future.done()]:
                if _count(slices) > self._cap:
                    slices, rest = _halved(slices, self._cap)
                    self._failed.appendleft(rest)
                return self._launch(slot, slices)
        share = self._share()
        for lane, waiting in list(self._lanes.items()):
            slices = waiting.take(min(self._room(lane), share), self._clock())
            if not waiting:
                del self._lanes[lane]
            if slices:
                if waiting:
                    self._lanes.move_to_end(lane)
                self._queued_rows -= _count(slices)
                call = self._launch(slot, slices)
                self._note_start(call, closed_by)  # while the engine works already
                if self._lanes:
                    self._wake_one()
                return call
        return None

    def _note_start(self, call: _Call, closed_by: str) -> None:
        series = self._metrics.of_work(call.lane.bundle, call.lane.operation)
        for entry, start, _ in call.slices:
            if start == 0:
                entry.queue_s = call.started - entry.arrival
                series.queue_wait.observe(entry.queue_s)
        series.batches("full" if call.rows == self._room(call.lane) else closed_by).inc()
        series.batch_images.observe(call.rows)

    def _launch(self, slot: int, slices: list[_Slice]) -> _Call:
        parts = [Part(s.entry.payload, s.start, s.stop) for s in slices]
        started = self._clock()
        call = _Call(slices, _count(slices), started, self._run(slot, slices[0].entry.lane, parts))
        self._calls.add(call)
        return call

    async def _finish(self, slot: int, call: _Call) -> _Call | None:
        """Wait for an engine call; whatever comes of it, every caller in it gets its rows or an error, or is retried.

        Returns the slot's next call where that has begun: where a good batch waits, it runs while these rows are
        handed out.
        """
        error = await self._outcome(call)
        if error is not None:
            self._blame(call.slices, error)
            return None
        self._usual_rows, self._usual_callers = self._queued_rows + call.rows, len(self._unfinished)
        self._done_at = self._clock()
        following = self._launch_next(slot, "idle") if self._is_settled else None
        self._hand_out(call)
        if following is None:
            await self._settle()
        return following

    async def _outcome(self, call: _Call) -> Exception | None:
        """Wait for an engine call: None, or why its rows are not there."""
        try:
            result = await call.future
            if len(result) != call.rows:
                raise EngineFailed(f"the engine was given {call.rows} rows and returned {len(result)}")  # noqa: TRY301
        except OutOfMemory as error:
            return OutOfMemory(str(error))  # a new one: this one's traceback holds the tensors
        except Exception as error:  # noqa: BLE001 — whatever it is, it belongs to these callers
            return error
        finally:
            self._calls.discard(call)
            call.seconds = self._clock() - call.started
            self._metrics.of_work(call.lane.bundle, call.lane.operation).compute.observe(call.seconds)
        self._note_success(call)
        return None

    def _hand_out(self, call: _Call) -> None:
        """Give every caller its rows."""
        series = self._metrics.of_work(call.lane.bundle, call.lane.operation)
        self._metrics.engine_last_progress.labels(self._device).set_to_current_time()
        series.images.inc(call.rows)
        series.batch_padding_images.inc(call.lane.padded(call.rows) - call.rows)
        result, place = call.future.result(), 0
        for entry, start, stop in call.slices:
            entry.give(start, result[place : place + stop - start], call.seconds)
            place += stop - start

    def _blame(self, slices: list[_Slice], error: Exception) -> None:
        """After a failure: end those whose fault it is, halve the batch where that is not known."""
        rows = _count(slices)
        if isinstance(error, DeviceFailed):
            self._metrics.engine_errors.labels("device").inc()
            self.fail_all("the device failed", error)
        elif isinstance(error, OutOfMemory):
            self._metrics.out_of_memory.inc()
            self._metrics.engine_errors.labels("out_of_memory").inc()
            self._cap, self._good_batches = min(self._cap, max(1, rows // 2)), 0  # another slot may have lowered it
            log.warning("out of memory with %d rows: %s", rows, error)
            if rows == 1:
                slices[0].entry.fail(EngineFailed("out of memory with a single row"))
            else:
                self._failed.extendleft(reversed(_halved(slices, rows // 2)))
        elif len(slices) == 1:
            self._metrics.engine_errors.labels("failed_rows").inc()
            failure = EngineFailed(f"the engine failed on these rows: {error!r}")
            failure.__cause__ = error
            slices[0].entry.fail(failure)
        else:
            self._metrics.engine_errors.labels("batch").inc()
            middle = len(slices) // 2
            self._failed.extendleft([slices[middle:], slices[:middle]])

    def _note_success(self, call: _Call) -> None:
        rows, seconds = call.rows, call.seconds
        is_near_full = rows >= NEAR_FULL * self._room(call.lane)
        if is_near_full and not self._rate_is_known:
            self._recent_rows = self._recent_s = 0.0
            self._rate_is_known = True
        if is_near_full or not self._rate_is_known:
            # Rows and seconds apart, so that a large batch counts for what it is worth among smaller ones.
            self._recent_rows = RATE_MEMORY * self._recent_rows + rows
            self._recent_s = RATE_MEMORY * self._recent_s + seconds
        if self._cap == self._max_rows or rows < self._cap:
            return  # a small batch says nothing about a larger one
        self._good_batches += 1
        if self._good_batches >= GROW_AFTER_BATCHES:
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
        for worker in self._workers:
            worker.remove_done_callback(self._worker_ended)
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)


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
