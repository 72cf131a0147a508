"""Fits the simulation to a lone client's runs, and compares it with the service under other loads.

    python -m benchmarks.scaling.fit [--seconds 3] [--costs build/costs.json]

The service has one worker on one processor, and the clients another. A lone client asks again and again, for each of
several sizes. What a batch takes comes from `gan_compute_seconds`. What the event loop takes is the rest of the
process' time: encoding is known (`gan_encode_seconds`), and of the other half comes before the batch, half after it.
The rest of the latency is the client's and the network's.

Then requests come at random times, of one size and of several mixed, at shares of what the simulation says is possible.
Each is run five times, and simulated with the same arrivals. The medians are compared. `--costs` writes the fit for
`benchmarks.scaling.replicas`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.scaling.simulation import Costs, simulate
from benchmarks.tools.client import Client, Request, after, keep_asking, send_at
from benchmarks.tools.process import Readings, Service, running
from benchmarks.tools.report import Check, finish, parser, table
from service.capacity.traffic import Piece, Traffic, arrivals

SIZES = (1, 2, 4, 16, 64, 256)
ALONE_S, WARM_S = 1.5, 1.0
MIXES = {"one image": {1: 1.0}, "1, 16 and 64 mixed": {1: 0.7, 16: 0.25, 64: 0.05}}
LOADS = (0.3, 0.5, 0.8)
RUNS = 5
SATURATION = 4000  # requests that come at once, to see what the simulation gets through
WITHIN = 0.15
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
    table([{"count": count, **{name: f"{1e3 * s:.3f} ms" for name, s in one.items()}} for count, one in alone.items()])
    return Costs(
        batch_s={count: one["batch"] for count, one in alone.items()},
        read_s={count: one["loop"] / 2 for count, one in alone.items()},
        answer_s={count: one["loop"] / 2 + one["encode"] for count, one in alone.items()},
        client_s=alone[1]["client"],
    )


async def _alone(service: Service, count: int) -> Figures:
    async with Client(service.port) as client:
        ask: Callable[[int], Request] = lambda number: request(count, number)  # noqa: E731
        await keep_asking(client, ask, 1, after(WARM_S / 2))
        before, before_s = await service.metrics(), service.cpu_s()
        asked = await keep_asking(client, ask, 1, after(ALONE_S))
        used_s, now = service.cpu_s() - before_s, await service.metrics()
    latency = statistics.fmean(one.latency_s for one in asked)
    batch, encode = (_mean(before, now, name) for name in ("gan_compute_seconds", "gan_encode_seconds"))
    loop = max(0.0, used_s / len(asked) - batch - encode)
    return {
        "latency": latency,
        "batch": batch,
        "encode": encode,
        "loop": loop,
        "client": max(0.0, latency - batch - encode - loop),
    }


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
            rows.append(
                {
                    "mix": name,
                    "load": load,
                    "requests/s": round(load * most),
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
        sent = await send_at(client, ((due, request(count, place)) for place, (due, count) in enumerate(schedule)))
    assert all(one.outcome == OK for one in sent)
    return _figures(np.array([one.latency_s for one in sent])), _figures(simulate(costs, asked.due_s, asked.counts))


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
    by_count = {name: {int(count): s for count, s in told[name].items()} for name in ("batch_s", "read_s", "answer_s")}
    return Costs(**by_count, client_s=told["client_s"])


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Fit the simulation and compare it with the service.", seconds=3)
    made.add_argument("--bundle", default="mnist-mlp", help="what is drawn from")
    made.add_argument("--costs", type=Path, help="write the fit to this file")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
