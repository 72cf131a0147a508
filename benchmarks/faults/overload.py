"""Offers several times as much as the service can do, and reports what happens.

    python -m benchmarks.faults.overload [--seconds 60] [--factor 5] [--count 256] [--queue-images 16384]

First it looks for the knee: more and more clients, each of which asks again when it is answered; the highest throughput
counts. Then comes an open loop at so many times the knee: requests arrive at random times, whatever becomes of the
others. All the time another process asks the probes, and metrics and memory are read, so that this costs the knee as
much as the overload.

`Retry-After` is compared with what came true: the time from the refusal until as many images had been computed as were
in the queue at that moment.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import numpy as np
import uvloop

from benchmarks.tools.client import Client, Exchange, Request, after, every, images, keep_asking, offer, outcomes
from benchmarks.tools.prober import probing
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, percentiles, table, trend

CLIENTS = (1, 2, 4, 8, 16, 32)
WARM_S = 2
PROBES_PER_S = 10
LOOK_EVERY_S = 0.5
PROBE_P99_MS = 100
SLACK_S = 1  # it is given in whole seconds, and at least one
OK, TOO_MANY = 200, 429
MIB = 2**20


class Watch:
    """The service over time: resident memory, images in the queue, and images computed so far."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.times: list[float] = []
        self.mib: list[float] = []
        self.queued: list[float] = []
        self.computed: list[float] = []

    async def look(self) -> None:
        """Once more."""
        readings = await self._service.metrics()
        self.times.append(time.perf_counter())
        self.mib.append(self._service.rss_bytes() / MIB)
        self.queued.append(readings.total("gan_queue_images"))
        self.computed.append(readings.total("gan_images_total"))

    def drain_s(self, moment: float) -> float | None:
        """How long it took until all was computed that was queued at a moment; None where that was not seen."""
        queued, computed = (np.interp(moment, self.times, values) for values in (self.queued, self.computed))
        if computed + queued > self.computed[-1]:
            return None
        return float(np.interp(computed + queued, self.computed, self.times)) - moment


class Promise(NamedTuple):
    """A refusal's Retry-After beside the time that the queue of that moment really took, in seconds."""

    promised: int
    real: float


class Load(NamedTuple):
    """What was delivered, and what it took of the processors: in images per second, and in cores."""

    rate: float
    service: float
    client: float

    @property
    def per_core(self) -> float:
        """Images per second of the service's own time."""
        return self.rate / self.service


