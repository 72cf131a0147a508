"""A thousand clients connect, ask and hang up; reports the cost to the engine and to the clients that stay.

    python -m benchmarks.faults.disconnects [--clients 1000]

This is done twice. First the engine's thread is held, so that everything is still queued when the clients leave: none
of it may be computed. Then the engine is at work, and each client comes and leaves at a random time: only what was
already in a batch may be computed. Both times, clients that stay must get the bytes that they get alone, and the
counters must add up.
"""

import argparse
import asyncio
import random
import signal
import sys
from collections.abc import Sequence

import uvloop

from benchmarks.faults.gated import HELD
from benchmarks.tools.client import Client, Connection, NoReply, Request
from benchmarks.tools.process import Readings, Service, allow_connections, running
from benchmarks.tools.report import Check, finish, parser

COUNT = 4  # images that each leaver asks for
NEIGHBOURS, NEIGHBOUR_COUNT = 20, 64
POLL_S = 0.02
ARRIVALS_PER_S, LONGEST_STAY_S = 300, 0.1  # with the engine at work


class Storm:
    """What the counters said before and after one storm."""

    def __init__(self, before: Readings, after: Readings) -> None:
        self._before, self._after = before, after

    def grown(self, name: str, **labels: str) -> int:
        """By how much a counter grew."""
        return round(self._after.total(name, **labels) - self._before.total(name, **labels))


def ask_for(count: int, seed: int) -> Request:
    """Images of a seed."""
    return Request("GET", f"/sample?count={count}&format=npy&seed={seed}", count)


def neighbours() -> list[Request]:
    """Requests of the clients that stay."""
    return [ask_for(NEIGHBOUR_COUNT, seed) for seed in range(NEIGHBOURS)]


async def answers(service: Service, requests: Sequence[Request]) -> list[bytes]:
    """The bodies of their replies, asked all at once."""
    async with Client(service.port) as client:
        return [reply.body for reply in await asyncio.gather(*map(client.ask, requests))]


async def until(service: Service, name: str, value: float, **labels: str) -> None:
    """Return once a series has this value, or a larger one."""
    while (await service.metrics()).total(name, **labels) < value:  # noqa: ASYNC110 - another process has no events
        await asyncio.sleep(POLL_S)


class Leaver:
    """A client that asks and then hangs up, answered or not."""

    def __init__(self, connection: Connection, seed: int) -> None:
        self._connection = connection
        self._asking = asyncio.ensure_future(self._ask(seed))

    @classmethod
    async def arrive(cls, service: Service, seed: int) -> "Leaver":
        """Connect, and send the request."""
        return cls(await Connection.open(service.port), seed)

    async def _ask(self, seed: int) -> bool:
        try:
            await self._connection.ask(ask_for(COUNT, seed))
        except NoReply:
            return False
        return True

    async def leave(self) -> bool:
        """Hang up; whether it had been answered."""
        self._connection.close()
        return await self._asking


async def storm_on_held_engine(service: Service, clients: int) -> tuple[Storm, bool]:
    """All leave while all are queued. Also says whether the neighbours' bytes are those that they get alone."""
    alone = [await answers(service, [request]) for request in neighbours()]
    service.send(signal.SIGUSR1)
    service.wait_for_log(HELD)
    before = await service.metrics()
    # The first batch is closed when the first rows come, full or not: it holds this one.
    first = asyncio.ensure_future(answers(service, [ask_for(1, 0)]))
    await until(service, "gan_batches_total", before.total("gan_batches_total") + 1)
    leavers = [await Leaver.arrive(service, seed) for seed in range(clients)]
    await until(service, "gan_queue_images", clients * COUNT)
    staying = asyncio.ensure_future(answers(service, neighbours()))
    await until(service, "gan_queue_images", clients * COUNT + NEIGHBOURS * NEIGHBOUR_COUNT)
    await asyncio.gather(*(leaver.leave() for leaver in leavers))
    await until(service, "gan_requests_total", clients, status="499")
    service.send(signal.SIGUSR2)
    together = await staying
    await first
    return Storm(before, await service.metrics()), together == [body for (body,) in alone]


async def storm_on_busy_engine(service: Service, clients: int) -> tuple[Storm, bool, int]:
    """Each comes and leaves when it likes. Also: whether the neighbours' bytes are right; how many were answered."""
    alone = [await answers(service, [request]) for request in neighbours()]
    before = await service.metrics()
    rng = random.Random(0)  # noqa: S311 — how long they stay

    async def visit(seed: int) -> bool:
        await asyncio.sleep(rng.uniform(0, clients / ARRIVALS_PER_S))
        leaver = await Leaver.arrive(service, seed)
        await asyncio.sleep(rng.uniform(0, LONGEST_STAY_S))
        return await leaver.leave()

    staying = asyncio.ensure_future(answers(service, neighbours()))
    answered = sum(await asyncio.gather(*map(visit, range(clients))))
    together = await staying
    await until(
        service,
        "gan_requests_total",
        before.total("gan_requests_total", route="/sample") + clients + NEIGHBOURS,
        route="/sample",
    )
    return Storm(before, await service.metrics()), together == [body for (body,) in alone], answered


async def measure(arguments: argparse.Namespace) -> int:
    """Both storms; returns the exit code."""
    clients = arguments.clients
    allow_connections(clients)
    queue = 2 * clients * COUNT + 2 * NEIGHBOURS * NEIGHBOUR_COUNT
    with running("benchmarks.faults.gated", bundles=arguments.bundles, max_queued_images=max(4096, queue)) as service:
        held, held_bytes = await storm_on_held_engine(service, clients)
        busy, busy_bytes, answered = await storm_on_busy_engine(service, clients)
    staying = NEIGHBOURS * NEIGHBOUR_COUNT
    wasted_held = held.grown("gan_images_total") - staying - 1
    wasted_busy = busy.grown("gan_images_total") - staying
    left = busy.grown("gan_requests_total", route="/sample", status="499")
    finished = busy.grown("gan_requests_total", route="/sample", status="200") - NEIGHBOURS
    queued, ran = (busy.grown("gan_cancelled_total", phase=phase) for phase in ("queued", "running"))
    checks = [
        Check(
            "held: all left, status 499",
            str(held.grown("gan_requests_total", status="499")),
            held.grown("gan_requests_total", status="499") == clients,
        ),
        Check(
            "held: all cancelled while queued",
            str(held.grown("gan_cancelled_total", phase="queued")),
            held.grown("gan_cancelled_total", phase="queued") == clients,
        ),
        Check("held: images computed for them 0", str(wasted_held), wasted_held == 0),
        Check("held: neighbours' bytes unchanged", str(held_bytes), held_bytes),
        Check("busy: neighbours' bytes unchanged", str(busy_bytes), busy_bytes),
        Check("busy: each request counted once", f"{left} left + {finished} answered", left + finished == clients),
        Check("busy: no client answered that is not counted", f"{answered} answered", answered <= finished),
        Check(
            "busy: images computed only for rows in a batch already",
            f"{wasted_busy}",
            finished * COUNT <= wasted_busy <= (clients - queued) * COUNT,
        ),
    ]
    facts = {
        "clients": clients,
        "count": COUNT,
        "held": {"images_computed_for_leavers": wasted_held},
        "busy": {
            "answered": answered,
            "left": left,
            "left_queued": queued,
            "left_running": ran,
            "images_computed_for_leavers": wasted_busy,
        },
    }
    return finish("disconnects", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("A thousand clients connect, ask, and hang up.")
    made.add_argument("--clients", type=int, default=1000, help="clients that hang up, in each storm")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
