"""One reference tile of a bundle: what every other size of tile has to give is known from it."""

import copy
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from models.bundle import Bundle
from models.inference.fast_nets import (
    FastDiscriminator,
    FastEncoder,
    fast_discriminator,
    fast_encoder,
    fast_generator,
)
from models.inference.noise import LatentRange, beside_noise, draw_latents
from models.inference.tiles import REFERENCE_TILE
from service.engine.device import Call, Device, Precision, Sampler
from service.engine.payloads import UNKNOWN_LABEL

WARMUP_SEED = 0
SLOWER = 1.1  # what is worth a warning

log = logging.getLogger(__name__)


@dataclass
class JudgeReference:
    """D with the inputs and outputs of one reference tile.

    Attributes:
        asked: Labels that D is given. Every other one is unknown, so that the class head is tried too.
        pixels: What G gives: (n, c, h, w).
        judged: What D gives: see `Verdicts`.
    """

    net: FastDiscriminator
    pixels: torch.Tensor
    asked: torch.Tensor | None
    judged: torch.Tensor


@dataclass
class EncoderReference:
    """E with the inputs and outputs of one reference tile: the pixels that G gives, and what E finds in them."""

    net: FastEncoder
    pixels: torch.Tensor
    codes: torch.Tensor


@dataclass
class Reference:
    """The nets with the inputs and outputs of one reference tile.

    Attributes:
        latent_sampler, seed_sampler: Of latents, and of the device's own noise where it draws some.
        latents: What the CPU draws for it; the sampler's example may be something else.
        labels: Of the images that G makes, if there are any.
        pixels: What G gives: (n, c, h, w).
        judge, encoder: Of D and E, if there are any.
    """

    latent_sampler: Sampler
    seed_sampler: Sampler | None
    latents: torch.Tensor
    labels: torch.Tensor | None
    pixels: torch.Tensor
    judge: JudgeReference | None
    encoder: EncoderReference | None

    @classmethod
    def of(cls, bundle: Bundle, device: Device, precision: Precision) -> "Reference":
        """Run a bundle's nets on the device."""
        half = precision == "bfloat16"
        latent, names = bundle.manifest.latent, bundle.manifest.labels
        drawn = draw_latents(latent, WARMUP_SEED, 0, REFERENCE_TILE)
        latents = device.send(beside_noise(latent, drawn, [LatentRange(WARMUP_SEED, 0, REFERENCE_TILE)]))
        labels = asked = None
        if names is not None:
            numbers = torch.arange(REFERENCE_TILE, device=device.torch_device)
            labels = numbers % len(names)
            asked = labels.where(numbers % 2 == 0, UNKNOWN_LABEL)
        generator = fast_generator(bundle.generator, half=half)
        of_latents = device.sampler(latent, generator, latents)
        of_seeds = device.seed_sampler(latent, generator, latents)
        sampler = of_seeds or of_latents
        # Contiguous, as uploads are: for other layouts there may be other kernels.
        pixels = sampler.net(sampler.example, labels).contiguous()
        judge = None
        if bundle.judge is not None:
            net = fast_discriminator(bundle.judge, half=half)
            judge = JudgeReference(net, pixels, asked, net(pixels, asked))
        encoder = None
        if bundle.encoder is not None:
            finder = fast_encoder(bundle.encoder)
            encoder = EncoderReference(finder, pixels, finder(pixels))
        return cls(of_latents, of_seeds, latents, labels, pixels, judge, encoder)

    @property
    def sampler(self) -> Sampler:
        """The one that requests with a seed use."""
        return self.seed_sampler or self.latent_sampler

    def nets_without_numbers(self) -> Iterator[str]:
        """Which nets give NaN or Inf."""
        if not torch.isfinite(self.pixels).all():
            yield "generator"
        if self.judge is not None and not torch.isfinite(self.judge.judged).all():
            yield "discriminator"
        if self.encoder is not None and not torch.isfinite(self.encoder.codes).all():
            yield "encoder"

    @cached_property
    def fingerprint(self) -> str:
        """A hash of G's output."""
        return hashlib.sha256(self.pixels.cpu().numpy().tobytes()).hexdigest()[:12]

    def report_error(self, exact: Bundle, precision: Precision) -> None:
        """Log what a precision costs: how far both nets' answers are from those of the float32 bundle, on the CPU.

        Not on a GPU, where tf32 is a switch of the whole process, and batches of other bundles may be running.
        """
        on_cpu, labels = self.pixels.device.type == "cpu", None if self.labels is None else self.labels.cpu()
        generator = exact.generator if on_cpu else copy.deepcopy(exact.generator).cpu()
        pixels = self.pixels.cpu()
        off = 255 * (generator(self.latents.cpu(), labels) - pixels).abs()
        log.info(
            "%s in %s: 64 images differ from float32's by %.2f grey levels on average and %.1f at most%s",
            *(exact.name, precision, off.mean(), off.max(), self._logits_off(exact, pixels)),
        )
        if self.pixels.device.type == "cpu":
            self._warn_of_slow_images(exact, precision)

    def _logits_off(self, exact: Bundle, pixels: torch.Tensor) -> str:
        """How far D's logits are from those of the float32 bundle, as the log says it."""
        if self.judge is None or exact.judge is None:
            return ""
        net, judged = exact.judge, self.judge.judged.cpu()
        net = net if self.pixels.device.type == "cpu" else copy.deepcopy(net).cpu()
        logits = net(pixels, None if self.labels is None else judged[:, 1].long())
        return f", logits by {(logits - judged[:, 0]).abs().max():.3f}"

    def _warn_of_slow_images(self, exact: Bundle, precision: Precision) -> None:
        """Log a warning where a single image takes longer than in float32; all sizes have one precision."""
        alone = self.sampler.example[:1], None if self.labels is None else self.labels[:1]
        slower = _seconds(self.sampler.levels, *alone) / _seconds(fast_generator(exact.generator).levels, *alone)
        if slower > SLOWER:
            log.warning(
                "%s in %s: a single image takes %.1f times as long as in float32", exact.name, precision, slower
            )


def _seconds(call: Call, rows: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Processor time of a call; the least of some."""
    seconds = []
    for _ in range(10):
        started = time.thread_time()
        call(rows, labels)
        seconds.append(time.thread_time() - started)
    return min(seconds)
