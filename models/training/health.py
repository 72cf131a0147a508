"""Is the run healthy? A few cheap numbers from a fixed probe, and the alarms that follow when they stay bad.

The probe is as many generated, training and validation images as a mini-batch of the paper, always the same noise and
images, through both nets without dropout and without gradients. Logits are only compared with one another, because the
mean of a relativistic D says nothing, and images only by distance, so this works for any family of nets and any loss.
It changes nothing in the training and draws no random number: a monitored run computes the same bits.

An alarm is a condition that has held without a break for many images. It depends on nothing but the numbers so far,
which stats.jsonl holds, so a resumed run continues its alarms. docs/log.md has the measured courses of healthy and sick
runs behind the thresholds. Mind that D's loss of 0.02 in an early epoch of the paper's recipe is healthy.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.data.dataset import Dataset, Split
from models.inference.noise import draw_latents
from models.inference.pixels import to_pixels
from models.spec import AugmentName
from models.training.trainer import State

PROBE_ROWS = 100
MIN_PROBES = 4  # bad ones in a row before an alarm, however many images lie between two


@dataclass(frozen=True)
class TrainingHealth:
    """What one look at the probe shows.

    Attributes:
        pairs_right: Share of pairs (training image x, generated image) with D(x) > D(G(z)); ties count half.
        train_over_validation: Share of pairs (training image, validation image) with D higher for the first. Both are
            real, so ½ is right; near 1, D knows its training images by heart.
        r_v: (E D(x) − E D(v)) / (E D(x) − E D(G(z))) for training images x and validation images v: overfitting of D
            on its own scale (Karras et al. 2020, equation 1). NaN if the denominator is 0.
        diversity: Mean distance between two generated images over that between two training images, in pixels.
        g_gradient, d_gradient: Euclidean norm of the net's last gradient.
    """

    pairs_right: float
    train_over_validation: float
    r_v: float
    diversity: float
    g_gradient: float
    d_gradient: float


class Probe:
    """The fixed images and noise that a run is examined with."""

    def __init__(self, state: State, dataset: Dataset) -> None:
        self.state = state
        self.train, self.train_labels = _some(dataset.train, state)
        self.validation, self.validation_labels = _some(dataset.validation, state)
        self.latents = torch.from_numpy(draw_latents(state.options.latent, 0, 0, PROBE_ROWS)).to(state.device)
        labels = state.sample_labels(PROBE_ROWS)
        self.labels = None if labels is None else labels.to(state.device)
        self.real_distance = _mean_distance(self.train)

    def every(self, steps: int) -> int:
        """Steps between two looks: a multiple of `steps`, larger for small mini-batches, whose steps cost less."""
        return steps * math.ceil(PROBE_ROWS / self.state.options.batch_size)

    @torch.no_grad()
    def look(self) -> TrainingHealth:
        """Measure the present health."""
        generator, discriminator = self.state.generator, self.state.discriminator
        modes = [(module, module.training) for net in (generator, discriminator) for module in net.modules()]
        generator.eval()
        discriminator.eval()
        fake = generator(self.latents, self.labels)
        generated = discriminator(fake, self.labels)
        train = discriminator(self.train, self.train_labels)
        validation = discriminator(self.validation, self.validation_labels)
        for module, training in modes:
            module.training = training
        gap, overfit = (train.mean() - other.mean() for other in (generated, validation))
        return TrainingHealth(
            _share_above(train, generated),
            _share_above(train, validation),
            (overfit / gap).item() if gap else math.nan,
            _mean_distance(fake) / self.real_distance if self.real_distance else math.nan,
            _gradient_norm(generator),
            _gradient_norm(discriminator),
        )


@dataclass(frozen=True)
class Condition:
    """Something that is wrong by the numbers of one look, and for how many images (D's real ones) it may last."""

    name: str
    patience_images: int
    holds: Callable[[TrainingHealth, float], bool]  # of the health and the highest diversity so far
    words: Callable[[TrainingHealth, AugmentName], str]  # of the health and what the run does against it


def _against_memorising(augment: AugmentName) -> str:
    """What there is to do about it, beside what the run does already."""
    others = "--init with a bundle of alike images, more images, a smaller D or fewer steps"
    if augment in {"none", "flip"}:
        return f": --augment ada (--resume --override takes it up), {others}"
    return f", in spite of --augment {augment}: {others}"


CONDITIONS = (
    Condition(
        "memorising",
        50_000,
        lambda now, _: now.train_over_validation >= 0.75,
        lambda now, augment: (
            f"D ranks a training image above a validation image in {now.train_over_validation:.0%} of pairs, "
            f"and knows the training images by heart{_against_memorising(augment)}"
        ),
    ),
    # In a healthy run G's images may be all alike for the first 130,000 images, with D far ahead.
    Condition(
        "out of step",
        300_000,
        lambda now, best: now.pairs_right >= 0.99 and now.diversity < 0.1 and best < 0.15,
        lambda now, _: (
            f"D tells {now.pairs_right:.0%} of pairs apart, and G, whose images differ by "
            f"{now.diversity:.2g} of what real ones do, has not begun to learn: fewer steps or a lower rate for D, or "
            "the non-saturating loss"
        ),
    ),
    Condition(
        "collapse",
        100_000,
        lambda now, best: now.diversity < 0.05 and best >= 0.15,
        lambda now, _: (
            f"G's images differ by {now.diversity:.2g} of what real ones do, after more: lower rates, or another loss"
        ),
    ),
)


@dataclass(frozen=True)
class Alarm:
    """A condition that has lasted for half its patience, which is a warning, or for all of it: `stop`."""

    name: str
    images: int
    patience_images: int
    text: str

    @property
    def stop(self) -> bool:
        """Whether the run should end."""
        return self.images >= self.patience_images

    def __str__(self) -> str:
        return f"{self.name}: {self.text} (for {self.images:,} images; {self.patience_images:,} stop a run)"


class HealthError(RuntimeError):
    """An alarm stopped the run. The message says which, why, and which checkpoint is left."""


class HealthMonitor:
    """The alarms of a run.

    Args:
        images_per_step: Real images that D sees in one step.
        rows: Earlier rows of stats.jsonl; those without health are skipped.
        augment: What the run does that D learns nothing by heart; an alarm says what else there is.
    """

    def __init__(
        self, images_per_step: int, rows: Iterable[Mapping[str, Any]] = (), augment: AugmentName = "none"
    ) -> None:
        self.images_per_step, self.augment = images_per_step, augment
        self.good_step = 0  # the last look at which no condition held
        self._best_diversity = 0.0
        self._held: dict[str, list[int]] = {condition.name: [] for condition in CONDITIONS}  # steps of the looks
        for row in rows:
            if "pairs_right" in row:
                # NaN is null in the file.
                numbers = {
                    name: math.nan if row[name] is None else row[name] for name in TrainingHealth.__annotations__
                }
                self.see(int(row["step"]), TrainingHealth(**numbers))

    def see(self, step: int, now: TrainingHealth) -> list[Alarm]:
        """Take in one look and return the alarms that it raises, those that stop the run first."""
        self._best_diversity = max(self._best_diversity, now.diversity)
        alarms = []
        for condition in CONDITIONS:
            held = self._held[condition.name]
            if not condition.holds(now, self._best_diversity):
                held.clear()
                continue
            held.append(step)
            images = (step - held[0]) * self.images_per_step
            if len(held) >= MIN_PROBES and images >= condition.patience_images / 2:
                alarms.append(
                    Alarm(condition.name, images, condition.patience_images, condition.words(now, self.augment))
                )
        if not any(self._held.values()):
            self.good_step = step
        return sorted(alarms, key=lambda alarm: not alarm.stop)


def row_of(now: TrainingHealth) -> dict[str, float | None]:
    """The health for stats.jsonl, with null for NaN, which is not JSON."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(now).items()}


def _some(split: Split, state: State) -> tuple[Tensor, Tensor | None]:
    """As many images as the probe has rows, evenly spaced, and their labels if the nets take labels."""
    rows = np.linspace(0, len(split.images) - 1, min(PROBE_ROWS, len(split.images))).astype(int)
    labels = None if not state.classes or split.labels is None else torch.from_numpy(split.labels[rows])
    return to_pixels(split.images[rows], state.device), None if labels is None else labels.to(state.device)


def _share_above(these: Tensor, those: Tensor) -> float:
    """Share of pairs in which the first is greater, the area under the ROC curve."""
    difference = these[:, None] - those[None]
    return ((difference > 0).double().mean() + (difference == 0).double().mean() / 2).item()


def _mean_distance(images: Tensor) -> float:
    return torch.pdist(images.flatten(1)).mean().item()


def _gradient_norm(net: nn.Module) -> float:
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() if gradients else math.nan
