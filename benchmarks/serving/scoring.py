"""What scoring drawn images costs: requests a second with GAN_SCORED_SHARE as it is by default, and with none.

    python -m benchmarks.serving.scoring [--seconds 3] [--rounds 5]

Two services run side by side, one with scoring and one without, and wrk asks them in turns: many connections for one
image each, and one connection for 64. Each round gives a ratio. How many images were scored is said too: while images
wait, none are.
"""

import argparse
import asyncio
import statistics
import sys
from contextlib import ExitStack

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, table
from service.settings import Settings

LOADS = {"64 connections, 1 image": (64, 1), "8 connections, 1 image": (8, 1), "1 connection, 64 images": (1, 64)}
WARM_S = 1
MOST_COST = 0.03  # of requests a second


async def scored(service: Service) -> float:
    """Images that D has scored so far."""
    return (await service.metrics()).total("gan_discriminator_probability_count", origin="sampled")


def cost(services: list[Service], load: str, seconds: float, rounds: int) -> dict[str, float]:
    """The median share of requests that the first service answers less than the second."""
    connections, count = LOADS[load]
    body = b'{"seed":{seed},"count":%d}' % count
    asked = Request("POST", "/sample", 0, body, (("Content-Type", "application/json"),))
    for service in services:
        wrk.measure(service.port, asked, connections, WARM_S, 0)
    before, rates, ratios = asyncio.run(scored(services[0])), [], []
    for number in range(rounds):
        order = services if number % 2 else services[::-1]
        found = {one.port: wrk.measure(one.port, asked, connections, seconds, 1000 * number).per_s for one in order}
        rates.append(found[services[0].port])
        ratios.append(found[services[0].port] / found[services[1].port])
    judged = asyncio.run(scored(services[0])) - before
    drawn = statistics.mean(rates) * seconds * rounds * count
    return {
        "per_s": statistics.median(rates),
        "cost": 1 - statistics.median(ratios),
        "least": 1 - max(ratios),
        "most": 1 - min(ratios),
        "scored": judged / drawn,
    }


def measure(arguments: argparse.Namespace) -> int:
    """All loads; returns the exit code."""
    share = Settings.model_fields["scored_share"].default
    with ExitStack() as stack:
        services = [stack.enter_context(running(bundles=arguments.bundles, scored_share=one)) for one in (share, 0)]
        found = {load: cost(services, load, arguments.seconds, arguments.rounds) for load in arguments.loads}
    shown = {load: f"{one['cost']:.1%} ({one['least']:.1%} to {one['most']:.1%})" for load, one in found.items()}
    table(
        [
            {"load": load, "per_s": round(one["per_s"]), "cost": shown[load], "scored": f"{one['scored']:.2%}"}
            for load, one in found.items()
        ]
    )
    checks = [
        Check(f"{load}: at most {MOST_COST:.0%} of requests a second", shown[load], one["cost"] <= MOST_COST)
        for load, one in found.items()
    ]
    facts = {"seconds": arguments.seconds, "rounds": arguments.rounds, "share": share, "loads": found}
    return finish("scoring", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Scoring of drawn images.", seconds=3)
    made.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    made.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), help="what is asked for")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
