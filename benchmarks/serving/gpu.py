"""Measures the service on a GPU: its engine alone, its HTTP layer with it, and the memory that it keeps.

    python -m benchmarks.serving.gpu [--device cuda] [--seconds 2] [--rounds 3]

- The engine alone, its threads kept busy with batches of the largest size, noise and copies included: in each
  precision, with graphs and without, exact or not. Beside it, the rate that G's arithmetic or the bus allows, whichever
  takes longer: G as a graph on numbers that are already there, and as many grey levels copied to the host, each timed
  alone.
- Single images over 256 connections, beside the same service with an engine that computes nothing.
- The device memory that is reserved before and after a thousand more requests.

`--device cpu` runs all of it without a GPU, to try the program; its expectations then mean nothing.
"""

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import torch
import uvloop

from benchmarks.tools import wrk
from benchmarks.tools.client import Client, Request
from benchmarks.tools.process import running
from benchmarks.tools.report import Check, finish, parser, table
from models.bundle import Bundle, read_bundle
from models.inference.noise import draw_latents
from service.engine.batching.batch import BatchSlice
from service.engine.device import Precision
from service.engine.engine import Engine, Loaded
from service.engine.gpu.cuda_graphs import GraphRecorder
from service.engine.payloads import SamplePayload

BUNDLE = "mnist-mlp"
CONNECTIONS, REQUESTS, CLIENTS = 256, 1000, 16
COUNTS = (1, 64, 1024, 7)  # of images in the requests after which memory is looked at
OF_ALLOWED, OF_NO_ENGINE = 0.7, 0.9
PIPELINE = 2  # batches that each thread is sent ahead


class Way(NamedTuple):
    """How the engine computes."""

    precision: Precision
    exact: bool
    cuda_graphs: bool


def ways(device: str) -> list[Way]:
    """Those that the device has."""
    precisions: list[Precision] = ["float32", "bfloat16"] if device == "cpu" else ["float32", "tf32", "bfloat16"]
    graphs = [False] if device == "cpu" else [False, True]
    return [Way(precision, exact, graph) for precision in precisions for exact in (True, False) for graph in graphs]


def engine_rate(device: str, way: Way, bundle: Bundle, rows: int, seconds: float) -> float:
    """Images per second of an engine that is never without a batch of so many."""
    engine = Engine(device, exact=way.exact, precision=way.precision, cuda_graphs=way.cuda_graphs)

    async def keep_busy() -> float:
        loaded = await engine.threads[0].run(engine.load, bundle.folder, {})
        made, first = 0, 0

        async def work(thread: int) -> None:
            nonlocal made, first
            while time.perf_counter() < end:
                first += rows
                images = await engine.threads[thread].run(loaded.sample.run, batch(first, rows))
                made += len(images)

        end = time.perf_counter() + seconds / 4
        await everywhere(work)
        made, began = 0, time.perf_counter()
        end = began + seconds
        await everywhere(work)
        return made / (time.perf_counter() - began)

    async def everywhere(work: Callable[[int], Awaitable[None]]) -> None:
        places = [place for place in range(len(engine.threads)) for _ in range(PIPELINE)]
        await asyncio.gather(*(work(place) for place in places))

    try:
        return asyncio.run(keep_busy())
    finally:
        for thread in engine.threads:
            thread.stop()


def batch(first: int, rows: int) -> list[BatchSlice[SamplePayload]]:
    """One request's images."""
    return [BatchSlice(SamplePayload(1, first, None, 1.0), 0, rows)]


@torch.inference_mode()
def allowed_rate(device: str, way: Way, bundle: Bundle, rows: int, seconds: float) -> dict[str, float]:
    """Images per second that arithmetic alone would give, and the bus alone."""
    engine = Engine(device, exact=True, precision=way.precision)  # sets the precision
    made: Loaded = engine.load(bundle.folder, {})
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 0, 0, rows)).to(engine.device.torch_device)
    levels = torch.zeros((rows, bundle.manifest.image.size), dtype=torch.uint8, device=engine.device.torch_device)
    host = torch.zeros_like(levels, device="cpu", pin_memory=engine.device.torch_device.type == "cuda")
    for thread in engine.threads:
        thread.stop()

    def compute() -> object:
        return made.generator(latents)

    if engine.device.torch_device.type == "cuda":
        recorder = GraphRecorder(engine.device.torch_device)
        _, compute = recorder.record(lambda: made.generator(latents))
    return {
        "arithmetic": rows / seconds_of(compute, engine.device.torch_device, seconds),
        "bus": rows / seconds_of(lambda: host.copy_(levels, non_blocking=True), engine.device.torch_device, seconds),
    }


def seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Of one call, many being launched one after the other."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    wait()
    times, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds / 2:
        for _ in range(10):
            work()
        wait()
        times += 10
    return (time.perf_counter() - began) / times


def http_rates(device: str, seconds: float, rounds: int, folder: str) -> dict[str, list[float]]:
    """Single images per second over many connections, of the service and of the one without an engine, in turns."""
    found: dict[str, list[float]] = {"service": [], "benchmarks.serving.no_engine": []}
    body = f'{{"bundle":"{BUNDLE}","seed":{{seed}}}}'.encode()
    request = Request("POST", "/sample", headers=(("Content-Type", "application/json"),), body=body)
    for n in range(rounds):
        for module, rates in found.items():
            with running(module, device=device, bundles=folder) as service:
                wrk.measure(service.port, request, CONNECTIONS, 1, n * 10**8)
                seen = wrk.measure(service.port, request, CONNECTIONS, seconds, n * 10**8 + 10**7)
                rates.append(seen.per_s)
    return found


async def memory_growth(device: str, folder: str, requests: int = REQUESTS) -> dict[str, float]:
    """Bytes of device memory by kind that so many more requests have added to what twice as many had taken."""
    target = f"/sample?bundle={BUNDLE}&format=npy"
    with running(device=device, bundles=folder) as service:
        client = Client(service.port)

        async def ask() -> dict[str, float]:
            numbers = iter(range(requests))

            async def one() -> None:
                for n in numbers:
                    await client.ask(Request("GET", f"{target}&seed={n}&count={COUNTS[n % len(COUNTS)]}"))

            await asyncio.gather(*(one() for _ in range(CLIENTS)))
            readings = await service.metrics()
            return {kind: readings.total("gan_device_memory_bytes", kind=kind) for kind in ("allocated", "reserved")}

        await ask()
        before, after = await ask(), await ask()
    if device != "cpu" and not before["reserved"]:
        raise RuntimeError("the service has told of no device memory")
    return {kind: after[kind] - before[kind] for kind in before}


def device_facts(device: torch.device) -> dict[str, object]:
    """What it is, and what drives it."""
    facts: dict[str, object] = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "driver": "unknown"}
        with contextlib.suppress(OSError):  # there is no nvidia-smi
            query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"]
            asked = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 - our own arguments
            facts["driver"] = asked.stdout.strip()
    return facts


def measure_engine(options: argparse.Namespace, bundle: Bundle, rows: int) -> list[dict[str, object]]:
    """A row for each way, which it prints."""
    found: list[dict[str, object]] = []
    for way in ways(options.device):
        rates = [engine_rate(options.device, way, bundle, rows, options.seconds) for _ in range(options.rounds)]
        allowed = allowed_rate(options.device, way, bundle, rows, options.seconds)
        rate = statistics.median(rates)
        found.append(
            {
                **way._asdict(),
                "images_per_s": round(rate),
                "arithmetic_per_s": round(allowed["arithmetic"]),
                "bus_per_s": round(allowed["bus"]),
                "of_allowed": round(rate / min(allowed.values()), 3),
            }
        )
    table(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    arguments_parser = parser(__doc__.split("\n", 1)[0], seconds=2)
    arguments_parser.add_argument("--device", default="cuda", help="as GAN_DEVICE")
    arguments_parser.add_argument("--rounds", type=int, default=3, help="of each measurement, whose median counts")
    options = arguments_parser.parse_args(arguments)
    engine = Engine(options.device, exact=True)
    for thread in engine.threads:
        thread.stop()
    bundle, facts = read_bundle(options.bundles / BUNDLE), device_facts(engine.device.torch_device)
    engines = measure_engine(options, bundle, engine.device.max_batch_rows)
    rates = http_rates(options.device, options.seconds, options.rounds, str(options.bundles))
    ours, without = (statistics.median(seen) for seen in rates.values())
    growth = uvloop.run(memory_growth(options.device, str(options.bundles)))
    best = max(float(str(row["of_allowed"])) for row in engines if row["precision"] == "float32")
    checks = [
        Check(f"engine alone, float32: at least {OF_ALLOWED} of what it could be", f"{best}", best >= OF_ALLOWED),
        Check(
            f"single images: at least {OF_NO_ENGINE} of those without an engine",
            f"{ours / without:.2f} ({ours:,.0f} and {without:,.0f} requests/s)",
            ours >= OF_NO_ENGINE * without,
        ),
        Check("device memory that 1,000 more requests add: none", f"{growth}", max(growth.values()) <= 0),
    ]
    return finish("gpu", {"engine": engines, "http": rates, "growth": growth, **facts}, checks)


if __name__ == "__main__":
    sys.exit(main())
