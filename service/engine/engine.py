"""Weights in memory on one device, and what runs batches of rows through them.

`Engine.load` verifies a bundle, moves it to the device, finds the tile sizes that give a row the same bits, and so
warms every size that will be used. What it returns holds all that its batches need, and lives for as long as somebody
refers to it: a bundle can be replaced between two batches.

A CPU has a thread for each processor, and each of them runs batches of its own. Left to itself, torch would spread
every operator of one batch over the processors, and all of them would wait at its end for the slowest: each moment that
the event loop, or another program, takes from one processor would be lost on all of them.

A GPU has two threads, each with a stream of its own: while it computes one's batch, the other draws noise and copies.
"""

import contextlib
import copy
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from models.bundle import Bundle, BundleError, read_bundle
from models.inference.devices import find_device
from models.inference.noise import Float32, Int64, LatentRange, Noise, draw_latent_ranges, draw_latents
from models.inference.pixels import UInt8, grey_levels, unit_levels
from models.inference.tiles import LARGE_TILE, REFERENCE_TILE, Tiles, spare_rows, tile_sizes
from models.spec import LatentSpec
from service.cpu import cpu_limit
from service.engine.batcher import DeviceFailed, OutOfMemory, Part, Rows
from service.engine.cuda_graphs import give_back, replayed
from service.engine.engine_thread import EngineThread
from service.engine.jit import traced

Precision = Literal["float32", "tf32", "bfloat16"]

MAX_BATCH_ROWS, MAX_BATCH_ROWS_OF_GPU = 512, 4096
GPU_THREADS = 2
NOISE_TOLERANCE = 1e-5  # between a GPU's own noise and the CPU's; their last bits differ
TENSOR_CORES = (8, 0)  # the least compute capability of a GPU that has tf32 and bfloat16
WARMUP_SEED = 0
UNKNOWN_LABEL = -1  # for D's class head to name

log = logging.getLogger(__name__)


class _DeviceErrors(contextlib.ContextDecorator):
    """Says which errors mean that memory is short, and which that the device is lost.

    Not a generator: since Python 3.12 contextlib's frame and the error that it throws into one hold each other, and the
    batch's tensors with them, until the garbage collector comes by.
    """

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what the error means."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise OutOfMemory(str(error)) from None
        if not isinstance(error, RuntimeError):
            return
        text = str(error)
        # The CPU's allocator; CUDA's runtime; its libraries. None of them harms what is there already.
        if any(words in text for words in ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")):
            raise OutOfMemory(text) from None
        # What can't be done while another thread records is no loss.
        if ("CUDA error" in text or "CUDA driver" in text) and "captur" not in text:
            raise DeviceFailed(text) from None


class NoSuchPrecision(ValueError):  # noqa: N818 - as the errors of service.errors say it
    """The device can't compute in this precision."""


class SamplePayload(NamedTuple):
    """What G needs for one request: images first_index … of a seed. `labels` has one for each of them, or is None."""

    seed: int
    first_index: int
    labels: Int64 | None
    truncation: float


class DiscriminatePayload(NamedTuple):
    """What D needs for one request: uint8 (n, h, w, c) of the bundle's shape, and a label for each, or None.

    A bundle with classes needs labels; −1 is an unknown one, which the class head names.
    """

    images: UInt8
    labels: Int64 | None


@dataclass(eq=False)
class SampleLane:
    """G of a bundle: payloads are `SamplePayload`, rows are uint8 (n, h, w, c).

    `draws_there` says that its tiles take `_keys` of images instead of their latents.
    """

    bundle: str
    latent: LatentSpec
    tiles: Tiles
    device: torch.device
    most_rows: int = MAX_BATCH_ROWS
    draws_there: bool = False
    operation: str = "sample"

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        return self.tiles.padded(rows)

    @_DeviceErrors()
    def run(self, parts: Sequence[Part]) -> Rows:
        """Draw the latents and make the images."""
        drawn = _keys(parts) if self.draws_there else self._latents(parts)
        images: UInt8 = _to_host(self.tiles(_to_device(drawn, self.device), _labels(parts, self.device)))
        return images

    def _latents(self, parts: Sequence[Part]) -> Float32:
        ranges = [LatentRange(p.payload.seed, p.payload.first_index + p.start, p.stop - p.start) for p in parts]
        drawn, end = draw_latent_ranges(self.latent, ranges), 0
        for part in parts:
            start, end = end, end + part.stop - part.start
            if part.payload.truncation != 1:
                drawn[start:end] *= np.float32(part.payload.truncation)
        return drawn


@dataclass(eq=False)
class DiscriminateLane:
    """D of a bundle: payloads are `DiscriminatePayload`.

    Rows are float32 (n, 1) logits, with classes (n, 2): the logit, and the label that it is for, given or named.
    """

    bundle: str
    tiles: Tiles
    device: torch.device
    most_rows: int = MAX_BATCH_ROWS
    operation: str = "discriminate"

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        return self.tiles.padded(rows)

    @_DeviceErrors()
    def run(self, parts: Sequence[Part]) -> Rows:
        """Judge the images."""
        images = _to_device(np.concatenate([payload.images[start:stop] for payload, start, stop in parts]), self.device)
        verdicts = self.tiles(unit_levels(images), _labels(parts, self.device))
        return _to_host(verdicts[:, :2].to(torch.float32))


def _keys(parts: Sequence[Part]) -> Int64:
    """What an image's latents are drawn from, one row each (n, 3): seed, index, and the bits of its truncation."""
    rows = [part.stop - part.start for part in parts]
    keys = np.empty((sum(rows), 3), np.int64)
    keys[:, 0] = np.repeat([part.payload.seed for part in parts], rows)
    keys[:, 1] = np.concatenate([part.payload.first_index + np.arange(part.start, part.stop) for part in parts])
    keys[:, 2] = np.repeat(np.asarray([part.payload.truncation for part in parts], np.float64).view(np.int64), rows)
    return keys


def _labels(parts: Sequence[Part], device: torch.device) -> torch.Tensor | None:
    labels = [payload.labels[start:stop] for payload, start, stop in parts if payload.labels is not None]
    return _to_device(np.concatenate(labels), device) if labels else None


def _to_device(array: Float32 | Int64 | UInt8, device: torch.device) -> torch.Tensor:
    """The array there, by pinned memory, which a GPU reads itself.

    Waits until it has, so that no event is left to be recorded on a device that may be lost by then.
    """
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device)


