"""Serves 50 versions of a bundle with 8 in memory: memory, cold requests, swaps of what a name means, and neighbours.

    python -m benchmarks.faults.versions [--part memory|neighbours|swaps]

`memory` asks for every version in turn, twice, and then has all but one let go. `neighbours` measures clients of one
version, alone and beside a client that asks for all others in turn. `swaps` changes 100 times what the name means, by
aliases.json and SIGHUP, while clients ask for the name and for pinned versions. Every reply must be a 200 with the
bytes that its version always gives.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import uvloop
from PIL import Image

from benchmarks.tools.client import Client, Exchange, Request, after, keep_asking, offer
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, percentiles
from models.bundle import SAMPLES, read_bundle, write_bundle

VERSIONS, RESIDENT, SWAPS, CLIENTS = 50, 8, 100, 4
RATE_PER_S, COUNT, SECONDS = 100.0, 4, 20.0  # of the neighbours
WARM_S = 2.0
TAKE_UP_S = 30.0  # until the name means what aliases.json says
TRIM_S = 31.0  # the service gives memory back every half minute
MOST_LOADING = 1.2  # what is freed stays in the heap until it is given back
MOST_LEFT, MOST_SLOWER = 1.05, 1.5
MIB = 2**20


def make_versions(source: Path, folder: Path) -> list[str]:
    """Versions of a bundle, the first being what its name means; returns their digits."""
    bundle = read_bundle(source)
    samples = np.atleast_3d(np.asarray(Image.open(source / SAMPLES)))
    digits = []
    for number in range(VERSIONS):
        facts = bundle.manifest.model_dump(exclude={"format", "files"})
        generator = {name: (1 - 0.001 * number) * tensor for name, tensor in bundle.generator.state_dict().items()}
        made = write_bundle(folder / f"v{number}", facts, generator, bundle.discriminator.state_dict(), samples)
        digits.append(made.version)
    write_aliases(folder, bundle.name, digits[0])
    return digits


def write_aliases(folder: Path, name: str, version: str) -> None:
    """Have the name mean this version, once that is taken up."""
    new = folder / ".aliases.json"
    new.write_text(json.dumps({name: version}))
    new.replace(folder / "aliases.json")


class Watch:
    """Asks, and looks at every reply."""

    def __init__(self, client: Client, name: str) -> None:
        self.wrong = 0
        self.failed: list[int | str] = []
        self._client = client
        self._name = name
        self._digests: dict[str, str] = {}

    async def ask(self, version: str | None) -> Exchange:
        """Images of a seed, of a pinned version or of what the name means."""
        asked = f"{self._name}@{version}" if version else self._name
        request = Request("GET", f"/sample?bundle={asked}&count={COUNT}&seed=7&format=npy", COUNT)
        exchange = await self._client.exchange(request)
        if exchange.outcome != 200 or exchange.reply is None:
            self.failed.append(exchange.outcome)
            return exchange
        digest, came = hashlib.sha256(exchange.reply.body).hexdigest(), exchange.reply.headers["x-bundle"]
        self.wrong += self._digests.setdefault(came, digest) != digest or (version is not None and came != asked)
        exchange.reply = None
        return exchange

    def check(self, asked: int) -> Check:
        """That nothing was refused or mixed up."""
        seen = f"{len(self.failed)} failed, {self.wrong} wrong of {asked}"
        return Check("every reply is a 200 with its version's bytes", seen, not self.failed and not self.wrong)


async def memory(
    service: Service, folder: Path, name: str, versions: list[str]
) -> tuple[dict[str, object], list[Check]]:
    """Ask for all versions in turn, twice; then let go of all but the first."""
    mib = [service.rss_bytes() / MIB]
    exchanges = []
    async with Client(service.port, keep_replies=True) as client:
        watch = Watch(client, name)
        await watch.ask(None)
        for version in [*versions, *versions]:
            exchanges.append(await watch.ask(version))
            mib.append(service.rss_bytes() / MIB)
    resident = (await service.metrics()).total("gan_bundle_info")
    full, most = max(mib[: RESIDENT + 1]), max(mib)
    for number in range(1, VERSIONS):
        shutil.rmtree(folder / f"v{number}")
    service.send(signal.SIGHUP)
    while (await service.metrics()).total("gan_bundle_info") > 1:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.1)
    await asyncio.sleep(TRIM_S)
    last = service.rss_bytes() / MIB
    cold = percentiles(exchange.latency_s for exchange in exchanges[1:])
    checks = [
        watch.check(len(exchanges)),
        Check(f"in memory after {2 * VERSIONS} cold loads: {RESIDENT}", f"{resident:.0f}", resident == RESIDENT),
        Check(
            f"at most {MOST_LOADING} x the memory with the first {RESIDENT}",
            f"{most:.0f} of {full:.0f} MiB",
            most <= MOST_LOADING * full,
        ),
        Check(
            "memory is back where it began, once one is left",
            f"{last:.0f} of {mib[0]:.0f} MiB",
            last <= MOST_LEFT * mib[0],
        ),
    ]
    rss = {"start": round(mib[0]), "with_8": round(full), "most": round(most), "one_left": round(last)}
    return {"cold_request": cold, "rss_mib": rss}, checks


async def neighbours(service: Service, name: str, versions: list[str]) -> tuple[dict[str, object], list[Check]]:
    """Clients of what the name means, alone and beside one who asks for all other versions in turn."""
    request = Request("GET", f"/sample?count={COUNT}&format=npy", COUNT)
    turn = itertools.cycle(versions[1:])

    def next_version(_: int) -> Request:
        return Request("GET", f"/sample?bundle={name}@{next(turn)}&seed=1")

    async with Client(service.port) as client, Client(service.port) as other:
        await offer(client, lambda _: request, RATE_PER_S, WARM_S)
        alone = await offer(client, lambda _: request, RATE_PER_S, SECONDS)
        beside, cycled = await asyncio.gather(
            offer(client, lambda _: request, RATE_PER_S, SECONDS),
            keep_asking(other, next_version, 1, after(SECONDS)),
        )
    failed = [one.outcome for one in (*alone, *beside, *cycled) if one.outcome != 200]
    before, after_ = (percentiles(one.latency_s for one in exchanges) for exchanges in (alone, beside))
    factor = after_["p99_ms"] / before["p99_ms"]
    checks = [
        Check("no request fails", f"{len(failed)} of {len(alone) + len(beside) + len(cycled)}", not failed),
        Check(
            f"neighbours' p99 at most {MOST_SLOWER} x",
            f"{factor:.2f} x, {len(cycled)} cold loads",
            factor <= MOST_SLOWER,
        ),
    ]
    return {"alone": before, "beside": after_, "cold_loads": len(cycled)}, checks


async def swaps(
    service: Service, folder: Path, name: str, versions: list[str]
) -> tuple[dict[str, object], list[Check]]:
    """Change what the name means under load of the name and of pinned versions."""
    is_over, asked = False, list[Exchange]()
    async with Client(service.port, keep_replies=True) as client, asyncio.TaskGroup() as group:
        watch = Watch(client, name)

        async def ask(choices: Iterator[str | None]) -> None:
            while not is_over:
                asked.append(await watch.ask(next(choices)))

        few = versions[: RESIDENT - 2]
        for number in range(CLIENTS):
            pinned = few[number:] + few[:number]
            group.create_task(ask(itertools.cycle([None, *pinned, None, versions[RESIDENT + number]])))
        taken_up = 0
        for number in range(1, SWAPS + 1):
            write_aliases(folder, name, version := few[number % len(few)])
            service.send(signal.SIGHUP)
            try:
                async with asyncio.timeout(TAKE_UP_S):
                    while json.loads((await service.get(f"/bundles/{name}")).body)["version"] != version:  # noqa: ASYNC110 - as above
                        await asyncio.sleep(0.01)
            except TimeoutError:
                break
            taken_up = number
        is_over = True
    checks = [watch.check(len(asked)), Check(f"{SWAPS} swaps taken up", str(taken_up), taken_up == SWAPS)]
    return {"requests": len(asked), "latency": percentiles(one.latency_s for one in asked)}, checks


@contextmanager
def serving(source: Path) -> Iterator[tuple[Service, Path, str, list[str]]]:
    """A service of versions of this bundle, their folder, its name and their digits."""
    with tempfile.TemporaryDirectory() as scratch:
        versions = make_versions(source, Path(scratch))
        with running(bundles=scratch, max_resident_bundles=RESIDENT) as service:
            yield service, Path(scratch), read_bundle(source).name, versions


async def measure(arguments: argparse.Namespace) -> int:
    """Run the parts; returns the exit code."""
    facts: dict[str, object] = {"versions": VERSIONS, "resident": RESIDENT}
    checks: list[Check] = []
    source = arguments.bundles / arguments.bundle
    parts: dict[str, Callable[[Service, Path, str, list[str]], Awaitable[tuple[dict[str, object], list[Check]]]]] = {
        "memory": memory,
        "neighbours": lambda service, _, name, versions: neighbours(service, name, versions),
        "swaps": swaps,
    }
    for part in [arguments.part] if arguments.part else parts:
        with serving(source) as (service, folder, name, versions):
            facts[part], more = await parts[part](service, folder, name, versions)
            checks += more
    return finish("versions", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Serve 50 versions of a bundle with 8 of them in memory.")
    made.add_argument("--bundle", default="mnist-mlp", help="the bundle in that folder to make versions of")
    made.add_argument("--part", choices=("memory", "neighbours", "swaps"), help="one part; all if unset")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
