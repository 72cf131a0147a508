"""Measures what more workers bring: answers a second, their times and memory, by load and number of workers.

    python -m benchmarks.serving.workers [--workers 1 2 4] [--rounds 3] [--seconds 3]

Closed loops by wrk on the service's own processors, in turns: in each round every number of workers is started, asked
and stopped once. Figures are medians of the rounds. The rule of `GAN_WORKERS=auto` (service/server/worker_count.py)
should choose the number with which most is answered; what a lone client loses by it is in the rows with one connection.
"""

import argparse
import itertools
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import finish, parser, table
from service.machine.cpu import cpu_limit

WARM_S = 1
SEEDS_APART = 10**8  # between two measurements, so that no request comes twice
# Images in a request, their form, connections. More connections for the last would be more than may wait.
LOADS = (
    *((count, "png", connections) for count in (1, 64) for connections in (1, 8, 64)),
    *((1024, "npy", connections) for connections in (1, 8)),
)
AT_THE_END = "start, and memory after all this"

Row = dict[str, Any]

_seeds = itertools.count(SEEDS_APART, SEEDS_APART)


def ask(service: Service, count: int, form: str, connections: int, seconds: float) -> Row:
    """A closed loop of requests for so many images in one form."""
    body = f'{{"count":{count},"seed":{{seed}},"format":"{form}"}}'.encode()
    request = Request("POST", "/sample", count, body, (("Content-Type", "application/json"),))
    wrk.measure(service.port, request, connections, WARM_S, next(_seeds))
    seen = wrk.measure(service.port, request, connections, seconds, next(_seeds))
    return {"requests_per_s": seen.per_s, "p50_ms": seen.p50_ms, "p99_ms": seen.p99_ms, "failed": seen.failed}


def memory_mib(pid: int) -> Row:
    """Memory of a process and all that it has started: with what they share counted for each, and counted once."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    pages = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in pids]
    resident, shared_once = (
        sum(int(re.findall(rf"^{name}: +(\d+) kB", page, re.MULTILINE)[0]) for page in pages) / 1024
        for name in ("Rss", "Pss")
    )
    return {"resident_mib": resident, "shared_once_mib": shared_once}


def measure(arguments: argparse.Namespace) -> list[Row]:
    """A row for each load and number of workers, then one for each number's start and memory."""
    found: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            started = time.monotonic()
            with running(bundles=arguments.bundles, default_bundle=arguments.bundle, workers=workers) as service:
                start_s = time.monotonic() - started
                for count, form, connections in LOADS:
                    load = f"count={count} {form}, {connections} connection{'s' * (connections > 1)}"
                    found[load, workers].append(ask(service, count, form, connections, arguments.seconds))
                found[AT_THE_END, workers].append({"start_s": start_s} | memory_mib(service.pid))
    loads = list(dict.fromkeys(load for load, _ in found))
    return [
        {"load": load, "workers": workers} | medians(found[load, workers])
        for load in loads
        for workers in arguments.workers
    ]


def medians(rows: Sequence[Row]) -> Row:
    """The median of each figure."""
    return {name: float(f"{statistics.median(row[name] for row in rows):.4g}") for name in rows[0]}


def main() -> int:
    """Read the arguments and measure."""
    made = parser("What more workers bring.", seconds=3)
    made.add_argument("--bundle", default="mnist-mlp", help="the one to ask for")
    made.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    most = cpu_limit()
    several = sorted({1, *(n for n in (2, 4, 8) if n <= most), most})
    made.add_argument("--workers", type=int, nargs="+", default=several, help="numbers of workers to compare")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    rows = measure(arguments)
    table([row for row in rows if row["load"] != AT_THE_END])
    print()
    table([row for row in rows if row["load"] == AT_THE_END])
    return finish("workers", {"seconds": arguments.seconds, "rounds": arguments.rounds, "rows": rows}, [])


if __name__ == "__main__":
    sys.exit(main())
