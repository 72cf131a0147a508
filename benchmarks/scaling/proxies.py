"""What nginx and HAProxy make of two replicas: hits of the cache, rolling updates, and a replica that freezes.

    python -m benchmarks.scaling.proxies [--seconds 6]

With the examples of deploy/proxies, without TLS. All listen on loopback only; `unshare --net` keeps even that apart:

    unshare --net sh -c "ip link set lo up && python -m benchmarks.scaling.proxies"

Clients ask for single images by seeds that follow Zipf's law. A frozen replica (SIGSTOP) still has its connections
accepted by the system: what is sent there hangs until the client gives up.
"""

import argparse
import asyncio
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.scaling.replicas import SEEDS, ZIPF
from benchmarks.tools.client import Client, Exchange, Request, after, keep_asking, outcomes
from benchmarks.tools.process import Service
from benchmarks.tools.proxies import EXAMPLES, free_port, proxying, why_not
from benchmarks.tools.report import Check, finish, parser, table

CLIENTS = 8
DRAIN_DELAY_S = 2  # HAProxy asks each second whether a replica is ready
PATIENCE_S = 8.0  # of a client, with a replica that is frozen
FROZEN_S, ASKED_PER_S = 20.0, 20
SETTLE_S = 2.0
OK = 200


class Replicas:
    """Two services on ports that they keep."""

    def __init__(self, bundles: Path, bundle: str) -> None:
        self.ports = free_port(), free_port()
        self._bundles, self._bundle = bundles, bundle
        self.services = [self._start(port) for port in self.ports]

    def _start(self, port: int) -> Service:
        return Service(port=port, bundles=self._bundles, default_bundle=self._bundle, drain_delay_s=DRAIN_DELAY_S)

    def replace(self, place: int) -> None:
        """Stop one in order, and start it again."""
        self.services[place].stop()
        self.services[place] = self._start(self.ports[place])

    def stop(self) -> None:
        """End both."""
        for service in self.services:
            service.stop()


def by_popularity(seed: int) -> "itertools.chain[Request]":
    """Requests for seeds of which few are asked for often."""
    weights = np.arange(1, SEEDS + 1) ** -ZIPF
    seeds = np.random.default_rng(seed).choice(SEEDS, 200_000, p=weights / weights.sum())
    return itertools.chain(Request("GET", f"/sample?seed={one}", 1) for one in seeds.tolist())


async def hits(port: int, seconds: float) -> dict[str, object]:
    """The cache's share of the replies, once it has been asked for a while."""
    requests = by_popularity(1)
    async with Client(port, keep_replies=True) as client:
        await keep_asking(client, lambda _: next(requests), CLIENTS, after(seconds))
        asked = await keep_asking(client, lambda _: next(requests), CLIENTS, after(seconds))
    kept = [one.reply is not None and one.reply.headers.get("x-cache") == "HIT" for one in asked]
    return {"requests/s": round(len(asked) / seconds), "hits": f"{np.mean(kept):.0%}", "outcomes": outcomes(asked)}


async def roll(port: int, replicas: Replicas) -> list[Exchange]:
    """Replace one after the other while clients ask for images without a seed, which nothing keeps."""
    is_over = False
    async with Client(port) as client, asyncio.TaskGroup() as group:
        asking = group.create_task(
            keep_asking(client, lambda _: Request("GET", "/sample", 1), CLIENTS, lambda: is_over)
        )
        for place in range(2):
            await asyncio.sleep(SETTLE_S)
            await asyncio.to_thread(replicas.replace, place)
        await asyncio.sleep(SETTLE_S)
        is_over = True
    return asking.result()


async def freeze(port: int, replicas: Replicas) -> tuple[list[float], int]:
    """Stop a replica in its tracks while clients ask, again and again whatever becomes of those before.

    Returns when those requests were sent, in seconds since then, that nobody answered in time, and how many there were.
    """
    frozen, lost = replicas.services[0], list[float]()
    frozen.send(signal.SIGSTOP)
    began = time.perf_counter()

    async def ask(sent_s: float) -> None:
        await asyncio.sleep(began + sent_s - time.perf_counter())
        async with Client(port, reuse=False) as client:
            try:
                reply = await asyncio.wait_for(client.ask(Request("GET", "/sample", 1)), PATIENCE_S)
            except TimeoutError:
                lost.append(sent_s)
            else:
                assert reply.status == OK

    times_s = np.arange(0, FROZEN_S, 1 / ASKED_PER_S).tolist()
    try:
        await asyncio.gather(*map(ask, times_s))
    finally:
        frozen.send(signal.SIGCONT)
    return lost, len(times_s)


async def measure(arguments: argparse.Namespace) -> int:
    """Both proxies in turn; the exit code."""
    replicas = Replicas(arguments.bundles, arguments.bundle)
    rows, checks = list[dict[str, object]](), list[Check]()
    try:
        for name in (name for name in EXAMPLES if not why_not(name)):
            with tempfile.TemporaryDirectory() as folder, proxying(name, Path(folder), replicas.ports) as port:
                row = {"proxy": name} | await hits(port, arguments.seconds)
                rolled = await roll(port, replicas)
                lost, total = await freeze(port, replicas)
            failed = sum(one.outcome != OK for one in rolled)
            row |= {"rolled": f"{failed} of {len(rolled)} failed", "frozen": _frozen(lost, total)}
            rows.append(row)
            checks.append(Check(f"{name}: a rolling update fails nobody", f"{failed} of {len(rolled)}", not failed))
            if name == "haproxy":
                out_s = max(lost, default=0.0)
                checks.append(Check("HAProxy takes a frozen replica out within 10 s", f"{out_s:.1f} s", out_s <= 10))
    finally:
        replicas.stop()
    table(rows)
    return finish("proxies", {"rows": rows}, checks)


def _frozen(lost: Sequence[float], total: int) -> str:
    return f"{len(lost)} of {total} unanswered, the last {max(lost, default=0):.1f} s after"


def main() -> int:
    """Read the arguments and measure."""
    made = parser("What nginx and HAProxy make of two replicas.", seconds=6)
    made.add_argument("--bundle", default="mnist-mlp", help="what is drawn from")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
