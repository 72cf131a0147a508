"""What a million images cost, by format: machine hours, and bytes to send and keep.

    python -m benchmarks.scaling.costs [--seconds 3] [--bundle mnist-mlp]

Clients on the same machine keep asking the service, as it starts by default, for 256 images at a time, over eight
connections; and for single images over 64. What they take is in the figures.
"""

import argparse
import asyncio
import itertools
import sys

import uvloop

from benchmarks.tools.client import Client, Request, after, images, keep_asking
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import finish, parser, table
from service.capacity.need import hours_per_million

LOADS = [
    ("png, single images", "png", 1, 64),
    ("png, a picture of 256", "png", 256, 8),
    ("webp, a picture of 256", "webp", 256, 8),
    ("jpeg, a picture of 256", "jpeg", 256, 8),
    ("json, 256 PNGs", "json", 256, 8),
    ("zip, 256 PNGs", "zip", 256, 8),
    ("npy, 256", "npy", 256, 8),
    ("npy, 4,096", "npy", 4096, 2),
]
WARM_S = 1
MILLION = 10**6

_seeds = itertools.count()


async def measure_one(
    service: Service, name: str, form: str, count: int, clients: int, seconds: float
) -> dict[str, object]:
    """One format's rate and cost."""

    def request(_: int) -> Request:
        return Request("GET", f"/sample?count={count}&format={form}&seed={next(_seeds) * 4096}", count)

    async with Client(service.port) as client:
        await keep_asking(client, request, clients, after(WARM_S))
        before = await service.metrics()
        asked = await keep_asking(client, request, clients, after(seconds))
        now = await service.metrics()
    took_s = max(one.done for one in asked) - min(one.sent for one in asked)
    per_s = images(asked) / took_s
    sent = now.total("gan_response_bytes_sum", route="/sample") - before.total(
        "gan_response_bytes_sum", route="/sample"
    )
    return {
        "reply": name,
        "images/s": round(per_s),
        "machine hours a million": float(f"{hours_per_million(per_s):.3g}"),
        "MB a million": round(sent / images(asked)),
        "failed": sum(one.outcome != 200 for one in asked),
    }


async def measure(arguments: argparse.Namespace) -> int:
    """Every format in turn; the exit code."""
    with running(bundles=arguments.bundles, default_bundle=arguments.bundle, workers="auto") as service:
        rows = [await measure_one(service, *load, arguments.seconds) for load in LOADS]
    table(rows)
    return finish("costs", {"bundle": arguments.bundle, "rows": rows}, [])


def main() -> int:
    """Read the arguments and measure."""
    made = parser("What a million images cost.", seconds=3)
    made.add_argument("--bundle", default="mnist-mlp", help="what is drawn from")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
