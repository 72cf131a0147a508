"""What D says of images that it never saw: real ones, generated ones, those of another data set, and noise.

Images are judged as `/discriminate` does without labels: a bundle with classes names each one's class itself.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.bundle import Bundle
from models.data.load import Dataset
from models.evaluation.calibration import (
    VERDICT_BINS,
    Float64s,
    auc,
    expected_calibration_error,
    histogram,
    probabilities,
)
from models.inference.drawing import logits_of
from models.inference.pixels import UInt8

REAL, GENERATED, NOISE = "test images", "generated images", "noise"
SAMPLE_SEED = 1  # the images of seed 0 were calibrated with
_QUANTILES = (0.05, 0.5, 0.95)
_COLOURS = ("black", "#15803d", "#1d4ed8", "#b45309")
_STROKES = ("-", "-", "--", ":")


@dataclass(frozen=True)
class Said:
    """D's probabilities that the images of one set are real.

    Attributes:
        images: How many were judged.
        histogram: Images in each of 20 equal bins from 0 to 1.
        quantiles: By share, as text: half of the images lie above that of 0.5.
        above_half: Share of images that D takes for real rather than generated.
    """

    images: int
    histogram: list[int]
    quantiles: Mapping[str, float]
    above_half: float


@dataclass(frozen=True)
class Judged:
    """What one bundle's D says of every set.

    Attributes:
        bundle, version: Whose D it is.
        sets: What it says, by the set's name.
        auc: Of test images against generated ones.
        calibration_error: The expected error of `probability_real` on these, with the bundle's calibration.
        plain_error: The same of σ(logit), without.
    """

    bundle: str
    version: str
    sets: Mapping[str, Said]
    auc: float
    calibration_error: float
    plain_error: float


def judge(bundle: Bundle, dataset: Dataset, other: Dataset | None = None) -> Judged:
    """Judge the test images, as many generated ones and as many of noise, and another set's test images.

    The generated ones are of a seed that D was not calibrated with. In the noise each pixel is uniform on 0 … 255.

    Args:
        bundle: Its D judges.
        dataset: What the bundle was trained on.
        other: Another data set, of images of the same size.
    """
    real = dataset.test.images
    sets = {REAL: real, GENERATED: bundle.draw(len(real), seed=SAMPLE_SEED)}
    if other is not None:
        sets[other.name] = other.test.images
    sets[NOISE] = np.random.default_rng(0).integers(0, 256, real.shape, np.uint8)
    logits = {name: _logits(bundle, images) for name, images in sets.items()}
    calibration = bundle.manifest.calibration
    said = {name: probabilities(calibration, of) for name, of in logits.items()}
    plain = {name: probabilities(None, of) for name, of in logits.items()}
    return Judged(
        bundle.name,
        bundle.version,
        {name: _summary(of) for name, of in said.items()},
        auc(said[REAL], said[GENERATED]),
        expected_calibration_error(said[REAL], said[GENERATED]),
        expected_calibration_error(plain[REAL], plain[GENERATED]),
    )


def chart(judged: Sequence[Judged]) -> bytes:
    """A panel for each bundle: how often its D says what of each set. A PNG."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(judged), squeeze=False)[0], judged, strict=True):
        for (name, said), colour, stroke in zip(one.sets.items(), _COLOURS, _STROKES, strict=False):
            shares = np.array(said.histogram) / said.images
            axes.stairs(shares, np.linspace(0, 1, VERDICT_BINS + 1), label=name, color=colour, linestyle=stroke, lw=1.6)
        axes.set_title(one.bundle, fontsize=11)
        axes.set_xlabel("probability_real")
        axes.set_xlim(0, 1)
    figure.axes[0].set_ylabel("share of images")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    picture, small = io.BytesIO(), io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    Image.open(picture).convert("RGB").quantize(32).save(small, "png", optimize=True)
    return small.getvalue()


def _logits(bundle: Bundle, images: UInt8) -> Tensor:
    to_be_named = None if bundle.manifest.labels is None else np.full(len(images), -1, np.int64)
    return torch.from_numpy(logits_of(bundle.discriminator, images, to_be_named))


def _summary(said: Float64s) -> Said:
    quantiles = np.quantile(said, _QUANTILES).tolist()
    return Said(
        len(said),
        histogram(said),
        {str(share): round(value, 4) for share, value in zip(_QUANTILES, quantiles, strict=True)},
        round(float((said > 0.5).mean()), 4),
    )
