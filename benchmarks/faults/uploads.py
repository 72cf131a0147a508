"""Two hundred clients bring large bodies at once, again and again; reports what probes and small requests notice.

    python -m benchmarks.faults.uploads [--seconds 15] [--clients 200]

The bodies are forms of 4,096 PNGs, arrays of 30 MB that have to be converted, and arrays that fit. Every fifth client
leaves while it is sending, and those that are refused come again at once. Meanwhile another process asks the probes,
and one client sends a single image again and again.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Callable

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.serving.contenders import Uploads
from benchmarks.tools.client import Client, Connection, Exchange, NoReply, Request, after, keep_asking, outcomes
from benchmarks.tools.prober import probing
from benchmarks.tools.process import Service, allow_connections, running
from benchmarks.tools.report import Check, finish, parser, percentiles

FILES = 4096
PROBES_PER_S = 20
TIME_OUT_MS = 1000  # that of an orchestrator's probe
LEAVES_EVERY, STAYS_S = 5, 0.05
FORM, NPY, PNG = "multipart/form-data", "application/x-npy", "image/png"
BOUNDARY = "a7f3"
MIB = 2**20


def bodies() -> tuple[list[Request], Request]:
    """The large ones, of which one is larger than the others by far, and a small one."""
    rng = np.random.default_rng(0)
    fitting = rng.integers(0, 256, (FILES, 28, 28, 1), np.uint8)
    larger = rng.integers(0, 256, (FILES, 50, 50, 3), np.uint8)
    arrays = [_judge(Uploads(images).npy, NPY, FILES) for images in (larger, fitting)]
    return [_form(fitting), *arrays], _judge(Uploads(fitting).png, PNG, 1)


def _form(images: NDArray[np.uint8]) -> Request:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'.encode()
    files = [head + Uploads(images[place : place + 1]).png + b"\r\n" for place in range(len(images))]
    return _judge(b"".join([*files, f"--{BOUNDARY}--\r\n".encode()]), f"{FORM}; boundary={BOUNDARY}", len(images))


def _judge(body: bytes, content_type: str, images: int) -> Request:
    return Request("POST", "/discriminate", images, body, (("Content-Type", content_type),))


async def crowd(service: Service, large: list[Request], clients: int, until: Callable[[], bool]) -> list[Exchange]:
    """What becomes of the large ones of those who stay."""
    numbers = iter(range(2**53))
    stayed: list[Exchange] = []

    async def one(client: Client) -> None:
        while not until():
            number = next(numbers)
            request = large[number % len(large)]
            if number % LEAVES_EVERY == 0:
                await _leave(service, request)
            else:
                stayed.append(await client.exchange(request))

    async with Client(service.port) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return stayed


async def _leave(service: Service, request: Request) -> None:
    with contextlib.suppress(NoReply):
        connection = await Connection.open(service.port)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.ask(request), STAYS_S)
        finally:
            connection.close()


async def measure(arguments: argparse.Namespace) -> int:
    """Have them all come; returns the exit code."""
    allow_connections(2 * arguments.clients)
    large, small = bodies()
    with running(bundles=arguments.bundles) as service:
        async with Client(service.port) as client:
            await client.ask(small)
            with probing(service.port, arguments.seconds, PROBES_PER_S) as asked:
                until = after(arguments.seconds)
                alone = asyncio.create_task(keep_asking(client, lambda _: small, 1, until))
                stayed = await crowd(service, large, arguments.clients, until)
                beside, probes = await alone, await asyncio.wrap_future(asked)
        alive = (await service.get("/livez")).status
        memory = service.rss_bytes() / MIB
    seen = outcomes(stayed + beside)
    probed = {path: percentiles(e.latency_s for e in exchanges) for path, exchanges in probes.items()}
    failed = sum(e.outcome != 200 for e in probes["/livez"])
    checks = [
        Check("every reply 200, 429 or 504", str(seen), set(seen) <= {"200", "429", "504"}),
        Check("no /livez fails", str(failed), failed == 0 and alive == 200),
        *(
            Check(f"{path} answers within {TIME_OUT_MS} ms", f"{found['max_ms']} ms", found["max_ms"] < TIME_OUT_MS)
            for path, found in probed.items()
        ),
    ]
    facts = {
        "clients": arguments.clients,
        "answered": {"large": outcomes(stayed), "small": outcomes(beside)},
        "small": percentiles(e.latency_s for e in beside if e.outcome == 200),
        "probes": probed,
        "mib": round(memory),
    }
    return finish("uploads", facts, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("Two hundred clients bring large bodies at once.", seconds=15)
    made.add_argument("--clients", type=int, default=200, help="clients that bring large bodies")
    return uvloop.run(measure(made.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
