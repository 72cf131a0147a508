"""How long a free engine instance waits before it starts a batch."""

import asyncio
import math
import os
from collections.abc import Callable
from typing import NamedTuple

# Where engine and loop have a processor each, a batch waits for so many turns of the loop, or until so many in a row
# bring no rows: in one turn the loop reads what clients have sent, and in the next it begins to answer.
MOST_TURNS, MOST_QUIET_TURNS = 8, 2
# Where they share one, clients who were just answered may also ask again: a batch waits until as many rows are there as
# were when the last one was done, while new ones come with shorter gaps than these. The gap adapts: doubled where at
# least half of the rows came back, halved where fewer did.
LEAST_GAP_S, MOST_GAP_S = 0.0002, 0.002
MOST_WAIT_S = 0.003  # in all

# To other processes on this processor: clients on the same machine, which have answers to read. Windows has no call.
_yield_processor: Callable[[], None] = getattr(os, "sched_yield", lambda: None)


class BatchingPolicy(NamedTuple):
    """What a free engine instance waits for before it starts a batch.

    Attributes:
        max_queue_delay_s: An idle engine waits so long for company, unless a batch is full sooner.
        enough_rows: With so many rows waiting, a batch starts at once.
        shares_processor: Whether engine and event loop have one processor between them.
    """

    max_queue_delay_s: float = 0.0
    enough_rows: int = 64
    shares_processor: bool = False


EAGER = BatchingPolicy()
SHARING = BatchingPolicy(enough_rows=256, shares_processor=True)


class ArrivalWait:
    """Lets the event loop read the requests that it has in hand before a batch starts.

    The loop gets through them sooner while no engine competes for caches and the interpreter's lock, and they then
    share a batch. A caller that is alone is not made to wait.

    Args:
        policy: How long to wait.
        waiting_rows: Rows that wait now.
        callers: Callers that have no answer yet.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        waiting_rows: Callable[[], int],
        callers: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._waiting_rows = waiting_rows
        self._callers = callers
        self._clock = clock
        self.waiting_instances = 0  # engine instances that are inside `wait`
        self._gap_s = MOST_GAP_S
        # When the last batch was done: rows that waited or were in it, their callers, and the time.
        self._rows_before = self._callers_before = 0
        self._done_at = -math.inf

    def note_done(self, rows: int) -> None:
        """A batch of this many rows was just computed; nobody has been answered yet."""
        self._rows_before = self._waiting_rows() + rows
        self._callers_before = self._callers()
        self._done_at = self._clock()

    def has_enough(self, max_rows: int) -> bool:
        """Whether the rows that wait are worth a batch without waiting for more."""
        return self._waiting_rows() >= min(self._policy.enough_rows, max_rows)

    def expects_nobody_else(self) -> bool:
        """Whether there is one caller, as there was at the last batch. It need not even wait for a turn of the loop."""
        return self._callers() == self._callers_before == 1

    async def wait(self, max_rows: int) -> None:
        """Return when a batch should start."""
        self.waiting_instances += 1
        try:
            await self._wait(max_rows)
        finally:
            self.waiting_instances -= 1

    async def _wait(self, max_rows: int) -> None:
        turns = quiet_turns = 0
        began = last_arrival = self._clock()
        while self._has_company() and not self.has_enough(max_rows):
            if turns >= MOST_TURNS or quiet_turns >= MOST_QUIET_TURNS:
                if not self._may_come_again(last_arrival, began):
                    self._adapt_gap()
                    return
                _yield_processor()
            before = self._waiting_rows()
            await asyncio.sleep(0)
            turns, quiet_turns = turns + 1, quiet_turns + 1
            if self._waiting_rows() > before:
                quiet_turns, last_arrival = 0, self._clock()

    def _has_company(self) -> bool:
        """Whether there are several callers, or, on a shared processor, one who was answered with others just now.

        Without the latter, two who ask again and again would take turns for ever, each alone in a batch.
        """
        if self._callers() > 1:
            return True
        was_just_answered = self._callers_before > 1 and self._clock() < self._done_at + self._gap_s
        return bool(self._callers()) and self._policy.shares_processor and was_just_answered

    def _may_come_again(self, last_arrival: float, began: float) -> bool:
        """Whether clients who were just answered still have time to ask again."""
        is_early = self._clock() < min(last_arrival + self._gap_s, began + MOST_WAIT_S)
        return self._policy.shares_processor and self._waiting_rows() < self._rows_before and is_early

    def _adapt_gap(self) -> None:
        if 2 * self._waiting_rows() >= self._rows_before:
            self._gap_s = min(MOST_GAP_S, 2 * self._gap_s)
        else:
            self._gap_s = max(LEAST_GAP_S, self._gap_s / 2)
