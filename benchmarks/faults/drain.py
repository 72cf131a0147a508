"""Stops services under load, again and again, and looks for lost requests.

    python -m benchmarks.faults.drain [--times 10] [--rolls 10]

First, ten times, SIGTERM goes to a process that clients keep busy. Every request ends in one of these ways:

- answered: a whole 200;
- refused: a whole 503 with Retry-After, or the connection could not be made: the client may ask elsewhere;
- closed: the connection ended without a byte of a reply. The service's log tells two kinds apart. If the log does not
  know the request's id, the service never saw it: it arrived while the process was closing its connections.
- lost: anything else. A reply was cut off, or the log knows the id of a request that got no reply.

Then rolling restarts: two processes behind a proxy, each replaced in turn while clients ask over connections that they
keep open. The clients must not see a single failure. During GAN_DRAIN_DELAY_S the service is not ready but still works;
the proxy looks at /readyz four times a second.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections import deque
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import uvloop

from benchmarks.tools.client import REFUSED, UNANSWERED, Client, Exchange, Request, outcomes
from benchmarks.tools.process import Service, running
from benchmarks.tools.proxy import Proxy
from benchmarks.tools.report import Check, finish, parser, percentiles, table

CLIENTS, COUNT = 16, 256
BEFORE_SIGNAL = 50  # requests answered: the load is on
PAUSE_S = 0.05  # before a client that got no images asks again
THINK_S = 0.25  # behind the proxy, where a service must be able to start beside two others on the same cores
DRAIN_DELAY_S = 2.0
BEFORE_ROLL_S = 1.0
OK, UNAVAILABLE = 200, 503


class Load:
    """Clients that ask again and again, each time under an id of its own by which the service's log can be asked."""

    def __init__(self, client: Client, think_s: float = 0.0) -> None:
        self.exchanges: list[Exchange] = []
        self.is_on = asyncio.Event()  # the first requests have been answered
        self.is_over = False
        self._client = client
        self._think_s = think_s  # before a client asks again
        self._ids = count()

    async def run(self) -> None:
        """Ask until it is over, or nobody listens any more."""
        await asyncio.gather(*(self._one() for _ in range(CLIENTS)))

    async def _one(self) -> None:
        while not self.is_over:
            exchange = await self._client.exchange(self._request())
            self.exchanges.append(exchange)
            if len(self.exchanges) >= BEFORE_SIGNAL:
                self.is_on.set()
            if exchange.outcome == REFUSED:
                return
            await asyncio.sleep(self._think_s if exchange.outcome == OK else PAUSE_S)

    def _request(self) -> Request:
        number = next(self._ids)
        target = f"/sample?count={COUNT}&format=npy&seed={number}"
        return Request("GET", target, COUNT, headers=(("X-Request-ID", f"load-{number}"),))


class Stop(NamedTuple):
    """One service, stopped while it was busy."""

    exchanges: list[Exchange]
    logged: set[str]  # ids of the requests that it took in
    exit_code: int
    seconds: float  # from the signal to its end

    def lost(self) -> list[Exchange]:
        """Requests that it took in and did not answer with images or a proper refusal."""
        return [exchange for exchange in self.exchanges if not self._is_accounted_for(exchange)]

    def _is_accounted_for(self, exchange: Exchange) -> bool:
        if exchange.outcome == UNAVAILABLE:
            return exchange.retry_after_s is not None
        if exchange.outcome == UNANSWERED:
            return dict(exchange.request.headers)["X-Request-ID"] not in self.logged
        return exchange.outcome in {OK, REFUSED}


async def stop_under_load(bundles: Path) -> Stop:
    """Start a service, keep it busy, send SIGTERM, and see what becomes of every request."""
    with running(bundles=bundles) as service:
        async with Client(service.port) as client, asyncio.TaskGroup() as group:
            load = Load(client)
            group.create_task(load.run())
            await load.is_on.wait()
            service.send(signal.SIGTERM)
            started = time.perf_counter()
            code = await asyncio.to_thread(service.wait)
            seconds = time.perf_counter() - started
        logged = {str(line.get("request_id")) for line in service.log_lines()}
    return Stop(load.exchanges, logged, code, seconds)


