"""Images that were decoded, resized and divided once, kept on disk as one array that later starts map into memory.

    <cache>/gan-service/images/<source and options>/<fingerprint>/
        images.npy    uint8 (n, h, w, c): train, validation and test one after the other
        labels.npy    int64 (n,), where there are labels
        metadata.json name, label names, sizes of the three parts, checksum, preparation, what became of the files

`<cache>` is XDG_CACHE_HOME, or ~/.cache. An entry is whole or not there, and replaces the source's earlier one. All of
it may be deleted at any time: the next start decodes again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from models.data.dataset import Dataset, FilesRead, Images, Labels, Split, checksum_of
from models.files import cache_folder, replaced_folder
from models.images.preparation import Preparation, prepare

_FORMAT = 2  # of an entry, or of what decoding does: another number makes every entry anew
_ABANDONED_S = 24 * 3600  # no build takes a day: an unfinished entry of this age was left by a kill


def cached(source: str, options: Mapping[str, object], fingerprint: str, build: Callable[[Path], None]) -> Dataset:
    """The entry of a source, written by `build` where it is missing.

    Args:
        source: What was read, such as a path.
        options: Everything else that decides the pixels and their order; JSON.
        fingerprint: Differs as soon as the source has changed. One entry is kept for a source with its options.
        build: Writes an entry by `write_entry`.

    Raises:
        OSError: The cache cannot be written.
    """
    identity = json.dumps([_FORMAT, PIL.__version__, source, options], sort_keys=True)
    home = cache_folder() / "images" / _digest(identity)
    place = home / _digest(fingerprint)
    found = _read_entry(place)
    if found is not None:
        return found
    try:
        with replaced_folder(place) as entry:
            build(entry)
    except OSError as error:
        if error.filename is None:  # a write, as on a full disk: the source's name would lead to the wrong one
            raise OSError(error.errno, error.strerror, str(home)) from error
        raise
    _drop_others(home, place)
    made = _read_entry(place)
    if made is None:
        raise OSError(None, "cannot be read back", str(place))
    return made


def write_entry(
    folder: Path,
    name: str,
    rows: Iterable[Images],
    parts: tuple[int, int, int],
    labels: Labels | None,
    label_names: Sequence[str] | None,
    preparation: Preparation | None,
    files: FilesRead = FilesRead(),  # noqa: B008 — it is frozen
) -> None:
    """Write rows (h, w, c) of one shape, in the order train, validation, test, of which there are `parts`."""
    with (folder / "images.npy").open("wb") as file:
        for index, row in enumerate(rows):
            if index == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (sum(parts), *row.shape)}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(row).data)  # a full disk is an error here; in a mapped file it would kill
        file.flush()
        os.fsync(file.fileno())
    if labels is not None:
        np.save(folder / "labels.npy", labels)
    how = None if preparation is None else asdict(preparation)
    metadata = {"name": name, "label_names": label_names, "parts": parts, "preparation": how, "files": asdict(files)}
    checksum = checksum_of(*_parts_of(folder, parts))
    (folder / "metadata.json").write_text(json.dumps({**metadata, "checksum": checksum}), "utf-8")


def array_of(image: Image.Image) -> Images:
    """(h, w, c) of an image in mode L or RGB. Pillow's grey has no channel axis."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def write_resized(folder: Path, dataset: Dataset, image_size: int) -> None:
    """Write the entry of a data set with every image brought to this size by its preparation."""
    how, size = dataset.preparation or Preparation(), (image_size, image_size)
    rows = (
        array_of(prepare(Image.fromarray(row[..., 0] if row.shape[-1] == 1 else row), 1, how, size, row.shape[-1]))
        for split in dataset.splits
        for row in split.images
    )
    labels = [split.labels for split in dataset.splits if split.labels is not None]
    train, validation, test = (len(split.images) for split in dataset.splits)
    whole = np.concatenate(labels) if labels else None
    write_entry(folder, dataset.name, rows, (train, validation, test), whole, dataset.label_names, how)


def _read_entry(place: Path) -> Dataset | None:
    """What lies there, or None where that is nothing, or not whole."""
    try:
        metadata = json.loads((place / "metadata.json").read_bytes())
        train, validation, test = _parts_of(place, metadata["parts"])
        files = FilesRead(**metadata["files"])
        how = metadata["preparation"] and Preparation(**metadata["preparation"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    names = metadata["label_names"]
    label_names = None if names is None else tuple(names)
    return Dataset(metadata["name"], train, validation, test, label_names, metadata["checksum"], files, how)


def _parts_of(folder: Path, parts: Sequence[int]) -> list[Split]:
    # Copy on write: torch warns of arrays that cannot be written.
    images = np.lib.format.open_memmap(folder / "images.npy", mode="c")
    labels = np.load(folder / "labels.npy") if (folder / "labels.npy").exists() else None
    ends = np.cumsum(parts)
    if len(images) != ends[-1]:
        raise ValueError("metadata and images differ")
    cuts = [slice(end - count, end) for end, count in zip(ends, parts, strict=True)]
    return [Split(images[cut], None if labels is None else labels[cut]) for cut in cuts]


def _drop_others(home: Path, place: Path) -> None:
    """Delete the source's earlier entry, and what a kill left. A process that has it mapped keeps its pages."""
    for other in home.iterdir():
        unfinished = other.name.startswith(".")
        if other != place and not (unfinished and time.time() - other.stat().st_mtime < _ABANDONED_S):
            shutil.rmtree(other, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
