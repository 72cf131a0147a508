"""Drives a service by an open loop, at one rate or until it no longer keeps a latency.

Requests are sent at random times, as those of many independent clients are, whatever becomes of the others. A request
that failed counts as one that took for ever.
"""

import asyncio
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from service.capacity.client import Client, Exchange, Request, send_at
from service.capacity.service_process import OK, ServiceProcess
from service.capacity.traffic import Arrivals, Traffic, arrivals

WAITING = 16  # clients who ask again when they are answered, to begin with
FIRST_SHARE = 0.7  # of what those get, is the first rate of a search
GROW = 1.3
FINE = 1.05  # a search ends once the knee is known so well
CLEARLY_LATE = 3.0  # times the wanted latency: nothing that a second look would change
LEAST_REQUESTS = 20  # a latency of fewer says nothing


class Plan(NamedTuple):
    """How long to look at each rate: so many seconds, longer where fewer than so many requests would come."""

    warm_seconds: float = 1.5  # before, and half as long before that
    seconds: float = 3.0
    requests: int = 400
    most_seconds: float = 15.0
    steps: int = 12  # of a search, at most
    rounds: int = 3  # of a curve
    connections: int = 1500


class Seen(NamedTuple):
    """What became of one rate, which is `scale` times the traffic's own. Rates are those that were offered."""

    scale: float
    requests_per_s: float
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    in_time: float  # share of the requests that were answered within the wanted latency
    failed: float  # share that got no image
    late_ms: float  # by which our own client was late with one request of a hundred
    client_cores: float  # that it took


class Driver:
    """Asks one service for one kind of traffic.

    Args:
        service: It.
        traffic: What to ask for.
        p99_ms: The wanted latency.
        plan: How long to look.
        tell: Called with each rate that was looked at.
    """

    def __init__(
        self,
        service: ServiceProcess,
        traffic: Traffic,
        p99_ms: float,
        plan: Plan,
        tell: Callable[[Seen], None],
    ) -> None:
        self._service = service
        self._traffic = traffic
        self._p99_ms = p99_ms
        self._plan = plan
        self._tell = tell
        self._looks = 0
        self._numbers = iter(range(2**53))

    async def find_knee(self) -> Seen | None:
        """The highest rate that keeps the latency, between one that does and one that does not; None if none does."""
        held: Seen | None = None
        too_much = math.inf
        scale = FIRST_SHARE * await self.saturate()
        for _ in range(self._plan.steps):
            if scale * self._traffic.requests_per_s * self._plan.most_seconds < LEAST_REQUESTS:
                break
            seen = await self._look_closely(scale)
            if seen.p99_ms <= self._p99_ms:
                held = seen
            else:
                too_much = scale
            if held and too_much <= FINE * held.scale:
                break
            scale = _between(held.scale if held else 0.0, too_much)
        return held

    async def curve(self, scales: Sequence[float]) -> list[Seen]:
        """What becomes of each of these rates: the medians of several rounds."""
        rounds = [[await self.look(scale) for scale in scales] for _ in range(self._plan.rounds)]
        return [Seen(*map(statistics.median, zip(*looks, strict=True))) for looks in zip(*rounds, strict=True)]

    async def saturate(self) -> float:
        """The scale at which clients who wait are answered, once the service is warm; 0 where they are not."""
        async with self._service.client(self._plan.connections) as client:
            await self._keep_asking(client, self._plan.warm_seconds / 2)
            began = time.perf_counter()
            answered = await self._keep_asking(client, self._plan.warm_seconds)
        return answered / (time.perf_counter() - began) / self._traffic.requests_per_s

    async def _keep_asking(self, client: Client, seconds: float) -> int:
        rng = random.Random(0)  # noqa: S311 - counts, not secrets
        counts, weights = zip(*((piece.images, piece.requests) for piece in self._traffic.pieces), strict=True)
        sums = list(itertools.accumulate(weights))
        end, answered = time.perf_counter() + seconds, 0

        async def ask() -> None:
            nonlocal answered
            while time.perf_counter() < end:
                [count] = rng.choices(counts, cum_weights=sums)
                exchange = await client.exchange(self._request(count))
                answered += exchange.outcome == OK

        await asyncio.gather(*(ask() for _ in range(WAITING)))
        return answered

    async def _look_closely(self, scale: float) -> Seen:
        """Look, and once more where a pause of the machine may have been what was late."""
        seen = await self.look(scale)
        if self._p99_ms < seen.p99_ms <= CLEARLY_LATE * self._p99_ms:
            seen = min(seen, await self.look(scale), key=lambda one: one.p99_ms)
        return seen

    async def look(self, scale: float) -> Seen:
        """Ask at so many times the traffic's rates."""
        per_s = scale * self._traffic.requests_per_s
        seconds = min(max(self._plan.seconds, self._plan.requests / per_s), self._plan.most_seconds)
        self._looks += 1
        asked = arrivals(self._traffic, scale, seconds, self._looks)
        async with self._service.client(self._plan.connections) as client:
            with no_garbage_collection():
                before_s = time.process_time()
                exchanges = await send_at(client, self._schedule(asked))
                cores = (time.process_time() - before_s) / seconds
        seen = _judge(exchanges, scale, seconds, cores, self._p99_ms)
        self._tell(seen)
        return seen

    def _schedule(self, asked: Arrivals) -> Iterator[tuple[float, Request]]:
        for due_s, count in zip(asked.due_s.tolist(), asked.counts.tolist(), strict=True):
            yield due_s, self._request(count)

    def _request(self, count: int) -> Request:
        return self._service.request(count, next(self._numbers))


def _between(low: float, high: float) -> float:
    """Where to look next."""
    if math.isinf(high):
        return GROW * low
    return math.sqrt(low * high) if low else high / 2


def _judge(exchanges: Sequence[Exchange], scale: float, seconds: float, cores: float, p99_ms: float) -> Seen:
    latencies_ms = np.array([1000 * e.latency_s if e.outcome == OK else math.inf for e in exchanges])
    late_ms = np.array([1000 * (e.sent - e.due) for e in exchanges])
    if not len(exchanges):  # by chance
        latencies_ms, late_ms = np.array([math.inf]), np.array([0.0])
    p50, p95, p99 = np.quantile(latencies_ms, (0.5, 0.95, 0.99), method="higher").tolist()
    return Seen(
        scale=scale,
        requests_per_s=len(exchanges) / seconds,
        images_per_s=sum(e.request.images for e in exchanges) / seconds,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        in_time=float((latencies_ms <= p99_ms).mean()),
        failed=float(np.isinf(latencies_ms).mean()),
        late_ms=float(np.quantile(late_ms, 0.99)),
        client_cores=cores,
    )


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """It would stop our client for milliseconds, which would then seem to be the service's."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
