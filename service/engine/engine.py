"""Weights in memory on one device, and the threads that run batches of rows through them.

What `Engine.load` returns holds all that its batches need, and lives for as long as somebody refers to it: a bundle can
be replaced between two batches.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from models.bundle import Bundle, BundleError, read_bundle
from models.inference.devices import find_device
from models.inference.pixels import to_uint8
from models.inference.tiles import LARGE_TILE, Tiles, spare_rows, tile_sizes
from models.networks import GraphNet
from models.signing import PublicKeys
from service.engine.batching.batch import BatchSlice
from service.engine.device import MAX_BATCH_ROWS, Call, Device, DeviceErrors, Precision, Sampler
from service.engine.engine_thread import EngineThread
from service.engine.hints import Hints
from service.engine.payloads import DiscriminatePayload, SamplePayload
from service.engine.reference import WARMUP_SEED, EncoderReference, JudgeReference, Reference
from service.engine.runners import DiscriminateRunner, EncodeRunner, SampleRunner


@dataclass(frozen=True, eq=False)
class Loaded(Bundle):
    """A bundle on the device, warm, with a runner for each net that it has.

    `fingerprint` is a hash of what G computes here for fixed latents: equal where this device and its libraries give
    the same bits, which no list of versions could promise. `hints` finds uploads that can't be what was meant.
    """

    sample: SampleRunner
    judge_runner: DiscriminateRunner | None
    encode: EncodeRunner | None
    hints: Hints
    fingerprint: str
    warmup_s: float

    @property
    def discriminate(self) -> DiscriminateRunner:
        """The runner of D.

        Raises:
            LookupError: There is none, which requests are told before.
        """
        if self.judge_runner is None:
            raise LookupError(f"{self.name} has no discriminator")
        return self.judge_runner

    def run_first_batches(self) -> None:
        """Run all nets, on a thread that has not done so yet."""
        others = [runner for runner in (self.judge_runner, self.encode) if runner is not None]
        sizes = sorted({size for runner in (self.sample, *others) for size in runner.tiles.sizes})
        for rows in self.sample.device.first_sizes(sizes):
            labels = None if self.manifest.labels is None else np.zeros(rows, np.int64)
            images = self.sample.run([BatchSlice(SamplePayload(WARMUP_SEED, 0, labels, 1.0), 0, rows)])
            for runner in others:
                runner.run([BatchSlice(DiscriminatePayload(images, labels), 0, rows)])


class Engine:
    """One device and its instances, each a thread that runs batches.

    Args:
        device: auto, cpu, cuda or cuda:N.
        exact: Run only tile sizes that are proven to give the same bits; else all of them, and single rows.
        workers: Processes that share the CPU's processors.
        processors: How many they use at most; None for all.
        precision: Of the nets. tf32 and bfloat16 are faster and less exact; `load` logs by how much.
        cuda_graphs: Launch a GPU's kernels as CUDA graphs.

    Raises:
        ValueError: There is no such device.
        NoSuchPrecision: It has none such.
    """

    def __init__(
        self,
        device: str,
        *,
        exact: bool,
        workers: int = 1,
        processors: int | None = None,
        precision: Precision = "float32",
        cuda_graphs: bool = False,
    ) -> None:
        self.exact = exact
        self.precision: Precision = precision
        on_cpu = partial(Device, workers=workers, processors=processors, precision=precision)
        self.device = _find_device(device, on_cpu, exact=exact, precision=precision, cuda_graphs=cuda_graphs)
        _set_up_torch(precision, exact=exact)
        self._proven: dict[tuple[str, str], tuple[int, ...]] = {}
        begin = self.device.begin_thread
        self.threads = [EngineThread(f"engine {self.name} {n}", begin) for n in range(self.device.instances)]

    @property
    def name(self) -> str:
        """The device's, as it stands in metrics and in the log."""
        return self.device.name

    @DeviceErrors()
    def load(self, folder: Path, known: Mapping[str, Loaded], trusted: PublicKeys | None = None) -> Loaded:
        """Verify and warm a bundle, on the calling thread; of one that is `known`, by name, only the metadata is new.

        Arguments are those of `read_bundle`.

        Raises:
            BundleError: As `read_bundle`; or its nets give NaN or Inf.
            OutOfMemory, DeviceFailed: See there.
        """
        started = time.monotonic()
        bundle = read_bundle(folder, self.device.torch_device, known, trusted)
        if isinstance(bundle, Loaded):
            return bundle
        with torch.inference_mode():
            with _graph_errors(bundle):
                reference = Reference.of(bundle, self.device, self.precision)
            for net in reference.nets_without_numbers():
                raise BundleError(folder, f"its {net} gives NaN or Inf")
            if self.precision != "float32":
                reference.report_error(bundle, self.precision)
            sample = self._sample_runner(bundle, reference, reference.sampler)
            if reference.seed_sampler is not None:
                sample.of_latents = self._sample_runner(bundle, reference, reference.latent_sampler)
            judge_runner = None if reference.judge is None else self._discriminate_runner(bundle, reference.judge)
            of_latents = sample.of_latents or sample
            encode = None if reference.encoder is None else self._encode_runner(bundle, reference.encoder, of_latents)
        self.device.release_unused_memory()
        warmup_s = time.monotonic() - started
        return Loaded(
            **vars(bundle),
            sample=sample,
            judge_runner=judge_runner,
            encode=encode,
            hints=Hints.of(to_uint8(reference.pixels)),
            fingerprint=reference.fingerprint,
            warmup_s=warmup_s,
        )

    def _sample_runner(self, bundle: Bundle, reference: Reference, sampler: Sampler) -> SampleRunner:
        labels = reference.labels
        candidates = tile_sizes(self.device.torch_device, bundle.manifest.image.size)
        # Proven on numbers: two that differ in their last bits may well be the same grey level.
        tiles = self._tiles(
            ("sample", _shapes(bundle)), candidates, sampler.net, sampler.example, labels, reference.pixels
        )
        tiles.run = self.device.image_call(sampler, labels, tiles.sizes)
        most_rows = max(MAX_BATCH_ROWS, tiles.sizes[-1])
        return SampleRunner(bundle.name, bundle.version, tiles, self.device, sampler.draw, most_rows)

    def _discriminate_runner(self, bundle: Bundle, reference: JudgeReference) -> DiscriminateRunner:
        net, pixels, labels = reference.net, reference.pixels, reference.asked
        candidates = tile_sizes(self.device.torch_device, bundle.manifest.image.size)
        tiles = self._tiles(("discriminate", _shapes(bundle)), candidates, net, pixels, labels, reference.judged)
        tiles.run = self.device.verdict_call(net, pixels, labels, tiles.sizes)
        most_rows = max(MAX_BATCH_ROWS, tiles.sizes[-1])
        return DiscriminateRunner(bundle.name, bundle.version, tiles, self.device, most_rows)

    def _encode_runner(self, bundle: Bundle, reference: EncoderReference, sample: SampleRunner) -> EncodeRunner:
        net, pixels = reference.net, reference.pixels
        candidates = tile_sizes(self.device.torch_device, bundle.manifest.image.size)
        tiles = self._tiles(("encode", _shapes(bundle)), candidates, net, pixels, None, reference.codes)
        tiles.run = self.device.verdict_call(net, pixels, None, tiles.sizes)
        return EncodeRunner(bundle.name, bundle.version, tiles, self.device, sample, bundle.manifest.latent.dim)

    def _tiles(
        self,
        kind: tuple[str, str],
        candidates: Sequence[int],
        net: Call,
        example: torch.Tensor,
        labels: torch.Tensor | None,
        expected: torch.Tensor,
    ) -> Tiles:
        """Tiles of a net; `kind` is what nets share that differ in their weights alone.

        What is proven of one of them holds for all, so that another version of a bundle is loaded in a third of the
        time. On a GPU the largest tiles that fit depend on what else is in its memory.
        """
        if not self.exact:
            return tiles_that_fit(net, example, labels, candidates)
        if kind in self._proven:
            return Tiles(net, self._proven[kind], spare_rows(example.device))
        tiles = Tiles.proven(net, example, labels, candidates, expected)
        if example.device.type == "cpu":
            self._proven[kind] = tiles.sizes
        return tiles

    def memory(self) -> dict[str, int]:
        """Bytes of the device's own memory that torch holds, by kind."""
        return self.device.memory()


