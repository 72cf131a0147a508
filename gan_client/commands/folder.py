"""A folder of drawn images: what is to be in it, what is there already, and files that are whole or not there.

`manifest.json` says what was asked for, with the seed and the bundle's version that it came to. Image i of these is
always the same, so a folder that is half full is filled by drawing what is missing.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from gan_client.core.images import png_file
from gan_client.core.paging import Span
from gan_client.results import UInt8

MANIFEST = "manifest.json"


class FolderError(Exception):
    """The folder holds something else."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that decides the files.

    Attributes:
        asked_bundle: As it was asked for; `bundle` is the version that this came to.
        labels: Classes by index or name, which take turns.
        shard_size: Images in an npy file.
    """

    bundle: str
    asked_bundle: str | None
    seed: int
    first_index: int
    count: int
    labels: list[int | str] | None
    truncation: float
    scale: int
    files: Literal["png", "npy"]
    shard_size: int
    format: int = 1


class Folder:
    """The folder of one manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._shard: tuple[BinaryIO, Path] | None = None

    def missing(self) -> list[Span]:
        """The spans of images, counted from 0, whose files are not there: runs of PNG files, or whole shards."""
        for killed in self.path.glob(".*.part"):  # what a run left that could not clean up any more
            killed.unlink()
        there = self._there()
        manifest = self.manifest
        if manifest.files == "npy":
            starts = range(0, manifest.count, manifest.shard_size)
            spans = [(start, min(manifest.shard_size, manifest.count - start)) for start in starts]
            return [span for span in spans if self._name(span[0]) not in there]
        return list(_runs(number for number in range(manifest.count) if self._name(number) not in there))

    def _there(self) -> set[str]:
        """The names of files; after a crash of the machine a file that was not yet written out is empty."""
        with os.scandir(self.path) as entries:
            return {entry.name for entry in entries if entry.stat().st_size}

    def _name(self, number: int) -> str:
        """A file is named by the index of its (first) image."""
        return f"{self.manifest.first_index + number:012d}.{self.manifest.files}"

    def write(self, span: Span, images: UInt8) -> None:
        """Write the images of a span. Spans come in order, and do not cross the end of a shard."""
        if self.manifest.files == "npy":
            self._write_rows(span, images)
            return
        for number, row in enumerate(images, span[0]):
            image = Image.fromarray(row.squeeze(2) if row.shape[2] == 1 else row)
            _replace(self.path / self._name(number), png_file(image))

    def _write_rows(self, span: Span, images: UInt8) -> None:
        number, place = divmod(span[0], self.manifest.shard_size)
        start = number * self.manifest.shard_size
        rows = min(self.manifest.shard_size, self.manifest.count - start)
        if self._shard is None:
            temporary = _temporary(self.path / self._name(start))
            self._shard = temporary.open("wb"), temporary
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *images.shape[1:])}
            np.lib.format.write_array_header_1_0(self._shard[0], header)
        file, temporary = self._shard
        file.write(images.tobytes())
        if place + len(images) == rows:
            _sync_and_close(file)
            temporary.replace(self.path / self._name(start))
            self._shard = None

    def close(self) -> None:
        """Remove the shard that was begun."""
        if self._shard:
            self._shard[0].close()
            self._shard[1].unlink()
            self._shard = None


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a folder; None where there is no folder, or nothing in it.

    Raises:
        FolderError: Other files are there, or a manifest of another kind.
    """
    try:
        written = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        if path.is_dir() and next(path.iterdir(), None):
            raise FolderError(f"{path} holds other files: give a new folder") from None
        return None
    except ValueError:
        raise FolderError(f"{path / MANIFEST} can't be read") from None
    try:
        manifest = Manifest(**written)
    except TypeError:
        raise FolderError(f"{path / MANIFEST} is not one of this command") from None
    if manifest.format != 1:
        raise FolderError(f"{path / MANIFEST} has format {manifest.format}, of another gan-client")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make the folder, with its manifest."""
    path.mkdir(parents=True, exist_ok=True)
    _replace(path / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n", is_synced=True)


def differences(manifest: Manifest, asked: dict[str, Any]) -> list[str]:
    """What is asked for and differs from a folder's manifest; None asks for whatever it has."""
    return [
        f"{name} is {getattr(manifest, name)!r} there, not {value!r}"
        for name, value in asked.items()
        if value is not None and getattr(manifest, name) != value
    ]


def _runs(numbers: Iterable[int]) -> Iterator[Span]:
    """Neighbouring numbers as (first, how many)."""
    start = end = -1
    for number in numbers:
        if number != end:
            if end > start:
                yield start, end - start
            start = number
        end = number + 1
    if end > start:
        yield start, end - start


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _replace(path: Path, content: bytes, *, is_synced: bool = False) -> None:
    """Write a file beside its place and rename it there.

    A hundred thousand small files are not synced one by one: that takes longer than drawing them.
    """
    temporary = _temporary(path)
    try:
        file = temporary.open("wb")
        with file:
            file.write(content)
            if is_synced:
                _sync_and_close(file)
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
