"""A simulation of one worker: its event loop, its queue and batcher, and one engine instance, on one processor.

Requests come at given times. The event loop reads each (`read_s`) and, once its rows are computed, encodes and answers
it (`answer_s`). It takes such work in the order in which it comes, and goes before the engine, which it delays: both
have one processor. A batch takes a time of its own, for each tile that its rows are divided into, and for each row.

The batcher is the service's own rule (service/engine/batching). A free engine starts at once for a lone caller. Else it
waits until no more requests are being read and, where clients who were just answered may ask again, until as many rows
are there as before, or none comes for an adaptive gap, or 3 ms are over. Half of a batch goes to the oldest, half to
those that need the fewest rows. A client adds its own time and the network's.

Several workers are several of these, and connections, hence requests, are divided among them at random.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.inference.tiles import CPU_TILE_SIZES, Tiles
from service.engine.batching.policy import LEAST_GAP_S, MOST_GAP_S, MOST_WAIT_S, SHARING

MAX_ROWS = 512
NEVER = float("inf")


TILES = Tiles(lambda rows, _: rows, CPU_TILE_SIZES)


class Line(NamedTuple):
    """Seconds in all, and for each image."""

    fixed_s: float
    image_s: float

    def of(self, images: int) -> float:
        """Seconds for so many."""
        return self.fixed_s + self.image_s * images


class Costs(NamedTuple):
    """What a lone client's runs have shown."""

    batch: Line
    tile_s: float
    read: Line
    answer: Line
    client: Line

    def batch_s(self, rows: int) -> float:
        """Seconds that a batch takes on a processor of its own."""
        return self.batch.of(rows) + self.tile_s * len(TILES.split(rows))

    def alone_s(self, images: int) -> float:
        """The latency of a lone request."""
        return self.batch_s(images) + sum(part.of(images) for part in (self.read, self.answer, self.client))


@dataclass(eq=False, slots=True)
class _Request:
    due: float
    rows: int
    taken: int = 0
    returned: int = 0
    answered: float = NEVER

    @property
    def needed(self) -> int:
        return self.rows - self.taken


@dataclass
class Worker:
    """One worker's state, moved on from event to event."""

    costs: Costs
    now: float = 0.0
    batches: list[int] = field(default_factory=list)

    def run(self, due_s: Sequence[float], rows: Sequence[int]) -> NDArray[np.float64]:
        """The latency of each request."""
        requests = [_Request(due, count) for due, count in zip(due_s, rows, strict=True)]
        coming = deque(requests)
        self._loop: deque[tuple[_Request, float, bool]] = deque()  # who, until when, and whether it is an answer
        self._queue: list[_Request] = []
        self._expects_more = False
        self._waiting = 0  # rows in it that no batch has taken
        self._batch: list[tuple[_Request, int]] = []
        self._left_s = NEVER  # of the batch, on a processor of its own
        self._wait_until = NEVER  # when a waiting engine looks again
        self._callers = self._callers_before = self._rows_before = 0
        self._done_at, self._gap_s = -NEVER, MOST_GAP_S
        self._began = self._last_arrival = 0.0
        while True:
            times = (
                coming[0].due if coming else NEVER,
                self._loop[0][1] if self._loop else NEVER,
                self.now + self._left_s if self._batch and not self._loop else NEVER,
                max(self.now, self._wait_until) if not self._loop else NEVER,
            )
            event = min(range(4), key=times.__getitem__)
            if times[event] == NEVER:
                break
            if self._batch and not self._loop:
                self._left_s -= times[event] - self.now
            self.now = times[event]
            (self._comes, self._ends_step, self._ends_batch, self._starts_batch)[event](coming)
        return np.array([one.answered - one.due + self.costs.client.of(one.rows) for one in requests])

    def _comes(self, coming: deque[_Request]) -> None:
        one = coming.popleft()
        self._give_loop(one, self.costs.read.of(one.rows), is_answer=False)

    def _give_loop(self, one: _Request, seconds: float, *, is_answer: bool) -> None:
        begin = self._loop[-1][1] if self._loop else self.now
        self._loop.append((one, begin + seconds, is_answer))

    def _ends_step(self, _: deque[_Request]) -> None:
        one, _until, is_answer = self._loop.popleft()
        if is_answer:
            one.answered = self.now
            return
        self._queue.append(one)
        self._waiting += one.rows
        self._callers += 1
        self._last_arrival = self.now
        if not self._batch:
            self._consider()

    def _consider(self) -> None:
        """Decide when the free engine starts, now that somebody waits."""
        if self._wait_until == NEVER:
            self._began = self._last_arrival = self.now
        is_alone = self._callers == self._callers_before == 1
        self._expects_more = self._has_company() and self._waiting < self._rows_before
        if is_alone or self._waiting >= SHARING.enough_rows:
            self._starts_batch(deque())
        elif self._expects_more:  # clients who were just answered may come again
            self._wait_until = min(self._last_arrival + self._gap_s, self._began + MOST_WAIT_S)
            if self._callers == 1:
                self._wait_until = min(self._wait_until, self._done_at + self._gap_s)
        else:
            self._wait_until = self.now  # once the loop has read what it has in hand

    def _has_company(self) -> bool:
        was_just_answered = self._callers_before > 1 and self.now < self._done_at + self._gap_s
        return self._callers > 1 or was_just_answered

    def _starts_batch(self, _: deque[_Request]) -> None:
        if self._wait_until != NEVER and self._callers > 1:
            # Not in vain where at least half came back.
            came_back = 2 * self._waiting >= self._rows_before
            self._gap_s = min(MOST_GAP_S, 2 * self._gap_s) if came_back else max(LEAST_GAP_S, self._gap_s / 2)
        self._wait_until = NEVER
        if not self._queue:
            return
        smallest = 0 if self._waiting <= MAX_ROWS else MAX_ROWS // 2
        left = self._take(self._queue, MAX_ROWS - smallest)
        if smallest:
            left = self._take(sorted(self._queue, key=lambda one: one.needed), left + smallest)
        self._queue = [one for one in self._queue if one.needed]
        self._left_s = self.costs.batch_s(MAX_ROWS - left)
        self.batches.append(MAX_ROWS - left)

    def _take(self, order: Sequence[_Request], room: int) -> int:
        """Take rows in this order; returns the room that is left."""
        for one in order:
            if not room:
                break
            rows = min(one.needed, room)
            if rows:
                one.taken += rows
                self._waiting -= rows
                self._batch.append((one, rows))
                room -= rows
        return room

    def _ends_batch(self, _: deque[_Request]) -> None:
        done, self._batch, self._left_s = self._batch, [], NEVER
        self._rows_before = self._waiting + sum(rows for _, rows in done)
        self._callers_before, self._done_at = self._callers, self.now
        for one, rows in done:
            one.returned += rows
            if one.returned == one.rows:
                self._callers -= 1
                self._give_loop(one, self.costs.answer.of(one.rows), is_answer=True)
        if self._waiting >= SHARING.enough_rows:
            self._starts_batch(deque())  # while these are answered
        elif self._queue:
            self._consider()


def simulate(
    costs: Costs, due_s: NDArray[np.float64], rows: NDArray[np.int64], workers: int = 1, seed: int = 0
) -> NDArray[np.float64]:
    """The latency of each request, in seconds."""
    latencies = np.empty(len(due_s))
    whose = np.random.default_rng(seed).integers(0, workers, len(due_s))
    for worker in range(workers):
        mine = whose == worker
        latencies[mine] = Worker(costs).run(due_s[mine].tolist(), rows[mine].tolist())
    return latencies
