"""Trains E, which finds the latent of an image, for a G that stays as it is (Donahue et al. 2017's latent regressor).

Images come from G itself, in endless number, so each step has new ones, rounded to the levels that clients' images
have. E learns the latents that they were drawn from, and that G makes the same images of what E finds: of several
latents that look alike, any one is right. With classes E learns them too, and G is told the true ones.
"""

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bundle import SAMPLES, Bundle, write_bundle
from models.inference.pixels import grey_levels, unit_levels
from models.networks import Encoder, fill_fixup
from models.spec import LatentSpec, RegressionOptions, half_cosine
from models.training.trainer import TrainingError


class LatentRegression:
    """An encoder in training.

    Args:
        bundle: Whose G draws the images; it is on the device.
        options: Of the training.

    Attributes:
        step: Steps that were taken.
        seconds: That they took.
    """

    def __init__(self, bundle: Bundle, options: RegressionOptions) -> None:
        self.bundle, self.options = bundle, options
        manifest, self.step, self.seconds = bundle.manifest, 0, 0.0
        self.device = next(bundle.generator.parameters()).device
        self.encoder = Encoder(options.encoder, manifest.image, manifest.latent.dim, len(manifest.labels or ()))
        self._rng = torch.Generator().manual_seed(options.seed)
        fill_fixup(self.encoder, self._rng)
        self.encoder.to(self.device)
        adam = options.optimiser
        self._optimiser = torch.optim.Adam(self.encoder.parameters(), lr=adam.lr, betas=(adam.beta1, adam.beta2))

    def train_step(self) -> dict[str, float]:
        """Learn from one mini-batch; returns its `latent_error`, `image_error` and, with classes, `class_loss`.

        Raises:
            TrainingError: Losses that are not numbers.
        """
        started, options, latent = time.monotonic(), self.options, self.bundle.manifest.latent
        adam, share = options.optimiser, self.step / options.steps
        final = adam.lr if adam.final_lr is None else adam.final_lr
        self._optimiser.param_groups[0]["lr"] = final + (adam.lr - final) * half_cosine(share)

        z, noise, labels = self._drawn()
        with torch.no_grad():
            images = unit_levels(grey_levels(self.bundle.generator(torch.cat([z, noise], dim=1), labels)))
        codes = self.encoder(images)
        found, scores = codes[:, : latent.dim], codes[:, latent.dim :]
        again = self.bundle.generator(torch.cat([found, noise], dim=1), labels)
        losses = {"latent_error": F.mse_loss(found, z), "image_error": F.mse_loss(again, images)}
        loss = losses["latent_error"] + options.image_loss * losses["image_error"]
        if labels is not None:
            losses["class_loss"] = F.cross_entropy(scores, labels)
            loss = loss + losses["class_loss"]
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()

        self.step += 1
        row = {name: value.item() for name, value in losses.items()}
        if not all(map(math.isfinite, row.values())):
            raise TrainingError(f"step {self.step}: the encoder has diverged")
        self.seconds += time.monotonic() - started
        return row

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, the noise beside them, and labels at the training data's frequencies."""
        latent, rows, labels = self.bundle.manifest.latent, self.options.batch_size, None
        numbers = _numbers(latent, (rows, latent.dim + latent.noise), self._rng).to(self.device)
        if latent.label_frequencies is not None:
            shares = torch.tensor(latent.label_frequencies)
            labels = torch.multinomial(shares, rows, replacement=True, generator=self._rng).to(self.device)
        return numbers[:, : latent.dim], numbers[:, latent.dim :], labels


def _numbers(latent: LatentSpec, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """Of the latent's distribution: mean 0 and variance 1."""
    if latent.distribution == "normal":
        return torch.randn(shape, generator=rng)
    return math.sqrt(3) * (2 * torch.rand(shape, generator=rng) - 1)


def publish_with_encoder(
    training: LatentRegression, folder: Path, name: str, record: Mapping[str, Any], scores: Mapping[str, Any]
) -> Bundle:
    """Write the bundle again with its encoder: another version. Errors are those of `write_bundle`.

    Args:
        training: That has ended.
        folder: Where.
        name: What the bundle will be called.
        record: Of the training, and
        scores: of the encoder, as the manifest will hold them, beside what it says of G and D.
    """
    bundle = training.bundle
    before = bundle.manifest.model_dump(exclude={"format", "files", "signature"})
    metadata = before | {
        "name": name,
        "created": datetime.now(UTC),
        "network": bundle.manifest.network.model_copy(update={"encoder": training.options.encoder}),
        "training": {**before["training"], "encoder": dict(record)},
        "evaluation": {**before["evaluation"], "encoder": dict(scores)},
    }
    judge = None if bundle.judge is None else bundle.judge.state_dict()
    samples = (bundle.folder / SAMPLES).read_bytes()
    return write_bundle(folder, metadata, bundle.generator.state_dict(), judge, samples, training.encoder.state_dict())
