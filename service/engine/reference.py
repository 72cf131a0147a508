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
from models.inference.fast_nets import FastDiscriminator, fast_discriminator, fast_generator
from models.inference.noise import draw_latents
from models.inference.tiles import REFERENCE_TILE
from service.engine.device import Call, Device, Precision, Sampler
from service.engine.payloads import UNKNOWN_LABEL

WARMUP_SEED = 0
SLOWER = 1.1  # what is worth a warning

log = logging.getLogger(__name__)


@dataclass
class Reference:
    """Both nets with the inputs and outputs of one reference tile.

    Attributes:
        latent_sampler, seed_sampler: Of latents, and of the device's own noise where it draws some.
        latents: What the CPU draws for it; the sampler's example may be something else.
        labels: Of the images that G makes, if there are any.
        asked: Labels that D is given for them. Every other one is unknown, so that the class head is tried too.
        pixels: What G gives: (n, c, h, w).
        judged: What D gives: see `Verdicts`.
    """

    latent_sampler: Sampler
    seed_sampler: Sampler | None
    verdicts: FastDiscriminator
    latents: torch.Tensor
    labels: torch.Tensor | None
    asked: torch.Tensor | None
    pixels: torch.Tensor
    judged: torch.Tensor

    @classmethod
    def of(cls, bundle: Bundle, device: Device, precision: Precision) -> "Reference":
        """Run a bundle's nets on the device."""
        half = precision == "bfloat16"
        latent, names = bundle.manifest.latent, bundle.manifest.labels
        latents = device.send(draw_latents(latent, WARMUP_SEED, 0, REFERENCE_TILE))
        labels = asked = None
        if names is not None:
            numbers = torch.arange(REFERENCE_TILE, device=device.torch_device)
            labels = numbers % len(names)
            asked = labels.where(numbers % 2 == 0, UNKNOWN_LABEL)
        generator = fast_generator(bundle.generator, half=half)
        of_latents = device.sampler(latent, generator, latents)
        of_seeds = device.seed_sampler(latent, generator, latents)
        sampler = of_seeds or of_latents
        verdicts = fast_discriminator(bundle.discriminator, half=half)
        # Contiguous, as uploads are: for other layouts there may be other kernels.
        pixels = sampler.net(sampler.example, labels).contiguous()
        return cls(of_latents, of_seeds, verdicts, latents, labels, asked, pixels, verdicts(pixels, asked))

    @property
    def sampler(self) -> Sampler:
        """The one that requests with a seed use."""
        return self.seed_sampler or self.latent_sampler

    def nets_without_numbers(self) -> Iterator[str]:
        """Which nets give NaN or Inf."""
        for net, rows in (("generator", self.pixels), ("discriminator", self.judged)):
            if not torch.isfinite(rows).all():
                yield net

    @cached_property
    def fingerprint(self) -> str:
        """A hash of G's output."""
        return hashlib.sha256(self.pixels.cpu().numpy().tobytes()).hexdigest()[:12]

    def report_error(self, exact: Bundle, precision: Precision) -> None:
        """Log what a precision costs: how far both nets' answers are from those of the float32 bundle, on the CPU.

        Not on a GPU, where tf32 is a switch of the whole process, and batches of other bundles may be running.
        """
        generator, discriminator = exact.generator, exact.discriminator
        if self.pixels.device.type != "cpu":
            generator, discriminator = copy.deepcopy(generator).cpu(), copy.deepcopy(discriminator).cpu()
        pixels, judged = self.pixels.cpu(), self.judged.cpu()
        labels = None if self.labels is None else self.labels.cpu()
        off = 255 * (generator(self.latents.cpu(), labels) - pixels).abs()
        logits = discriminator(pixels, None if labels is None else judged[:, 1].long())
        log.info(
            "%s in %s: 64 images differ from float32's by %.2f grey levels on average and %.1f at most, logits by %.3f",
            *(exact.name, precision, off.mean(), off.max(), (logits - judged[:, 0]).abs().max()),
        )
        if self.pixels.device.type == "cpu":
            self._warn_of_slow_images(exact, precision)

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
