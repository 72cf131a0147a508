"""What a data set is: checked splits of uint8 images, and how a whole is divided into them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
            colours, as it once was; `rgb`, that it shall be so, which changes nothing in how its files are read.
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


@dataclass(frozen=True)
class FilesRead:
    """What became of the files of a folder; empty for other data sets.

    Attributes:
        sizes: Width and height of the smallest and of the largest image, by pixels, before they were fitted.
        coloured: Images that are not grey; None where nobody has counted.
        left_out: Why files were left out, and how many by suffix.
        by_folders: Whether folders called train, val and test divided them.
        notes: What the user should be told at every start.
    """

    sizes: Sequence[Sequence[int]] | None = None
    coloured: int | None = None
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    by_folders: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A whole data set, divided.

    Attributes:
        name: Of the published set, the folder, or the file without its suffix. Never a path.
        train, validation, test: No image is in two of them.
        label_names: What each label means, in order; None for a set without labels.
        checksum: sha256, in hex, over the images and labels of the three splits in order. The same content gives the
            same checksum, whatever files it came in; another split of it gives another.
        files: What became of the files of a folder.
        preparation: How its images were made, and how one of another shape becomes like them; None where nobody knows.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    label_names: tuple[str, ...] | None
    checksum: str
    files: FilesRead = FilesRead()
    preparation: Preparation | None = None

    @property
    def splits(self) -> tuple[Split, Split, Split]:
        """Training, validation and test images."""
        return self.train, self.validation, self.test


def division(name: str, count: int, seed: int) -> tuple[npt.NDArray[np.intp], ...]:
    """Rows for training, validation and test: a tenth each, rounded down, for the last two.

    Raises:
        DataError: Too few rows.
    """
    if count < MIN_IMAGES:
        raise DataError(f"{name}: {count} images are too few to divide: {MIN_IMAGES} is the least")
    order, tenth = shuffled(count, seed), count // 10
    return order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]


def shuffled(count: int, seed: int) -> npt.NDArray[np.intp]:
    """The numbers 0 … count − 1 in an order that the seed decides, on every machine and numpy version."""
    # Generator.permutation may change between numpy versions; a bit generator's own stream may not.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def divide(name: str, whole: Split, label_names: tuple[str, ...] | None, seed: int) -> Dataset:
    """A data set without a published split, divided 80/10/10 by a permutation."""
    parts = [take(whole, rows) for rows in division(name, len(whole.images), seed)]
    return assembled(name, parts, label_names)


def assembled(name: str, parts: Sequence[Split], label_names: tuple[str, ...] | None) -> Dataset:
    """A data set of its train, validation and test rows."""
    train, validation, test = parts
    return Dataset(printable(name), train, validation, test, label_names, checksum_of(train, validation, test))


def relabelled(dataset: Dataset, label_names: Sequence[str]) -> Dataset:
    """The same images and labels, the names of the labels standing in another order."""
    index = {name: place for place, name in enumerate(label_names)}
    numbers = np.array([index[name] for name in dataset.label_names or ()], np.int64)
    parts = [Split(one.images, None if one.labels is None else numbers[one.labels]) for one in dataset.splits]
    found = assembled(dataset.name, parts, tuple(label_names))
    return replace(found, files=dataset.files, preparation=dataset.preparation)


def in_rgb(dataset: Dataset) -> Dataset:
    """A grey folder's images in three channels, which are those that it would have beside coloured ones."""
    parts = [Split(np.repeat(split.images, 3, axis=-1), split.labels) for split in dataset.splits]
    how = replace(dataset.preparation, colour="rgb") if dataset.preparation else None
    return replace(assembled(dataset.name, parts, dataset.label_names), files=dataset.files, preparation=how)


def numbered_as_before(dataset: Dataset, checksum: str | None) -> Dataset:
    """The data set with its labels numbered as in a bundle with this checksum; itself where neither order fits.

    Class folders with whole numbers as names once stood by code point: 0, 1, 10, 2.
    """
    earlier = sorted(dataset.label_names or ())
    if dataset.checksum == checksum or earlier == list(dataset.label_names or ()):
        return dataset
    found = relabelled(dataset, earlier)
    return found if found.checksum == checksum else dataset


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


def left_out_words(left_out: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each reason: `48 files left out, no image by its name: .heic (36), .txt (12)`."""
    lines = []
    for reason, counts in left_out.items():
        total = sum(counts.values())
        suffixes = listed([f"{suffix or 'without a suffix'} ({count:,})" for suffix, count in counts.items()])
        lines.append(f"{total:,} {'file' if total == 1 else 'files'} left out, {reason}: {suffixes}")
    return lines


def printable(text: str) -> str:
    """The text with everything escaped that is no UTF-8 or would move the cursor: a file's name may hold any bytes."""
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python reads a byte of a name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def one_line(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split()) or type(error).__name__
