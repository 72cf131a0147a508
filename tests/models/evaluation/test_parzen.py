"""The paper's log-likelihood against a double loop, its protocol, and its reference rows."""

import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.data.load import load_dataset
from models.evaluation import parzen
from models.evaluation.parzen import (
    FINE_SIGMAS,
    PAPER_SIGMAS,
    kmeans_centroids,
    parzen_log_likelihood,
    parzen_log_likelihoods,
    parzen_table,
    score_parzen,
    validation_log_likelihood,
)
from models.inference.pixels import to_pixels

pytestmark = pytest.mark.usefixtures("one_thread")

FULL_SETS = Path(os.environ.get("GAN_DATA_DIR", ""))
needs_full_mnist = pytest.mark.skipif(
    not any(FULL_SETS.glob("mnist/train-images-idx3-ubyte*")), reason="GAN_DATA_DIR does not name the full MNIST set"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def rows(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Uniform pixels, (n, *shape)."""
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """2,000 real digits, float32 (2000, 1, 28, 28)."""
    with np.load(Path(__file__).parents[2] / "data" / "mnist-2000.npz") as sample:
        return to_pixels(sample["images"][..., None])


def naive_log_likelihood(samples: np.ndarray, data: np.ndarray, sigma: float) -> list[float]:
    """The definition, one pair at a time, in float64."""
    means = []
    for x in data:
        exponents = []
        for s in samples:
            squared = sum((float(a) - float(b)) ** 2 for a, b in zip(x, s, strict=True))
            exponents.append(-squared / (2 * sigma**2) - len(x) / 2 * math.log(2 * math.pi * sigma**2))
        highest = max(exponents)
        means.append(highest + math.log(sum(math.exp(e - highest) for e in exponents) / len(exponents)))
    return means


# Parzen windows


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    shape=st.sampled_from([(1,), (5,), (3, 2, 2), (1, 4, 3)]),
    sigmas=st.lists(st.floats(0.05, 2.0), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_parzen_equals_a_double_loop(m: int, n: int, shape: tuple[int, ...], sigmas: list[float], seed: int) -> None:
    """Any shapes and bandwidths give what the definition gives, pair by pair, in float64."""
    samples, data = rows(m, *shape, seed=seed), rows(n, *shape, seed=seed + 1)
    expected = [naive_log_likelihood(samples.flatten(1).numpy(), data.flatten(1).numpy(), sigma) for sigma in sigmas]

    got = parzen_log_likelihoods(samples, data, sigmas)

    assert got.dtype == np.float64
    assert got.shape == (len(sigmas), n)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-3)


def test_one_sample_is_one_gaussian() -> None:
    """With a single sample the likelihood is the normal density around it; on the sample itself, its peak."""
    sample, sigma = torch.tensor([[0.25, 0.5, 0.75]]), 0.2
    data = torch.tensor([[0.25, 0.5, 0.75], [0.25, 0.5, 0.35]])
    peak = -1.5 * math.log(2 * math.pi * sigma**2)
    np.testing.assert_allclose(
        parzen_log_likelihood(sample, data, sigma), [peak, peak - 0.4**2 / (2 * sigma**2)], rtol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_samples_and_rows_does_not_matter(seed: int) -> None:
    """Shuffled samples change nothing; shuffled data rows come back shuffled alike."""
    samples, data = rows(9, 6, seed=seed), rows(8, 6, seed=seed + 1)
    random = torch.Generator().manual_seed(seed)
    samples_order, data_order = torch.randperm(9, generator=random), torch.randperm(8, generator=random)

    shuffled = parzen_log_likelihood(samples[samples_order], data[data_order], 0.2)

    np.testing.assert_allclose(shuffled, parzen_log_likelihood(samples, data, 0.2)[data_order.numpy()], atol=1e-4)


@pytest.mark.parametrize("buffer_bytes", [1, 4 * 50 * 7, 4 * 50 * 64])
def test_chunks_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch, buffer_bytes: int) -> None:
    """Memory is bounded by working through the data in chunks, down to a single row, at no change of the answer."""
    samples, data = rows(50, 1, 4, 4), rows(64, 1, 4, 4, seed=1)
    in_one_pass = parzen_log_likelihoods(samples, data, (0.1, 0.3))
    monkeypatch.setattr(parzen, "BUFFER_BYTES", buffer_bytes)
    np.testing.assert_allclose(parzen_log_likelihoods(samples, data, (0.1, 0.3)), in_one_pass, atol=1e-3)


def test_no_row_is_nearer_than_itself(digits: Tensor) -> None:
    """Rounding must not make a row's distance to itself negative: no likelihood passes the peak of its own window."""
    samples = digits[:300]
    peak = -digits[0].numel() / 2 * math.log(2 * math.pi * 0.1**2) - math.log(300)
    assert parzen_log_likelihood(samples, samples, 0.1).max() <= peak + 1e-9


def test_far_away_data_have_a_finite_likelihood() -> None:
    """A narrow window far from every sample gives a very low number, not minus infinity."""
    log_likelihood = parzen_log_likelihood(torch.zeros(3, 400), torch.ones(1, 400), 0.01)
    np.testing.assert_allclose(log_likelihood, -400 / 0.0002 - 200 * math.log(2 * math.pi * 0.0001), rtol=1e-6)


def test_float32_distances_are_exact_enough_on_digits(digits: Tensor) -> None:
    """At the paper's narrowest window a row's float32 error is under 0.01 nats, and the mean's under 0.001."""
    samples, data = digits[:1000], digits[1000:1500]
    error = parzen_log_likelihood(samples, data, 0.1) - parzen_log_likelihood(samples.double(), data, 0.1)
    assert np.abs(error).max() < 0.01
    assert abs(error.mean()) < 0.001


def test_training_speed_settings_do_not_leak_into_the_score() -> None:
    """Autocast and reduced matmul precision, which training may switch on, change no score and stay as they were."""
    samples, data = rows(40, 300), rows(30, 300, seed=1)
    expected = parzen_log_likelihood(samples, data, 0.1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = parzen_log_likelihood(samples.requires_grad_(), data, 0.1)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(got, expected)


@needs_gpu
def test_the_gpu_gives_the_same_score() -> None:
    """Samples on a GPU are scored there, against data from anywhere, to within the float32 error."""
    samples, data = rows(500, 1, 28, 28), rows(300, 1, 28, 28, seed=1)
    on_gpu = parzen_log_likelihoods(samples.cuda(), data, PAPER_SIGMAS)
    np.testing.assert_allclose(on_gpu, parzen_log_likelihoods(samples, data, PAPER_SIGMAS), atol=0.02)


@pytest.mark.parametrize(
    ("samples", "data", "sigmas", "complaint"),
    [
        (rows(3, 4), rows(3, 5), [0.1], "5 pixels can't be compared with rows of 4"),
        (rows(0, 4), rows(3, 4), [0.1], "samples must be"),
        (rows(3, 4), rows(0, 4), [0.1], "data must be"),
        (rows(3), rows(3, 4), [0.1], "samples must be"),
        (rows(3, 4), torch.zeros(3, 4, dtype=torch.uint8), [0.1], "floating point"),
        (torch.full((3, 4), math.nan), rows(3, 4), [0.1], "samples hold NaN"),
        (rows(3, 4), rows(3, 4), [], "positive"),
        (rows(3, 4), rows(3, 4), [0.1, 0.0], "positive"),
        (rows(3, 4), rows(3, 4), [math.inf], "positive"),
    ],
    ids=["lengths", "no samples", "no data", "no pixels", "uint8", "NaN", "no sigma", "sigma 0", "sigma inf"],
)
def test_meaningless_input_is_refused(samples: Tensor, data: Tensor, sigmas: list[float], complaint: str) -> None:
    """What has no log-likelihood gets an error that says why, never a number."""
    with pytest.raises(ValueError, match=complaint):
        parzen_log_likelihoods(samples, data, sigmas)


# The protocol


def test_validation_picks_the_best_mean() -> None:
    """Of a grid, the bandwidth with the highest mean over the validation rows wins, and that mean comes with it."""
    samples, validation, grid = rows(20, 6), rows(30, 6, seed=1), [0.05, 0.2, 0.4, 3.0]
    means = [np.mean(naive_log_likelihood(samples.numpy(), validation.numpy(), sigma)) for sigma in grid]

    sigma, log_likelihood = validation_log_likelihood(samples, validation, grid)

    assert sigma == grid[int(np.argmax(means))]
    assert log_likelihood == pytest.approx(max(means), abs=1e-3)


def test_the_grids_are_the_published_ones() -> None:
    """Ten bandwidths from 0.1 to 1, and twenty from 10^-0.9 to 10^-0.6, evenly spaced in the logarithm."""
    for grid, first, last, length in ((PAPER_SIGMAS, 0.1, 1.0, 10), (FINE_SIGMAS, 10**-0.9, 10**-0.6, 20)):
        assert len(grid) == length
        assert (grid[0], grid[-1]) == pytest.approx((first, last))
        assert np.ptp(np.diff(np.log(grid))) == pytest.approx(0, abs=1e-12)


def test_bandwidths_come_from_the_first_thousand_validation_rows_alone() -> None:
    """Neither other test rows nor other later validation rows move the bandwidths; other early validation rows do."""
    samples, validation, test = rows(60, 9), rows(1500, 9, seed=1), rows(40, 9, seed=2)
    score = score_parzen(samples, validation, test)
    near_samples = samples[torch.arange(1500) % 60] + 0.02

    other_test = score_parzen(samples, validation, samples[:40] + 0.02)
    assert (other_test.paper.sigma, other_test.fine.sigma) == (score.paper.sigma, score.fine.sigma)
    assert other_test.paper.log_likelihood > score.paper.log_likelihood + 1

    assert score_parzen(samples, torch.cat([validation[:1000], near_samples[1000:]]), test) == score

    other_validation = score_parzen(samples, torch.cat([near_samples[:1000], validation[1000:]]), test)
    assert other_validation.paper.sigma < score.paper.sigma


def test_the_figure_is_the_test_mean_with_its_standard_error() -> None:
    """The figure is the mean over all test rows at the chosen bandwidth, and std / sqrt(n) beside it."""
    samples, validation, test = rows(25, 8), rows(50, 8, seed=1), rows(70, 8, seed=2)

    score = score_parzen(samples, validation, test)

    assert (score.samples, score.validation_rows, score.test_rows) == (25, 50, 70)
    for figure, grid in ((score.paper, PAPER_SIGMAS), (score.fine, FINE_SIGMAS)):
        assert figure.sigma == validation_log_likelihood(samples, validation, grid).sigma
        each = naive_log_likelihood(samples.numpy(), test.numpy(), figure.sigma)
        assert figure.log_likelihood == pytest.approx(np.mean(each), abs=1e-3)
        assert figure.standard_error == pytest.approx(np.std(each) / math.sqrt(70), abs=1e-3)


# The reference rows


def test_one_step_of_kmeans_is_the_mean_of_the_nearest() -> None:
    """Every centroid moves to the mean of the rows that it is nearest to; one that has none stays."""
    start = torch.cat([rows(5, 3), torch.full((1, 3), 9.0)])
    data = rows(200, 3, seed=1)
    nearest = np.array([np.argmin([float(((x - c) ** 2).sum()) for c in start]) for x in data])

    moved = kmeans_centroids(data, start, iterations=1)

    for cluster in range(5):
        np.testing.assert_allclose(moved[cluster], data[torch.from_numpy(nearest == cluster)].mean(0), atol=1e-6)
    assert torch.equal(moved[5], start[5])


def test_kmeans_beats_random_rows_on_clustered_data() -> None:
    """Centroids of clustered rows lie nearer to them than the rows they were started from."""
    random = torch.Generator().manual_seed(3)
    centres = rows(10, 20, seed=4)
    data = centres[torch.randint(10, (1000,), generator=random)] + 0.1 * torch.randn(1000, 20, generator=random)
    start = data[:30]

    centroids = kmeans_centroids(data, start)

    def distance(to: Tensor) -> float:
        return float(torch.cdist(data[30:], to).amin(dim=1).square().mean())

    assert distance(centroids) < 0.8 * distance(start)


def test_the_table_has_the_generator_and_its_references(digits: Tensor) -> None:
    """On real digits: k-means beats real images, which beat blurred noise by far; plain noise comes last."""
    asked = []

    def blurred_noise(count: int, first_index: int) -> Tensor:
        asked.append((count, first_index))
        noise = rows(count, 1, 28, 28, seed=5)
        return torch.nn.functional.avg_pool2d(noise, 5, stride=1, padding=2)

    table = dict(parzen_table(blurred_noise, digits[:1000], digits[1000:1200], digits[1200:1400], seed=0))

    assert asked == [(200, 0)]
    assert list(table) == ["generator", "training images", "k-means centroids", "uniform noise"]
    assert {(score.samples, score.validation_rows, score.test_rows) for score in table.values()} == {(200, 200, 200)}
    means = {name: score.paper.log_likelihood for name, score in table.items()}
    assert means["training images"] > means["generator"] + 200
    assert means["k-means centroids"] > means["training images"] + 20
    assert means["generator"] > means["uniform noise"]
    assert asdict(table["generator"])["paper"].keys() == {"sigma", "log_likelihood", "standard_error"}


def test_the_table_is_fixed_by_its_seed() -> None:
    """The same seed gives the same table to the last digit; another seed draws other references."""
    train, validation, test = rows(300, 1, 3, 3), rows(50, 1, 3, 3, seed=1), rows(50, 1, 3, 3, seed=2)

    def table(seed: int) -> dict[str, parzen.ParzenScore]:
        return dict(parzen_table(lambda count, _: rows(count, 1, 3, 3, seed=9), train, validation, test, seed=seed))

    first, again, other = table(7), table(7), table(8)
    assert first == again
    assert {name for name in first if first[name] != other[name]} == set(first) - {"generator"}


def test_the_table_refuses_what_it_cannot_score() -> None:
    """Too few training rows for a sample of them, or a generator that returns another number of rows, is an error."""
    data = rows(50, 4)
    with pytest.raises(ValueError, match="at least five training rows, got 4"):
        next(parzen_table(lambda count, _: rows(count, 4), data[:4], data, data, seed=0))
    with pytest.raises(ValueError, match="asked for 10 generated rows, got 9"):
        next(parzen_table(lambda count, _: rows(count - 1, 4), data, data, data, seed=0))


@needs_full_mnist
def test_real_training_images_score_as_published() -> None:
    """10,000 training images as the samples, scored on all of MNIST, give the literature's 240 nats or so."""
    mnist = load_dataset("mnist", FULL_SETS, seed=0)
    train, validation, test = (to_pixels(part.images) for part in (mnist.train, mnist.validation, mnist.test))
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))]

    name, score = next(parzen_table(lambda count, _: shuffled[:count], train, validation, test, seed=0))

    assert (name, score.samples, score.validation_rows, score.test_rows) == ("generator", 10_000, 1_000, 10_000)
    assert score.paper.log_likelihood == pytest.approx(241, abs=5)
    assert score.paper.standard_error == pytest.approx(2, abs=0.5)
    assert score.fine.log_likelihood > score.paper.log_likelihood
