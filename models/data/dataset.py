"""What a data set is: checked splits of uint8 images, and how a whole is divided into them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.images.preparation import Fit, Preparation

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Colour = Literal["pixels", "mode", "rgb"]

MIN_IMAGES = 10  # the fewest that 80/10/10 can divide

_SHOWN = 10  # files, sizes or labels named in one error


class DataError(ValueError):
    """A data set cannot be used. The message is one line for a person and names the file."""


@dataclass(frozen=True)
class Reading:
    """How the images of a data set are brought to one size and colour.

    Attributes:
        image_size: Pixels a side; None keeps sizes.
        fit, background: Of the preparation. Without a background it is white, or for sets of arrays their own.
        colour: What makes a folder's set RGB: `pixels`, one that is not exactly grey; `mode`, a file in a mode for
            colours, as it once was; `rgb`, that it shall be so.
    """

    image_size: int | None = None
    fit: Fit = "crop"
    background: str | None = None
    colour: Colour = "pixels"

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height); None keeps each image's own."""
        return None if self.image_size is None else (self.image_size, self.image_size)

    def preparation(self) -> Preparation:
        """What is done to each file; its colour is known at the end."""
        return Preparation(self.fit, self.background or "#ffffff")


@dataclass(frozen=True, eq=False)
class Split:
    """A part of a data set.

    Attributes:
        images: uint8 (n, h, w, c); c is 1 (grey) or 3 (RGB).
        labels: int64 (n,), each an index into the data set's `label_names`; None where there are no labels.
    """

    images: Images
    labels: Labels | None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set, divided.

    Attributes:
        name: Of the published set, the folder, or the file without its suffix. Never a path.
        train, validation, test: No image is in two of them.
        label_names: What each label means, in order; None for a set without labels.
        checksum: sha256, in hex, over the images and labels of the three splits in order. The same content gives the
            same checksum, whatever files it came in; another split of it gives another.
        preparation: How its images were made, and how one of another shape becomes like them; None where nobody knows.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    label_names: tuple[str, ...] | None
    checksum: str
    preparation: Preparation | None = None


def division(name: str, count: int, seed: int) -> tuple[npt.NDArray[np.intp], ...]:
    """Rows for training, validation and test: a tenth each, rounded down, for the last two.

    Raises:
        DataError: Too few rows.
    """
    if count < MIN_IMAGES:
        raise DataError(f"{name}: {count} images are too few to divide: {MIN_IMAGES} is the least")
    # Generator.permutation may change between numpy versions; a bit generator's own stream may not.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    tenth = count // 10
    return order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]


def divide(name: str, whole: Split, label_names: tuple[str, ...] | None, seed: int) -> Dataset:
    """A data set without a published split, divided 80/10/10 by a permutation."""
    parts = [take(whole, rows) for rows in division(name, len(whole.images), seed)]
    return assembled(name, parts, label_names)


def assembled(name: str, parts: Sequence[Split], label_names: tuple[str, ...] | None) -> Dataset:
    """A data set of its train, validation and test rows."""
    train, validation, test = parts
    return Dataset(name, train, validation, test, label_names, checksum_of(train, validation, test))


def declared(dataset: Dataset, reading: Reading) -> Dataset:
    """A set of arrays with its preparation. Its background, if none is given, is what its images seem to lie on.

    That is black for grey images that are dark along their edges, as MNIST's are: on white, an uploaded white digit
    would be gone.
    """
    images = dataset.train.images
    is_grey = images.shape[-1] == 1
    edges = np.concatenate([images[:1000, [0, -1]].ravel(), images[:1000, :, [0, -1]].ravel()])
    ground = "#000000" if is_grey and np.median(edges) < 128 else "#ffffff"
    preparation = Preparation(reading.fit, reading.background or ground, colour="grey" if is_grey else "rgb")
    return replace(dataset, preparation=preparation)


def take(split: Split, rows: slice | npt.NDArray[np.intp]) -> Split:
    """Some of the rows, with their labels."""
    return Split(split.images[rows], None if split.labels is None else split.labels[rows])


def checksum_of(*splits: Split) -> str:
    """The checksum of a `Dataset`."""
    digest = hashlib.sha256()
    for split in splits:
        # Shapes first: without them, bytes could move between neighbours and hash the same.
        digest.update(f"{split.images.shape} {'unlabelled' if split.labels is None else 'labelled'}\n".encode())
        digest.update(np.ascontiguousarray(split.images).data)
        if split.labels is not None:
            digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    return digest.hexdigest()


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """The first few of many, for a message."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def one_line(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split()) or type(error).__name__
