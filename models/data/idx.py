"""IDX files, the format of MNIST: a strict reader, the published sets with their downloads, and anyone's own files."""

from __future__ import annotations

import hashlib
import http.client
import math
import re
import sys
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.data.dataset import DataError, Dataset, Images, Split, assembled, divide, take
from models.files import replace_file

DOWNLOAD_TIMEOUT_S = 20.0
MAX_DOWNLOAD_BYTES = 64 * 2**20  # the largest published file has 26 MB

_GZIP_MAGIC = b"\x1f\x8b"
_MAX_IDX_HEADER_BYTES = 16  # magic number and three dimensions


@dataclass(frozen=True)
class PublishedSet:
    """Where a set's four IDX files come from, and how they are known to be whole.

    Attributes:
        mirrors: URLs to which `<file>.gz` is appended, in the order they are tried.
        sha256: By file name without `.gz`, over the unpacked file: repacking with another gzip changes nothing.
        label_names: In order of the label.
        validation_images: How many of the last training images are the validation split.
    """

    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    label_names: tuple[str, ...]
    validation_images: int = 10_000


DIGIT_NAMES = tuple(str(digit) for digit in range(10))
_TRAIN_IMAGES, _TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_TEST_IMAGES, _TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

PUBLISHED = {
    "mnist": PublishedSet(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            _TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            _TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            _TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            _TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        label_names=DIGIT_NAMES,
    ),
    "fashion-mnist": PublishedSet(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        sha256={
            _TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            _TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            _TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            _TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        label_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
}


def read_idx(path: Path) -> Images:
    """Read an IDX file of unsigned bytes with one to three dimensions, gzipped or not: told by content, not by name.

    The format: two zero bytes, a type (8 is unsigned byte), the number of dimensions, each dimension as a big-endian
    uint32, and then exactly as many bytes as they say. http://yann.lecun.com/exdb/mnist/ defined it.

    Returns:
        An array of the file's shape.

    Raises:
        DataError: Unreadable, not IDX, truncated, or longer than its header says. Memory stays within a small multiple
            of the file's content, whatever the header claims.
    """
    return _idx_array(_idx_content(_read_bytes(path), str(path)))


def _idx_content(raw: bytes, source: str) -> bytes:
    """The unpacked file, header and all, of exactly the length that its header gives."""
    content = _gunzip_idx(raw, source) if raw.startswith(_GZIP_MAGIC) else raw
    expected = _idx_bytes(content, source)
    if len(content) < expected:
        raise DataError(f"{source}: truncated: its header says {expected} bytes, found {len(content)}")
    if len(content) > expected:
        raise DataError(f"{source}: more bytes than the {expected} its header says")
    return content


def _gunzip_idx(raw: bytes, source: str) -> bytes:
    # One stream, and strictly: the gzip module would skip zero bytes after the end. Unpacking stops one byte after the
    # length in the header, so a small file cannot fill the memory.
    stream = zlib.decompressobj(wbits=31)
    try:
        head = stream.decompress(raw, _MAX_IDX_HEADER_BYTES)
        expected = _idx_bytes(head, source)
        rest_bytes = min(max(1, expected + 1 - len(head)), sys.maxsize)  # 0 would mean no limit
        content = head + stream.decompress(stream.unconsumed_tail, rest_bytes)
    except zlib.error as error:
        raise DataError(f"{source}: damaged gzip data ({error})") from error
    if stream.unused_data:
        raise DataError(f"{source}: {len(stream.unused_data)} bytes after the end of the gzip data")
    if not stream.eof and len(content) <= expected:
        raise DataError(f"{source}: truncated gzip data")
    return content


def _idx_bytes(content: bytes, source: str) -> int:
    """How long the header says the unpacked file is."""
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{source}: not an IDX file")
    kind, dimensions = content[2], content[3]
    if kind != 8 or not 1 <= dimensions <= 3:
        raise DataError(
            f"{source}: expected IDX of unsigned bytes (type 8) in 1 to 3 dimensions, found type {kind} in {dimensions}"
        )
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise DataError(f"{source}: truncated within the IDX header")
    shape = _idx_shape(content)
    if 0 in shape:
        raise DataError(f"{source}: empty: its shape is {shape}")
    return header_bytes + math.prod(shape)


def _idx_shape(content: bytes) -> tuple[int, ...]:
    return tuple(int(size) for size in np.frombuffer(content, ">u4", count=content[3], offset=4))


def _idx_array(content: bytes) -> Images:
    shape = _idx_shape(content)
    # A copy, because torch.from_numpy warns of arrays that cannot be written.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


# --- Published sets ----------------------------------------------------------------------------------------------


def load_published(name: str, folder: Path) -> Dataset:
    """One of `PUBLISHED`, from its files in a folder; missing ones are downloaded to there.

    Raises:
        DataError: A file is damaged, or not the published one, or cannot be had.
    """
    published = PUBLISHED[name]
    paths = _locate(published, folder)
    arrays = {file: _read_verified(paths[file], published.sha256[file]) for file in published.sha256}
    known = Split(arrays[_TRAIN_IMAGES][..., None], arrays[_TRAIN_LABELS].astype(np.int64))
    test = Split(arrays[_TEST_IMAGES][..., None], arrays[_TEST_LABELS].astype(np.int64))
    cut = len(known.images) - published.validation_images
    parts = [take(known, slice(None, cut)), take(known, slice(cut, None)), test]
    return assembled(name, parts, published.label_names)


def is_idx(path: Path) -> bool:
    """Whether a file is named as IDX files are: `…-idx3-ubyte`, perhaps with `.gz`."""
    return bool(re.search(r"idx\d-ubyte(\.gz)?$", path.name))


def read_pair(path: Path, seed: int) -> Dataset:
    """Someone's own IDX file of images, and its labels where a file beside it has them, divided by `seed`.

    `letters-images-idx3-ubyte.gz` has its labels in `letters-labels-idx1-ubyte`, with `.gz` or without. The labels that
    occur become classes in their order, each named by its number.

    Raises:
        DataError: A file is damaged, has another number of dimensions, or there are not as many labels as images.
    """
    images = read_idx(path)
    if images.ndim != 3:
        raise DataError(f"{path}: images have three dimensions (n, h, w), found {images.ndim}")
    plain = path.name.removesuffix(".gz")
    name = plain.replace("-images", "").replace("-idx3-ubyte", "") or plain
    beside = plain.replace("images", "labels").replace("idx3", "idx1")
    labels_path = None if beside == plain else _present(path.parent, beside)
    if labels_path is None:
        return divide(name, Split(images[..., None], None), None, seed)
    numbers = read_idx(labels_path)
    if numbers.shape != (len(images),):
        raise DataError(f"{labels_path}: expected {len(images)} labels, one an image, found shape {numbers.shape}")
    used, labels = np.unique(numbers, return_inverse=True)
    return divide(name, Split(images[..., None], labels.astype(np.int64)), tuple(map(str, used)), seed)


def _read_verified(path: Path, sha256: str) -> Images:
    content = _idx_content(_read_bytes(path), str(path))
    _require_sha256(content, sha256, str(path))
    return _idx_array(content)


def _require_sha256(content: bytes, expected: str, source: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(f"{source}: not the published file: sha256 of the unpacked data is {found}, not {expected}")


def _locate(published: PublishedSet, folder: Path) -> dict[str, Path]:
    """Each file's path, after downloading what is missing."""
    paths = {file: _present(folder, file) or folder / f"{file}.gz" for file in published.sha256}
    missing = [file for file, path in paths.items() if not path.exists()]
    for done, file in enumerate(missing):
        reasons = _download(published, file, paths[file])
        if reasons:
            wanted = ", ".join(f"{other}.gz ({published.sha256[other]})" for other in missing[done:])
            raise DataError(
                f"{paths[file]} is missing and no mirror gave it ({'; '.join(reasons)}); put into {folder} these files "
                f"(sha256 of each when unpacked): {wanted}"
            )
    return paths


def _present(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / f"{file}.gz", folder / file) if path.exists()), None)


def _download(published: PublishedSet, file: str, target: Path) -> list[str]:
    """Try the mirrors in turn. Returns why each failed, or nothing once the file is in its place."""
    reasons = []
    for mirror in published.mirrors:
        url = f"{mirror}{file}.gz"
        print(f"Downloading {url} to {target}", file=sys.stderr, flush=True)
        try:
            raw = _fetch(url, published.sha256[file])
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{url}: {error}")
        except DataError as error:  # names the URL itself
            reasons.append(str(error))
        else:
            replace_file(target, raw)
            return []
    return reasons


def _fetch(url: str, sha256: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310 — from our own table
        raw: bytes = response.read(MAX_DOWNLOAD_BYTES)
    _require_sha256(_idx_content(raw, url), sha256, url)
    return raw
