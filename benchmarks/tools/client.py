"""Load by the client of `python -m service capacity`: at random times, or as fast as it is answered."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

from service.capacity.client import (
    HOST,
    MAX_CONNECTIONS,
    REFUSED,
    UNANSWERED,
    Client,
    Connection,
    Exchange,
    NoReply,
    Reply,
    Request,
    send_at,
)

__all__ = [
    "HOST",
    "MAX_CONNECTIONS",
    "REFUSED",
    "UNANSWERED",
    "Client",
    "Connection",
    "Exchange",
    "NoReply",
    "Reply",
    "Request",
    "after",
    "every",
    "images",
    "keep_asking",
    "offer",
    "outcomes",
    "send_at",
]


async def offer(
    client: Client, requests: Callable[[int], Request], per_s: float, seconds: float, seed: int = 0
) -> list[Exchange]:
    """Open loop: `requests(i)` for i = 0, 1, … at random times, `per_s` on average, whatever becomes of the others.

    Arrivals are a Poisson process, as those of many independent clients are. Returns when all have ended, in order.
    """
    rng = random.Random(seed)  # noqa: S311 — arrival times, not secrets

    def schedule() -> Iterator[tuple[float, Request]]:
        due, number = rng.expovariate(per_s), 0
        while due < seconds:
            yield due, requests(number)
            due, number = due + rng.expovariate(per_s), number + 1

    return await send_at(client, schedule())


async def keep_asking(
    client: Client, requests: Callable[[int], Request], clients: int, until: Callable[[], bool]
) -> list[Exchange]:
    """Closed loop: so many clients, each of which asks again once it has been answered, until `until()` is true."""
    exchanges: list[Exchange] = []
    numbers = iter(range(2**53))

    async def one() -> None:
        while not until():
            exchanges.append(await client.exchange(requests(next(numbers))))

    await asyncio.gather(*(one() for _ in range(clients)))
    return exchanges


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since now."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


async def every(seconds: float, look: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    """Look again and again until told to stop."""
    while not stop.is_set():
        await look()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), seconds)


def images(exchanges: Iterable[Exchange]) -> int:
    """Images that came with a 200."""
    return sum(exchange.request.images for exchange in exchanges if exchange.outcome == 200)


def outcomes(exchanges: Iterable[Exchange]) -> dict[str, int]:
    """How often each outcome was seen."""
    seen: dict[str, int] = {}
    for exchange in exchanges:
        seen[str(exchange.outcome)] = seen.get(str(exchange.outcome), 0) + 1
    return dict(sorted(seen.items()))
