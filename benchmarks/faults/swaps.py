"""Swaps a bundle for another version again and again under load, and checks every reply.

    python -m benchmarks.faults.swaps [--swaps 50]

The folder of bundles holds a link to one of two versions; a swap changes the link and sends SIGHUP. Every reply must be
a 200 with the bytes that the version it names always gives for its seed. Once, half-way, the link leads to a version
whose weights are damaged: that must be refused, and the old one must go on serving. The service's memory is read after
each swap, and must not grow.
"""

import argparse
import asyncio
import hashlib
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import uvloop
from PIL import Image

from benchmarks.tools.client import Client, Exchange, Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, percentiles, trend
from models.bundle import GENERATOR, SAMPLES, Bundle, read_bundle, write_bundle

CLIENTS, COUNT, SEEDS = 8, 64, 16
POLL_S = 0.02
BETWEEN_S = 0.2  # so that each version works for a while
WARM_SWAPS = 10
MOST_GROWTH = 0.03
MIB = 2**20


def make_versions(bundle: Bundle, folder: Path) -> list[Path]:
    """The bundle, another version of it, and a damaged one."""
    first, second, damaged = (folder / name for name in ("first", "second", "damaged"))
    shutil.copytree(bundle.folder, first)
    facts = bundle.manifest.model_dump(exclude={"format", "files"})
    generator = {name: 0.9 * tensor for name, tensor in bundle.generator.state_dict().items()}
    samples = np.atleast_3d(np.asarray(Image.open(bundle.folder / SAMPLES)))
    write_bundle(second, facts, generator, bundle.discriminator.state_dict(), samples)
    shutil.copytree(second, damaged)
    weights = bytearray((damaged / GENERATOR).read_bytes())
    weights[-1] ^= 1
    (damaged / GENERATOR).write_bytes(weights)
    return [first, second, damaged]


class Link:
    """The bundle that the service's folder holds, and that can be turned into another at once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._place = folder / "current"
        self._new = folder / ".new"

    def turn(self, target: Path) -> None:
        """Lead to this bundle from now on."""
        self._new.symlink_to(target)
        self._new.replace(self._place)


def ask_for(number: int) -> Request:
    """Images of one of a few seeds."""
    return Request("GET", f"/sample?count={COUNT}&format=npy&seed={number % SEEDS}", COUNT)


class Load:
    """Clients that ask, one after the other, and look at every byte."""

    def __init__(self, client: Client) -> None:
        self.exchanges: list[Exchange] = []
        self.wrong_bytes = 0
        self.is_over = False
        self._client = client
        self._digests: dict[tuple[str, int], str] = {}  # of the images, by name@version and seed

    @property
    def versions(self) -> set[str]:
        """Those that replies have named."""
        return {version for version, _ in self._digests}

    async def run(self) -> None:
        """Ask until it is over."""
        await asyncio.gather(*(self._one(number) for number in range(CLIENTS)))

    async def _one(self, number: int) -> None:
        while not self.is_over:
            exchange = await self._client.exchange(ask_for(number))
            if exchange.reply is not None and exchange.outcome == 200:
                digest = hashlib.sha256(exchange.reply.body).hexdigest()
                version = exchange.reply.headers["x-bundle"], number % SEEDS
                self.wrong_bytes += self._digests.setdefault(version, digest) != digest
            exchange.reply = None
            self.exchanges.append(exchange)
            number += CLIENTS + 1


async def swap(service: Service, link: Link, target: Path, result: str) -> None:
    """Turn the link, tell the service, and wait until it has counted this result once more."""
    before = (await service.metrics()).total("gan_bundle_swaps_total", result=result)
    link.turn(target)
    service.send(signal.SIGHUP)
    while (await service.metrics()).total("gan_bundle_swaps_total", result=result) == before:  # noqa: ASYNC110 - another process
        await asyncio.sleep(POLL_S)


async def swap_under_load(service: Service, link: Link, versions: list[Path], swaps: int) -> tuple[Load, list[float]]:
    """All the swaps: what the clients saw, and the service's MiB after each."""
    first, second, damaged = versions
    mib = []
    async with Client(service.port, keep_replies=True) as client, asyncio.TaskGroup() as group:
        load = Load(client)
        group.create_task(load.run())
        for number in range(swaps):
            if number == swaps // 2:
                await swap(service, link, damaged, "refused")
            await swap(service, link, first if number % 2 else second, "loaded")
            await asyncio.sleep(BETWEEN_S)
            mib.append(service.rss_bytes() / MIB)
        load.is_over = True
    return load, mib


async def measure(arguments: argparse.Namespace) -> int:
    """Make the versions, swap them, and look; returns the exit code."""
    source = min(path.parent for path in arguments.bundles.glob("*/manifest.json"))
    with tempfile.TemporaryDirectory() as scratch:
        versions = make_versions(read_bundle(source), Path(scratch))
        link = Link(Path(scratch) / "bundles")
        link.turn(versions[0])
        with running(bundles=Path(scratch) / "bundles") as service:
            load, mib = await swap_under_load(service, link, versions, arguments.swaps)
            readings = await service.metrics()
    failed = [exchange for exchange in load.exchanges if exchange.outcome != 200]
    loaded, refused = (readings.total("gan_bundle_swaps_total", result=result) for result in ("loaded", "refused"))
    slope = trend(range(len(mib) - WARM_SWAPS), mib[WARM_SWAPS:])
    growth = slope.slope * (len(mib) - WARM_SWAPS)
    latency = percentiles(exchange.latency_s for exchange in load.exchanges)
    checks = [
        Check(
            f"{arguments.swaps} swaps under load, one damaged version refused",
            f"{loaded:.0f}, {refused:.0f}",
            (loaded, refused) == (arguments.swaps, 1),
        ),
        Check("no request fails", f"{len(failed)} of {len(load.exchanges)}", not failed),
        Check(
            "every reply has its version's bytes",
            f"{load.wrong_bytes} wrong, {len(load.versions)} versions",
            not load.wrong_bytes and len(load.versions) == 2,
        ),
        Check(
            f"memory after {WARM_SWAPS} swaps: slope within 2 standard errors, or < {100 * MOST_GROWTH:.0f} % in all",
            f"{slope.slope:+.3f} ± {slope.error:.3f} MiB a swap, {mib[-1]:.0f} MiB",
            slope.is_flat or growth < MOST_GROWTH * mib[-1],
        ),
    ]
    facts = {
        "swaps": arguments.swaps,
        "requests": len(load.exchanges),
        "failed": len(failed),
        "latency": latency,
        "rss_mib": {
            "first": round(mib[0]),
            "warm": round(mib[WARM_SWAPS]),
            "max": round(max(mib)),
            "last": round(mib[-1]),
        },
        "rss_slope_mib_per_swap": [round(slope.slope, 3), round(slope.error, 3)],
    }
    return finish("swaps", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Swap a bundle for another version under load.")
    made.add_argument("--swaps", type=int, default=50, help="swaps; at least 40, for a trend")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