def _to_host(tensor: torch.Tensor) -> Rows:
    """The tensor as an array, once it is computed."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor)  # waits, as above
    return pinned.numpy()


class _FromKeys(nn.Module):
    """G of what its latents are drawn from, see `_keys`."""

    def __init__(self, latent: LatentSpec, generator: nn.Module) -> None:
        super().__init__()
        self.noise = Noise(latent)
        self.generator = generator

    def forward(self, keys: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        pixels: torch.Tensor = self.generator(self.latents(keys), labels)
        return pixels

    def latents(self, keys: torch.Tensor) -> torch.Tensor:
        truncations = keys[:, 2:].contiguous().view(torch.float64).float()
        latents: torch.Tensor = self.noise(keys[:, 0], keys[:, 1]) * truncations
        return latents


class _Images(nn.Module):
    """All that G makes of latents: uint8 (n, h, w, c)."""

    def __init__(self, generator: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return grey_levels(self.generator(latents, labels))


class _Verdicts(nn.Module):
    """All that D says of images, in one tensor whose bits can be compared.

    (n, 1) logits without labels; with them (n, 2 + classes): the logit, the label that it is for, each class's score.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.discriminator = bundle.discriminator

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        if labels is None:
            logits: torch.Tensor = self.discriminator(images)
            return logits[:, None]
        logits, labels, scores = self.discriminator.judge(images, labels)
        return torch.cat([logits[:, None], labels[:, None].to(scores.dtype), scores], dim=1)


@dataclass(frozen=True, eq=False)
class Loaded(Bundle):
    """A bundle on the device, warm, with a lane for each net.

    `fingerprint` is a hash of what G computes here for fixed latents: equal where this device and its libraries give
    the same bits, which no list of versions could promise.
    """

    sample: SampleLane
    discriminate: DiscriminateLane
    fingerprint: str
    warmup_s: float

    def run_first_batches(self) -> None:
        """Run both lanes, for a thread that has not done so yet.

        In every size of tile where a thread plans each, and its stream has memory of its own, as on a GPU.
        """
        sizes = {*self.sample.tiles.sizes, *self.discriminate.tiles.sizes}
        for rows in [1] if self.sample.device.type == "cpu" else sorted(sizes):
            labels = None if self.manifest.labels is None else np.zeros(rows, np.int64)
            images = self.sample.run([Part(SamplePayload(WARMUP_SEED, 0, labels, 1.0), 0, rows)])
            self.discriminate.run([Part(DiscriminatePayload(images, labels), 0, rows)])


