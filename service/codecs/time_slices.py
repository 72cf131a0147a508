"""Runs long Python work on the event loop in time slices: at most one slice in each turn of the loop.

Worker threads would not make such work faster, because all threads share one interpreter lock, and they would slow down
everything else: the loop would wait milliseconds for that lock before each of its callbacks. With some hundred
connections sending large bodies there are as many callbacks in each turn, and a new connection, such as a liveness
probe, would wait for all of them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

SLICE_S = 0.001
NEW_WORK_S = 0.01  # within one turn of the loop, new work may run its first slice at once for this long in total

T = TypeVar("T")


class OffLoopWork(NamedTuple):
    """A call that takes longer than a slice but releases the interpreter lock, so it should run off the event loop.

    Attributes:
        work: May be called on any thread.
        cost: Estimated duration, in a unit that all calls compared with one another share.
    """

    work: Callable[[], Any]
    cost: float


# A generator that returns T and runs in steps of well under a slice. It yields None where it may be interrupted, and
# OffLoopWork to have that done off the loop; the result is sent back in.
Steps = Generator[OffLoopWork | None, Any, T]


class FairQueue:
    """Jobs that wait for a turn. Turns go alternately to the oldest job and to the cheapest one.

    Serving the oldest lets jobs of a crowd finish one after the other, instead of all of them past their deadlines.
    Serving the cheapest keeps short jobs from waiting for long ones.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], tuple[float, float]] = {}  # when each job arrived, and its cost
        self._is_for_oldest = False

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, arrived: float, cost: float) -> asyncio.Future[None]:
        """Return a future that is done when this job's turn has come. Cancel it to stop waiting."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = arrived, cost
        turn.add_done_callback(lambda turn: self._waiting.pop(turn, None))
        return turn

    def wake_next(self) -> bool:
        """Give the next turn to a waiting job. Returns False if no job waits."""
        self._is_for_oldest = not self._is_for_oldest
        turn = min(self._waiting, key=lambda turn: self._waiting[turn][0 if self._is_for_oldest else 1], default=None)
        if turn is None:
            return False
        del self._waiting[turn]
        if turn.done():  # cancelled, but its callback, which removes it, has not run yet
            return self.wake_next()
        turn.set_result(None)
        return True


class TimeSlices:
    """Divides the event loop's time between all long work. A job's cost is the time that it has used so far."""

    def __init__(self) -> None:
        self._queue = FairQueue()
        self._is_wake_up_scheduled = False
        self._new_work_s = 0.0

    async def run(
        self, steps: Steps[T], off_loop: Callable[[OffLoopWork], Awaitable[tuple[Any, float]]]
    ) -> tuple[T, float]:
        """Run all steps and return their result with the seconds that they took, not counting waits for a turn.

        The first slice runs at once, without a wait, unless much other new work has already run in this turn.

        Args:
            steps: The work.
            off_loop: Runs a call off the event loop; returns its result and the seconds that it took.
        """
        arrived = time.perf_counter()
        yielded: Any
        took_s, sent, has_ended = 0.0, None, False
        is_new = self._new_work_s < NEW_WORK_S
        if not is_new:
            await self._wait_for_turn(arrived, took_s)
        while True:
            started = time.perf_counter()
            try:
                yielded = steps.send(sent)
                while yielded is None and time.perf_counter() - started < SLICE_S:
                    yielded = next(steps)
            except StopIteration as end:
                yielded, has_ended = end.value, True
            slice_s = time.perf_counter() - started
            took_s += slice_s
            if is_new:
                self._count_new_work(slice_s)
                is_new = False
            if has_ended:
                return yielded, took_s
            if yielded is None:
                sent = None
                await self._wait_for_turn(arrived, took_s)
            else:
                sent, call_s = await off_loop(yielded)
                took_s += call_s

    def _count_new_work(self, slice_s: float) -> None:
        if not self._new_work_s:
            asyncio.get_running_loop().call_soon(self._reset_new_work)
        self._new_work_s += slice_s

    def _reset_new_work(self) -> None:
        self._new_work_s = 0.0

    async def _wait_for_turn(self, arrived: float, took_s: float) -> None:
        """Wait for the next slice, which comes in a later turn of the loop."""
        turn = self._queue.wait(arrived, took_s)
        self._schedule_wake_up()
        await turn

    def _schedule_wake_up(self) -> None:
        if self._queue and not self._is_wake_up_scheduled:
            self._is_wake_up_scheduled = True
            asyncio.get_running_loop().call_soon(self._wake_next)

    def _wake_next(self) -> None:
        self._is_wake_up_scheduled = False
        self._queue.wake_next()
        self._schedule_wake_up()


def run_steps(steps: Steps[T]) -> T:
    """Run all steps without a pause and return their result. Only for work that is known to be short."""
    sent = None
    while True:
        try:
            yielded = steps.send(sent)
        except StopIteration as end:
            result: T = end.value
            return result
        sent = None if yielded is None else yielded.work()


def timed_call(work: Callable[[], T]) -> tuple[T, float]:
    """Call `work`; returns its result and the seconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started