class Meter:
    """Measures a load from its making on."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = time.perf_counter(), service.cpu_s(), time.process_time()

    def read(self, exchanges: Sequence[Exchange]) -> Load:
        """The load so far."""
        now = time.perf_counter(), self._service.cpu_s(), time.process_time()
        seconds, service, client = (after - before for before, after in zip(self._started, now, strict=True))
        return Load(images(exchanges) / seconds, service / seconds, client / seconds)


Probed = Mapping[str, list[Exchange]]


@asynccontextmanager
async def looked_at(service: Service, seconds: float) -> AsyncIterator[tuple[Watch, "asyncio.Future[Probed]"]]:
    """Read metrics and memory while the block lasts, and have the probes asked for so long."""
    watch, stop = Watch(service), asyncio.Event()
    with probing(service.port, seconds, PROBES_PER_S) as probes:
        async with asyncio.TaskGroup() as group:
            group.create_task(every(LOOK_EVERY_S, watch.look, stop))
            yield watch, asyncio.wrap_future(probes)
            stop.set()


async def find_knee(service: Service, request: Callable[[int], Request], seconds: float) -> Load:
    """The most images per second that waiting clients can get out of the service."""
    rows, loads = [], []
    async with Client(service.port) as client, looked_at(service, WARM_S + len(CLIENTS) * seconds):
        await keep_asking(client, request, 4, after(WARM_S))
        for clients in CLIENTS:
            meter = Meter(service)
            exchanges = await keep_asking(client, request, clients, after(seconds))
            loads.append(load := meter.read(exchanges))
            cells = {"images/s": round(load.rate), "service cores": f"{load.service:.2f}", "own": f"{load.client:.2f}"}
            rows.append({"clients": clients, **cells, **percentiles(e.latency_s for e in exchanges)})
    table(rows)
    return max(loads)


class Seen(NamedTuple):
    """One overload, as clients, orchestrator and operating system saw it."""

    exchanges: list[Exchange]
    probes: Probed
    watch: Watch
    load: Load  # from the first request to the last reply


async def overload(service: Service, request: Callable[[int], Request], per_s: float, seconds: float) -> Seen:
    """Offer so many requests per second, and watch."""
    async with Client(service.port) as client, looked_at(service, seconds) as (watch, probes):
        meter = Meter(service)
        exchanges = await offer(client, request, per_s, seconds)
        load = meter.read(exchanges)
        probed = await probes
    return Seen(exchanges, probed, watch, load)


def promises(seen: Seen) -> list[Promise]:
    """What each refusal promised, and what came of it."""
    refused = [(e.retry_after_s, seen.watch.drain_s(e.done)) for e in seen.exchanges if e.retry_after_s is not None]
    return [Promise(promised, real) for promised, real in refused if real is not None]


def report(seen: Seen, knee: Load, offered: float, arguments: argparse.Namespace) -> int:
    """Print what was seen beside what was wanted; the exit code."""
    by_outcome = outcomes(seen.exchanges)
    accepted = percentiles(e.latency_s for e in seen.exchanges if e.outcome == OK)
    refused = percentiles(e.latency_s for e in seen.exchanges if e.outcome == TOO_MANY)
    probes = {path: percentiles(e.latency_s for e in asked) for path, asked in seen.probes.items()}
    failed_probes = sum(e.outcome != OK for asked in seen.probes.values() for e in asked)
    half = len(seen.watch.mib) // 2  # the first half fills queues and buffers
    memory = trend(seen.watch.times[half:], seen.watch.mib[half:])
    growth = memory.slope * (seen.watch.times[-1] - seen.watch.times[half])
    kept = promises(seen)
    honest = sum(p.real - SLACK_S <= p.promised <= p.real + SLACK_S for p in kept) / max(1, len(kept))
    unpromised = sum(e.retry_after_s is None for e in seen.exchanges if e.outcome == TOO_MANY)
    checks = [
        Check(
            f"goodput >= 90 % of the knee, {knee.rate:.0f} images/s",
            f"{100 * seen.load.rate / knee.rate:.1f} %",
            seen.load.rate >= 0.9 * knee.rate,
        ),
        # The load comes from the same processors: what it takes, the service can't have.
        Check(
            f"goodput per core of the service >= 90 % of {knee.per_core:.0f} images/s",
            f"{100 * seen.load.per_core / knee.per_core:.1f} %",
            seen.load.per_core >= 0.9 * knee.per_core,
        ),
        Check(
            f"accepted p99 < {arguments.deadline_s:g} s",
            f"{accepted['p99_ms']} ms",
            accepted["p99_ms"] < 1000 * arguments.deadline_s,
        ),
        Check(
            "every other reply a 429 with Retry-After",
            f"{by_outcome}, {unpromised} without",
            set(by_outcome) <= {"200", "429"} and not unpromised,
        ),
        Check(
            f"95 of 100 Retry-After within {SLACK_S} s of the truth",
            f"{100 * honest:.1f} % of {len(kept)}",
            honest >= 0.95,
        ),
        Check("no probe fails", str(failed_probes), not failed_probes),
        *(
            Check(f"{path} p99 <= {PROBE_P99_MS} ms", f"{p['p99_ms']} ms", p["p99_ms"] <= PROBE_P99_MS)
            for path, p in probes.items()
        ),
        Check(
            "memory flat: < 2 % in the second half",
            f"{growth:+.2f} MiB of {seen.watch.mib[-1]:.0f}",
            growth < 0.02 * seen.watch.mib[-1],
        ),
    ]
    facts = {
        "knee_images_per_s": round(knee.rate),
        "knee_cores": {"service": round(knee.service, 2), "client": round(knee.client, 2)},
        "factor": arguments.factor,
        "queue_images": arguments.queue_images,
        "offered_requests_per_s": round(offered, 1),
        "goodput_images_per_s": round(seen.load.rate),
        "cores": {"service": round(seen.load.service, 2), "client": round(seen.load.client, 2)},
        "outcomes": by_outcome,
        "accepted": accepted,
        "refused": refused,
        "probes": probes,
        "rss_mib": {
            "first": round(seen.watch.mib[0], 1),
            "max": round(max(seen.watch.mib), 1),
            "last": round(seen.watch.mib[-1], 1),
        },
        "rss_slope_mib_per_s": [round(memory.slope, 4), round(memory.error, 4)],
        "retry_after_s": in_short(kept),
    }
    return finish("overload", facts, checks)


def in_short(kept: Sequence[Promise]) -> dict[str, object]:
    """Promised and real seconds."""
    if not kept:
        return {}
    promised, real = np.array(kept).T
    return {
        "promised": {
            "p1": float(np.percentile(promised, 1)),
            "p50": float(np.median(promised)),
            "p99": float(np.percentile(promised, 99)),
        },
        "real": {
            "p1": round(float(np.percentile(real, 1)), 2),
            "p50": round(float(np.median(real)), 2),
            "p99": round(float(np.percentile(real, 99)), 2),
        },
    }


async def measure(arguments: argparse.Namespace) -> int:
    """The knee, then the overload; returns the exit code."""

    def request(number: int) -> Request:
        return Request("GET", f"/sample?count={arguments.count}&format=npy&seed={number}", arguments.count)

    with running(
        bundles=arguments.bundles, max_queued_images=arguments.queue_images, deadline_s=arguments.deadline_s
    ) as service:
        knee = await find_knee(service, request, arguments.knee_seconds)
        per_s = arguments.factor * knee.rate / arguments.count
        seen = await overload(service, request, per_s, arguments.seconds)
    return report(seen, knee, per_s, arguments)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Offer several times what the service can do.", seconds=60)
    made.add_argument("--factor", type=float, default=5, help="offered load over the knee")
    made.add_argument("--count", type=int, default=256, help="images in one request")
    made.add_argument("--queue-images", type=int, default=16384, help="GAN_MAX_QUEUED_IMAGES")
    made.add_argument("--deadline-s", type=float, default=30, help="GAN_DEADLINE_S")
    made.add_argument("--knee-seconds", type=float, default=5, help="for each number of clients")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
