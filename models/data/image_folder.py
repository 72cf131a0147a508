"""A folder of images, in whatever files, sizes and modes -> a cached entry of uint8 rows, in bounded memory."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from models.data.dataset import (
    MIN_IMAGES,
    Colour,
    DataError,
    FilesRead,
    Images,
    Reading,
    division,
    listed,
    one_line,
    printable,
    shuffled,
)
from models.data.folder_listing import (
    SPLITS,
    TEST,
    TRAIN,
    UNREADABLE,
    VALIDATION,
    ImageFolder,
    find_images,
    suffix_of,
)
from models.data.image_cache import array_of, write_entry
from models.images.decoding import decode_any
from models.images.image_file import ImageFileError
from models.images.preparation import prepare

DECODED_AT_ONCE = 256  # images in memory while a folder is read
MAX_FILE_BYTES = 2**28

Shape = tuple[int, int, int]  # height, width, channels
Size = tuple[int, int]  # width, height


def write_folder(entry: Path, source: ImageFolder, reading: Reading, *, seed: int, skip_bad: bool) -> None:
    """Decode every file once and write the divided whole as a cached entry.

    Prepared images first go to a temporary file, in the order of their names, because the number of channels and the
    files to leave out are known only at the end.

    Raises:
        DataError: A file cannot be read (all are named) unless `skip_bad`; sizes differ, and none is asked for; too few
            are left; or the folder changed meanwhile.
        OSError: The disk.
    """
    name = printable(source.path.resolve().name)
    with tempfile.TemporaryFile(dir=entry) as spool:
        decoded = _decode_all(source, spool, reading)
        if decoded.faults and not skip_bad:
            raise DataError(
                f"{source.path}: {len(decoded.faults)} of {len(source.files)} images cannot be read "
                f"(--skip-bad leaves them out): {listed(decoded.reasons(), '; ')}"
            )
        shapes, places = list(decoded.shapes.values()), np.array(list(decoded.shapes), np.intp)
        _require_one_size(source.path, shapes)
        parts, made_up = _divided(name, None if source.splits is None else source.splits[places], len(places), seed)
        order = np.concatenate(parts)
        labels, names = _labels_of(source, places[order])
        train, validation, test = map(len, parts)
        colour: Literal["grey", "rgb"] = "rgb" if any(shape[2] == 3 for shape in shapes) else "grey"
        how = replace(reading.preparation(), colour=colour)
        files = _files_read(source, decoded, reading.colour, made_up)
        write_entry(entry, name, _in_order(spool, shapes, order), (train, validation, test), labels, names, how, files)
    if find_images(source.path, source.mode).fingerprint != source.fingerprint:
        raise DataError(f"{source.path}: changed while it was read: try again")


def _divided(
    name: str, split_of: npt.NDArray[np.int64] | None, count: int, seed: int
) -> tuple[Sequence[npt.NDArray[np.intp]], list[str]]:
    """The rows for training, validation and test, all of them shuffled, and what the user should be told of it.

    Where folders say the split of each row, a tenth of the training images makes one that is missing.
    """
    if split_of is None:
        return division(name, count, seed), []
    order = shuffled(count, seed)
    parts = [order[split_of[order] == split] for split in SPLITS]
    if len(parts[TRAIN]) < MIN_IMAGES:
        raise DataError(f"{name}: {len(parts[TRAIN])} images in train are too few: {MIN_IMAGES} is the least")
    tenth, notes = len(parts[TRAIN]) // 10, []
    for split, words in ((VALIDATION, "validation"), (TEST, "test")):
        if not len(parts[split]):
            parts[split], parts[TRAIN] = parts[TRAIN][:tenth], parts[TRAIN][tenth:]
            notes.append(f"No {words} images in a folder of their own: {tenth:,} of those in train, chosen by the "
                         "seed, are taken for it")  # fmt: skip
    return parts, notes


@dataclass
class _Decoded:
    """What decoding gave.

    Attributes:
        shapes: By place among the files, in their order; as the rows follow one another in the spool.
        faults: The files that gave no row, and why.
        smallest, largest: The sizes of the images before they were fitted, by pixels.
    """

    shapes: dict[int, Shape] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    smallest: Size | None = None
    largest: Size | None = None

    def see(self, size: Size) -> None:
        """Count an image of this size."""
        self.smallest = min(self.smallest or size, size, key=math.prod)
        self.largest = max(self.largest or size, size, key=math.prod)

    def reasons(self) -> list[str]:
        """The files that gave no row, with the reasons, for a message."""
        return [f"{printable(name)}: {reason}" for name, reason in self.faults.items()]


def _decode_all(source: ImageFolder, spool: IO[bytes], reading: Reading) -> _Decoded:
    """Append each image to `spool`."""
    found = _Decoded()
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        # Pillow warns of odd metadata, which is no reason to stop; but between its limit and twice that it only warns
        # of a decompression bomb. The filters hold for all threads.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of formats that go one day
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(source.files), DECODED_AT_ONCE):
            some = source.files[start : start + DECODED_AT_ONCE]
            # Pillow decodes outside the interpreter's lock.
            decoded = pool.map(partial(_decode, source.path, reading=reading), some)
            for place, (name, row) in enumerate(zip(some, decoded, strict=True), start):
                if isinstance(row, str):
                    found.faults[name] = row
                else:
                    pixels, size = row
                    spool.write(np.ascontiguousarray(pixels).data)
                    found.shapes[place] = pixels.shape
                    found.see(size)
    spool.flush()
    return found


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


def _files_read(source: ImageFolder, decoded: _Decoded, colour: Colour, notes: Sequence[str]) -> FilesRead:
    """What became of the folder's files, and what the user should be told of it."""
    notes, left_out, total = list(notes), {}, len(decoded.shapes)
    if decoded.faults:
        left_out[UNREADABLE] = dict(Counter(map(suffix_of, decoded.faults)).most_common())
        notes.append(f"Left out {len(decoded.faults)} of {len(source.files)} images: "
                     f"{listed(decoded.reasons(), '; ')}")  # fmt: skip
    coloured = [printable(source.files[place]) for place, shape in decoded.shapes.items() if shape[2] == 3]
    if coloured and len(coloured) < total / 2:  # a stray file triples the work, and nobody would see why
        notes.append(f"All images become RGB because of {len(coloured)} among {total}: {listed(coloured)}")
    sizes = (decoded.smallest, decoded.largest) if decoded.smallest and decoded.largest else None
    counted = len(coloured) if colour == "pixels" else None  # else grey images may be among them
    return FilesRead(sizes, counted, left_out, source.splits is not None, notes)


def _decode(folder: Path, name: str, *, reading: Reading) -> tuple[Images, Size] | str:
    """One image, prepared: (h, w, 1) where it is grey, else (h, w, 3). And its own size; or why there is none."""
    try:
        picture, orientation = decode_any(_content(folder / name))
        with picture:
            size = picture.size if orientation < 5 else picture.size[::-1]  # the upper four turn by a quarter
            channels = _channels(picture, reading.colour)
            return array_of(prepare(picture, orientation, reading.preparation(), reading.size, channels)), size
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
    return None
