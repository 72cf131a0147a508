"""What it costs to be asked the same again: computed anew, already known to the client, or kept by the service.

    python -m benchmarks.serving.repeats [--seconds 3] [--rounds 5]

wrk asks for one GET with a seed over 64 connections, in turns: a service with default settings, which computes it each
time; the same service with the reply's ETag, which is answered with 304; and a service with `GAN_CACHE_BYTES`. Each
round gives a ratio to its own computed replies; the table has the medians, and the least and the largest ratio.
"""

import argparse
import asyncio
import statistics
import sys
from typing import NamedTuple

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, table

TARGETS = {
    "one PNG": "/sample?seed=7",
    "a PNG grid of 64": "/sample?seed=7&count=64",
    "64 as npy": "/sample?seed=7&count=64&format=npy",
}
CONNECTIONS, WARM_S = 64, 1
NOT_MODIFIED = 304
COMPUTED, KNOWN, KEPT = "computed", "known to the client", "kept by the service"


class Way(NamedTuple):
    """One way to be answered: who is asked, and how."""

    service: Service
    request: Request

    def seen(self, seconds: float) -> wrk.Seen:
        """What becomes of it over so many connections."""
        return wrk.measure(self.service.port, self.request, CONNECTIONS, seconds, 0)


def ways(computes: Service, keeps: Service, target: str) -> dict[str, Way]:
    """All of them, each of which was seen to be what it is called."""
    asked = Request("GET", target)
    first = asyncio.run(computes.ask(asked))
    known = asked._replace(headers=(("If-None-Match", first.headers["etag"]),))
    assert asyncio.run(computes.ask(known)).status == NOT_MODIFIED
    kept = [asyncio.run(keeps.ask(asked)) for _ in range(2)][1]
    assert kept.headers["server-timing"] == "cache"
    assert kept.body == first.body
    return {COMPUTED: Way(computes, asked), KNOWN: Way(computes, known), KEPT: Way(keeps, asked)}


def measure(arguments: argparse.Namespace) -> int:
    """Round by round; returns the exit code."""
    rows: list[dict[str, object]] = []
    failed = 0
    with (
        running(bundles=arguments.bundles) as computes,
        running(bundles=arguments.bundles, cache_bytes="64MiB") as keeps,
    ):
        for name, target in TARGETS.items():
            all_ways = ways(computes, keeps, target)
            rates: dict[str, list[float]] = {way: [] for way in all_ways}
            for asked in all_ways.values():
                asked.seen(WARM_S)
            for _ in range(arguments.rounds):
                for way, asked in all_ways.items():
                    seen = asked.seen(arguments.seconds)
                    rates[way].append(seen.per_s)
                    failed += seen.failed
            for way, found in rates.items():
                times = [rate / computed for rate, computed in zip(found, rates[COMPUTED], strict=True)]
                rows.append(
                    {
                        "reply": name,
                        "it is": way,
                        "per_s": round(statistics.median(found)),
                        "times": round(statistics.median(times), 2),
                        "least": round(min(times), 2),
                        "most": round(max(times), 2),
                    }
                )
    table(rows)
    checks = [Check("every request is answered", f"{failed} are not", not failed)]
    return finish("repeats", {"seconds": arguments.seconds, "rounds": arguments.rounds, "replies": rows}, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Being asked the same again.", seconds=3)
    made.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
