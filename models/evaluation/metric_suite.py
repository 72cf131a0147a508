"""The metric suite: every score of one generator on one data set, beside what real images get.

Each score comes in three columns, all from the same numbers of rows:

- `value`: n generated images against the reference, which is the test images.
- `real`: n training images against the same reference: what a perfect generator could hope for. Scores of a single set
  show here what the test images get.
- `floor`: n training images against as many other training images as the reference has. Both are drawn without
  replacement from the shuffled training split (MNIST is ordered by writer, so parts in file order are not alike).

Nothing here is fitted to the generated images or chosen by them, so the test images may be the reference. They may be
nowhere else: training chooses its weights by `FrechetOnValidation`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from models.data.load import Dataset
from models.evaluation import scores
from models.evaluation.features import RECIPE, Embedding, FeatureExtractor, load_features
from models.evaluation.scores import Estimate
from models.inference.pixels import UInt8, grid, to_pixels

GENERATED = 10_000
PIXEL_ROWS = 2_000  # for scores in pixel space, where a row costs six times as much


@dataclass(frozen=True)
class SuiteScore:
    """One score in its three columns.

    Attributes:
        name: Stable, for programs.
        better: `higher`, `lower`, `0`, `½`, or `floor` if a value near the floor is best.
        value: Of the generated images.
        standard_error: Of `value`; None if it is not known.
        floor, real: Of real images, as above; None for a score that has none.
        note: For people, such as the name of the worst class.
    """

    name: str
    better: str
    value: float
    standard_error: float | None
    floor: float | None
    real: float | None
    note: str | None = None

    def record(self) -> dict[str, JsonValue]:
        """What a manifest holds under the score's name."""
        return {key: value for key, value in asdict(self).items() if key != "name" and (key != "note" or value)}


class TooFewError(ValueError):
    """The data set is too small for the metric suite; the message says by how much."""


@dataclass(frozen=True)
class Rows:
    """The sets that are compared, as (n, d) features of one extractor.

    `one` and `other` are the disjoint training rows of the floor, `rest` all other training rows.
    """

    generated: Tensor
    reference: Tensor
    one: Tensor
    other: Tensor
    rest: Tensor

    @property
    def train(self) -> Tensor:
        """Every training row."""
        return torch.cat([self.one, self.other, self.rest])


