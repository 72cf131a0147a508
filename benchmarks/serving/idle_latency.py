"""What the batcher costs a client that is alone, and what it saves a small request beside large ones.

    python -m benchmarks.serving.idle_latency [--seconds 20]

Alone: one client asks the service, and the same service with its batcher bypassed, in turns; the medians are compared.

Beside large ones: one client asks for single images on a schedule, while others keep the service busy with the largest
requests. The first one's p99 is compared with the time of one full batch, as the service measured it meanwhile.
"""

import argparse
import asyncio
import sys

import uvloop

from benchmarks.tools.client import Client, Exchange, Request, after, keep_asking, offer
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, percentiles, table

KINDS = {"1 png": "count=1&format=png", "1 npy": "count=1&format=npy", "64 npy": "count=64&format=npy"}
TURNS = 50
LARGE_CLIENTS, LARGE_COUNT = 4, 4096
SMALL_PER_S = 20
MOST_OVER_BYPASS, MOST_BATCHES = 1.1, 3.0


def ask_for(query: str, number: int) -> Request:
    """Images of a seed, which no cache on the way has."""
    return Request("GET", f"/sample?{query}&seed={number}")


async def alone(service: Service, bypassed: Service, query: str, seconds: float) -> dict[str, dict[str, float]]:
    """Latency of one client, of both, by turns: what else happens on the machine then hits both alike."""
    seen: dict[str, list[Exchange]] = {"batcher": [], "bypassed": []}
    async with Client(service.port) as one, Client(bypassed.port) as other:
        for turn in range(2 * TURNS + 2):
            name, client = ("batcher", one) if turn % 2 else ("bypassed", other)
            exchanges = await keep_asking(client, lambda n: ask_for(query, n), 1, after(seconds / TURNS / 2))
            if turn >= 2:  # the first two warm
                seen[name] += exchanges
    return {name: percentiles(e.latency_s for e in exchanges) for name, exchanges in seen.items()}


async def beside_large(service: Service, seconds: float) -> tuple[dict[str, float], float, float]:
    """The small client's latency, the mean milliseconds of a batch meanwhile, and the mean rows in one."""
    over = asyncio.Event()
    async with Client(service.port) as large, Client(service.port) as small:
        streams = asyncio.ensure_future(
            keep_asking(large, lambda n: ask_for(f"count={LARGE_COUNT}&format=npy", n), LARGE_CLIENTS, over.is_set)
        )
        await offer(small, lambda n: ask_for(KINDS["1 npy"], n), SMALL_PER_S, 2)  # warm
        before = await service.metrics()
        exchanges = await offer(small, lambda n: ask_for(KINDS["1 npy"], n), SMALL_PER_S, seconds)
        later = await service.metrics()
        over.set()
        await streams
    batches, compute_s, rows = (
        later.total(name) - before.total(name)
        for name in ("gan_compute_seconds_count", "gan_compute_seconds_sum", "gan_images_total")
    )
    return percentiles(e.latency_s for e in exchanges), 1000 * compute_s / batches, rows / batches


async def measure(arguments: argparse.Namespace) -> int:
    """Alone, then beside large ones; returns the exit code."""
    kinds = {}
    with running(bundles=arguments.bundles) as service:
        with running("benchmarks.serving.unbatched", bundles=arguments.bundles) as bypassed:
            for kind, query in KINDS.items():
                kinds[kind] = await alone(service, bypassed, query, arguments.seconds)
        small, batch_ms, batch_rows = await beside_large(service, arguments.seconds)
    table([{"alone": kind, "service": name, **seen} for kind, both in kinds.items() for name, seen in both.items()])
    ratios = {kind: both["batcher"]["p50_ms"] / both["bypassed"]["p50_ms"] for kind, both in kinds.items()}
    batches = small["p99_ms"] / batch_ms
    checks = [
        Check(
            f"alone, {kind}: p50 with the batcher <= {MOST_OVER_BYPASS} x without",
            f"{ratio:.3f}",
            ratio <= MOST_OVER_BYPASS,
        )
        for kind, ratio in ratios.items()
    ]
    checks.append(
        Check(
            f"one image beside {LARGE_CLIENTS} x {LARGE_COUNT}: p99 <= {MOST_BATCHES:g} batches",
            f"{batches:.2f} of {batch_ms:.1f} ms",
            batches <= MOST_BATCHES,
        )
    )
    facts = {
        "alone": kinds,
        "p50_ratio": {kind: round(ratio, 3) for kind, ratio in ratios.items()},
        "beside_large": {
            **small,
            "batch_ms": round(batch_ms, 2),
            "batch_rows": round(batch_rows),
            "p99_in_batches": round(batches, 2),
        },
    }
    return finish("idle_latency", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    return uvloop.run(measure(parser("What the batcher costs and saves.", seconds=20).parse_args()))


if __name__ == "__main__":
    sys.exit(main())