class Engine:
    """One device and its threads: `GPU_THREADS` for a GPU, one a processor for the CPU.

    Args:
        device: auto, cpu, cuda or cuda:N.
        exact: Run only tile sizes that are proven to give the same bits; else all of them, and single rows.
        workers: Processes that share the CPU's processors.
        precision: Of the nets. tf32 and bfloat16 are faster and less exact; `load` logs by how much.
        cuda_graphs: Replay a GPU's launches, see `service.engine.cuda_graphs`.

    Attributes:
        shares_processor: Whether it has one processor, together with the event loop.
        loaders: Threads that may load bundles at once.
        max_batch_rows: Largest batch that any lane takes.

    Raises:
        ValueError: There is no such device.
        NoSuchPrecision: It has none such.
    """

    def __init__(
        self, device: str, *, exact: bool, workers: int = 1, precision: Precision = "float32", cuda_graphs: bool = False
    ) -> None:
        self.device = find_device(device)
        self.name = str(self.device)
        self.exact = exact
        self.precision = precision
        self.has_graphs = cuda_graphs and self.device.type == "cuda"
        self.draws_noise = not exact and self.device.type != "cpu"  # itself: what it then is differs from CPUs'
        self._check_precision()
        _choose_precision(precision)
        # Of a GPU's convolutions, for all of the process: some add up in whatever order its parts come to an end.
        torch.backends.cudnn.deterministic = exact
        is_cpu = self.device.type == "cpu"
        slots = max(1, cpu_limit() // workers) if is_cpu else GPU_THREADS
        if is_cpu:
            torch.set_num_threads(1)
        self.shares_processor = is_cpu and slots == 1
        self.loaders = slots if is_cpu else 1
        self.max_batch_rows = MAX_BATCH_ROWS if is_cpu else MAX_BATCH_ROWS_OF_GPU
        begin = None if is_cpu else partial(_take_stream, self.device)
        self.threads = [EngineThread(f"engine {self.name} {slot}", begin) for slot in range(slots)]

    def _check_precision(self) -> None:
        if self.precision == "tf32" and self.device.type != "cuda":
            raise NoSuchPrecision(f"there is no tf32 on {self.name}, but float32 and bfloat16")
        if self.precision != "float32" and self.device.type == "cuda":
            capability = torch.cuda.get_device_capability(self.device)
            if capability < TENSOR_CORES:
                raise NoSuchPrecision(f"there is no {self.precision} on {self.name}, whose capability is {capability}")

    @_DeviceErrors()
    def load(self, folder: Path, known: Mapping[str, Loaded]) -> Loaded:
        """Verify and warm a bundle, on the calling thread; of one that is `known`, by name, only the facts are new.

        Raises:
            BundleError: As `read_bundle`; or its nets give NaN or Inf.
            OutOfMemory, DeviceFailed: See there.
        """
        started = time.monotonic()
        bundle = read_bundle(folder, self.device, known)
        if isinstance(bundle, Loaded):
            return bundle
        latent, names = bundle.manifest.latent, bundle.manifest.labels
        facts, plain = bundle.manifest, bundle
        bundle = plain.prepacked(half=self.precision == "bfloat16")
        architecture = f"{facts.network!r} {facts.image!r} {latent.dim} {len(names or ())} {self.precision}"
        # One reference tile: what each net gives for it is what every other size of tile has to give.
        latents = torch.from_numpy(draw_latents(latent, WARMUP_SEED, 0, REFERENCE_TILE)).to(self.device)
        labels = asked = None
        if names is not None:
            numbers = torch.arange(REFERENCE_TILE, device=self.device)
            labels = numbers % len(names)
            # Every other label is unknown: what the class head names is proven too.
            asked = labels.where(numbers % 2 == 0, UNKNOWN_LABEL)
        with torch.inference_mode():
            judge = _Verdicts(bundle)
            generator: nn.Module = bundle.generator
            given = latents
            if self.draws_noise and (keys := _matching_keys(latent, latents)) is not None:
                generator, given = _FromKeys(latent, bundle.generator).to(self.device), keys
            pixels = generator(given, labels).contiguous()  # as uploads are: other layouts may have other kernels
            judged = judge(pixels, asked)
            for net, rows in (("generator", pixels), ("discriminator", judged)):
                if not torch.isfinite(rows).all():
                    raise BundleError(folder, f"its {net} gives NaN or Inf")
            if self.precision != "float32":
                self._report_error(plain, latents, labels, pixels, judged)
            maker = _Images(generator)
            images: Callable[..., torch.Tensor] = maker
            verdicts: Callable[..., torch.Tensor] = judge
            if self.device.type == "cpu":
                images = traced(maker, latents, labels, grey_levels(pixels), architecture)
                verdicts = traced(judge, pixels, asked, judged, architecture)
            # Sizes are proven on numbers: two that differ in their last bits may well be the same grey level.
            sizes, sizes_of_d = (tile_sizes(self.device, facts.image.size, of_d=of_d) for of_d in (False, True))
            sampled = self._tiles(sizes, generator, given, labels, pixels)
            discriminated = self._tiles(sizes_of_d, verdicts, pixels, asked, judged)
            if self.has_graphs:
                # Tapes are compared as numbers too, so grey levels are made of what they give.
                images = _Images(replayed(generator, given, labels, sampled.sizes))
                discriminated.run = replayed(verdicts, pixels, asked, discriminated.sizes)
            sampled.run = images
        draws_there = given is not latents
        most, most_of_d = (max(MAX_BATCH_ROWS, tiles.sizes[-1]) for tiles in (sampled, discriminated))
        loaded = Loaded(
            **vars(bundle),
            sample=SampleLane(bundle.name, latent, sampled, self.device, most, draws_there),
            discriminate=DiscriminateLane(bundle.name, discriminated, self.device, most_of_d),
            fingerprint=hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()[:12],
            warmup_s=time.monotonic() - started,
        )
        give_back(self.device)  # what warming took of this thread's stream, which others can't use
        return loaded

    def _report_error(
        self,
        plain: Bundle,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        pixels: torch.Tensor,
        judged: torch.Tensor,
    ) -> None:
        """Log what this precision costs: how far both nets' answers are from those of float32, on the CPU.

        Not on a GPU, where tf32 is a switch of the whole process, and batches of other bundles may be running.
        """
        generator, discriminator = plain.generator, plain.discriminator
        if self.device.type != "cpu":
            generator, discriminator = copy.deepcopy(generator).cpu(), copy.deepcopy(discriminator).cpu()
        pixels, judged = pixels.cpu(), judged.cpu()
        off = 255 * (generator(latents.cpu(), None if labels is None else labels.cpu()) - pixels).abs()
        logits = discriminator(pixels, None if labels is None else judged[:, 1].long())
        log.info(
            "%s in %s: 64 images differ from float32's by %.2f grey levels on average and %.1f at most, logits by %.3f",
            *(plain.name, self.precision, off.mean(), off.max(), (logits - judged[:, 0]).abs().max()),
        )

    def _tiles(
        self,
        sizes: Sequence[int],
        net: Callable[..., torch.Tensor],
        example: torch.Tensor,
        labels: torch.Tensor | None,
        expected: torch.Tensor,
    ) -> Tiles:
        if self.exact:
            return Tiles.proven(net, example, labels, sizes, expected)
        warm = []
        for size in sorted({1, 2, *sizes}):
            asked = torch.arange(size, device=example.device) % len(example)
            try:
                net(example[asked], None if labels is None else labels[asked])
            except torch.OutOfMemoryError:
                if size <= LARGE_TILE:
                    raise
                break
            warm.append(size)
        return Tiles(net, warm, spare_rows(self.device))

    def memory(self) -> dict[str, int]:
        """Bytes of the device's memory that torch holds, by kind; nothing where the device is the CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated": torch.cuda.memory_allocated(self.device),
            "reserved": torch.cuda.memory_reserved(self.device),
        }


def _matching_keys(latent: LatentSpec, latents: torch.Tensor) -> torch.Tensor | None:
    """Keys of the first images of `WARMUP_SEED`, if the device draws from them what a CPU did; else None."""
    keys = torch.from_numpy(_keys([Part(SamplePayload(WARMUP_SEED, 0, None, 1.0), 0, len(latents))])).to(latents.device)
    drawn = _FromKeys(latent, nn.Identity()).to(latents.device).latents(keys)
    if torch.allclose(drawn, latents, rtol=0, atol=NOISE_TOLERANCE):
        return keys
    log.warning("noise is drawn on the CPU: %s draws another", latents.device)
    return None


def _take_stream(device: torch.device) -> None:
    """Have the calling thread launch on a stream of its own.

    torch gives out streams of different priorities from different pools, and this one is another than the one of
    `service.engine.cuda_graphs`: so no other thread ever records what is launched here.
    """
    torch.cuda.set_stream(torch.cuda.Stream(device, priority=-2))  # type: ignore[no-untyped-call]


def _choose_precision(precision: Precision) -> None:
    """Of matrix products and convolutions on GPUs, for all of the process.

    torch's own choice is float32 for the former and tf32 for the latter, and sums that may be bfloat16.
    """
    with warnings.catch_warnings():
        # Some versions of torch announce another way to say it, and still know this one.
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
