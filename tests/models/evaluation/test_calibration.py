"""What D's logit is worth: known odds are found again, and nothing is claimed without evidence."""

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.evaluation.calibration import VERDICT_BINS, count_verdicts, fit_calibration
from models.spec import Calibration


def separated_logits(n_real: int, n_fake: int, *, scale: float, offset: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits for which P(real | logit) is exactly σ(scale·logit + offset) at even odds.

    N(±½, 1) have log-density ratio x; logit = (x - offset) / scale.
    """
    random = torch.Generator().manual_seed(seed)
    real, fake = (torch.randn(n, generator=random) for n in (n_real, n_fake))
    return (real + 0.5 - offset) / scale, (fake - 0.5 - offset) / scale


@pytest.mark.parametrize(("n_real", "n_fake"), [(20_000, 20_000), (20_000, 4_000), (4_000, 20_000)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.2, -1.5), (30.0, 4.0)])
def test_calibration_recovers_the_truth(n_real: int, n_fake: int, scale: float, offset: float) -> None:
    """Known odds are found again, for even odds whatever the numbers of each kind, with the AUC that theory gives."""
    fitted = fit_calibration(*separated_logits(n_real, n_fake, scale=scale, offset=offset))

    assert fitted is not None
    assert fitted.scale == pytest.approx(scale, rel=0.1)
    assert fitted.offset == pytest.approx(offset, rel=0.1, abs=0.1)
    assert fitted.auc == pytest.approx(NormalDist().cdf(math.sqrt(0.5)), abs=0.02)
    assert fitted.expected_calibration_error < 0.05


def test_calibration_error_shows_a_logit_that_misleads() -> None:
    """Odds that are no line in the logit leave the error that its definition gives, ties sharing a bin."""
    seen = {0.0: 0.1, 1.0: 0.8, 2.0: 0.75}  # P(real | logit), each logit as frequent
    n = 3000
    logits = {
        kind: torch.cat([torch.full((round(n * (p if kind == "real" else 1 - p)),), x) for x, p in seen.items()])
        for kind in ("real", "fake")
    }

    fitted = fit_calibration(logits["real"], logits["fake"])

    assert fitted is not None
    weights = {"real": 0.5 / len(logits["real"]), "fake": 0.5 / len(logits["fake"])}
    expected = 0.0
    for x, p in seen.items():
        said = 1 / (1 + math.exp(-(fitted.scale * x + fitted.offset)))
        real, fake = n * p * weights["real"], n * (1 - p) * weights["fake"]
        expected += abs((real + fake) * said - real)
    assert expected > 0.1
    assert fitted.expected_calibration_error == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        tuple(torch.randn(2, 3000, generator=torch.Generator().manual_seed(1))),
        (torch.full((100,), 2.0), torch.full((100,), 2.0)),
        tuple(reversed(separated_logits(3000, 3000, scale=1, offset=0))),
        (torch.full((29,), 2.0), torch.full((100,), -2.0)),
        (torch.zeros(0), torch.zeros(0)),
    ],
    ids=["same distribution", "constant", "upside down", "too few", "none"],
)
def test_no_calibration_without_evidence(real: Tensor, fake: Tensor) -> None:
    """Where the logit does not tell real from generated, or nobody could know, there is no calibration."""
    assert fit_calibration(real, fake) is None


@pytest.mark.parametrize("gap", [1e-3, 10.0, 1e4])
def test_perfect_separation_is_finite(gap: float) -> None:
    """Logits without overlap give a steep but finite line that is sure of both sides."""
    away = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) * gap
    real, fake = away[0] + 2 * gap, -away[1]
    fitted = fit_calibration(real.double(), fake.double())
    assert fitted is not None
    assert fitted.auc == 1
    assert fitted.expected_calibration_error < 0.05
    assert fitted.scale * 2 * gap + fitted.offset > 2
    assert fitted.offset < -2


def test_nothing_is_surer_than_its_evidence() -> None:
    """A logit seen a hundred times, always on a real image, means 101 in 102, as for any rate under a uniform prior."""
    fitted = fit_calibration(torch.full((200,), 5.0), torch.full((200,), -3.0))
    assert fitted is not None
    assert fitted.scale * 5 + fitted.offset == pytest.approx(math.log(101))
    assert fitted.scale * -3 + fitted.offset == pytest.approx(-math.log(101))
    assert fitted.expected_calibration_error == pytest.approx(1 / 102)


def test_the_error_is_measured_on_the_other_half() -> None:
    """A line fits two values of the logit perfectly, so an error beyond the smoothing comes from unseen logits."""
    random = np.random.default_rng(2)
    real, fake = (torch.from_numpy(random.binomial(1, p, 2000).astype(np.float32)) for p in (0.7, 0.4))
    errors = [
        fitted.expected_calibration_error
        for seed in range(5)
        if (fitted := fit_calibration(real, fake, seed=seed)) is not None
    ]
    assert len(errors) == 5
    assert max(errors) > 0.005


@settings(deadline=None, max_examples=25)
@given(factor=st.floats(1e-3, 1e3), shift=st.floats(-50, 50), seed=st.integers(0, 2**31))
def test_calibration_does_not_depend_on_the_logits_units(factor: float, shift: float, seed: int) -> None:
    """Logits on another scale or with another zero give the same probabilities, hence the same AUC and error."""
    real, fake = (logits.double() for logits in separated_logits(400, 400, scale=0.3, offset=1, seed=seed))
    plain = fit_calibration(real, fake)
    changed = fit_calibration(real * factor + shift, fake * factor + shift)
    assert plain is not None
    assert changed is not None
    assert changed.scale * factor == pytest.approx(plain.scale, rel=1e-4)
    assert changed.scale * shift + changed.offset == pytest.approx(plain.offset, abs=1e-3)
    assert (changed.auc, changed.expected_calibration_error) == pytest.approx(
        (plain.auc, plain.expected_calibration_error), abs=1e-3
    )


def test_calibration_is_fixed_by_its_seed() -> None:
    """The seed decides which half is fitted: the same gives the same answer, another a slightly other one."""
    logits = separated_logits(500, 500, scale=1, offset=0)
    assert fit_calibration(*logits, seed=3) == fit_calibration(*logits, seed=3)
    assert fit_calibration(*logits, seed=3) != fit_calibration(*logits, seed=4)


@settings(deadline=None, max_examples=40)
@given(
    real=st.lists(st.integers(-3, 4) | st.floats(-1e5, 1e6), min_size=30, max_size=60),
    fake=st.lists(st.integers(-4, 3) | st.floats(-1e6, 1e5), min_size=30, max_size=60),
)
def test_any_calibration_is_a_sane_one(real: list[float], fake: list[float]) -> None:
    """Whatever the logits, the answer is None or a rising line whose AUC on unseen logits clears one half."""
    fitted = fit_calibration(torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64))
    if fitted is not None:
        assert fitted.scale > 0
        assert math.isfinite(fitted.offset)
        assert 0.5 < fitted.auc <= 1
        assert 0 <= fitted.expected_calibration_error <= 1


def test_auc_counts_pairs() -> None:
    """With equal halves the AUC is the share of pairs in the right order, ties counting half."""
    real, fake = [2.0, 2.0, 3.0, 1.0], [1.0, 0.0, 2.0, 1.0]
    pairs = [1.0 if r > f else 0.5 if r == f else 0.0 for r, f in product(real, fake)]
    # Every logit 400 times: a random half has nearly the same shares.
    fitted = fit_calibration(torch.tensor(real).repeat(400), torch.tensor(fake).repeat(400))
    assert fitted is not None
    assert fitted.auc == pytest.approx(np.mean(pairs), abs=0.02)


@pytest.mark.parametrize("bad", [torch.full((50,), math.nan), torch.full((50,), math.inf), torch.zeros(50, 1)])
def test_unusable_logits_are_refused(bad: Tensor) -> None:
    """NaN, Inf or a matrix of logits is an error, not a calibration."""
    with pytest.raises(ValueError, match="logits must be finite"):
        fit_calibration(bad, torch.zeros(50))


def test_verdicts_are_counted_as_the_service_says_them() -> None:
    """Each image is in the bin of its probability, the two ends included; without a calibration that is σ(logit)."""
    logits = torch.tensor([-1000.0, -0.5, 0.0, 0.5, 1000.0])
    counts = count_verdicts(None, logits, logits[:2])
    bins = [0, int(VERDICT_BINS / (1 + math.exp(0.5))), VERDICT_BINS // 2, int(VERDICT_BINS / (1 + math.exp(-0.5)))]
    expected = [[*bins, VERDICT_BINS - 1], bins[:2]]
    assert [counts[name] for name in ("real", "generated")] == [
        [places.count(place) for place in range(VERDICT_BINS)] for places in expected
    ]
    calibration = Calibration(scale=2.0, offset=-1.0, auc=0.9, expected_calibration_error=0.0)
    assert count_verdicts(calibration, logits, logits) == count_verdicts(None, 2 * logits - 1, 2 * logits - 1)


def test_verdicts_of_no_numbers_are_refused() -> None:
    """As calibrations of them are."""
    with pytest.raises(ValueError, match="finite"):
        count_verdicts(None, torch.tensor([math.nan]), torch.zeros(1))
