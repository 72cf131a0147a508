"""Long work that is nearly all Python, done on the event loop in slices: at most one in each of the loop's turns.

Threads would not make it faster, for they share one interpreter, and everybody else much slower: the loop would wait
milliseconds for the interpreter's lock before each of its callbacks. Some hundred connections that bring large bodies
have as many callbacks a turn, and who connects meanwhile, be it to ask whether we are alive, would wait for them all.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

SLICE_S = 0.001
NEWCOMERS_S = 0.01  # in one turn, for the first slices of all that is new

T = TypeVar("T")


class Apart(NamedTuple):
    """Work for elsewhere than the event loop: it takes longer than a slice, but needs no interpreter.

    Attributes:
        work: May be called on any thread.
        cost: About how long it takes, in whatever unit all of them have.
    """

    work: Callable[[], Any]
    cost: float


# Work that gives T, in steps of well under a slice: it yields None where it may be interrupted, and what is to be done
# apart, whose result it is sent.
Steps = Generator[Apart | None, Any, T]


class Turns:
    """Those who wait for their turn.

    Every other turn is the oldest's, so that in a crowd one after the other is done, and not all when it is too late
    for all; and every other one is for whoever asks for the least, so that the short does not wait for the long.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], tuple[float, float]] = {}  # when it came, and what it costs
        self._is_oldests = False

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, came: float, cost: float) -> asyncio.Future[None]:
        """Done when the turn has come; who does not wait for it any longer cancels it."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = came, cost
        turn.add_done_callback(lambda turn: self._waiting.pop(turn, None))
        return turn

    def next(self) -> bool:
        """Give somebody the next turn; False where nobody waits."""
        self._is_oldests = not self._is_oldests
        turn = min(self._waiting, key=lambda turn: self._waiting[turn][0 if self._is_oldests else 1], default=None)
        if turn is None:
            return False
        del self._waiting[turn]
        if turn.done():  # it was cancelled in this very step
            return self.next()
        turn.set_result(None)
        return True


class TimeSlices:
    """Divides the loop's time between all such work; what it costs is what it has had."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._is_turning = False
        self._newcomers_s = 0.0

    async def run(self, steps: Steps[T], apart: Callable[[Apart], Awaitable[tuple[Any, float]]]) -> tuple[T, float]:
        """The result of this work, and the seconds that it took, without those that it waited for its turn.

        What is done within a slice is done where it stands, unless very many come at once. `apart` does what is to be
        done elsewhere, and returns its result with the seconds that it took.
        """
        came = time.perf_counter()
        gave: Any
        took_s, sent, ended = 0.0, None, False
        is_new = self._newcomers_s < NEWCOMERS_S
        if not is_new:
            await self._turn(came, took_s)
        while True:
            started = time.perf_counter()
            try:
                gave = steps.send(sent)
                while gave is None and time.perf_counter() - started < SLICE_S:
                    gave = next(steps)
            except StopIteration as end:
                gave, ended = end.value, True
            slice_s = time.perf_counter() - started
            took_s += slice_s
            if is_new:
                self._count_newcomer(slice_s)
                is_new = False
            if ended:
                return gave, took_s
            if gave is None:
                sent = None
                await self._turn(came, took_s)
            else:
                sent, call_s = await apart(gave)
                took_s += call_s

    def _count_newcomer(self, slice_s: float) -> None:
        if not self._newcomers_s:
            asyncio.get_running_loop().call_soon(self._begin_turn)
        self._newcomers_s += slice_s

    def _begin_turn(self) -> None:
        self._newcomers_s = 0.0

    async def _turn(self, came: float, took_s: float) -> None:
        """Wait for the next slice, in another turn of the loop."""
        turn = self._turns.wait(came, took_s)
        self._go_on()
        await turn

    def _go_on(self) -> None:
        if self._turns and not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._is_turning = False
        self._turns.next()
        self._go_on()


def at_once(steps: Steps[T]) -> T:
    """The result of these steps, one right after the other: for what is known to be short."""
    sent = None
    while True:
        try:
            gave = steps.send(sent)
        except StopIteration as end:
            result: T = end.value
            return result
        sent = None if gave is None else gave.work()


def timed(work: Callable[[], T]) -> Callable[[], tuple[T, float]]:
    """The same work, whose result comes with the seconds it took."""

    def work_and_time() -> tuple[T, float]:
        started = time.perf_counter()
        result = work()
        return result, time.perf_counter() - started

    return work_and_time