class MetricSuite:
    """All scores of one set of generated images.

    Args:
        dataset: Its test images are the reference, its training images the floor.
        generated: uint8 (n, h, w, c); see `rows_wanted` for n.
        labels: (n,) int64, what a class-conditional generator was asked for; None for one without classes.
        extractor: Its features are behind the main scores.
        control: An untrained net, for a second opinion on the distances; None if `extractor` is one.
        seed: Of the shuffles.

    Raises:
        TooFewError: Under six generated or test images.
        ValueError: The number of generated images is not `rows_wanted`.
    """

    def __init__(
        self,
        dataset: Dataset,
        generated: UInt8,
        labels: Tensor | None,
        extractor: FeatureExtractor,
        control: FeatureExtractor | None,
        seed: int = 0,
    ) -> None:
        if len(generated) != rows_wanted(dataset):
            raise ValueError(f"{rows_wanted(dataset)} generated images are wanted, got {len(generated)}")
        if min(len(generated), len(dataset.test.images)) < scores.MIN_ROWS:
            raise TooFewError(
                f"they need {scores.MIN_ROWS} test images and {5 * scores.MIN_ROWS} training images; "
                f"{dataset.name} has {len(dataset.test.images)} and {len(dataset.train.images)}"
            )
        self.dataset, self.generated, self.labels = dataset, generated, labels
        self.extractor, self.control = extractor, control
        n, r = len(generated), len(dataset.test.images)
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(dataset.train.images), generator=rng).numpy()
        self._one, self._other, self._rest = np.split(order, [n, n + r])
        self._seed = seed

    def groups(self) -> Iterator[tuple[str, Callable[[], list[SuiteScore]]]]:
        """The suite's groups of scores by name, the cheap and telling ones first. Calling one computes it."""
        embeddings = self._embed(self.extractor)
        rows = self._rows(embeddings, lambda e: e.features)
        yield "distances", lambda: self._distances(rows, "")
        yield "overlap", lambda: self._overlap(rows, "")
        if self.extractor.kind == "trained":
            yield "classes", lambda: self._classes(self._rows(embeddings, lambda e: e.logits))
        yield "memorisation", lambda: self._memorisation(rows)
        yield "memorisation in pixels", self._pixels
        if self.control is not None:
            control = self.control
            yield "control", lambda: self._second_opinion(control)

    def metadata(self) -> dict[str, JsonValue]:
        """What the scores depend on: numbers of rows, seed, reference, and the nets' checksums."""
        nets = {"features": self.extractor, "control": self.control}
        return {
            "generated_rows": len(self.generated),
            "reference": {"split": "test", "rows": len(self.dataset.test.images)},
            "floor": {"split": "train", "rows": [len(self._one), len(self._other)]},
            "seed": self._seed,
            **{
                name: {"recipe": RECIPE, "kind": net.kind, "sha256": net.checksum, "accuracy": net.accuracy}
                for name, net in nets.items()
                if net is not None
            },
        }

    def nearest_pictures(self, count: int = 12) -> UInt8:
        """A picture with three rows: generated images, their nearest training images by pixels and by features.

        Nearest by Euclidean distance in the whole training split; the picture is (3·h, count·w, c).
        """
        shown = self.generated[:count]
        train = self.dataset.train.images
        by_pixels = scores.nearest(self._flat(shown), self._flat(train)).indices[:, 0].cpu().numpy()
        known = self.extractor.embed(train).features
        by_features = scores.nearest(self.extractor.embed(shown).features, known).indices[:, 0].cpu().numpy()
        return grid(np.concatenate([shown, train[by_pixels], train[by_features]]), columns=len(shown))

    def _embed(self, extractor: FeatureExtractor) -> tuple[Embedding, Embedding, Embedding]:
        """Embeddings of the generated, the test and the training images."""
        sets = (self.generated, self.dataset.test.images, self.dataset.train.images)
        generated, test, train = (extractor.embed(images) for images in sets)
        return generated, test, train

    def _rows(self, embeddings: tuple[Embedding, Embedding, Embedding], part: Callable[[Embedding], Tensor]) -> Rows:
        generated, test, train = (part(embedding) for embedding in embeddings)
        return Rows(generated, test, *(train[torch.from_numpy(of)] for of in (self._one, self._other, self._rest)))

    def _distances(self, rows: Rows, suffix: str) -> list[SuiteScore]:
        seed = self._seed
        return [
            _compared(f"frechet{suffix}", "lower", rows, lambda a, b: scores.frechet(a, b, seed=seed)),
            _compared(
                f"frechet_infinity{suffix}", "lower", rows, lambda a, b: scores.frechet_at_infinity(a, b, seed=seed)
            ),
            _compared(f"kernel{suffix}", "0", rows, lambda a, b: scores.kernel_distance(a, b, seed=seed)),
        ]

    def _overlap(self, rows: Rows, suffix: str) -> list[SuiteScore]:
        pairs = (rows.generated, rows.reference), (rows.one, rows.other), (rows.one, rows.reference)
        found = [scores.overlap(reference, mine) for mine, reference in pairs]
        return [
            SuiteScore(
                f"{name}{suffix}",
                "floor" if name == "density" else "higher",
                value.value,
                value.standard_error,
                floor.value,
                real.value,
            )
            for name, value, floor, real in zip(scores.Overlap._fields, *found, strict=True)
        ]

    def _classes(self, logits: Rows) -> list[SuiteScore]:
        names = self.dataset.label_names or ()
        frequencies = _frequencies(self.dataset, len(names))
        alone = (logits.generated, logits.one, logits.reference)
        score, score_floor, score_real = (scores.classifier_score(rows, seed=self._seed) for rows in alone)
        value, floor, real = (scores.class_divergence(rows.argmax(dim=1), frequencies) for rows in alone)
        found = [
            SuiteScore("classifier_score", "floor", *score, score_floor.value, score_real.value),
            SuiteScore("class_divergence", "lower", value, None, floor, real),
        ]
        train, test = self.dataset.train.labels, self.dataset.test.labels
        if self.labels is not None and train is not None and test is not None:
            asked = (self.labels, torch.from_numpy(train[self._one]), torch.from_numpy(test))
            mine, floor_of, real_of = (scores.conditional_accuracy(*pair) for pair in zip(alone, asked, strict=True))
            worst = names[mine.worst_class]
            found += [
                SuiteScore("accuracy", "higher", *mine.overall, floor_of.overall.value, real_of.overall.value),
                SuiteScore(
                    "accuracy_worst_class", "higher", *mine.worst, floor_of.worst.value, real_of.worst.value, worst
                ),
            ]
        return found

    def _memorisation(self, rows: Rows) -> list[SuiteScore]:
        n = len(rows.reference)
        train = rows.train

        def copying(generated: Tensor, held_out: Tensor, known: Tensor) -> float:
            return scores.copying(generated, held_out, known, seed=self._seed)

        return [
            # This score knows no reference but the training rows, so `real` would be the floor again.
            SuiteScore("authenticity", "floor", *scores.authenticity(rows.generated, train),
                   scores.authenticity(rows.one, torch.cat([rows.other, rows.rest])).value, None),
            SuiteScore("copying", "0", copying(rows.generated, rows.reference, train), None,
                   copying(rows.one, rows.other, rows.rest), copying(rows.one, rows.reference, rows.rest)),
            _compared("two_sample_accuracy", "½", rows,
                    lambda a, b: scores.two_sample_accuracy(b, a[:n], seed=self._seed)),
        ]  # fmt: skip

    def _pixels(self) -> list[SuiteScore]:
        train, n = self._flat(self.dataset.train.images), PIXEL_ROWS
        generated, one = self._flat(self.generated[:n]), torch.from_numpy(self._one[:n])
        others = torch.from_numpy(np.concatenate([self._one[n:], self._other, self._rest]))
        floor = scores.authenticity(train[one], train[others])
        return [SuiteScore("authenticity_pixels", "floor", *scores.authenticity(generated, train), floor.value, None)]

    def _second_opinion(self, control: FeatureExtractor) -> list[SuiteScore]:
        rows = self._rows(self._embed(control), lambda e: e.features)
        return [*self._distances(rows, "_control"), *self._overlap(rows, "_control")]

    def _flat(self, images: UInt8) -> Tensor:
        return to_pixels(images, self.extractor.net.output.weight.device).flatten(1)


