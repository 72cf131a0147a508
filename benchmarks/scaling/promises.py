"""Does `python -m service capacity` tell the truth? A rate that it did not look at, and its settings, five times each.

    python -m service capacity --p99-ms 50 --json > build/capacity.json
    python -m benchmarks.scaling.promises --capacity build/capacity.json

Services are started as the command starts them, with the settings of the environment, and asked for the same. At a rate
between those of its curve the medians of p95 and p99 are compared with what the curve says. At the knee a service with
its settings and one with the operator's own are asked in turns, and what was answered in time is compared.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.tools.report import Check, finish, parser, table
from service.capacity.measure import Driver, Plan, Seen
from service.capacity.service_process import ServiceProcess
from service.capacity.traffic import steady
from service.settings import PREFIX, Settings

HELD_OUT = 0.75  # of the knee; the curve has 0.6 and 0.8
RUNS = 5
P95_WITHIN, P99_WITHIN, KEPT = 0.15, 0.25, 0.97


def expected(told: dict[str, Any], per_s: float, name: str) -> float:
    """What the curve says of a rate."""
    rates, latencies = zip(*((point["requests_per_s"], point[name]) for point in told["curve"]), strict=True)
    return float(np.exp(np.interp(per_s, rates, np.log(latencies))))


async def measure(arguments: argparse.Namespace) -> int:
    """Ask, and compare; the exit code."""
    told = json.loads(arguments.capacity.read_text())
    [count] = told["counts"]
    p99_ms, knee = float(told["p99_ms"]), float(told["knee"]["requests_per_s"])
    per_s = HELD_OUT * knee
    flags = {"bundles": str(arguments.bundles), "default_bundle": told["bundle"].partition("@")[0]}
    settings = Settings.model_validate(flags)
    workers = {"workers": told["settings"]["GAN_WORKERS"]}
    wanted = {name.removeprefix(PREFIX).lower(): value for name, value in told["settings"].items()}
    traffic, plan = steady(1, count, arguments.seconds), Plan(seconds=arguments.seconds, most_seconds=arguments.seconds)
    seen, before, after = list[Seen](), list[Seen](), list[Seen]()
    async with ServiceProcess(settings, flags, wanted) as theirs, ServiceProcess(settings, flags, workers) as own:
        with_theirs, with_own = (Driver(one, traffic, p99_ms, plan, lambda _: None) for one in (theirs, own))
        for driver in (with_theirs, with_own):
            await driver.saturate()
        for _ in range(RUNS):
            seen.append(await with_theirs.look(per_s))
            before.append(await with_own.look(knee))
            after.append(await with_theirs.look(knee))
    return report(told, per_s, seen, before, after)


def report(told: dict[str, Any], per_s: float, seen: list[Seen], before: list[Seen], after: list[Seen]) -> int:
    """Print what was promised beside what was seen; the exit code."""
    checks, rows = list[Check](), list[dict[str, object]]()
    for name, within in (("p95_ms", P95_WITHIN), ("p99_ms", P99_WITHIN)):
        values = [getattr(one, name) for one in seen]
        promised, median = expected(told, per_s, name), statistics.median(values)
        rows.append(
            {"at": f"{per_s:.0f} requests/s", "of": name, "promised": f"{promised:.3g}", "seen": f"{median:.3g}"}
        )
        off = abs(promised / median - 1)
        checks.append(Check(f"{name} within {within:.0%} of what was promised", f"{off:.1%}", off <= within))
    own, theirs = (statistics.median(one.in_time * one.requests_per_s for one in runs) for runs in (before, after))
    checks.append(Check(f"its settings keep {KEPT:.0%} of the goodput", f"{theirs / own:.1%}", theirs >= KEPT * own))
    table(rows)
    runs = {"held_out": seen, "own_settings": before, "its_settings": after}
    facts = {name: [one._asdict() for one in those] for name, those in runs.items()}
    return finish("promises", {"requests_per_s": per_s, **facts}, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Does `python -m service capacity` tell the truth?", seconds=4)
    made.add_argument("--capacity", type=Path, required=True, help="what the command has printed with --json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
