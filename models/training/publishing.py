"""What a run makes of its weights: samples, their scores, the best weights so far, and bundles.

Scoring has random streams of its own, and moves nothing that a step reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from models.bundle import Bundle, write_bundle
from models.data.load import Dataset, Split
from models.evaluation.calibration import count_verdicts, fit_calibration
from models.evaluation.metric_suite import FrechetOnValidation
from models.evaluation.parzen import PAPER_SAMPLES, validation_log_likelihood
from models.inference.drawing import draw_images, logits_beside
from models.inference.noise import sampled_labels
from models.inference.pixels import UInt8, grid, to_pixels
from models.networks import Generator
from models.spec import LatentSpec
from models.training.trainer import Best, State, TrainingError

Show = Callable[[str, int, int], None]  # what is done at present, and how much of how much is done
DRAWN_AT_ONCE = 1_000  # images between two calls of a `Show`


@dataclass(frozen=True)
class Score:
    """The score of the EMA generator's samples by the run's rule, with the metadata that the manifest records."""

    value: float
    metadata: dict[str, float | int | str]

    def stats(self) -> dict[str, float | int]:
        """The numbers in the metadata for stats.jsonl, with `validation_` before their names."""
        return {f"validation_{key}": value for key, value in self.metadata.items() if not isinstance(value, str)}


def score(state: State, dataset: Dataset, show: Show = lambda _what, _done, _of: None) -> Score:
    """Score the images of `ema_generator` against the validation images, by the rule of the options.

    They are images of seed 0, as clients would get them, and the feature net has random numbers of its own. So training
    goes on as if there had been no score, and two scores of a run differ by the weights alone.

    Raises:
        TrainingError: The generator's pixels are not all numbers.
    """
    if state.options.selection == "frechet":
        return _score_frechet(state, dataset, show)
    count = min(PAPER_SAMPLES, max(1, len(state.data) // 5))
    drawn, real = draw(state, count, show), dataset.validation.images
    show("log-likelihood", 0, 0)
    choice = validation_log_likelihood(to_pixels(drawn, state.device), to_pixels(real, state.device))
    facts: dict[str, float | int | str] = {
        "log_likelihood": choice.log_likelihood,
        "sigma": choice.sigma,
        "rows": len(dataset.validation.images),
    }
    return Score(choice.log_likelihood, facts)


def _score_frechet(state: State, dataset: Dataset, show: Show) -> Score:
    if state.frechet is None:
        learning = partial(show, "training the feature net")
        state.frechet = FrechetOnValidation(dataset, state.device, progress=learning)
    judge, count = state.frechet, state.frechet.count
    drawn = draw(state, count, show)
    show("Fréchet distance", 0, 0)
    value = judge.score(drawn)
    return Score(
        value,
        {
            "frechet": value,
            "frechet_floor": judge.floor,
            "samples": count,
            "rows": len(dataset.validation.images),
            "features": judge.extractor.kind,
            "features_sha256": judge.extractor.checksum,
        },
    )


def keep_if_best(state: State, new: Score) -> bool:
    """Note that the present weights are scored, and keep them as the best, if their score is the best so far."""
    state.scored_step = state.step
    if not state.selection.prefers(new.value, state.best.score):
        return False
    state.best = present(state, new)
    return True


def present(state: State, scored: Score) -> Best:
    """A copy of the present weights with their score."""
    return Best(
        state.step,
        scored.value,
        scored.metadata,
        {name: tensor.clone() for name, tensor in state.ema_generator.state_dict().items()},
        {name: tensor.clone() for name, tensor in state.discriminator.state_dict().items()},
    )


def publish(
    state: State,
    dataset: Dataset,
    folder: Path,
    name: str,
    record: dict[str, Any],
    *,
    rule: str,
    show: Show = lambda _what, _done, _of: None,
) -> Bundle:
    """Write weights as a bundle, calibrated on images that D never saw, as clients get them.

    Args:
        rule: `best`, the weights that scored best so far, or `last`, the present ones.
        record: Goes into the manifest's `training`.
        show: Is told what is done.

    Errors are those of `write_bundle`.
    """
    best = state.best if rule == "best" else present(state, score(state, dataset, show))
    generator, discriminator = state.empty_nets()
    generator.load_state_dict(best.generator)
    discriminator.load_state_dict(best.discriminator)
    images = _drawn(generator, state.latent, len(dataset.validation.images), show)
    show("calibrating D", 0, 0)
    real = dataset.validation
    logits = logits_beside(discriminator, state.latent, real.images, real.labels, images)
    calibration = fit_calibration(*logits)
    verdicts = {"data": {"name": dataset.name, "checksum": dataset.checksum}, "split": "validation"}
    metadata = _manifest(state, dataset, name, record) | {
        "calibration": calibration,
        "evaluation": {
            f"validation_{state.options.selection}": best.metadata,
            "verdicts": verdicts | count_verdicts(calibration, *logits),
        },
    }
    how = state.selection.rule if rule == "best" else "last step"
    metadata["training"]["selection"] = {"rule": how, "step": best.step}
    return write_bundle(folder, metadata, best.generator, best.discriminator, grid(images[:64], columns=8))


def publish_preview(
    state: State, dataset: Dataset, folder: Path, name: str, record: dict[str, Any], samples: bytes
) -> Bundle:
    """Write the present weights as a bundle to look at, with a PNG of samples. Nothing is scored or calibrated.

    Errors are those of `write_bundle`.
    """
    best, metadata = state.best, _manifest(state, dataset, name, record)
    metadata["training"]["selection"] = {"rule": "preview", "step": state.step}
    if best.step:
        metadata["evaluation"] = {f"best_validation_{state.options.selection}": {**best.metadata, "step": best.step}}
    nets = state.ema_generator.state_dict(), state.discriminator.state_dict()
    return write_bundle(folder, metadata, *nets, samples)


def _manifest(state: State, dataset: Dataset, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """What the manifest of any bundle of a run says, with neither calibration nor scores."""
    options = state.options
    training = record | {
        "steps": state.step,
        "images_seen": state.step * options.batch_size * options.d_steps,
        "wall_seconds": round(state.seconds, 1),
        "seed": options.seed,
    }
    return {
        "name": name,
        "created": datetime.now(UTC),
        "network": options.network,
        "image": state.image,
        "latent": state.latent,
        "labels": dataset.label_names if options.conditional else None,
        "calibration": None,
        "preparation": dataset.preparation,
        "training": training,
        "evaluation": {},
    }


def draw(state: State, count: int, show: Show = lambda _what, _done, _of: None) -> UInt8:
    """Images 0 … count − 1 of seed 0 by the generator whose images count: uint8 (count, h, w, c), as clients get them.

    Raises:
        TrainingError: Weights so large that pixels are not all numbers.
    """
    return _drawn(state.ema_generator, state.latent, count, show)


def real_beside(state: State, split: Split, count: int) -> UInt8:
    """As many images of a split, to be looked at beside samples: of the samples' labels, where the nets see labels."""
    labels = sampled_labels(state.latent, 0, 0, count)
    if labels is None or split.labels is None:
        rows = np.linspace(0, len(split.images) - 1, count).astype(int)
    else:  # a label that comes the nth time gets the nth image of its class
        of_class = [cycle(np.flatnonzero(split.labels == label).tolist()) for label in range(state.classes)]
        rows = np.array([next(of_class[label]) for label in labels])
    images: UInt8 = split.images[rows]
    return images


def _drawn(generator: Generator, latent: LatentSpec, count: int, show: Show) -> UInt8:
    drawn = []
    try:
        for first in range(0, count, DRAWN_AT_ONCE):
            show("drawing images", first, count)
            rows = min(DRAWN_AT_ONCE, count - first)
            drawn.append(draw_images(generator, latent, rows, first_index=first))
    except FloatingPointError:
        raise TrainingError("the generator has diverged: some of its pixels are not numbers") from None
    images: UInt8 = np.concatenate(drawn)
    return images
