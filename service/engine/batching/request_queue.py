"""Who waits for which model runner, and whose rows the next batch takes.

Rows are counted, not requests. Half of a batch goes to the oldest entries, so that nobody waits for ever; the other
half to those that need the fewest rows, so that a request of thousands delays one of a single row by no more than the
batch that is running. Entries of equal size are thus served in order of arrival.

Clients' keys, by their names, take turns: the one that was served least recently says which of its runners is next, and
these take turns too. The batch is divided evenly among the keys that wait for that runner; what one does not need goes
to the others. Within a key's share the rule above holds. So how much one key asks for costs another at most half of the
engine, and where only one key waits, or nobody has one, the rule above is all there is.
"""

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from service.engine.batching.batch import BatchSlice, ModelRunner, Rows
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
    key: str | None = None  # name of the client's key, where one is needed
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


# Of each entry that a batch takes rows of, the first of them.
_Starts = dict[Entry, int]


class RequestQueue:
    """Every waiting entry, by key and runner.

    Attributes:
        rows: Rows that wait.
    """

    def __init__(self) -> None:
        self.rows = 0
        # Keys in the order of their turns, and of each the runners that it waits for in the order of theirs.
        self._keys: OrderedDict[str | None, OrderedDict[ModelRunner, _RunnerQueue]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return sum(len(queue) for queues in self._keys.values() for queue in queues.values())

    def add(self, entry: Entry) -> None:
        """Have an entry wait."""
        queues = self._keys.get(entry.key)
        if queues is None:
            queues = self._keys[entry.key] = OrderedDict()
        queue = queues.get(entry.runner)
        if queue is None:
            queue = queues[entry.runner] = _RunnerQueue()
        queue.add(entry)
        self.rows += entry.needed

    def remove(self, entry: Entry) -> None:
        """Let an entry go, if it still waits."""
        queues = self._keys.get(entry.key)
        queue = None if queues is None else queues.get(entry.runner)
        if queue is not None and queue.remove(entry):
            self.rows -= entry.needed
            self._drop_if_empty(entry.key, entry.runner)

    def _drop_if_empty(self, key: str | None, runner: ModelRunner) -> bool:
        queues = self._keys[key]
        if queues[runner]:
            return False
        del queues[runner]
        if not queues:
            del self._keys[key]
        return True

    def take(self, room: Callable[[ModelRunner], int], now: float) -> list[BatchSlice[Entry]]:
        """The next batch, for the runner whose turn it is, of at most its room in rows; empty where nobody waits."""
        starts: _Starts = {}
        while self._keys and not starts:
            runner = next(iter(next(iter(self._keys.values()))))
            self._take_for(runner, room(runner), now, starts)  # at least drops those of the first key that are over
        return [BatchSlice(entry, start, entry.taken) for entry, start in starts.items()]

    def _take_for(self, runner: ModelRunner, room: int, now: float, starts: _Starts) -> None:
        """Divide the room evenly among the keys that wait for this runner, and have those that were asked go last."""
        # Those that would get no row even if each got a single one need not be looked for.
        waiting = list(islice((key for key, queues in self._keys.items() if runner in queues), room))
        asked = dict[str | None, None]()
        while room and waiting:
            share, hungry = max(1, room // len(waiting)), list[str | None]()
            for key in waiting:
                if not room:
                    break
                queue = self._keys[key][runner]
                before = queue.rows
                room -= queue.take(min(share, room), now, starts)
                self.rows -= before - queue.rows
                if queue:
                    hungry.append(key)
                asked.pop(key, None)
                asked[key] = None
            waiting = hungry
        for key in asked:
            self._pass_turn(key, runner)

    def _pass_turn(self, key: str | None, runner: ModelRunner) -> None:
        if not self._drop_if_empty(key, runner):
            self._keys[key].move_to_end(runner)
        if key in self._keys:
            self._keys.move_to_end(key)

    def rows_of(self, key: str | None) -> int:
        """Rows of this key that wait."""
        return sum([queue.rows for queue in self._keys.get(key, {}).values()])

    def rows_ahead(self, rows: int, key: str | None) -> int:
        """Rows that are computed before a newcomer of so many.

        Of its own key the smaller entries', which get half of each batch; and until then no more of any other key.
        """
        mine = [entry.needed for queue in self._keys.get(key, {}).values() for entry in queue]
        ahead = min(2 * sum([needed for needed in mine if needed <= rows]), sum(mine))
        return ahead + sum([min(self.rows_of(other), ahead + rows) for other in self._keys if other != key])

    def oldest_arrival(self) -> float | None:
        """When the oldest of the waiting entries came."""
        waiting = (queue for queues in self._keys.values() for queue in queues.values())
        return min((next(iter(queue)).arrival for queue in waiting), default=None)


class _RunnerQueue:
    """Who waits with one key for one runner: by age, and by need."""

    def __init__(self) -> None:
        self.rows = 0
        self._by_age: dict[int, Entry] = {}  # by number
        # A heap of (needed, number). An item counts only while its entry waits and still needs that many rows.
        self._by_need: list[tuple[int, int]] = []
        self._takes_smallest = False  # where it gets a single row
        self._gone: list[Entry] = []  # entries that have no more rows to take, or are over

    def __len__(self) -> int:
        return len(self._by_age)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_age.values())

    def add(self, entry: Entry) -> None:
        self._by_age[entry.number] = entry
        self.rows += entry.needed
        heapq.heappush(self._by_need, (entry.needed, entry.number))

    def remove(self, entry: Entry) -> bool:
        """Whether the entry was there."""
        if self._by_age.pop(entry.number, None) is None:
            return False
        self.rows -= entry.needed
        if len(self._by_need) > 2 * len(self._by_age) + 64:  # mostly items that no longer count
            self._by_need = [(one.needed, number) for number, one in self._by_age.items()]
            heapq.heapify(self._by_need)
        return True

    def take(self, room: int, now: float, starts: _Starts) -> int:
        """Give half of the room to the oldest, and the rest to those who need least; returns the rows taken."""
        smallest = room // 2
        if room == 1:
            smallest, self._takes_smallest = int(self._takes_smallest), not self._takes_smallest
        left = self._take_oldest(room - smallest, now, starts)
        left = self._take_smallest(left + smallest, now, starts)
        for entry in self._gone:
            self.remove(entry)
        self._gone.clear()
        return room - left

    def _take_oldest(self, room: int, now: float, starts: _Starts) -> int:
        for entry in self._by_age.values():
            if not room:
                break
            room -= self._take_rows(entry, room, now, starts)
        return room

    def _take_smallest(self, room: int, now: float, starts: _Starts) -> int:
        while room and self._by_need:
            needed, number = heapq.heappop(self._by_need)
            entry = self._by_age.get(number)
            if entry is not None and needed == entry.needed:
                room -= self._take_rows(entry, room, now, starts)
        return room

    def _take_rows(self, entry: Entry, most: int, now: float, starts: _Starts) -> int:
        if entry.is_over(now):
            self._gone.append(entry)
            return 0
        rows = min(entry.needed, most)
        starts.setdefault(entry, entry.taken)
        entry.taken += rows
        self.rows -= rows
        if entry.needed:
            heapq.heappush(self._by_need, (entry.needed, entry.number))
        else:
            self._gone.append(entry)
        return rows
