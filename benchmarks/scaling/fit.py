"""Fits the simulation to a lone client's runs, and compares it with the service under other loads.

    python -m benchmarks.scaling.fit [--seconds 3] [--costs build/costs.json]

The service has one worker on one processor, and the clients another. A lone client asks again and again, for each of
several sizes, some of which fill one tile of the net and some need several. What a batch takes comes from
`gan_compute_seconds`. What the event loop takes is the rest of the process' time: encoding is known
(`gan_encode_seconds`), and of the other half comes before the batch, half after it. Other programs on the service's
processor make all of it longer, by the share that they take. The rest of the latency is the client's and the network's.

Then requests come at random times, of one size and of several mixed, at shares of what the simulation says is possible.
Each is run five times, and simulated with the same arrivals, which are those at which our client really sent; latency
counts from there. The medians are compared. `--costs` writes the fit for
`benchmarks.scaling.replicas`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.scaling.simulation import TILES, Costs, Line, simulate
from benchmarks.tools.client import Client, Request, after, keep_asking, send_at
from benchmarks.tools.process import TICKS_PER_S, Readings, Service, running
from benchmarks.tools.report import Check, finish, parser, table
from service.capacity.measure import no_garbage_collection
from service.capacity.traffic import Piece, Traffic, arrivals

SIZES = (1, 2, 4, 5, 11, 16, 23, 45, 64, 79, 128, 256)
ALONE_S, WARM_S = 1.0, 1.0
MIXES = {"one image": {1: 1.0}, "1, 16 and 64 mixed": {1: 0.7, 16: 0.25, 64: 0.05}}
LOADS = (0.3, 0.5, 0.8)
RUNS = 5
SATURATION = 4000  # requests that come at once, to see what the simulation gets through
WITHIN = 0.15
LEAST_S = 1e-5  # less can't be told from nothing
MOST_OTHERS = 0.9  # of a processor, that can be made up for
OK = 200

Figures = Mapping[str, float]


class Cores(NamedTuple):
    """The processors of service and clients."""

    service: set[int]
    clients: set[int]


def divide_cores() -> Cores:
    """One for the service, all others for us.

    Raises:
        RuntimeError: There is only one.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise RuntimeError("two processors are needed: one for the service, one for its clients")
    return Cores({first}, set(others))


@contextmanager
def on_one_core(bundles: Path, bundle: str) -> Iterator[Service]:
    """A service of one worker on a processor that we leave to it."""
    cores = divide_cores()
    os.sched_setaffinity(0, cores.service)
    try:
        with running(bundles=bundles, default_bundle=bundle) as service:
            os.sched_setaffinity(0, cores.clients)
            yield service
    finally:
        os.sched_setaffinity(0, cores.service | cores.clients)


def request(count: int, seed: int) -> Request:
    """For so many images, as one picture."""
    return Request("GET", f"/sample?count={count}&seed={seed}", count)


# ----------------------------------------------------------------------------------------------------------- the fit


async def fit(service: Service) -> Costs:
    """What a lone client's requests of each size take, and where."""
    alone = {count: await _alone(service, count) for count in SIZES}
    table(
        [{"count": count, **{name: _cell(name, value) for name, value in one.items()}} for count, one in alone.items()]
    )
    return costs_of(alone)


def costs_of(alone: Mapping[int, Figures]) -> Costs:
    """Lines through what was seen of each size."""
    counts = np.array(list(alone), float)
    tiles = np.array([len(TILES.split(count)) for count in alone], float)
    seen = {name: np.array([one[name] for one in alone.values()]) for name in ("batch", "encode", "loop", "client")}
    fixed_s, row_s, tile_s = least_squares([np.ones_like(counts), counts, tiles], seen["batch"])
    loop, encode, client = (
        Line(*least_squares([np.ones_like(counts), counts], seen[name])) for name in ("loop", "encode", "client")
    )
    half = Line(loop.fixed_s / 2, loop.image_s / 2)
    answer = Line(half.fixed_s + encode.fixed_s, half.image_s + encode.image_s)
    return Costs(Line(fixed_s, row_s), tile_s, half, answer, client)


def least_squares(columns: Sequence[NDArray[np.float64]], values: NDArray[np.float64]) -> list[float]:
    """Of what the values are sums, with the smallest relative errors; nothing takes less than no time."""
    weights = 1 / np.maximum(values, LEAST_S)
    matrix = np.array(columns).T * weights[:, None]
    used = list(range(len(columns)))
    while True:
        found = np.linalg.lstsq(matrix[:, used], values * weights)[0]
        if not used or found.min() >= 0:
            break
        used.pop(int(found.argmin()))
    amounts = np.zeros(len(columns))
    amounts[used] = found
    return [float(one) for one in amounts]


