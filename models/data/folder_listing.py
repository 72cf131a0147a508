"""Which files of a folder are its images, their classes and splits, and what is left out: names, no pixels."""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.data.dataset import DataError, left_out_words, printable
from models.images.decoding import readable_formats

STATED_FILES = 10_000  # files whose time and size are looked at for a fingerprint
COUNTED_SUFFIXES = 50  # for each reason; `scan.0001` … would have thousands, and the rest are counted together
OTHER_SUFFIXES = "others"

# Their files begin with bytes that other files begin with too: a file without a suffix is not taken for one of these.
UNSURE_BEGINNINGS = frozenset({"CUR", "DIB", "FLI", "GBR", "ICO", "PCX", "PPM", "XBM"})

TRAIN, VALIDATION, TEST = SPLITS = range(3)
SPLIT_FOLDERS = {"train": TRAIN, "val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "test": TEST}

# Why files are left out.
NO_IMAGE_BY_NAME = "no image by its name"
NO_IMAGE_BY_CONTENT = "no image by its first bytes"
UNREADABLE = "unreadable"
UNOPENED = "not to be opened"
NO_FILE = "a broken link or no file"
LINKED_FOLDER = "a link to a folder further down"

LeftOut = Mapping[str, Mapping[str, int]]  # why, and how many files by suffix


@dataclass(frozen=True)
class ImageFolder:
    """The image files of a folder, sorted by path, which makes the division the same wherever it is copied to.

    Attributes:
        path: The folder.
        mode: How it was listed, `auto` or `none`.
        files: Relative to it.
        splits: For each file TRAIN, VALIDATION or TEST; None where the folders don't say.
        labels: For each file an index into `label_names`; None where the images lie in no folders of classes.
        left_out: The files that are not among them.
        fingerprint: Of the names, the sub-folders' times, and the times and sizes of the files. Of many files only some
            ten thousand are asked, evenly spread, because a network disk answers slowly.
    """

    path: Path
    mode: str
    files: tuple[str, ...]
    splits: npt.NDArray[np.int64] | None
    labels: npt.NDArray[np.int64] | None
    label_names: tuple[str, ...] | None
    left_out: LeftOut
    fingerprint: str


def find_images(path: Path, mode: str = "auto") -> ImageFolder:
    """List a folder. Sub-folders, read to any depth, are classes; one without any image is none.

    Where they are called train, val, valid, validation or test, with train and one more among them, they are splits,
    and the sub-folders in them are classes.

    Args:
        path: The folder.
        mode: `auto`, or `none`: then folders of those names are classes like others.

    Raises:
        DataError: There are no images, or some in sub-folders and some not; two folders are of one split; or a class
            has a name that is no UTF-8.
    """
    found = _walk(path)
    files = sorted(found.files, key=lambda file: file.split("/"))
    if not files:
        raise DataError(f"{path}: {_why_empty(path, found.counts())}")
    _require_one_level(path, files)
    split_of = _split_folders(path, files) if mode == "auto" else {}
    within = [file.partition("/")[2] for file in files] if split_of else files
    if split_of:
        _require_one_level(path, within, files)
    labels, names = _classes(path, within)
    return ImageFolder(
        path,
        mode,
        tuple(files),
        np.array([split_of[file.partition("/")[0]] for file in files], np.int64) if split_of else None,
        labels,
        names,
        found.counts(),
        _fingerprint(path, files, found.times),
    )


def in_label_order(names: Iterable[str]) -> list[str]:
    """The order of classes: by value where all names are whole numbers, else by code point.

    Equal numbers, as 01 and 1, are two classes, which stand by code point.
    """
    ordered = sorted(names)
    if all(re.fullmatch("-?[0-9]+", name) for name in ordered):
        ordered.sort(key=int)  # names of files are short, so this takes no time
    return ordered


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of the images that count, in small letters, with their dots."""
    known = {*readable_formats(), "MPO"}  # opened as a JPEG of several frames
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in known)


# --- Files -------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What a walk has seen: images, the folders' times, and how many files it left out, by reason and suffix."""

    files: list[str] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)

    def counts(self) -> dict[str, dict[str, int]]:
        """The files that were left out, by reason and then by suffix."""
        by_reason: dict[str, dict[str, int]] = {}
        for (reason, suffix), count in self.left_out.most_common():
            counts = by_reason.setdefault(reason, {})
            key = suffix if len(counts) < COUNTED_SUFFIXES else OTHER_SUFFIXES
            counts[key] = counts.get(key, 0) + count
        return by_reason