@contextmanager
def _graph_errors(bundle: Bundle) -> Iterator[None]:
    """A graph that can't be run is a bundle that can't be used; a device that fails is not."""
    try:
        with DeviceErrors():
            yield
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if not isinstance(bundle.generator, GraphNet):
            raise
        reason = str(error).partition("\n")[0]
        raise BundleError(bundle.folder, f"its graph can't be run: {reason}") from None


def _shapes(bundle: Bundle) -> str:
    """Equal for bundles whose nets run the same kernels."""
    manifest = bundle.manifest
    return f"{manifest.network!r} {manifest.image!r} {manifest.latent.dim} {len(manifest.labels or ())}"


def tiles_that_fit(net: Call, example: torch.Tensor, labels: torch.Tensor | None, candidates: Sequence[int]) -> Tiles:
    """Tiles of all candidates and of one and two rows, up to what the device has memory for; bits may differ."""
    sizes = []
    for size in sorted({1, 2, *candidates}):
        rows = torch.arange(size, device=example.device) % len(example)
        try:
            net(example[rows], None if labels is None else labels[rows])
        except torch.OutOfMemoryError:
            if size <= LARGE_TILE:
                raise
            break
        sizes.append(size)
    return Tiles(net, sizes, spare_rows(example.device))


def _set_up_torch(precision: Precision, *, exact: bool) -> None:
    """Choose how a GPU's matrix products and convolutions are computed, for all of the process.

    torch's own choice is float32 for the former and tf32 for the latter, sums that may be bfloat16, and algorithms of
    which some add up in whatever order their parts happen to end.
    """
    torch.backends.cudnn.deterministic = exact
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _find_device(
    name: str, on_cpu: Callable[[], Device], *, exact: bool, precision: Precision, cuda_graphs: bool
) -> Device:
    device = find_device(name)
    if device.type == "cpu":
        return on_cpu()
    from service.engine.gpu.device import GPU  # noqa: PLC0415 - nothing of it is needed elsewhere

    return GPU(device, exact=exact, precision=precision, cuda_graphs=cuda_graphs)
