"""Every score against a library or its definition, and at the values that theory gives."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from models.evaluation import parzen, scores
from models.evaluation.scores import frechet_distance, moments

pytestmark = pytest.mark.usefixtures("one_thread")


def cloud(n: int, d: int = 6, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Rows of a normal distribution with correlated coordinates, float32 (n, d)."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, d, generator=rng) @ mix + shift


class Identity(torch.nn.Module):
    """An extractor whose images are their features: torchmetrics brings its own arithmetic to our numbers."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 2, 2) → (n, 12)."""
        return images.flatten(1)


# --- Distances ---------------------------------------------------------------------------------------------------


def test_the_frechet_distance_is_torchmetrics() -> None:
    """The same rows through the library's class, with an extractor that changes nothing."""
    a, b = cloud(300, 12), cloud(200, 12, seed=1, shift=0.5)
    library = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(3, 2, 2))
    library.set_dtype(torch.float64)
    for rows, real in ((a, True), (b, False)):
        library.update(rows.double().view(-1, 3, 2, 2), real=real)
    assert scores.frechet(a, b).value == pytest.approx(library.compute().item(), rel=1e-6)


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    """With SciPy's matrix root, which isn't symmetric; and |μ₁ − μ₂|² where only the means differ."""
    a, b = moments(cloud(80)), moments(cloud(90, seed=1, shift=2.0))
    root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = (a.mean - b.mean).square().sum() + np.trace((a.covariance + b.covariance).numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    rows = cloud(50).double()
    assert frechet_distance(moments(rows), moments(rows + 3)) == pytest.approx(6 * 9, rel=1e-6)
    assert frechet_distance(moments(rows), moments(rows)) == pytest.approx(0, abs=1e-6)


def test_singular_covariances_have_a_distance() -> None:
    """Fewer rows than dimensions, and features that are always 0: no offset, no NaN."""
    a, b = cloud(4, 20), cloud(5, 20, seed=1)
    a[:, :3] = b[:, :3] = 0
    assert 0 < frechet_distance(moments(a), moments(b)) < math.inf


def test_the_extrapolation_takes_away_the_bias_of_few_rows() -> None:
    """Equal distributions: the plain distance at 1,000 rows is far from 0, the extrapolated one close to it."""
    a, b = cloud(1_000, 20), cloud(1_000, 20, seed=1)
    plain, extrapolated = scores.frechet(a, b), scores.frechet_at_infinity(a, b)
    assert abs(extrapolated.value) < 0.35 * plain.value
    shifted = scores.frechet_at_infinity(a, b + 1.0)
    assert shifted.value == pytest.approx(20, rel=0.3)


def test_the_jackknife_error_is_that_of_repeated_draws() -> None:
    """Its size agrees with the spread of the distance over fresh rows, within a factor of two."""
    found = [scores.frechet(cloud(500, seed=2 * i), cloud(500, seed=2 * i + 1, shift=0.5)) for i in range(20)]
    spread = np.std([estimate.value for estimate in found])
    claimed = np.mean([estimate.standard_error or 0 for estimate in found])
    assert 0.5 < claimed / spread < 2


def test_the_kernel_distance_is_torchmetrics() -> None:
    """One subset that is the whole set, against the library's function; and a mean of 0 for equal distributions."""
    a, b = cloud(100), cloud(100, seed=1, shift=0.2)
    ours = scores.kernel_distance(a, b, subsets=2, size=100)
    assert ours.value == pytest.approx(poly_mmd(a.double(), b.double()).item(), rel=1e-9)
    assert ours.standard_error == pytest.approx(0, abs=1e-9)  # both subsets are everything
    equal = [scores.kernel_distance(cloud(100, seed=i), cloud(100, seed=100 + i), subsets=1).value for i in range(60)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / math.sqrt(60)
    assert scores.kernel_distance(a, b + 2).value > ours.value


# --- Neighbours --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), m=st.integers(8, 50), k=st.integers(1, 7), seed=st.integers(0, 2**31), chunk=st.booleans())
def test_neighbours_are_scikit_learns(n: int, m: int, k: int, seed: int, chunk: bool) -> None:  # noqa: FBT001
    """Distances and who they are, with and without oneself, in one piece or in chunks of a row."""
    queries, points = cloud(n, seed=seed), cloud(m, seed=seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        if chunk:
            patch.setattr(parzen, "BUFFER_BYTES", 1)
        found = scores.nearest(queries, points, k)
        others = scores.nearest(points, points, k, own=torch.arange(m))
    library = NearestNeighbors(algorithm="brute").fit(points.double().numpy())
    distances, indices = library.kneighbors(queries.double().numpy(), k)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found.indices[:, 0], indices[:, 0])
    np.testing.assert_allclose(others.distances, library.kneighbors(n_neighbors=k)[0], rtol=1e-3, atol=1e-3)


def test_more_neighbours_than_points_are_refused() -> None:
    """Oneself is not among them."""
    with pytest.raises(ValueError, match="5 neighbours need more than 5 points"):
        scores.nearest(cloud(5), cloud(5), 5, own=torch.arange(5))


def test_overlap_is_that_of_the_definition() -> None:
    """Precision, recall, density and coverage, ball by ball, with scikit-learn's distances."""
    real, generated = cloud(60, 3), cloud(50, 3, seed=1, shift=0.7)

    def radii(rows: Tensor, k: int) -> np.ndarray:
        found: np.ndarray = NearestNeighbors(n_neighbors=k).fit(rows.numpy()).kneighbors()[0][:, -1]
        return found

    between = np.linalg.norm(real.numpy()[:, None] - generated.numpy()[None], axis=2)
    in_real = between <= radii(real, 3)[:, None]
    in_near = between <= radii(real, 5)[:, None]
    in_generated = between <= radii(generated, 3)[None]
    expected = [in_real.any(axis=0).mean(), in_generated.any(axis=1).mean(), in_near.sum() / (5 * 50)]
    expected.append(in_near.any(axis=1).mean())
    got = scores.overlap(real, generated)
    np.testing.assert_allclose([estimate.value for estimate in got], expected, rtol=1e-9)


def test_equal_clouds_overlap_as_theory_says() -> None:
    """Density about 1 and coverage about 1 − 2⁻⁵; far clouds have none of either."""
    found = scores.overlap(cloud(1_500), cloud(1_500, seed=1))
    assert found.density.value == pytest.approx(1, abs=0.06)
    assert found.coverage.value == pytest.approx(1 - 2**-5, abs=0.02)
    far = scores.overlap(cloud(50), cloud(50, seed=1, shift=100))
    assert [estimate.value for estimate in far] == [0, 0, 0, 0]


def test_too_few_rows_have_no_overlap() -> None:
    """The fifth neighbour needs six rows."""
    with pytest.raises(ValueError, match="at least 6 rows are needed, got 5"):
        scores.overlap(cloud(9), cloud(5))


# --- Classes -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:std")  # of the library's one split
@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features")
def test_the_classifier_score_is_torchmetrics() -> None:
    """One split, so that the library's shuffle doesn't matter; one-hot rows of ten classes score ten."""
    logits = cloud(200, 12)
    library = InceptionScore(feature=Identity(), splits=1)
    library.update(logits.view(-1, 3, 2, 2))
    assert scores.classifier_score(logits, splits=1).value == pytest.approx(library.compute()[0].item(), rel=1e-5)
    certain = torch.eye(10).repeat(50, 1) * 100
    assert scores.classifier_score(certain, splits=1).value == pytest.approx(10, rel=1e-6)
    assert scores.classifier_score(torch.zeros(100, 10)).value == pytest.approx(1)


def test_the_class_divergence_is_scipys() -> None:
    """KL in nats; its expectation for exact sampling is (K − 1) / 2n; a dropped class costs −log of what is left."""
    frequencies = [0.5, 0.25, 0.125, 0.125]
    classes = torch.tensor([0] * 700 + [1] * 200 + [3] * 100)
    expected = stats.entropy([0.7, 0.2, 0.0, 0.1], frequencies)
    assert scores.class_divergence(classes, frequencies) == pytest.approx(expected, rel=0.01)
    random = np.random.default_rng(0)
    drawn = [torch.from_numpy(random.choice(4, 1000, p=frequencies)) for _ in range(200)]
    found = np.mean([scores.class_divergence(classes, frequencies) for classes in drawn])
    assert found == pytest.approx(3 / 2000, rel=0.25)
    assert scores.class_divergence(torch.zeros(1000, dtype=torch.int64), [0.5, 0.5]) == pytest.approx(
        math.log(2), rel=0.01
    )
    assert scores.class_divergence(torch.ones(10, dtype=torch.int64), [1.0, 0.0]) < math.inf


def test_accuracy_names_the_worst_class() -> None:
    """Overall 5 of 8; class 2 is right once in three; class 1 was never asked for."""
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 2, 0, 1, 3, 0]), 4).float()
    found = scores.conditional_accuracy(logits, torch.tensor([0, 0, 0, 2, 2, 2, 3, 3]))
    assert found.overall.value == 5 / 8
    assert found.worst_class == 2
    assert found.worst.value == pytest.approx(1 / 3)


