"""What an encoder is worth: how near G comes to images that it never saw, beside a search that has no encoder."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from models.bundle import Bundle, BundleError
from models.data.load import Dataset
from models.evaluation.metric_suite import GENERATED
from models.evaluation.scores import nearest
from models.inference.drawing import codes_of, draw_images, images_of
from models.inference.noise import Float32, LatentRange, beside_noise
from models.inference.pixels import UInt8

Show = Callable[[str], object]


def score_encoder(bundle: Bundle, dataset: Dataset, show: Show = lambda _what: None) -> dict[str, Any]:
    """Scores of a bundle's encoder on the test images, by which nothing is chosen.

    Returns:
        `error`: mean squared difference of pixels in [0, 1] between an image and what G makes of its latent.
        `nearest_error`: the same between an image and the nearest of `samples` images of seed 0, the best that can be
            had without an encoder by drawing so many.
        `label_accuracy`: of the classes that E finds, where the data has those of the bundle.
        `neighbour_accuracy`: share of test images whose nearest training image, by distance of latents, has the same
            label; where the data has labels.

    Raises:
        BundleError: There is no encoder.
    """
    encoder, generator, latent = bundle.encoder, bundle.generator, bundle.manifest.latent
    if encoder is None:
        raise BundleError(bundle.folder, "the bundle has no encoder")
    test, count = dataset.test, GENERATED
    show("encoding the test images")
    latents, labels = codes_of(encoder, test.images)
    rows = [LatentRange(0, index, 1) for index in range(len(latents))] if latent.noise else []
    made = images_of(generator, beside_noise(latent, latents, rows), labels)
    show(f"drawing {count:,} images to compare with")
    drawn = draw_images(generator, latent, count)
    found: dict[str, Any] = {
        "error": float(np.square(_flat(test.images) - _flat(made)).mean()),
        "nearest_error": float(
            (nearest(torch.from_numpy(_flat(test.images)), torch.from_numpy(_flat(drawn))).distances ** 2).mean()
            / _flat(drawn[:1]).size
        ),
        "samples": count,
        "rows": len(test.images),
        "split": "test",
        "data": {"name": dataset.name, "checksum": dataset.checksum},
    }
    if test.labels is None or dataset.train.labels is None:
        return found
    if labels is not None and encoder.classes == len(dataset.label_names or ()):
        found["label_accuracy"] = float((labels == test.labels).mean())
    show("encoding the training images")
    known, _ = codes_of(encoder, dataset.train.images)
    nearest_rows = nearest(torch.from_numpy(latents), torch.from_numpy(known)).indices[:, 0].numpy()
    found["neighbour_accuracy"] = float((dataset.train.labels[nearest_rows] == test.labels).mean())
    return found


def _flat(images: UInt8) -> Float32:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
