"""What a data set is: checked splits of uint8 images, and how a whole is divided into them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

MIN_IMAGES = 10  # the fewest that 80/10/10 can divide

_SHOWN = 10  # files, sizes or labels named in one error


class DataError(ValueError):
    """A data set cannot be used. The message is one line for a person and names the file."""


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
    """

    name: str
    train: Split
    validation: Split
    test: Split
    label_names: tuple[str, ...] | None
    checksum: str


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
