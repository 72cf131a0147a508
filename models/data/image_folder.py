"""A folder of images, in whatever files, sizes and modes -> a cached entry of uint8 rows, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from models.data.dataset import Colour, DataError, Images, Reading, division, listed, one_line
from models.data.image_cache import array_of, write_entry
from models.images.decoding import decode_any
from models.images.image_file import ImageFileError
from models.images.preparation import prepare

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DECODED_AT_ONCE = 256  # images in memory while a folder is read
MAX_FILE_BYTES = 2**28
STATED_FILES = 10_000  # files whose time and size are looked at for a fingerprint

Shape = tuple[int, int, int]  # height, width, channels


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder, sorted by path, which makes the division the same wherever it is copied to.

    Attributes:
        path: The folder.
        files: Relative to it.
        labels: For each file an index into `label_names`; None where the images lie directly in the folder.
        fingerprint: Of the names, the sub-folders' times, and the times and sizes of the files. Of many files only some
            ten thousand are asked, evenly spread, because a network disk answers slowly.
    """

    path: Path
    files: tuple[str, ...]
    labels: npt.NDArray[np.int64] | None
    label_names: tuple[str, ...] | None
    fingerprint: str


def find_images(path: Path) -> ImageFolder:
    """List a folder. Sub-folders, read to any depth, are classes; one without any image is none.

    Raises:
        DataError: There are no images, or some in sub-folders and some not.
    """
    times: list[str] = []
    files = sorted(_walk(path, "", times), key=lambda file: file.split("/"))
    if not files:
        idx = next((entry.name for entry in sorted(path.iterdir()) if "-idx3-ubyte" in entry.name), None)
        hint = f"; for IDX files, name the one with the images: {path / idx}" if idx else ""
        raise DataError(f"{path}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))}){hint}")
    loose = [file for file in files if "/" not in file]
    if loose and len(loose) < len(files):
        inside = next(file for file in files if "/" in file).split("/")[0]
        raise DataError(
            f"{path}: has images both directly in it ({loose[0]}) and in sub-folders ({inside}): "
            "use sub-folders for all, as class labels, or for none"
        )
    for file in files[:: -(-len(files) // STATED_FILES)]:
        found = (path / file).stat()
        times.append(f"{found.st_size} {found.st_mtime_ns}")
    digest = hashlib.sha256("\n".join((*files, *times)).encode("utf-8", "surrogateescape")).hexdigest()
    if loose:
        return ImageFolder(path, tuple(files), None, None, digest)
    names, labels = np.unique([file.split("/")[0] for file in files], return_inverse=True)
    return ImageFolder(path, tuple(files), labels.astype(np.int64), tuple(map(str, names)), digest)


def _walk(folder: Path, prefix: str, times: list[str]) -> Iterator[str]:
    # Hidden files are not the user's pictures: macOS archives hold a "._cat.jpg" of metadata beside "cat.jpg".
    times.append(f"{prefix} {folder.stat().st_mtime_ns}")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # A link to a class's folder is followed. One further down could lead round in a circle.
            if entry.is_dir(follow_symlinks=not prefix):
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", times)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and entry.is_file():  # noqa: PTH122
                yield prefix + entry.name


def write_folder(entry: Path, source: ImageFolder, reading: Reading, *, seed: int, skip_bad: bool) -> None:
    """Decode every file once and write the divided whole as a cached entry.

    Prepared images first go to a temporary file, in the order of their names, because the number of channels and the
    files to leave out are known only at the end.

    Raises:
        DataError: A file cannot be read (all are named) unless `skip_bad`; sizes differ, and none is asked for; too few
            are left; or the folder changed meanwhile.
        OSError: The disk.
    """
    name = source.path.resolve().name
    with tempfile.TemporaryFile(dir=entry) as spool:
        found, faults = _decode_all(source, spool, reading)
        if faults and not skip_bad:
            raise DataError(
                f"{source.path}: {len(faults)} of {len(source.files)} images cannot be read "
                f"(--skip-bad leaves them out): {listed(faults, '; ')}"
            )
        shapes = list(found.values())
        _require_one_size(source.path, shapes)
        train, validation, test = division(source.path.name, len(shapes), seed)
        order = np.concatenate([train, validation, test])
        labels, names = _labels_of(source, np.array(list(found), np.intp)[order])
        parts = len(train), len(validation), len(test)
        colour: Literal["grey", "rgb"] = "rgb" if any(shape[2] == 3 for shape in shapes) else "grey"
        how = replace(reading.preparation(), colour=colour)
        notes = _notes(source, found, faults)
        write_entry(entry, name, _in_order(spool, shapes, order), parts, labels, names, how, notes)
    if find_images(source.path).fingerprint != source.fingerprint:
        raise DataError(f"{source.path}: changed while it was read: try again")


def _decode_all(source: ImageFolder, spool: IO[bytes], reading: Reading) -> tuple[dict[int, Shape], list[str]]:
    """Append each image to `spool`. Returns the shapes by place among the files, and why the others can't be read."""
    shapes: dict[int, Shape] = {}
    faults = []
    Image.init()  # registers every format now: done lazily in the threads, it can race and miss one
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        # Pillow warns of odd metadata, which is no reason to stop; but between its limit and twice that it only warns
        # of a decompression bomb. The filters hold for all threads.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(source.files), DECODED_AT_ONCE):
            some = source.files[start : start + DECODED_AT_ONCE]
            # Pillow decodes outside the interpreter's lock.
            decoded = pool.map(partial(_decode, source.path, reading=reading), some)
            for place, (name, row) in enumerate(zip(some, decoded, strict=True), start):
                if isinstance(row, str):
                    faults.append(f"{name}: {row}")
                else:
                    spool.write(np.ascontiguousarray(row).data)
                    shapes[place] = row.shape
    spool.flush()
    return shapes, faults


def _require_one_size(path: Path, shapes: Sequence[Shape]) -> None:
    sizes = Counter((width, height) for height, width, _ in shapes)
    if len(sizes) > 1:
        found = listed([f"{width}x{height} ({count})" for (width, height), count in sizes.most_common()])
        raise DataError(f"{path}: images of {len(sizes)} sizes: {found}: make them one size with --image-size")


def _in_order(spool: IO[bytes], shapes: Sequence[Shape], order: npt.NDArray[np.intp]) -> Iterator[Images]:
    """The images of the spool in this order, all with the channels of the one that has most."""
    flat, ends = np.memmap(spool, np.uint8, "r"), np.cumsum([np.prod(shape) for shape in shapes])
    channels = max(shape[2] for shape in shapes)
    for place in order:
        height, width, depth = shapes[place]
        row = flat[ends[place] - height * width * depth : ends[place]].reshape(shapes[place])
        yield np.broadcast_to(row, (height, width, channels))  # grey in an RGB set is repeated over the channels


def _labels_of(
    source: ImageFolder, places: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.int64] | None, list[str] | None]:
    """Labels of these files, and the names of the classes that are left: one may have lost all its images."""
    if source.labels is None or source.label_names is None:
        return None, None
    used, labels = np.unique(source.labels[places], return_inverse=True)
    return labels, [source.label_names[label] for label in used]


def _notes(source: ImageFolder, shapes: Mapping[int, Shape], faults: Sequence[str]) -> list[str]:
    """What the user should be told of such a folder."""
    notes = [f"Left out {len(faults)} of {len(source.files)} images: {listed(faults, '; ')}"] if faults else []
    coloured = [source.files[place] for place, shape in shapes.items() if shape[2] == 3]
    if coloured and len(coloured) < len(shapes) / 2:  # a stray file triples the work, and nobody would see why
        notes.append(f"All images become RGB because of {len(coloured)} among {len(shapes)}: {listed(coloured)}")
    if not coloured:
        notes.append(f"All {len(shapes)} images are grey: one channel")
    return notes


def _decode(folder: Path, name: str, *, reading: Reading) -> Images | str:
    """One image, prepared: (h, w, 1) where it is grey and (h, w, 3) where not; or why there is none."""
    try:
        picture, orientation = decode_any(_content(folder / name))
        with picture:
            channels = _channels(picture, reading.colour)
            return array_of(prepare(picture, orientation, reading.preparation(), reading.size, channels))
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    # On damaged files Pillow's decoders raise errors of almost every kind, and the user needs each file's name.
    except Exception as error:  # noqa: BLE001
        return one_line(error)


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
            raise ImageFileError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        return file.read()


def _channels(picture: Image.Image, colour: Colour) -> int | None:
    """How many channels the image gets; None where its pixels say."""
    if colour == "mode":
        return 1 if picture.mode in {"1", "L", "LA", "La"} or picture.mode.startswith("I;16") else 3
    return 3 if colour == "rgb" else None