def _cell(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "others" else f"{1e3 * value:.3f} ms"


async def _alone(service: Service, count: int) -> Figures:
    async with Client(service.port) as client:
        ask: Callable[[int], Request] = lambda number: request(count, number)  # noqa: E731
        await keep_asking(client, ask, 1, after(WARM_S / 2))
        before, used = await service.metrics(), Used(service)
        asked = await keep_asking(client, ask, 1, after(ALONE_S))
        used_s, others, now = *used.since(), await service.metrics()
    latency = statistics.fmean(one.latency_s for one in asked)
    batch, encode = (_mean(before, now, name) for name in ("gan_compute_seconds", "gan_encode_seconds"))
    loop = max(0.0, used_s / (1 - others) / len(asked) - batch - encode)
    return {
        "latency": latency,
        "batch": batch,
        "encode": encode,
        "loop": loop,
        "client": max(0.0, latency - batch - encode - loop),
        "others": others,
    }


class Used:
    """What the service has used of its processor since this was made, and others have."""

    def __init__(self, service: Service) -> None:
        self._service = service
        [core] = os.sched_getaffinity(service.pid)
        self._name = f"cpu{core} "
        self._began = self._now()

    def _now(self) -> tuple[float, float, float]:
        [line] = (one for one in Path("/proc/stat").read_text().splitlines() if one.startswith(self._name))
        user, nice, system, _idle, _io, *interrupts_and_steal = map(int, line.split()[1:9])
        busy = user + nice + system + sum(interrupts_and_steal)
        return time.perf_counter(), busy / TICKS_PER_S, self._service.cpu_s()

    def since(self) -> tuple[float, float]:
        """Seconds that the service used, and the share that others took."""
        took_s, busy_s, used_s = (now - began for now, began in zip(self._now(), self._began, strict=True))
        return used_s, min(max(0.0, busy_s - used_s) / took_s, MOST_OTHERS)


def _mean(before: Readings, now: Readings, name: str) -> float:
    seconds, times = (now.total(f"{name}_{end}") - before.total(f"{name}_{end}") for end in ("sum", "count"))
    return seconds / times


# ---------------------------------------------------------------------------------------------------- the comparison


def traffic_of(mix: Mapping[int, float], seconds: float) -> Traffic:
    """One request a second of this mix."""
    return Traffic(tuple(Piece(0, seconds, share, count) for count, share in mix.items()), seconds)


def most_per_s(costs: Costs, mix: Mapping[int, float]) -> float:
    """Requests a second that the simulation gets through where all come at once."""
    rng = np.random.default_rng(0)
    counts = rng.choice(list(mix), SATURATION, p=list(mix.values()))
    return SATURATION / float(simulate(costs, np.zeros(SATURATION), counts).max())


async def compare(service: Service, costs: Costs, seconds: float) -> list[dict[str, object]]:
    """Each mix at each load: what was seen and what the simulation says."""
    rows = []
    for name, mix in MIXES.items():
        most = most_per_s(costs, mix)
        for load in LOADS:
            pairs = [await _one_run(service, costs, mix, load * most, seconds, run) for run in range(RUNS)]
            seen, simulated = ({q: _median(pairs, side, q) for q in ("mean", "p95", "p99")} for side in (0, 1))
            busy, others = (_median(pairs, 0, name) for name in ("busy", "others"))
            rows.append(
                {
                    "mix": name,
                    "load": load,
                    "requests/s": round(load * most),
                    "busy": f"{busy:.0%} and {others:.0%}",
                    **{f"{q}, ms": f"{1e3 * seen[q]:.2f} and {1e3 * simulated[q]:.2f}" for q in seen},
                    "worst": f"{max(abs(simulated[q] / seen[q] - 1) for q in seen):.1%}",
                }
            )
    return rows


async def _one_run(
    service: Service, costs: Costs, mix: Mapping[int, float], per_s: float, seconds: float, seed: int
) -> tuple[Figures, Figures]:
    asked = arrivals(traffic_of(mix, seconds), per_s, seconds, seed)
    schedule = zip(asked.due_s.tolist(), asked.counts.tolist(), strict=True)
    async with Client(service.port) as client:
        await keep_asking(client, lambda number: request(1, number), 4, after(WARM_S / 4))
        used, began = Used(service), time.perf_counter()
        with no_garbage_collection():
            sent = await send_at(client, ((due, request(count, place)) for place, (due, count) in enumerate(schedule)))
        took_s, (used_s, others) = time.perf_counter() - began, used.since()
    assert all(one.outcome == OK for one in sent)
    sent.sort(key=lambda one: one.sent)
    at, counts = np.array([one.sent for one in sent]), np.array([one.request.images for one in sent])
    latencies = _figures(np.array([one.done for one in sent]) - at)
    seen = {**latencies, "busy": used_s / took_s, "others": others}
    return seen, _figures(simulate(costs, at - began, counts))


def _figures(latencies: NDArray[np.float64]) -> Figures:
    p95, p99 = np.quantile(latencies, (0.95, 0.99)).tolist()
    return {"mean": float(latencies.mean()), "p95": p95, "p99": p99}


def _median(pairs: list[tuple[Figures, Figures]], side: int, name: str) -> float:
    return statistics.median(pair[side][name] for pair in pairs)


async def measure(arguments: argparse.Namespace) -> int:
    """Fit, compare, and say what came of it; the exit code."""
    with on_one_core(arguments.bundles, arguments.bundle) as service:
        costs = await fit(service)
        rows = await compare(service, costs, arguments.seconds)
    table(rows)
    if arguments.costs:
        arguments.costs.parent.mkdir(parents=True, exist_ok=True)
        arguments.costs.write_text(json.dumps(costs._asdict()))
    checks = [
        Check(f"{row['mix']}, load {row['load']}: within {WITHIN:.0%}", str(row["worst"]), _share(row) <= WITHIN)
        for row in rows
    ]
    return finish("fit", {"bundle": arguments.bundle, "costs": costs._asdict(), "compared": rows}, checks)


def _share(row: Mapping[str, object]) -> float:
    return float(str(row["worst"]).rstrip("%")) / 100


def read_costs(file: Path) -> Costs:
    """What `--costs` has written."""
    told = json.loads(file.read_text())
    lines = {name: Line(*told[name]) for name in ("batch", "read", "answer", "client")}
    return Costs(**lines, tile_s=told["tile_s"])


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Fit the simulation and compare it with the service.", seconds=3)
    made.add_argument("--bundle", default="mnist-mlp", help="what is drawn from")
    made.add_argument("--costs", type=Path, help="write the fit to this file")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
