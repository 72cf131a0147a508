"""The metric suite on real digits: a dropped class, blur and copies each move the right scores the right way."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from models.data.load import Dataset, Split
from models.evaluation import features
from models.evaluation.features import FeatureExtractor, load_features, untrained_features
from models.evaluation.metric_suite import FrechetOnValidation, MetricSuite, SuiteScore, TooFewError, rows_wanted
from models.inference.pixels import UInt8

pytestmark = pytest.mark.usefixtures("one_thread")

Scores = dict[str, SuiteScore]


@pytest.fixture(scope="module")
def everything() -> Split:
    """2,000 real digits, shuffled."""
    with np.load(Path(__file__).parents[2] / "data" / "mnist-2000.npz") as sample:
        order = np.random.default_rng(0).permutation(2_000)
        return Split(sample["images"][order, ..., None], sample["labels"][order].astype(np.int64))


def part(split: Split, rows: slice) -> Split:
    assert split.labels is not None
    return Split(split.images[rows], split.labels[rows])


@pytest.fixture(scope="module")
def digits(everything: Split) -> Dataset:
    """1,200 to train on, 100 to validate, 240 to test; 460 are left as what a perfect generator would make."""
    train, validation, test = (
        part(everything, rows) for rows in (slice(0, 1200), slice(1200, 1300), slice(1300, 1540))
    )
    return Dataset("digits", train, validation, test, tuple("0123456789"), "digits of the suite")


@pytest.fixture(scope="module")
def extractors(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureExtractor, FeatureExtractor]:
    return load_features(digits, cache=tmp_path_factory.mktemp("cache"), updates=80), untrained_features(digits)


@pytest.fixture(scope="module")
def fresh(everything: Split) -> Split:
    """Real digits in no split."""
    return part(everything, slice(1540, 2000))


def scored(
    digits: Dataset,
    extractors: tuple[FeatureExtractor, FeatureExtractor],
    images: UInt8,
    labels: torch.Tensor | None = None,
) -> Scores:
    """Every score by its name."""
    suite = MetricSuite(digits, images, labels, *extractors)
    return {score.name: score for _, compute in suite.groups() for score in compute()}


@pytest.fixture(scope="module")
def perfect(digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], fresh: Split) -> Scores:
    assert fresh.labels is not None
    return scored(digits, extractors, fresh.images[:240], torch.from_numpy(fresh.labels[:240]))


@pytest.mark.slow
def test_real_images_score_like_the_floor(perfect: Scores) -> None:
    """A perfect generator: near its floor in every score, in the control's too."""
    for name in ("precision", "recall", "coverage", "precision_control", "recall_control", "coverage_control"):
        assert perfect[name].value == pytest.approx(perfect[name].floor, abs=0.1), name
    for name in ("frechet", "frechet_control"):
        assert perfect[name].value < 1.6 * (perfect[name].floor or 0), name
    assert perfect["class_divergence"].value < 0.1
    assert abs(perfect["copying"].value) < 3
    assert perfect["two_sample_accuracy"].value == pytest.approx(0.5, abs=0.08)
    assert perfect["accuracy"].value > 0.85
    assert perfect["accuracy_worst_class"].note in set("0123456789")


@pytest.mark.slow
def test_a_dropped_class_lowers_recall_and_coverage(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], fresh: Split, perfect: Scores
) -> None:
    """No zeros, ones and twos among otherwise perfect samples: precision stays, and the histogram tells."""
    assert fresh.labels is not None
    kept = fresh.images[fresh.labels > 2]
    assert len(kept) >= 240
    found = scored(digits, extractors, kept[:240])
    assert found["recall"].value < perfect["recall"].value - 0.05
    assert found["coverage"].value < perfect["coverage"].value - 0.1
    assert found["coverage_control"].value < perfect["coverage_control"].value - 0.05
    assert found["precision"].value > perfect["precision"].value - 0.07
    assert found["class_divergence"].value > 0.2
    assert found["frechet"].value > 2 * perfect["frechet"].value
    assert "accuracy" not in found  # nothing was asked of a generator without classes


@pytest.mark.slow
def test_blur_worsens_the_distances_recall_and_coverage(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], fresh: Split, perfect: Scores
) -> None:
    """Soft digits are off the data by both nets; precision alone would praise them, and density gives that away."""
    blurred = [
        np.asarray(Image.fromarray(image[..., 0]).filter(ImageFilter.GaussianBlur(1.5))) for image in fresh.images[:240]
    ]
    found = scored(digits, extractors, np.stack(blurred)[..., None])
    for name in ("frechet", "frechet_control", "kernel", "kernel_control", "frechet_infinity"):
        assert found[name].value > perfect[name].value + 2 * (perfect[name].standard_error or 0), name
    for name in ("recall", "recall_control", "coverage"):
        assert found[name].value < perfect[name].value - 0.2, name
    assert found["density_control"].value > 2
    assert found["two_sample_accuracy"].value > 0.6


