"""How many replicas keep a p99 under which arrivals, with a cache in front and without, as the simulation says.

    python -m benchmarks.scaling.replicas --costs build/costs.json [--p99-ms 50]

Every request is for one image. A replica has two workers with a processor each; requests go to replicas at random.
Arrivals are steady; in bursts, a second of five times the rest's rate in every five; or all of a second at once, as
from clients that obey a clock. Seeds are asked for by Zipf's law, and the cache, which is never full, answers those
that it has had before.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.scaling.fit import read_costs
from benchmarks.scaling.simulation import Costs, simulate
from benchmarks.tools.report import finish, parser, table

DAY_S = 86_400
PER_DAY = (1_000, 1_000_000, 100_000_000)
PEAK = 3.0  # the busiest hour over the day's average
WORKERS = 2  # of a replica
SEEDS, ZIPF = 100_000, 1.1
LEAST_S, LEAST_REQUESTS, MOST_REQUESTS = 10.0, 2_000, 60_000
MOST_REPLICAS = 512

Times = NDArray[np.float64]


def steady(rng: np.random.Generator, per_s: float, seconds: float) -> Times:
    """A Poisson process."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(per_s * seconds)))


def bursts(rng: np.random.Generator, per_s: float, seconds: float) -> Times:
    """In one second of five, five times the rate of the other four."""
    whole = math.ceil(seconds / 5) * 5
    starts = np.arange(whole)
    rates = np.where(starts % 5 == 0, 5, 1) * per_s * 5 / 9
    return np.sort(np.concatenate([start + rng.random(rng.poisson(rate)) for start, rate in zip(starts, rates)]))  # noqa: B905 - of one length


def by_the_clock(rng: np.random.Generator, per_s: float, seconds: float) -> Times:
    """Everything at the beginning of a second."""
    return np.floor(steady(rng, per_s, seconds))


PATTERNS: dict[str, Callable[[np.random.Generator, float, float], Times]] = {
    "steady": steady,
    "bursts": bursts,
    "by the clock": by_the_clock,
}


def misses(rng: np.random.Generator, requests: int) -> NDArray[np.bool_]:
    """Which of so many requests the cache, filled by as many before them, has to pass on."""
    weights = np.arange(1, SEEDS + 1) ** -ZIPF
    asked = rng.choice(SEEDS, 2 * requests, p=weights / weights.sum())
    is_first = np.zeros(len(asked), bool)
    is_first[np.unique(asked, return_index=True)[1]] = True
    return is_first[requests:]


def p99_ms(costs: Costs, due: Times, replicas: int) -> float:
    """Of one replica's share of these requests; all replicas are alike."""
    mine = np.random.default_rng(replicas).integers(0, replicas, len(due)) == 0
    if not mine.any():
        return 1e3 * costs.alone_s(1)
    latencies = simulate(costs, due[mine], np.ones(int(mine.sum()), np.int64), WORKERS)
    return 1e3 * float(np.quantile(latencies, 0.99))


def replicas_for(costs: Costs, due: Times, wanted_ms: float) -> int | None:
    """The fewest that keep the latency; None where too many would be needed."""
    low, high = 0, 1
    while p99_ms(costs, due, high) > wanted_ms:
        low, high = high, 2 * high
        if high > MOST_REPLICAS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p99_ms(costs, due, middle) <= wanted_ms else (middle, high)
    return high


def plan(costs: Costs, wanted_ms: float) -> list[dict[str, object]]:
    """Each load under each pattern."""
    rows = []
    for per_day in PER_DAY:
        per_s = PEAK * per_day / DAY_S
        seconds = max(LEAST_S, min(LEAST_REQUESTS / per_s, DAY_S), min(10.0, MOST_REQUESTS / per_s))
        for name, pattern in PATTERNS.items():
            rng = np.random.default_rng(1)
            due = pattern(rng, per_s, seconds)
            passed_on = misses(rng, len(due))
            rows.append(
                {
                    "images a day": f"{per_day:,}",
                    "at their most, a second": float(f"{per_s:.3g}"),
                    "arrivals": name,
                    "replicas": replicas_for(costs, due, wanted_ms),
                    "with a cache": replicas_for(costs, due[passed_on], wanted_ms),
                    "hits": f"{1 - passed_on.mean():.0%}",
                }
            )
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Simulate and print; the exit code."""
    rows = plan(read_costs(arguments.costs), arguments.p99_ms)
    table(rows)
    return finish("replicas", {"p99_ms": arguments.p99_ms, "rows": rows}, [])


def main() -> int:
    """Read the arguments and simulate."""
    made = parser("How many replicas keep a p99.")
    made.add_argument("--costs", type=Path, required=True, help="what `benchmarks.scaling.fit --costs` has written")
    made.add_argument("--p99-ms", type=float, default=50, help="the wanted latency")
    return run(made.parse_args())


if __name__ == "__main__":
    sys.exit(main())