def rows_wanted(dataset: Dataset) -> int:
    """How many generated images the suite takes: 10,000, or a fifth of the training images if that is fewer."""
    return min(GENERATED, len(dataset.train.images) // 5)


class FrechetOnValidation:
    """The score of weights during training: the Fréchet distance between samples and the validation images.

    Scores of one run compare with one another; `floor` is what as many training images get. The net and the shuffle
    have seeds of their own, so scoring neither depends on the training's state nor changes it. The test images stay
    unseen.

    Args:
        dataset, device, progress: As in `load_features`, which is asked for the net.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device | str,
        *,
        progress: Callable[[int, int], None] = lambda _done, _of: None,
    ) -> None:
        self.extractor = load_features(dataset, device, progress=progress)
        self.count = rows_wanted(dataset)
        self._reference = scores.moments(self.extractor.embed(dataset.validation.images).features)
        order = torch.randperm(len(dataset.train.images), generator=torch.Generator().manual_seed(0))
        self.floor = self.score(dataset.train.images[order[: self.count].numpy()])

    def score(self, images: UInt8) -> float:
        """Fréchet distance of uint8 images (n, h, w, c), `count` of them, to the validation images."""
        return scores.frechet_distance(scores.moments(self.extractor.embed(images).features), self._reference)


def _compared(name: str, better: str, rows: Rows, compare: Callable[[Tensor, Tensor], Estimate]) -> SuiteScore:
    """The score that a comparison of two sets gives, in the three columns."""
    value = compare(rows.generated, rows.reference)
    floor, real = compare(rows.one, rows.other), compare(rows.one, rows.reference)
    return SuiteScore(name, better, *value, floor.value, real.value)


def _frequencies(dataset: Dataset, classes: int) -> tuple[float, ...]:
    assert dataset.train.labels is not None  # noqa: S101 — a trained extractor has seen them
    counts: list[int] = np.bincount(dataset.train.labels, minlength=classes).tolist()
    return tuple(count / math.fsum(counts) for count in counts)
