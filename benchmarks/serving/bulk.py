"""Measures what shards of a data set cost beside the model alone, on one thread; docs/performance.md has the table.

    python -m benchmarks.serving.bulk [--bundle mnist-mlp] [--images 4096] [--rounds 5]

The model alone draws the latents and computes the images, and throws them away. Rounds alternate between it and the
formats, so that all of them meet the same machine; figures are medians. Checksums and the disk are part of a shard's
time, starting processes is not.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from benchmarks.tools.report import Check, finish, parser, table
from models.bundle import Bundle, read_bundle
from models.exchange.bulk.plan import ENCODINGS, BulkOptions
from models.exchange.bulk.worker import MOST_BLOCK_IMAGES, Task, make_shard
from models.inference.drawing import Drawing
from models.inference.noise import draw_latents, sampled_labels
from models.inference.png import fast_png

LEAST_OF_RAW = 0.9  # of the model's own rate
MOST_PNG_OVERHEAD = 3  # times what the encoder takes: the tar, its checksum and the disk take as much again


def alone_s(bundle: Bundle, drawing: Drawing, count: int) -> float:
    """Seconds that the images take without anything else."""
    latent, started = bundle.manifest.latent, time.perf_counter()
    for start in range(0, count, MOST_BLOCK_IMAGES):
        rows = min(MOST_BLOCK_IMAGES, count - start)
        drawing(draw_latents(latent, 0, start, rows), sampled_labels(latent, 0, start, rows))
    return time.perf_counter() - started


def encoding_s(bundle: Bundle, count: int) -> float:
    """Seconds that the encoder takes for the images."""
    images = bundle.draw(count)
    started = time.perf_counter()
    for image in images:
        fast_png(image)
    return time.perf_counter() - started


def measure(bundle: Bundle, count: int, rounds: int) -> dict[str, float]:
    """Median seconds: of the model alone, of the encoder alone, and of a shard in each format."""
    kinds = [(form, encoding) for form, encodings in ENCODINGS.items() for encoding in encodings]
    labels: Literal["frequency"] | None = None if bundle.manifest.labels is None else "frequency"
    taken: dict[str, list[float]] = {}
    drawing = Drawing(bundle.generator)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):  # the first is thrown away
            seen = {"model": alone_s(bundle, drawing, count), "encoder": encoding_s(bundle, count)}
            for form, encoding in kinds:
                name = f"{bundle.name}@{bundle.version}"
                options = BulkOptions(
                    bundle=name,
                    count=count,
                    seed=0,
                    shard_size=count,
                    format=form,
                    encoding=encoding,
                    labels=labels,
                )
                started = time.perf_counter()
                make_shard(Task(bundle.folder, folder, options), 0)
                seen[f"{form}, {encoding}"] = time.perf_counter() - started
            for name, seconds in seen.items() if number else ():
                taken.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> int:
    """Measure and print."""
    made = parser("Shards of a data set beside the model alone.")
    made.add_argument("--bundle", default="mnist-mlp", help="its name")
    made.add_argument("--images", type=int, default=4096, help="in a shard")
    made.add_argument("--rounds", type=int, default=5, help="of which the medians are taken")
    arguments: argparse.Namespace = made.parse_args()
    torch.set_num_threads(1)
    seconds = measure(read_bundle(Path(arguments.bundles) / arguments.bundle), arguments.images, arguments.rounds)
    model, encoder = seconds["model"], seconds["encoder"]
    rows = [
        {
            "what": name,
            "images_per_s": round(arguments.images / took),
            "microseconds_an_image": round(1e6 * took / arguments.images, 1),
            "of_model": "" if name == "encoder" else round(model / took, 2),
        }
        for name, took in seconds.items()
    ]
    table(rows)
    raw = [name for name in seconds if name.endswith("raw")]
    png_cost = seconds["webdataset, png"] - model
    checks = [
        *(Check(f"{name} at least {LEAST_OF_RAW} of the model", f"{model / seconds[name]:.2f}",
                model / seconds[name] >= LEAST_OF_RAW) for name in raw),
        Check(f"a tar of PNGs costs at most {MOST_PNG_OVERHEAD} × the encoder", f"{png_cost / encoder:.2f}",
              png_cost <= MOST_PNG_OVERHEAD * encoder),
    ]  # fmt: skip
    return finish("bulk", {"rows": rows}, checks)


if __name__ == "__main__":
    sys.exit(main())
