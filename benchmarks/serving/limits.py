"""What this machine can do without a server: the nets and the encoder alone, in one process. Prints a line of JSON.

    python -m benchmarks.serving.limits [--seconds 1]

On one thread, in processor time: one image of G in the batch size at which it is cheapest, and one PNG. On all
processors, by the clock: images of G, images of G as PNG grids of 64, and verdicts of D. Two ways are tried, a thread
with batches of its own for each processor, and one thread whose batches torch divides among all; each with the nets as
they are, and with prepacked weights as the service runs them. The fastest counts. Noise is drawn beforehand, and pixels
become bytes only where they are encoded: the limit is the net's.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.serving.contenders import CORES, GRID
from benchmarks.tools.report import parser
from models.bundle import Bundle, read_bundle
from models.inference.noise import draw_latents
from models.inference.pixels import to_pixels, to_uint8
from models.inference.prepacked import prepacked
from service.codecs.encode import RenderOptions, SampleMetadata, encode

BATCHES = (64, 128, 256, 512)
BATCHES_OF_GRIDS = (256, 512)
TRIAL_S = 0.1
ORIGIN = SampleMetadata("", "", 0, 0, None)
ONE, PICTURE = RenderOptions("png", 1, 1), RenderOptions("png", round(GRID**0.5), 1)

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
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 0, 0, max(BATCHES)))
    images = to_uint8(bundle.generator(latents))
    makes = _passes(bundle.generator, latents)
    judges = _passes(bundle.discriminator, to_pixels(images))

    def pngs() -> int:
        return sum(bool(encode(image[None], ONE, ORIGIN)) for image in images)

    best = min(makes, key=lambda work: _cpu_s(work, TRIAL_S))
    return Limits(
        image_s=_cpu_s(best, seconds),
        image_batch=best(),
        png_s=_cpu_s(pngs, seconds),
        images_per_s=_on_all(makes, seconds),
        grid_images_per_s=_on_all(_grids(bundle.generator, latents), seconds),
        verdicts_per_s=_on_all(judges, seconds),
    )


def _passes(net: nn.Module, rows: Tensor) -> list[Work]:
    """A net on batches of each size."""

    def once(net: nn.Module, batch: Tensor) -> Work:
        def work() -> int:
            net(batch)
            return len(batch)

        return work

    return [once(either, rows[:size]) for either in (net, prepacked(net)) for size in BATCHES]


def _grids(generator: nn.Module, latents: Tensor) -> list[Work]:
    """G on batches, and a picture of every 64 images."""

    def once(net: nn.Module, batch: Tensor) -> Work:
        def work() -> int:
            images = to_uint8(net(batch))
            for start in range(0, len(images), GRID):
                encode(images[start : start + GRID], PICTURE, ORIGIN)
            return len(images)

        return work

    return [once(net, latents[:size]) for net in (generator, prepacked(generator)) for size in BATCHES_OF_GRIDS]


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
