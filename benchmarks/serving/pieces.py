"""Measures the service's pieces, each beside the plain way to do the same; docs/performance.md has the table.

    python -m benchmarks.serving.pieces [--bundles FOLDER]

On one thread, each the median of many runs. Prints a table and then one line of JSON.
"""

import argparse
import gc
import io
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.tools.report import machine, parser, table
from models.bundle import read_bundle
from models.inference.fast_nets import Verdicts, fast_discriminator, fast_generator
from models.inference.noise import draw_latents
from models.inference.pixels import UInt8, grey_levels, grid
from models.inference.tiles import REFERENCE_TILE, Tiles
from service.codecs.encode import RenderOptions, SampleMetadata, encode
from service.http.images.verdicts import DiscriminatorOutput, discriminate_reply
from service.http.schemas import DiscriminateReply, DiscriminateResult
from service.metrics import Metrics

ROUNDS = 30
LEAST_S = 0.002  # of one round: what is shorter is repeated
ORIGIN = SampleMetadata("", "", 0, 0, None)
ROWS, VERDICTS, LARGE = (1, 4, 16, 64, 512), 256, 512

Call = Callable[[Tensor, Tensor | None], Tensor]
Work = Callable[[], object]


def microseconds(work: Work, rounds: int = ROUNDS) -> float:
    """The median time of one call."""
    work()
    started = time.perf_counter()
    work()
    repeats = max(1, round(LEAST_S / max(time.perf_counter() - started, 1e-9)))
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        taken.append((time.perf_counter() - started) / repeats)
    return statistics.median(taken) * 1e6


def by_pillow(picture: UInt8) -> bytes:
    """A grey PNG as Pillow writes it."""
    Image.fromarray(picture[..., 0]).save(out := io.BytesIO(), "png", compress_level=1)
    return out.getvalue()


def pictures(images: UInt8) -> Iterator[tuple[str, Work, Work]]:
    """Grey PNGs: Pillow, and chunks around zlib-ng."""
    for name, some in (("PNG of one digit", images[:1]), ("PNG of a grid of 256 digits", images[:256])):
        columns = round(len(some) ** 0.5)
        picture = grid(some, columns) if len(some) > 1 else some[0]
        look = RenderOptions("png", columns, 1)
        sizes = f"{name}, {len(by_pillow(picture))} and {len(encode(some, look, ORIGIN))} bytes"
        yield sizes, lambda p=picture: by_pillow(p), lambda s=some, a=look: encode(s, a, ORIGIN)  # type: ignore[misc]


@contextmanager
def busy_interpreter() -> Iterator[None]:
    """Beside a thread that never lets go of the interpreter by itself."""
    over = threading.Event()

    def spin() -> None:
        while not over.is_set():
            pass

    (thread := threading.Thread(target=spin)).start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def verdicts() -> Iterator[tuple[str, Work, Work]]:
    """D's answers as JSON with their histogram: a model an image, and all in one go."""
    metrics, logits = Metrics(CollectorRegistry()), np.random.default_rng(0).normal(size=VERDICTS)
    probabilities = 1 / (1 + np.exp(-logits))
    pairs = list(zip(probabilities.tolist(), logits.tolist(), strict=True))
    observe = metrics.discriminator_probability.labels("plain", "0", "uploaded").observe
    adapter = TypeAdapter(DiscriminateReply)

    def plain() -> bytes:
        results = [DiscriminateResult(probability_real=probability, logit=logit) for probability, logit in pairs]
        for probability, _ in pairs:
            observe(probability)
        reply = DiscriminateReply(bundle="plain", version="0", results=results)
        return adapter.dump_json(reply, exclude_none=True)

    def ours() -> bytes:
        metrics.discriminator_probability.labels("ours", "0", "uploaded").observe(*probabilities.tolist())
        judged = DiscriminatorOutput(
            probabilities.tolist(), logits.tolist(), None, is_calibrated=True, converted=[False] * VERDICTS
        )
        return discriminate_reply("ours", "0", judged, {})

    yield f"{VERDICTS} verdicts as JSON, with their histogram", plain, ours


def nets(bundles: Path) -> Iterator[tuple[str, Work, Work]]:
    """Both nets in the tiles that the service would run: by torch and by onnxruntime, in float32 and in bfloat16."""
    for bundle in (read_bundle(bundles / "mnist"), read_bundle(bundles / "mnist-mlp")):
        noise, names = torch.from_numpy(draw_latents(bundle.manifest.latent, 0, 0, LARGE)), bundle.manifest.labels
        labels = None if names is None else torch.arange(LARGE) % len(names)
        fast, pixels = fast_generator(bundle.generator), bundle.generator(noise, labels)
        half, judge = fast_generator(bundle.generator, half=True), fast_discriminator(bundle.discriminator)
        pairs: list[tuple[str, Call, Call, Tensor]] = [
            ("G by torch, by onnxruntime", bundle.generator, fast, noise),
            ("G in float32, in bfloat16", fast, half, noise),
            ("D by torch, by onnxruntime", Verdicts(bundle.discriminator), judge, pixels),
        ]
        for name, before, after, rows in pairs:
            example = rows[:REFERENCE_TILE], None if labels is None else labels[:REFERENCE_TILE]
            one, other = (Tiles.proven(net, *example) for net in (before, after))
            for size in ROWS:
                given = rows[:size], None if labels is None else labels[:size]
                yield f"{size} rows of {bundle.name}: {name}", partial(one, *given), partial(other, *given)


@torch.inference_mode()
def measure(bundles: Path) -> list[dict[str, object]]:
    """Every piece: microseconds the plain way, ours, and how many times less that is."""
    torch.set_num_threads(1)
    paper = read_bundle(bundles / "mnist-mlp")
    rows: list[dict[str, object]] = []

    def add(name: str, plain: Work, ours: Work) -> None:
        gc.collect()
        before, after = microseconds(plain), microseconds(ours)
        cells = {"plain_us": float(f"{before:.3g}"), "ours_us": float(f"{after:.3g}")}
        rows.append({"piece": name, **cells, "times": float(f"{before / after:.2g}")})

    for piece in (*pictures(paper.draw(LARGE)), *verdicts(), *nets(bundles)):
        add(*piece)
    few, fast = torch.from_numpy(draw_latents(paper.manifest.latent, 0, 0, 32)), fast_generator(paper.generator)
    with busy_interpreter():
        name = "32 rows of mnist-mlp beside a busy thread: G by torch, by onnxruntime"
        add(name, lambda: grey_levels(paper.generator(few)), lambda: fast.levels(few))
    return rows


def main() -> int:
    """Measure and print."""
    arguments: argparse.Namespace = parser("The service's pieces beside the plain way.").parse_args()
    rows = measure(arguments.bundles)
    table(rows)
    print(json.dumps({"program": "pieces", "pieces": rows, "machine": machine()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