# --- Memorising --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    a=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    b=st.lists(st.integers(0, 9), min_size=2, max_size=30),
)
def test_the_mann_whitney_score_is_scipys(a: list[int], b: list[int]) -> None:
    """With ties and without the continuity correction: the two-sided p-value of the library is that of our Z."""
    z = scores.mann_whitney_z(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    if len({*a, *b}) == 1:
        assert z == 0
        return
    library = stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=False)
    assert 2 * stats.norm.sf(abs(z)) == pytest.approx(library.pvalue, rel=1e-9)
    assert np.sign(z) == np.sign(library.statistic - len(a) * len(b) / 2)


def test_copies_are_told_from_fresh_rows() -> None:
    """Fresh rows, noisy copies and far rows: each score moves to its side."""
    train, fresh, held_out = cloud(3_000), cloud(500, seed=1), cloud(500, seed=2)
    noisy = train[:500] + 0.01 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    far = fresh * 1.8
    fresh_z, noisy_z, far_z = (scores.copying(rows, held_out, train) for rows in (fresh, noisy, far))
    assert abs(fresh_z) < 3
    assert noisy_z < -10
    assert far_z > 5
    authentic = [scores.authenticity(rows, train).value for rows in (noisy, fresh, far)]
    assert authentic[0] < 0.02
    assert all(lower + 0.1 < higher for lower, higher in pairwise(authentic))
    assert scores.authenticity(train[:100], train).value == 0


