"""Sends mixed traffic for a long time, and says whether the memory of the service stands still.

    python -m benchmarks.faults.soak [--seconds 1200] [--requests 500000]

Samples in every format, judgements, answers from the client's cache, mistakes, unknown paths, and clients that hang up,
in a random order that a seed decides. It ends after so many seconds or requests, whichever comes first. Resident memory
is read every second, and a straight line is fitted to what comes after the warm-up, a fifth of the time.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import uvloop

from benchmarks.tools.client import Client, Connection, Exchange, NoReply, Request, every
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, Trend, finish, parser, percentiles, trend

CLIENTS = 6
LOOK_EVERY_S = 1.0
TELL_EVERY = 60  # looks
WARM_UP = 0.2  # of the time
STAY_S = 0.02  # of a client that hangs up
MIB = 2**20
EXPECTED = {"200", "304", "404", "405", "422"}


class Kind(NamedTuple):
    """One kind of traffic: how often it comes, relative to the others, and what is asked."""

    weight: int
    request: Request
    hangs_up: bool = False


async def traffic(service: Service) -> list[Kind]:
    """Every kind. Uploads are images that the service made, ETags are its own."""
    one = await service.get("/sample?seed=1")
    many = await service.get("/sample?seed=1&count=64&format=npy")
    kept = await service.get("/sample?seed=2&count=16")
    png, npy, json = (("Content-Type", kind) for kind in ("image/png", "application/x-npy", "application/json"))
    return [
        Kind(30, Request("GET", "/sample")),
        Kind(10, Request("POST", "/sample", body=b'{"count": 16, "seed": 7, "scale": 2}', headers=(json,))),
        Kind(10, Request("GET", "/sample?count=64&format=npy")),
        Kind(5, Request("GET", "/sample?count=8&format=json")),
        Kind(5, Request("GET", "/sample?count=4&format=webp")),
        Kind(2, Request("GET", "/sample?count=256&format=npy")),
        Kind(10, Request("GET", "/sample?seed=2&count=16", headers=(("If-None-Match", kept.headers["etag"]),))),
        Kind(20, Request("POST", "/discriminate", body=one.body, headers=(png,))),
        Kind(5, Request("POST", "/discriminate", body=many.body, headers=(npy,))),
        Kind(2, Request("POST", "/discriminate", body=b"not a picture", headers=(png,))),
        Kind(3, Request("GET", "/sample?count=0")),
        Kind(3, Request("GET", "/nowhere")),
        Kind(1, Request("DELETE", "/sample")),
        Kind(2, Request("GET", "/bundles")),
        Kind(2, Request("GET", "/metrics")),
        Kind(5, Request("GET", "/sample?count=512&format=npy"), hangs_up=True),
    ]


class Soak:
    """The traffic, and the service's memory meanwhile."""

    def __init__(self, service: Service, kinds: Sequence[Kind], seconds: float, requests: int) -> None:
        self.latencies: list[float] = []
        self.seen: dict[str, int] = {}
        self.hung_up = 0
        self.times: list[float] = []
        self.mib: list[float] = []
        self._service = service
        self._end = time.perf_counter() + seconds
        self._left = requests
        self._kinds = kinds
        self._rng = random.Random(0)  # noqa: S311 — the order of requests
        self._weights = [kind.weight for kind in kinds]

    @property
    def requests(self) -> int:
        """How many have ended so far."""
        return len(self.latencies) + self.hung_up

    async def run(self) -> None:
        """All of it."""
        stop = asyncio.Event()
        async with Client(self._service.port) as client, asyncio.TaskGroup() as group:
            group.create_task(every(LOOK_EVERY_S, self._look, stop))
            await asyncio.gather(*(self._one(client) for _ in range(CLIENTS)))
            stop.set()

    async def _one(self, client: Client) -> None:
        while self._left > 0 and time.perf_counter() < self._end:
            self._left -= 1
            (kind,) = self._rng.choices(self._kinds, self._weights)
            if kind.hangs_up:
                await self._hang_up(kind.request)
            else:
                self._note(await client.exchange(kind.request))

    async def _hang_up(self, request: Request) -> None:
        connection = await Connection.open(self._service.port)
        asking = asyncio.ensure_future(connection.ask(request))
        await asyncio.wait([asking], timeout=STAY_S * self._rng.random())
        connection.close()
        self.hung_up += isinstance((await asyncio.gather(asking, return_exceptions=True))[0], NoReply)

    def _note(self, exchange: Exchange) -> None:
        self.latencies.append(exchange.latency_s)
        outcome = str(exchange.outcome)
        self.seen[outcome] = self.seen.get(outcome, 0) + 1

    async def _look(self) -> None:
        self.times.append(time.perf_counter())
        self.mib.append(self._service.rss_bytes() / MIB)
        if len(self.mib) % TELL_EVERY == 1:
            print(
                f"{self.times[-1] - self.times[0]:5.0f} s {self.requests:7} requests {self.mib[-1]:6.1f} MiB",
                flush=True,
            )

    def trend(self) -> tuple[Trend, float]:
        """Memory after the warm-up: the line, in MiB per hour, and the hours it covers."""
        warm = self.times[0] + WARM_UP * (self.times[-1] - self.times[0])
        first = next(place for place, moment in enumerate(self.times) if moment >= warm)
        hours = [moment / 3600 for moment in self.times[first:]]
        return trend(hours, self.mib[first:]), hours[-1] - hours[0]


async def measure(arguments: argparse.Namespace) -> int:
    """Soak, and look; returns the exit code."""
    with running(bundles=arguments.bundles) as service:
        soak = Soak(service, await traffic(service), arguments.seconds, arguments.requests)
        await soak.run()
        errors = (await service.metrics()).total("gan_engine_errors_total")
    line, hours = soak.trend()
    seconds = soak.times[-1] - soak.times[0]
    checks = [
        Check("no unexpected outcome", str(dict(sorted(soak.seen.items()))), set(soak.seen) <= EXPECTED),
        Check("no engine error", f"{errors:.0f}", not errors),
        Check(
            "memory's slope within 2 standard errors of zero, or falling",
            f"{line.slope:+.2f} ± {line.error:.2f} MiB/h over {60 * hours:.1f} min at {soak.mib[-1]:.0f} MiB",
            line.is_flat,
        ),
    ]
    facts = {
        "requests": soak.requests,
        "seconds": round(seconds),
        "outcomes": dict(sorted(soak.seen.items())),
        "hung_up": soak.hung_up,
        "latency": percentiles(soak.latencies),
        "rss_mib": {"first": round(soak.mib[0], 1), "max": round(max(soak.mib), 1), "last": round(soak.mib[-1], 1)},
        "rss_slope_mib_per_hour": [round(line.slope, 2), round(line.error, 2)],
        "rss_mib_over_time": [round(value, 1) for value in soak.mib[:: max(1, len(soak.mib) // 40)]],
    }
    return finish("soak", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Mixed traffic for a long time.", seconds=1200)
    made.add_argument("--requests", type=int, default=500_000, help="requests at most")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
