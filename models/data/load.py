"""Data sets by name or path -> checked splits of uint8 images.

A data set is one of the published sets (`mnist`, `fashion-mnist`, in IDX files), `digits` (scikit-learn's), a folder of
images, an IDX file or an `.npz` file. Whatever it came from, it ends as three `Split`s of uint8 (n, h, w, c) with c = 1
or 3. Every fault in a file is a `DataError`: one line for a person, which names the file.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np

from models.data.dataset import (
    Colour,
    DataError,
    Dataset,
    Images,
    Labels,
    Reading,
    Split,
    declared,
    divide,
    in_rgb,
    listed,
    one_line,
)
from models.data.folder_listing import find_images
from models.data.idx import DIGIT_NAMES, PUBLISHED, is_idx, load_published, read_pair
from models.data.image_cache import cached, write_resized
from models.data.image_folder import write_folder
from models.images.preparation import Fit

__all__ = ["DEFAULT_DATA_DIR", "MAX_IMAGE_SIZE", "PUBLISHED", "DataError", "Dataset", "Split", "load_dataset"]

DEFAULT_DATA_DIR = Path("data")
MAX_IMAGE_SIZE = 1024  # pixels a side; a slip of the finger must not fill the memory


def load_dataset(  # noqa: PLR0913 — each is an option of the command line
    data: str,
    data_dir: Path | None,
    *,
    seed: int,
    image_size: int | None = None,
    skip_bad: bool = False,
    splits: str = "auto",
    fit: Fit = "crop",
    background: str | None = None,
    colour: Colour = "pixels",
) -> Dataset:
    """Read, check and divide a data set.

    `mnist` and `fashion-mnist` are divided as in the paper: the first 50,000 training images to train, the last 10,000
    to validate, and the published test images. They keep the published order, and MNIST's goes by writer: shuffle
    before taking a part of a split. Every other set is divided 80/10/10 by a permutation.

    In a folder each file is one image: turned upright by its EXIF note, the first frame of an animation, transparency
    over the background. Sub-folders, read to any depth, are classes, and those called train, val or test are splits
    (folder_listing.py); hidden files are not read. The set is grey where every pixel is (16 bits become 8), and RGB
    otherwise.

    A folder's images, and all that are resized, are decoded once: image_cache.py keeps them as one array, which
    is mapped into memory. A folder that has changed is read again.

    Args:
        data: `mnist`, `fashion-mnist`, `digits`, a folder of images (sub-folders are class labels), an IDX file of
            images (labels in the file beside it, named `labels-idx1` where this one is `images-idx3`), or an `.npz`
            file (`images` uint8 (n, h, w) or (n, h, w, c); optional `labels`, integers 0 ... K-1). A name wins over a
            folder of the same name; `./mnist` is the folder.
        data_dir: Where the published files lie, as `<data_dir>/mnist/train-images-idx3-ubyte.gz` or without `.gz`;
            missing ones are downloaded to there. None is `data` in the current folder.
        seed: Of the permutation, 0 or more. Without effect on the published sets.
        image_size: Make every image a square of this many pixels a side. None keeps sizes, which must then all be the
            same.
        skip_bad: Leave out a folder's files that cannot be read, and name them on stderr.
        splits: `none` makes classes of a folder's train, val and test too.
        fit, background: Of the data set's preparation; the background is #rrggbb. None is white for a folder, and for
            other sets what `declared` finds.
        colour: What makes a folder's set RGB; see `Reading`.

    Raises:
        DataError: What was named does not exist, is damaged, is not what it should be, or cannot be downloaded.
    """
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"image size must be from 1 to {MAX_IMAGE_SIZE} pixels, not {image_size}")
    reading = Reading(image_size, fit, background, colour)
    try:
        if data in PUBLISHED:
            fingerprint = " ".join(PUBLISHED[data].sha256.values())
            read = partial(load_published, data, (data_dir or DEFAULT_DATA_DIR) / data)
            return _resized(data, fingerprint, read, reading, seed=0)
        if data == "digits":
            return _resized(data, "", partial(_read_digits, seed), reading, seed)
        return _load_path(data, seed, reading, skip_bad=skip_bad, splits=splits)
    except OSError as error:  # no permission, a full disk: the message names the path
        raise DataError(f"{data}: {error}") from error


def _load_path(data: str, seed: int, reading: Reading, *, skip_bad: bool, splits: str) -> Dataset:
    path = Path(data).expanduser()
    if data and path.is_dir():  # an unset shell variable is not the current folder
        return _load_folder(path, seed, reading, skip_bad=skip_bad, splits=splits)
    if path.is_file():
        found = path.stat()
        fingerprint = f"{found.st_size} {found.st_mtime_ns}"
        if path.suffix.lower() == ".npz":
            return _resized(str(path.resolve()), fingerprint, partial(_read_npz, path, seed), reading, seed)
        if is_idx(path):
            return _resized(str(path.resolve()), fingerprint, partial(read_pair, path, seed), reading, seed)
    problem = (
        "is neither a folder nor an .npz or IDX file" if path.exists() else "is no data set, and no file or folder"
    )
    raise DataError(
        f"{data} {problem}: give {', '.join(PUBLISHED)}, digits, a folder of images, or an .npz or IDX file"
    )


def _load_folder(path: Path, seed: int, reading: Reading, *, skip_bad: bool, splits: str) -> Dataset:
    images = find_images(path, splits)
    # What says the same is the same entry: a run that goes on names the background and colour that it was begun with.
    is_rgb = reading.colour == "rgb"
    colour: Colour = "pixels" if is_rgb else reading.colour
    reading = replace(reading, background=reading.preparation().background, colour=colour)
    options = {**asdict(reading), "seed": seed, "skip_bad": skip_bad, "splits": splits}
    build = partial(write_folder, source=images, reading=reading, seed=seed, skip_bad=skip_bad)
    dataset = cached(str(path.resolve()), options, images.fingerprint, build)
    notes = list(dataset.files.notes)
    if dataset.train.images.shape[-1] == 1:
        if is_rgb:
            dataset = in_rgb(dataset)
        else:
            total = sum(len(split.images) for split in dataset.splits)
            notes.append(f"All {total} images are grey: one channel")
    for note in notes:
        print(note, file=sys.stderr)
    left_out = {**images.left_out, **dataset.files.left_out}
    return replace(dataset, files=replace(dataset.files, left_out=left_out, notes=notes))


def _resized(source: str, fingerprint: str, read: Callable[[], Dataset], reading: Reading, seed: int) -> Dataset:
    """The data set that `read` gives. A resized one is cached, and read again only when its fingerprint changes."""
    size = reading.image_size
    if size is None:
        return declared(read(), reading)
    options = {**asdict(reading), "seed": seed}
    return cached(source, options, fingerprint, lambda entry: write_resized(entry, declared(read(), reading), size))


# --- scikit-learn's digits ---------------------------------------------------------------------------------------


def _read_digits(seed: int) -> Dataset:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 — slow to import, and an extra
    except ImportError as error:
        raise DataError("digits comes with scikit-learn, which is not installed: install the train extra") from error
    rows, labels = load_digits(return_X_y=True)  # float64 (1797, 64) of whole numbers 0 ... 16
    images = np.rint(rows * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return divide("digits", Split(images, labels.astype(np.int64)), DIGIT_NAMES, seed)


# --- .npz files --------------------------------------------------------------------------------------------------


def _read_npz(path: Path, seed: int) -> Dataset:
    arrays = _npz_arrays(path)
    if "images" not in arrays:
        raise DataError(f"{path}: has no array called images")
    images = _npz_images(path, arrays["images"])
    labels = _npz_labels(path, arrays["labels"], len(images)) if "labels" in arrays else None
    return divide(path.stem, Split(images, labels), _numbered(labels), seed)


def _npz_arrays(path: Path) -> dict[str, object]:
    """The members that we know, as numpy read them: not necessarily arrays."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise DataError(f"{path}: not an .npz file, which is a zip of arrays")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as members:  # pickle could run code
                return {key: members[key] for key in ("images", "labels") if key in members.files}
        # A damaged zip fails in zipfile, zlib, struct or numpy, each with errors of its own.
        except Exception as error:
            raise DataError(f"{path}: cannot be read as .npz: {one_line(error)}") from error


def _npz_images(path: Path, images: object) -> Images:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: images must be uint8 (0 ... 255), found {found}")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"{path}: images must be (n, h, w) or (n, h, w, c), none of them 0, found {images.shape}")
    rows = images[..., None] if images.ndim == 3 else images
    if rows.shape[-1] not in (1, 3):
        raise DataError(f"{path}: images must have 1 channel (grey) or 3 (RGB), found {rows.shape[-1]}")
    return rows


def _npz_labels(path: Path, labels: object, count: int) -> Labels:
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
        found = labels.dtype if isinstance(labels, np.ndarray) else type(labels).__name__
        raise DataError(f"{path}: labels must be integers, found {found}")
    if labels.shape != (count,):
        raise DataError(f"{path}: expected one label for each of the {count} images, found shape {labels.shape}")
    classes = np.unique(labels)
    if not np.array_equal(classes, np.arange(len(classes))):
        shown = listed([str(label) for label in classes])
        raise DataError(f"{path}: labels must be 0 ... K-1, each of them used, found {shown}")
    return labels.astype(np.int64)


def _numbered(labels: Labels | None) -> tuple[str, ...] | None:
    return None if labels is None else tuple(str(label) for label in range(int(labels.max()) + 1))
