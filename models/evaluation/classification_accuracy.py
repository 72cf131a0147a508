"""Is a set of generated images useful? The classification accuracy score (Ravuri & Vinyals 2019, arXiv 1905.10887).

A small classifier learns from generated images alone, with the labels that they were asked for, and names real ones.
Another learns from as many real images in the same way. What the first gets less of the test images right is what the
generated set lacks: classes that are mixed up, drawn wrongly, or drawn in too few ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from models.data.dataset import Split
from models.data.load import Dataset
from models.evaluation.features import FeatureExtractor, fitted_classifier, updates_for
from models.inference.noise import Int64
from models.inference.pixels import UInt8

Show = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Shares of the test images that a classifier names right.

    Attributes:
        generated: Of the one that learnt from generated images.
        real: Of the one that learnt from the training images.
        standard_error: Of `generated`, by the number of test images.
        worst_class: The class that suffers most by generated images, and what both get there.
        images: How many each learnt from.
        rows: Test images.
    """

    generated: float
    real: float
    standard_error: float
    worst_class: str
    worst_class_generated: float
    worst_class_real: float
    images: int
    rows: int
    updates: int
    seed: int


def classification_accuracy(
    dataset: Dataset,
    images: UInt8,
    labels: Int64,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    updates: int | None = None,
    show: Show = lambda _what, _done, _of: None,
) -> ClassificationAccuracy:
    """Train both classifiers, and test them on the test images.

    Args:
        dataset: With labels.
        images: Generated ones, uint8 (n, h, w, c), as many as there are training images.
        labels: (n,), what they were asked for.
        device: Where the classifiers learn.
        seed: Of their first weights and the order of the images, the same for both.
        updates: Of each; None is as many as a feature net of so many images gets.
        show: Is told what is done.

    Raises:
        ValueError: The data have no labels, or there are no test images.
    """
    names, test = dataset.label_names, dataset.test
    if names is None or dataset.train.labels is None or test.labels is None or not len(test.images):
        raise ValueError(f"{dataset.name} has no labelled test images")
    count = updates_for(len(images)) if updates is None else updates
    truth = torch.from_numpy(test.labels)
    right = {}
    for kind, split in (("generated", Split(images, labels)), ("real", dataset.train)):
        learning = partial(show, f"training a classifier on {kind} images")
        net = fitted_classifier(dataset, split, device, seed=seed, updates=count, progress=learning)
        right[kind] = _right(net, test.images, truth)
    shares = {kind: found.mean().item() for kind, found in right.items()}
    by_class = {
        name: [right[kind][truth == label].mean().item() for kind in ("generated", "real")]
        for label, name in enumerate(names)
        if (truth == label).any()
    }
    worst = min(by_class, key=lambda name: by_class[name][0] - by_class[name][1])
    error = math.sqrt(shares["generated"] * (1 - shares["generated"]) / len(truth))
    return ClassificationAccuracy(
        **shares,
        standard_error=error,
        worst_class=worst,
        worst_class_generated=by_class[worst][0],
        worst_class_real=by_class[worst][1],
        images=len(images),
        rows=len(truth),
        updates=count,
        seed=seed,
    )


def _right(net: FeatureExtractor, images: UInt8, truth: torch.Tensor) -> torch.Tensor:
    """1 for each image that the classifier names right, else 0."""
    return (net.embed(images).logits.argmax(dim=1).cpu() == truth).double()