class Rolled(NamedTuple):
    """What became of clients and processes while services were replaced."""

    exchanges: list[Exchange]
    exit_codes: list[int]
    left_s: list[float]  # from each signal until nobody was connected; past the drain delay, requests may be lost


async def roll(bundles: Path, rolls: int, drain_delay_s: float = DRAIN_DELAY_S) -> Rolled:
    """Replace services behind a proxy, one after the other, while clients ask."""
    codes, left_s = [], []
    start = partial(Service, bundles=bundles, drain_delay_s=drain_delay_s)
    services = deque(await asyncio.gather(asyncio.to_thread(start), asyncio.to_thread(start)))
    try:
        async with Proxy() as proxy, Client(proxy.port) as client, asyncio.TaskGroup() as group:
            for service in services:
                await proxy.add(service.port)
            load = Load(client, THINK_S)
            group.create_task(load.run())
            await load.is_on.wait()
            for _ in range(rolls):
                services.append(await asyncio.to_thread(start))
                await proxy.add(services[-1].port)
                await asyncio.sleep(BEFORE_ROLL_S)  # all three at work
                old = services.popleft()
                old.send(signal.SIGTERM)
                told = time.monotonic()
                await proxy.left(old.port)
                left_s.append(time.monotonic() - told)
                codes.append(await asyncio.to_thread(old.wait))
                proxy.remove(old.port)
                old.stop()
            load.is_over = True
    finally:
        for service in services:
            service.stop()
    return Rolled(load.exchanges, codes, left_s)


async def measure(arguments: argparse.Namespace) -> int:
    """Stops, then rolls; returns the exit code."""
    stops = [await stop_under_load(arguments.bundles) for _ in range(arguments.times)]
    table(
        [
            {
                **outcomes(stop.exchanges),
                "lost": len(stop.lost()),
                "exit code": stop.exit_code,
                "seconds": round(stop.seconds, 2),
            }
            for stop in stops
        ]
    )
    everything = [exchange for stop in stops for exchange in stop.exchanges]
    lost = sum(len(stop.lost()) for stop in stops)
    unseen = sum(exchange.outcome == UNANSWERED for exchange in everything) - sum(
        exchange.outcome == UNANSWERED for stop in stops for exchange in stop.lost()
    )
    codes = [stop.exit_code for stop in stops]
    rolled = await roll(arguments.bundles, arguments.rolls)
    failed = [exchange for exchange in rolled.exchanges if exchange.outcome != OK]
    checks = [
        Check(f"{len(stops)} stops: no accepted request lost", f"{lost} of {len(everything)}", not lost),
        Check("exit codes 0", str(codes), not any(codes)),
        Check(
            f"{len(rolled.exit_codes)} restarts behind a proxy: no request fails",
            f"{len(failed)} of {len(rolled.exchanges)}",
            not failed,
        ),
        Check("exit codes 0", str(rolled.exit_codes), not any(rolled.exit_codes)),
    ]
    facts = {
        "stops": len(stops),
        "outcomes": outcomes(everything),
        "lost": lost,
        "closed_unseen": unseen,
        "stop_s": percentiles(stop.seconds for stop in stops),
        "restarts": len(rolled.exit_codes),
        "left_s": percentiles(rolled.left_s),
        "rolling_outcomes": outcomes(rolled.exchanges),
        "rolling_latency": percentiles(e.latency_s for e in rolled.exchanges),
    }
    return finish("drain", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Stop services under load, and look for a request that was lost.")
    made.add_argument("--times", type=int, default=10, help="services that are stopped")
    made.add_argument("--rolls", type=int, default=10, help="restarts behind the proxy")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
