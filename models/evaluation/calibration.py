"""What D's logit is worth: the probability that an image is real, and how it is spread, on images that D never saw."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.spec import Calibration

Float64s = npt.NDArray[np.float64]

VERDICT_BINS = 20
_CALIBRATION_BINS = 15


def fit_calibration(logits_real: Tensor, logits_fake: Tensor, *, seed: int = 0) -> Calibration | None:
    """Fit σ(scale·logit + offset) as the probability that an image is real, when half of all images are.

    Platt scaling (Platt 1999): logistic regression on the logit alone, towards targets just inside 0 and 1, so that
    separated logits have a finite answer. Both classes weigh the same, however many rows they have. A random half of
    each class is fitted; the other half gives the AUC and the expected calibration error, over 15 bins of equal mass.

    Args:
        logits_real, logits_fake: (n,) and (m,), D's raw output on uint8 images: real ones that D was not trained on,
            and generated ones.
        seed: Decides the halves.

    Returns:
        None if D can't tell the two apart: the AUC's 95% interval (Hanley & McNeil 1982) reaches ½, a higher logit
        does not mean more real, or a class has under 30 rows, too few to tell.

    Raises:
        ValueError: Logits that are not one-dimensional, or NaN or Inf among them.
    """
    random = np.random.default_rng(seed)
    halves = [_halves(_checked_logits(logits), random) for logits in (logits_real, logits_fake)]
    (fit_real, held_real), (fit_fake, held_fake) = halves
    if min(len(fit_real), len(fit_fake)) < _CALIBRATION_BINS:
        return None
    scale, offset = _platt(fit_real, fit_fake)
    area = auc(held_real, held_fake)
    if scale <= 0 or area - 1.96 * _auc_standard_error(area, len(held_real), len(held_fake)) <= 0.5:
        return None
    error = expected_calibration_error(_sigmoid(scale * held_real + offset), _sigmoid(scale * held_fake + offset))
    return Calibration(scale=scale, offset=offset, auc=area, expected_calibration_error=error)


def probabilities(calibration: Calibration | None, logits: Tensor) -> Float64s:
    """`probability_real` as the service says it, float64 (n,): σ(logit) where there is no calibration.

    Raises:
        ValueError: As `fit_calibration`.
    """
    scale, offset = (1.0, 0.0) if calibration is None else (calibration.scale, calibration.offset)
    return _sigmoid(scale * _checked_logits(logits) + offset)


def count_verdicts(calibration: Calibration | None, logits_real: Tensor, logits_fake: Tensor) -> dict[str, list[int]]:
    """How many real and how many generated images get which probability of being real, as a manifest holds it.

    Args:
        calibration: Makes logits probabilities; without one they are σ(logit), as the service says it.
        logits_real, logits_fake: (n,) and (m,), as for `fit_calibration`.

    Returns:
        `real` and `generated`: images in each of `VERDICT_BINS` equal bins from 0 to 1.

    Raises:
        ValueError: As `fit_calibration`.
    """
    sets = {"real": logits_real, "generated": logits_fake}
    return {name: histogram(probabilities(calibration, logits)) for name, logits in sets.items()}


def histogram(probabilities: Float64s) -> list[int]:
    """How many there are in each of `VERDICT_BINS` equal bins from 0 to 1."""
    counts: list[int] = np.histogram(probabilities, VERDICT_BINS, (0.0, 1.0))[0].tolist()
    return counts


def _checked_logits(logits: Tensor) -> Float64s:
    if logits.ndim != 1 or not bool(torch.isfinite(logits).all()):
        raise ValueError(f"logits must be finite and of shape (n,), got shape {tuple(logits.shape)}")
    checked: Float64s = logits.detach().double().cpu().numpy()
    return checked


def _halves(values: Float64s, random: np.random.Generator) -> tuple[Float64s, Float64s]:
    shuffled = random.permutation(values)
    middle = len(values) // 2
    return shuffled[:middle], shuffled[middle:]


def _sigmoid(values: Float64s) -> Float64s:
    return 0.5 * (1.0 + np.tanh(0.5 * values))  # no overflow, unlike 1 / (1 + exp(-x))


def _platt(real: Float64s, fake: Float64s) -> tuple[float, float]:
    """(scale, offset) at the cross-entropy's minimum; (0, 0) where all logits are the same."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 — an extra that serving does without

    logits = np.concatenate([real, fake])
    if logits.min() == logits.max():
        return 0.0, 0.0
    middle, spread = float(logits.mean()), float(logits.std())
    sizes = [len(real), len(fake)]
    # Platt's targets: the mean of a class seen n times under a uniform prior, not 1 and 0. So each logit stands there
    # twice, as a real one and as a fake one, and its target divides its weight between the two.
    targets = np.repeat([(len(real) + 1) / (len(real) + 2), 1 / (len(fake) + 2)], sizes)
    weights = np.repeat([0.5 / len(real), 0.5 / len(fake)], sizes) * [targets, 1 - targets]
    column = np.tile((logits - middle) / spread, 2)[:, None]
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1_000, solver="newton-cholesky")
    fit.fit(column, np.repeat([1, 0], len(logits)), sample_weight=weights.ravel() * len(logits))
    scale = float(fit.coef_[0, 0]) / spread
    return scale, float(fit.intercept_[0]) - scale * middle


def auc(real: Float64s, fake: Float64s) -> float:
    """Share of (real, fake) pairs in which the real one's logit or probability is higher; a tie is half a pair."""
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 — as above

    return float(roc_auc_score(np.repeat([1, 0], [len(real), len(fake)]), np.concatenate([real, fake])))


def _auc_standard_error(area: float, n_real: int, n_fake: int) -> float:
    """Hanley & McNeil 1982, equation 1 with the exponential model's Q1 and Q2."""
    q1, q2 = area / (2.0 - area), 2.0 * area**2 / (1.0 + area)
    variance = area * (1.0 - area) + (n_real - 1) * (q1 - area**2) + (n_fake - 1) * (q2 - area**2)
    return math.sqrt(max(0.0, variance) / (n_real * n_fake))  # rounding can leave a tiny negative near 1


def expected_calibration_error(real: Float64s, fake: Float64s) -> float:
    """Mean over bins of |said - seen|, each class weighing half; equal probabilities share a bin."""
    sizes = np.array([len(real), len(fake)])
    weights = np.repeat(0.5 / sizes, sizes)
    is_real = np.repeat([1.0, 0.0], sizes)
    probabilities = np.concatenate([real, fake])
    _, group = np.unique(probabilities, return_inverse=True)
    mass = np.bincount(group, weights)
    group_bin = ((np.cumsum(mass) - mass / 2.0) * _CALIBRATION_BINS).astype(np.int64).clip(max=_CALIBRATION_BINS - 1)
    gaps = np.bincount(group_bin[group], weights * (probabilities - is_real))
    return float(np.abs(gaps).sum())