def test_cells_are_compared_one_by_one() -> None:
    """Copies of one cluster's rows only, and far rows in the other: the cells' scores are averaged, not the rows."""
    train = torch.cat([cloud(1000), cloud(1000, seed=1, shift=200)])
    held_out = torch.cat([cloud(200, seed=2), cloud(200, seed=3, shift=200)])
    generated = torch.cat([train[:200], cloud(200, seed=4, shift=200) * 1.02])
    first = scores.mann_whitney_z(
        *(scores.nearest(rows[:200], train).distances[:, 0].numpy() for rows in (generated, held_out))
    )
    second = scores.mann_whitney_z(
        *(scores.nearest(rows[200:], train).distances[:, 0].numpy() for rows in (generated, held_out))
    )
    assert scores.copying(generated, held_out, train, cells=2) == pytest.approx((first + second) / 2, rel=1e-6)


def test_two_samples_are_told_apart_only_where_they_differ() -> None:
    """½ for equal distributions, near 1 for other ones, near 0 for copies of the very rows compared with."""
    real = cloud(800)
    assert scores.two_sample_accuracy(real, cloud(900, seed=1)).value == pytest.approx(0.5, abs=0.04)
    assert scores.two_sample_accuracy(real, cloud(800, seed=1, shift=30)).value > 0.99
    assert scores.two_sample_accuracy(real, real + 1e-3).value < 0.01
