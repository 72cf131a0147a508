"""Who waits for which model runner, and whose rows the next batch takes.

Rows are counted, not requests. Half of a batch goes to the oldest entries, so that nobody waits for ever; the other
half to those that need the fewest rows, so that a request of thousands delays one of a single row by no more than the
batch that is running. Entries of equal size are thus served in order of arrival. Runners take turns.
"""

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from service.engine.batching.batch import BatchSlice, ModelRunner, Rows, count_rows
from service.errors import DeadlinePassed


class Result(NamedTuple):
    """One caller's rows in order, and where its time went: waiting for its first batch, and in its batches."""

    rows: Rows
    queue_s: float
    compute_s: float


@dataclass(eq=False)
class Entry:
    """One caller's rows, from arrival to answer."""

    runner: ModelRunner
    payload: object
    rows: int
    deadline_s: float
    arrival: float
    number: int  # in the order of arrival
    future: "asyncio.Future[Result]"
    span: Any = None  # of its request, where that is traced
    taken: int = 0  # rows that a batch has taken
    returned: int = 0  # rows that have come back
    answer: Rows | None = None  # room for all rows, made when the first come back
    queue_s: float = 0.0
    compute_s: float = 0.0

    @property
    def needed(self) -> int:
        """Rows that no batch has taken yet."""
        return self.rows - self.taken

    def is_over(self, now: float) -> bool:
        """Whether nobody waits for it any more. The loop's own timer for its deadline may be late."""
        if now >= self.arrival + self.deadline_s:
            self.expire()
        return self.future.done()

    def expire(self) -> None:
        """End because the deadline has passed."""
        self.fail(DeadlinePassed())  # `deadline_s` is what was left; whoever waits knows what the client asked for

    def add_rows(self, start: int, rows: Rows, seconds: float) -> None:
        """Take computed rows, of which `start` is the first one's place. The last of them complete the answer."""
        if self.future.done():
            return
        if self.answer is None:
            self.answer = np.empty((self.rows, *rows.shape[1:]), rows.dtype)
        # Copied: a view would keep the whole batch in memory for as long as the slowest of its callers.
        self.answer[start : start + len(rows)] = rows
        self.returned += len(rows)
        self.compute_s += seconds
        if self.returned == self.rows:
            self.future.set_result(Result(self.answer, self.queue_s, self.compute_s))

    def fail(self, error: Exception) -> None:
        """End with an error, unless it has ended before."""
        if not self.future.done():
            self.future.set_exception(error)


class RequestQueue:
    """Every waiting entry, by runner.

    Attributes:
        rows: Rows that wait.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._queues: OrderedDict[ModelRunner, _RunnerQueue] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, entry: Entry) -> None:
        """Have an entry wait."""
        self._queues.setdefault(entry.runner, _RunnerQueue()).add(entry)
        self.rows += entry.needed

    def remove(self, entry: Entry) -> None:
        """Let an entry go, if it still waits."""
        queue = self._queues.get(entry.runner)
        if queue is not None and queue.remove(entry):
            self.rows -= entry.needed
            if not queue:
                del self._queues[entry.runner]

    def take(self, room: Callable[[ModelRunner], int], now: float) -> list[BatchSlice[Entry]]:
        """The next batch, for the runner whose turn it is, of at most its room in rows; empty where nobody waits."""
        for runner, queue in list(self._queues.items()):
            slices = queue.take(room(runner), now)
            if not queue:
                del self._queues[runner]
            if slices:
                if queue:
                    self._queues.move_to_end(runner)
                self.rows -= count_rows(slices)
                return slices
        return []

    def rows_ahead(self, rows: int) -> int:
        """Rows that are computed before a newcomer of so many: the smaller entries', which get half of each batch."""
        smaller = sum([entry.needed for queue in self._queues.values() for entry in queue if entry.needed <= rows])
        return min(2 * smaller, self.rows)

    def oldest_arrival(self) -> float | None:
        """When the oldest of the waiting entries came."""
        return min((next(iter(queue)).arrival for queue in self._queues.values()), default=None)


class _RunnerQueue:
    """Who waits for one runner: by age, and by need."""

    def __init__(self) -> None:
        self._by_age: dict[int, Entry] = {}  # by number
        # A heap of (needed, number). An item counts only while its entry waits and still needs that many rows.
        self._by_need: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_age.values())

    def add(self, entry: Entry) -> None:
        self._by_age[entry.number] = entry
        heapq.heappush(self._by_need, (entry.needed, entry.number))

    def remove(self, entry: Entry) -> bool:
        """Whether the entry was there."""
        if self._by_age.pop(entry.number, None) is None:
            return False
        if len(self._by_need) > 2 * len(self._by_age) + 64:  # mostly items that no longer count
            self._by_need = [(one.needed, number) for number, one in self._by_age.items()]
            heapq.heapify(self._by_need)
        return True

    def take(self, room: int, now: float) -> list[BatchSlice[Entry]]:
        """Half of the room for the oldest, and the rest for those who need least."""
        starts: dict[Entry, int] = {}
        left = self._take_oldest(room - room // 2, now, starts)
        self._take_smallest(left + room // 2, now, starts)
        for entry in starts:
            if not entry.needed:
                self.remove(entry)
        return [BatchSlice(entry, start, entry.taken) for entry, start in starts.items()]

    def _take_oldest(self, room: int, now: float, starts: dict[Entry, int]) -> int:
        for entry in self._by_age.values():
            if not room:
                break
            if not entry.is_over(now):
                room -= self._take_rows(entry, room, starts)
        return room

    def _take_smallest(self, room: int, now: float, starts: dict[Entry, int]) -> None:
        while room and self._by_need:
            needed, number = heapq.heappop(self._by_need)
            entry = self._by_age.get(number)
            if entry is not None and needed == entry.needed and not entry.is_over(now):
                room -= self._take_rows(entry, room, starts)

    def _take_rows(self, entry: Entry, most: int, starts: dict[Entry, int]) -> int:
        rows = min(entry.needed, most)
        starts.setdefault(entry, entry.taken)
        entry.taken += rows
        if entry.needed:
            heapq.heappush(self._by_need, (entry.needed, entry.number))
        return rows
