"""Measures how cost grows: with a request's count, with connections, with workers and with the size of a bundle.

    python -m benchmarks.serving.growth [--seconds 2] [--plot docs/figures/growth.png]

Closed loops by wrk on the service's own processors, with `mnist-mlp`. For the size of a bundle, the same nets with
wider or narrower layers and random weights, each alone in its service. Prints a table and one line of JSON, and draws
four panels.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import finish, parser, table
from models.bundle import write_bundle
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec

BUNDLE = "mnist-mlp"
WARM_S = 1
SEEDS_APART = 10**8  # between two measurements, so that no request comes twice
COUNTS = (1, 4, 16, 64, 256, 1024, 4096)
COUNT_CONNECTIONS = 4
CONNECTIONS = (1, 4, 16, 64, 256)
WORKERS = (1, 2)
WIDTHS = (150, 300, 600, 1200, 2400)  # of G's hidden layers; the paper's is 1200
WIDTH_COUNT = 1024
MIB = 2**20

Row = dict[str, Any]

_seeds = itertools.count(SEEDS_APART, SEEDS_APART)


def ask(service: Service, count: int, connections: int, seconds: float, *, raw: bool = True) -> Row:
    """A closed loop of requests for so many images, as npy or as PNG."""
    form = "npy" if raw else "png"
    body = f'{{"count":{count},"seed":{{seed}},"format":"{form}"}}'.encode()
    request = Request("POST", "/sample", count, body, (("Content-Type", "application/json"),))
    wrk.measure(service.port, request, connections, WARM_S, next(_seeds))
    seen = wrk.measure(service.port, request, connections, seconds, next(_seeds))
    return {
        "images_per_s": round(seen.per_s * count),
        "p50_ms": round(seen.p50_ms, 2),
        "p99_ms": round(seen.p99_ms, 2),
        "failed": seen.failed,
    }


async def held(service: Service) -> tuple[float, float]:
    """Its resident memory in MiB, and the seconds that its bundle took to load and warm."""
    now = await service.metrics()
    return now.total("process_resident_memory_bytes") / MIB, now.total("gan_warmup_seconds")


def write_wide(folder: Path, width: int) -> Path:
    """A bundle of the paper's nets with other widths and random weights; returns its folder."""
    options, image = PRESETS["mlp-paper"], ImageSpec(channels=1, height=28, width=28)
    network = MLPSpec(
        family="mlp",
        generator=MLPGeneratorSpec(hidden=(width, width)),
        discriminator=MaxoutDiscriminatorSpec(units=(width // 5, width // 5), pieces=5),
    )
    rng = torch.Generator().manual_seed(0)
    states = [
        {name: torch.randn(tensor.shape, generator=rng) * 0.05 for name, tensor in net.state_dict().items()}
        for net in build_networks(network, image, options.latent)
    ]
    facts: dict[str, Any] = {
        "name": f"wide-{width}",
        "created": "2026-01-02T03:04:05Z",
        "network": network,
        "image": image,
        "latent": options.latent,
        "labels": None,
        "calibration": None,
        "training": {},
        "evaluation": {},
    }
    return write_bundle(folder / facts["name"], facts, states[0], states[1], np.zeros((4, 4, 1), np.uint8)).folder


@contextmanager
def serve_alone(bundle: Path, workers: int) -> Iterator[Service]:
    """A service with this bundle and no other."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / bundle.name).symlink_to(bundle.resolve())
        with running(bundles=folder, default_bundle=bundle.name, device="cpu", workers=workers) as service:
            yield service


def measure(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """Row by row, by count, by connections and by width."""
    found: dict[str, list[Row]] = {"count": [], "connections": [], "width": []}
    for workers in WORKERS:
        with serve_alone(arguments.bundles / BUNDLE, workers) as service:
            for count in COUNTS:
                seen = ask(service, count, COUNT_CONNECTIONS, arguments.seconds)
                found["count"].append({"workers": workers, "count": count, **seen})
            for connections in CONNECTIONS:
                seen = ask(service, 1, connections, arguments.seconds, raw=False)
                found["connections"].append({"workers": workers, "connections": connections, **seen})
    with tempfile.TemporaryDirectory() as folder:
        for width in WIDTHS:
            with serve_alone(write_wide(Path(folder), width), 1) as service:
                seen = ask(service, WIDTH_COUNT, COUNT_CONNECTIONS, arguments.seconds)
                resident, warm_s = asyncio.run(held(service))
                seen |= {"resident_mib": round(resident), "warmup_s": round(warm_s, 3)}
                found["width"].append({"width": width, **seen})
    return found


def plot(found: dict[str, list[Row]], path: Path) -> None:
    """Four panels: images/s and p50 by count, requests/s by connections, images/s and memory by width."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the training extra

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    panels = figure.subplots(1, 4)
    for workers, style in zip(WORKERS, ("o-", "s--"), strict=True):
        label = f"{workers} worker{'s' if workers > 1 else ''}"
        rows = [row for row in found["count"] if row["workers"] == workers]
        x = [row["count"] for row in rows]
        panels[0].plot(x, [row["images_per_s"] for row in rows], style, label=label)
        panels[1].plot(x, [row["p50_ms"] for row in rows], style, label=label)
        rows = [row for row in found["connections"] if row["workers"] == workers]
        panels[2].plot([row["connections"] for row in rows], [row["images_per_s"] for row in rows], style, label=label)
    widths = [row["width"] for row in found["width"]]
    panels[3].plot(widths, [row["images_per_s"] for row in found["width"]], "o-", label="images/s")
    memory = panels[3].twinx()
    memory.plot(widths, [row["resident_mib"] for row in found["width"]], "s--", color="grey", label="MiB")
    memory.set_ylabel("resident MiB (dashed)")
    memory.set_ylim(bottom=0)
    titles = (
        (f"images/s, {COUNT_CONNECTIONS} connections", "count"),
        (f"p50 in ms, {COUNT_CONNECTIONS} connections", "count"),
        ("requests/s, count=1, PNG", "connections"),
        (f"images/s, count={WIDTH_COUNT}", "width of G's hidden layers"),
    )
    for panel, (title, below) in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(below)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    for panel in (panels[1], panels[3]):
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    for panel in (panels[0], panels[2]):
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> int:
    """Read the arguments, measure and draw."""
    made = parser("How cost grows.", seconds=2)
    made.add_argument("--plot", type=Path, help="where the picture goes")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    found = measure(arguments)
    for rows in found.values():
        table(rows)
    if arguments.plot:
        plot(found, arguments.plot)
    return finish("growth", {"seconds": arguments.seconds, **found}, [])


if __name__ == "__main__":
    sys.exit(main())