@pytest.mark.slow
def test_digits_that_are_two_at_once_lower_precision_and_density(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], fresh: Split, perfect: Scores
) -> None:
    """Strokes as sharp as real ones in shapes that no digit has: fewer lie in the real ones' balls, by both nets."""
    found = scored(digits, extractors, np.maximum(fresh.images[:240], fresh.images[220:]))
    for name in ("density", "density_control"):
        assert found[name].value < perfect[name].value - 0.15, name
    assert found["precision"].value < perfect["precision"].value - 0.03
    assert found["precision_control"].value < perfect["precision_control"].value - 0.15
    assert found["frechet_control"].value > 1.5 * perfect["frechet_control"].value


@pytest.mark.slow
def test_copied_training_images_are_called_copies(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], perfect: Scores
) -> None:
    """They are as good as real by every other score; only authenticity and C_T say what they are."""
    found = scored(digits, extractors, digits.train.images[:240])
    for name in ("precision", "recall", "coverage"):
        assert found[name].value > perfect[name].value - 0.1, name
    assert found["copying"].value < -3
    assert found["authenticity"].value < 0.02
    assert found["authenticity_pixels"].value < 0.02
    assert perfect["authenticity"].value > 0.3
    assert perfect["authenticity_pixels"].value > 0.3


@pytest.mark.slow
def test_wrong_labels_show_in_the_worst_class(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], fresh: Split
) -> None:
    """A generator that makes sevens when asked for ones is right elsewhere."""
    assert fresh.labels is not None
    labels = torch.from_numpy(fresh.labels[:240].copy())
    ones = float((labels == 1).sum() / ((labels == 1) | (labels == 7)).sum())
    labels[labels == 7] = 1
    found = scored(digits, extractors, fresh.images[:240], labels)
    assert found["accuracy_worst_class"].note == "1"
    assert found["accuracy_worst_class"].value <= ones  # a seven that is taken for a one would lie above
    assert found["accuracy"].value > 0.75


@pytest.mark.slow
def test_the_picture_finds_the_training_image_itself(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor]
) -> None:
    """A copied training image stands above itself twice: by pixels and by features."""
    picture = MetricSuite(digits, digits.train.images[:240], None, *extractors).nearest_pictures(2)
    expected = np.concatenate([np.concatenate([image] * 3) for image in digits.train.images[:2]], axis=1)
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.slow
def test_the_same_suite_gives_the_same_scores(
    digits: Dataset, extractors: tuple[FeatureExtractor, FeatureExtractor], perfect: Scores, fresh: Split
) -> None:
    """Every draw is from the suite's seed, which its metadata name, with rows, reference and both nets' checksums."""
    suite = MetricSuite(digits, fresh.images[:240], None, extractors[0], None)
    (_, distances), *_ = suite.groups()
    assert [score.record() for score in distances()] == [
        perfect[name].record() for name in ("frechet", "frechet_infinity", "kernel")
    ]
    metadata = suite.metadata()
    assert (metadata["seed"], metadata["generated_rows"]) == (0, 240)
    assert metadata["reference"] == {"split": "test", "rows": 240}
    assert metadata["features"] == {
        "recipe": "cnn-128/1", "kind": "trained", "sha256": extractors[0].checksum, "accuracy": extractors[0].accuracy
    }  # fmt: skip


def test_other_numbers_of_rows_are_refused(digits: Dataset, everything: Split) -> None:
    """Scores at other numbers don't compare; and a tiny set has none."""
    extractor = untrained_features(digits)
    assert rows_wanted(digits) == 240
    with pytest.raises(ValueError, match="240 generated images are wanted, got 10"):
        MetricSuite(digits, digits.train.images[:10], None, extractor, None)
    train, validation, test = (part(everything, rows) for rows in (slice(0, 16), slice(16, 18), slice(18, 20)))
    tiny = Dataset("tiny", train, validation, test, None, "x")
    with pytest.raises(TooFewError, match="tiny has 2 and 16"):
        MetricSuite(tiny, tiny.train.images[:3], None, extractor, None)


def test_selection_looks_at_the_validation_images_alone(
    digits: Dataset, everything: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test images change nothing; blur is worse than real images, and those are near the floor."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "LEAST_UPDATES", 20)  # in a second, not in half a minute
    monkeypatch.setattr(features, "EPOCHS", 0)
    small = Dataset("small", part(digits.train, slice(0, 200)), digits.validation, digits.test, digits.label_names, "y")
    inverted = Split(255 - digits.test.images, digits.test.labels)
    other = Dataset("small", small.train, small.validation, inverted, small.label_names, "y")
    one, same = (FrechetOnValidation(dataset, "cpu") for dataset in (small, other))
    assert one.extractor.checksum == same.extractor.checksum
    images = everything.images[1540 : 1540 + one.count]
    assert one.score(images) == same.score(images)
    assert one.score(images) < 2 * one.floor
    assert one.score(images // 2) > 1.2 * one.score(images)
