"""What this machine can do without a server: the nets and the encoder alone, in one process. Prints a line of JSON.

    python -m benchmarks.serving.limits [--seconds 1]

On one thread, in processor time: one image of G in the batch size at which it is cheapest, and one PNG. On all
processors, by the clock: images of G, images of G as PNG grids of 64, and verdicts of D. Two ways are tried, a thread
with batches of its own for each processor, and one thread whose batches torch divides among all; each with torch's nets
and with onnxruntime's, as the service runs them. The fastest counts. Noise is drawn beforehand, and pixels
become bytes only where they are encoded: the limit is the net's.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.serving.contenders import CORES, GRID
from benchmarks.tools.report import parser
from models.bundle import Bundle, read_bundle
from models.inference.fast_nets import Verdicts, fast_discriminator, fast_generator
from models.inference.noise import draw_latents, sampled_labels
from models.inference.pixels import to_pixels, to_uint8
from service.codecs.encode import RenderOptions, SampleMetadata, encode

BATCHES = (16, 64, 128, 256, 512)
BATCHES_OF_GRIDS = (256, 512)
TRIAL_S = 0.1
ORIGIN = SampleMetadata("", "", 0, 0, None)
ONE, PICTURE = RenderOptions("png", 1, 1), RenderOptions("png", round(GRID**0.5), 1)

Call = Callable[[Tensor, Tensor | None], Tensor]
Work = Callable[[], int]  # does something, and says how many rows of it


class Limits(NamedTuple):
    """Seconds of one processor for one row, and rows per second on all of them."""

    image_s: float
    image_batch: int
    png_s: float
    images_per_s: float
    grid_images_per_s: float
    verdicts_per_s: float


@torch.inference_mode()
def measure(bundle: Bundle, seconds: float) -> Limits:
    """All of them; each takes about so long."""
    torch.set_num_threads(1)
    given = draw_latents(bundle.manifest.latent, 0, 0, max(BATCHES))
    labels = sampled_labels(bundle.manifest.latent, 0, 0, max(BATCHES))
    images = bundle.images(given, labels)
    latents, known = torch.from_numpy(given), None if labels is None else torch.from_numpy(labels)
    makes = [_pass(net, latents, known, size) for net in _generators(bundle) for size in BATCHES]
    unknown = None if known is None else torch.full_like(known, -1)
    judges = [_pass(net, to_pixels(images), unknown, size) for net in _discriminators(bundle) for size in BATCHES]

    def pngs() -> int:
        return sum(bool(encode(image[None], ONE, ORIGIN)) for image in images)

    best = min(makes, key=lambda work: _cpu_s(work, TRIAL_S))
    return Limits(
        image_s=_cpu_s(best, seconds),
        image_batch=best(),
        png_s=_cpu_s(pngs, seconds),
        images_per_s=_on_all(makes, seconds),
        grid_images_per_s=_on_all(
            [_grids(net, latents, known, size) for net in _generators(bundle) for size in BATCHES_OF_GRIDS], seconds
        ),
        verdicts_per_s=_on_all(judges, seconds),
    )


def _generators(bundle: Bundle) -> Sequence[Call]:
    return bundle.generator, fast_generator(bundle.generator)


def _discriminators(bundle: Bundle) -> Sequence[Call]:
    return Verdicts(bundle.discriminator), fast_discriminator(bundle.discriminator)


def _pass(net: Call, rows: Tensor, labels: Tensor | None, size: int) -> Work:
    """A net on a batch of a size."""
    given = rows[:size], None if labels is None else labels[:size]

    def work() -> int:
        net(*given)
        return size

    return work


def _grids(generator: Call, latents: Tensor, labels: Tensor | None, size: int) -> Work:
    """G on a batch, and a picture of every 64 images."""
    given = latents[:size], None if labels is None else labels[:size]

    def work() -> int:
        images = to_uint8(generator(*given))
        for start in range(0, size, GRID):
            encode(images[start : start + GRID], PICTURE, ORIGIN)
        return size

    return work


def _cpu_s(work: Work, seconds: float) -> float:
    """Processor time of this thread for one row, the first run left out."""
    work()
    rows, end, began = 0, time.perf_counter() + seconds, time.thread_time()
    while time.perf_counter() < end:
        rows += work()
    return (time.thread_time() - began) / max(1, rows)


def _on_all(works: Sequence[Work], seconds: float) -> float:
    """Rows per second on all processors, of the work and the way that give most in a short trial."""
    ways = [(work, threads) for work in works for threads in {1, CORES}]
    work, threads = max(ways, key=lambda way: _per_s(way[0], way[1], TRIAL_S))
    return _per_s(work, threads, seconds)


def _per_s(work: Work, threads: int, seconds: float) -> float:
    """Rows per second of so many threads, between which torch's are divided."""
    torch.set_num_threads(CORES // threads)
    rows = [0] * threads
    ready = threading.Barrier(threads + 1)
    over = threading.Event()

    @torch.inference_mode()
    def keep_working(place: int) -> None:
        torch.get_num_threads()  # takes over the number, which a new thread would do only at its first large operator
        work()
        ready.wait()
        while not over.is_set():
            rows[place] += work()

    workers = [threading.Thread(target=keep_working, args=(place,)) for place in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    over.wait(seconds)
    over.set()
    for worker in workers:
        worker.join()
    return sum(rows) / (time.perf_counter() - began)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("The machine's own limits.", seconds=1)
    made.add_argument("--bundle", default="mnist-mlp", help="folder of the bundle under --bundles")
    arguments = made.parse_args()
    limits = measure(read_bundle(arguments.bundles / arguments.bundle), arguments.seconds)
    print(json.dumps(limits._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