def _walk(path: Path) -> _Found:
    found, waiting = _Found(), [""]
    while waiting:
        prefix = waiting.pop()
        found.times.append(f"{prefix} {(path / prefix).stat().st_mtime_ns}")
        with os.scandir(path / prefix) as entries:
            for entry in entries:
                # Hidden files are not the user's pictures: macOS archives hold a "._cat.jpg" of metadata beside
                # "cat.jpg".
                if entry.name.startswith("."):
                    continue
                # A link to a class's folder is followed. One further down could lead round in a circle.
                if _is_folder(entry, follow=not prefix):
                    waiting.append(f"{prefix}{entry.name}/")
                elif reason := _why_not(entry):
                    found.left_out[reason, suffix_of(entry.name)] += 1
                else:
                    found.files.append(prefix + entry.name)
    return found


def suffix_of(name: str) -> str:
    """In small letters, with its dot; empty where there is none."""
    return printable(os.path.splitext(name)[1].lower())  # noqa: PTH122 — a Path for each file takes longer


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a link to itself
        return False


def _why_not(entry: os.DirEntry[str]) -> str | None:
    """Why an entry is left out; None for an image."""
    suffix = suffix_of(entry.name)
    if suffix and suffix not in image_suffixes():
        return NO_IMAGE_BY_NAME
    if _is_folder(entry, follow=True):
        return LINKED_FOLDER
    try:
        if not entry.is_file():
            return NO_FILE
        return None if suffix or _begins_as_image(Path(entry.path)) else NO_IMAGE_BY_CONTENT
    except OSError:
        return UNOPENED


def _begins_as_image(path: Path) -> bool:
    """Whether a file's first bytes are those of an image, by Pillow's own tests."""
    with path.open("rb") as file:
        beginning = file.read(16)  # as many as Pillow looks at
    for name in readable_formats():
        accepts = Image.OPEN[name][1]
        if accepts is None or name in UNSURE_BEGINNINGS:
            continue
        try:
            if accepts(beginning) is True:
                return True
        except (SyntaxError, IndexError, TypeError, struct.error):  # of files that are shorter, as in Image.open
            continue
    return False


def _why_empty(path: Path, left_out: LeftOut) -> str:
    idx = next((entry.name for entry in sorted(path.iterdir()) if "-idx3-ubyte" in entry.name), None)
    if idx:
        return f"no images in it; for IDX files, name the one with the images: {path / idx}"
    others = "".join(f"; {words}" for words in left_out_words(left_out))
    return f"no images in it (.png .jpg .webp .gif .bmp .tif and what else Pillow decodes by itself){others}"


def _fingerprint(path: Path, files: Sequence[str], times: Sequence[str]) -> str:
    stated = []
    for file in files[:: -(-len(files) // STATED_FILES)]:
        found = (path / file).stat()
        stated.append(f"{found.st_size} {found.st_mtime_ns}")
    everything = "\n".join((*files, *sorted(times), *stated))
    return hashlib.sha256(everything.encode("utf-8", "surrogatepass")).hexdigest()


# --- Splits and classes ------------------------------------------------------------------------------------------


def _split_folders(path: Path, files: Sequence[str]) -> dict[str, int]:
    """The split of each sub-folder, where they are splits; empty where not."""
    folders = sorted({file.partition("/")[0] for file in files if "/" in file})
    split_of = {folder: SPLIT_FOLDERS.get(folder.lower()) for folder in folders}
    found = {folder: split for folder, split in split_of.items() if split is not None}
    if len(found) < len(folders) or len(found) < 2 or TRAIN not in found.values():
        return {}
    if len(set(found.values())) < len(found):
        raise DataError(f"{path}: {', '.join(folders)}: two of these are the same split: make them one folder "
                        "(or --splits none: then they are classes)")  # fmt: skip
    return found


def _require_one_level(path: Path, files: Sequence[str], full: Sequence[str] | None = None) -> None:
    """Images lie in folders of classes, or none of them does."""
    shown = full or files
    loose = [place for place, file in enumerate(files) if "/" not in file]
    if loose and len(loose) < len(files):
        deeper = next(place for place, file in enumerate(files) if "/" in file)
        raise DataError(
            f"{path}: has images both directly in {'a split' if full else 'it'} ({printable(shown[loose[0]])}) and in "
            f"sub-folders ({printable(shown[deeper].rpartition('/')[0])}): "
            "use sub-folders for all, as class labels, or for none"
        )


def _classes(path: Path, files: Sequence[str]) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...] | None]:
    """The label of each file, and the names of the labels in order."""
    if "/" not in files[0]:
        return None, None
    folders = [file.partition("/")[0] for file in files]
    names = in_label_order(set(folders))
    for name in names:
        # The names go into manifests, pages and replies, all of them UTF-8.
        if name != name.encode("utf-8", "replace").decode():
            raise DataError(f"{path}: the name of the class folder {printable(name)} is no UTF-8: rename it")
    index = {name: place for place, name in enumerate(names)}
    return np.array([index[folder] for folder in folders], np.int64), tuple(names)
