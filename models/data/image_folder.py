"""A folder of images, in whatever files, sizes and modes -> a cached entry of uint8 rows, in bounded memory."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from models.data.dataset import (
    MIN_IMAGES,
    DataError,
    FilesRead,
    Images,
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
    readable_formats,
    suffix_of,
)
from models.data.image_cache import fit, write_entry

DECODED_AT_ONCE = 256  # images in memory while a folder is read

Shape = tuple[int, int, int]  # height, width, channels
Size = tuple[int, int]  # width, height


def write_folder(entry: Path, source: ImageFolder, *, image_size: int | None, seed: int, skip_bad: bool) -> None:
    """Decode every file once and write the divided whole as a cached entry.

    Decoded images first go to a temporary file, in the order of their names, because the number of channels and the
    files to leave out are known only at the end.

    Raises:
        DataError: A file cannot be read (all are named) unless `skip_bad`; sizes differ, and none is asked for; too few
            are left; or the folder changed meanwhile.
        OSError: The disk.
    """
    name = printable(source.path.resolve().name)
    with tempfile.TemporaryFile(dir=entry) as spool:
        decoded = _decode_all(source, spool, image_size)
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
        files = _files_read(source, decoded, made_up)
        write_entry(entry, name, _in_order(spool, shapes, order), (train, validation, test), labels, names, files)
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


def _decode_all(source: ImageFolder, spool: IO[bytes], image_size: int | None) -> _Decoded:
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
            decoded = pool.map(partial(_decode, source.path, image_size=image_size), some)
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


def _files_read(source: ImageFolder, decoded: _Decoded, notes: Sequence[str]) -> FilesRead:
    """What became of the folder's files, and what the user should be told of it."""
    notes, left_out = list(notes), {}
    if decoded.faults:
        left_out[UNREADABLE] = dict(Counter(map(suffix_of, decoded.faults)).most_common())
        notes.append(f"Left out {len(decoded.faults)} of {len(source.files)} images: "
                     f"{listed(decoded.reasons(), '; ')}")  # fmt: skip
    coloured = [printable(source.files[place]) for place, shape in decoded.shapes.items() if shape[2] == 3]
    if coloured and len(coloured) < len(decoded.shapes) / 2:  # a stray file triples the work, and nobody would see why
        total = len(decoded.shapes)
        notes.append(f"All images become RGB because of {len(coloured)} among {total}: {listed(coloured)}")
    sizes = (decoded.smallest, decoded.largest) if decoded.smallest and decoded.largest else None
    return FilesRead(sizes, len(coloured), left_out, source.splits is not None, notes)


def _decode(folder: Path, name: str, *, image_size: int | None) -> tuple[Images, Size] | str:
    """One image, (h, w, 1) where the file is grey and (h, w, 3) where not, and its own size; or why there is none."""
    try:
        with Image.open(folder / name, formats=readable_formats()) as image:  # an EPS would start a program
            plain = _grey_or_rgb(ImageOps.exif_transpose(image))
        return fit(plain, image_size), plain.size
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    # On damaged files Pillow's decoders raise errors of almost every kind, and the user needs each file's name.
    except Exception as error:  # noqa: BLE001
        return one_line(error)


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """A copy in mode L or RGB."""
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no fixed range: save it with 8 or 16 bits")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    opaque = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert(mode)
