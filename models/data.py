"""Data sets -> checked splits of uint8 images.

A data set is one of the published sets (`mnist`, `fashion-mnist`, in IDX files), `digits` (scikit-learn's), a folder of
images, or an `.npz` file. Whatever it came from, it ends as three `Split`s of uint8 (n, h, w, c) with c = 1 or 3.
Every fault in a file is a `DataError`: one line for a person, which names the file.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import sys
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

DEFAULT_DATA_DIR = Path("data")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_IMAGE_SIZE = 1024  # pixels a side; a slip of the finger must not fill the memory
MIN_IMAGES = 10  # the fewest that 80/10/10 can divide
DOWNLOAD_TIMEOUT_S = 20.0
MAX_DOWNLOAD_BYTES = 64 * 2**20  # the largest published file has 26 MB

_SHOWN = 10  # files, sizes or labels named in one error
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_IDX_HEADER_BYTES = 16  # magic number and three dimensions


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


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))
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
        label_names=_DIGIT_NAMES,
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


def load_dataset(data: str, data_dir: Path | None, *, seed: int, image_size: int | None = None) -> Dataset:
    """Read, check and divide a data set.

    `mnist` and `fashion-mnist` are divided as in the paper: the first 50,000 training images to train, the last 10,000
    to validate, and the published test images. They keep the published order, and MNIST's goes by writer: shuffle
    before taking a part of a split. Every other set is divided 80/10/10 by a permutation.

    In a folder each file is one image: turned upright by its EXIF note, the first frame of an animation, transparency
    over white. Sub-folders, read to any depth, are classes in the order of their names; hidden files are not read. The
    set is grey where every file is (16 bits become 8), and RGB otherwise.

    Args:
        data: `mnist`, `fashion-mnist`, `digits`, a folder of images (sub-folders are class labels), or an `.npz` file
            (`images` uint8 (n, h, w) or (n, h, w, c); optional `labels`, integers 0 ... K-1). A name wins over a folder
            of the same name; `./mnist` is the folder.
        data_dir: Where the IDX files lie, as `<data_dir>/mnist/train-images-idx3-ubyte.gz` or without `.gz`; missing
            ones are downloaded to there. None is `data` in the current folder.
        seed: Of the permutation, 0 or more. Without effect on the published sets.
        image_size: Cut every image to its central square and resize it to this many pixels a side. None keeps sizes,
            which must then all be the same.

    Raises:
        DataError: What was named does not exist, is damaged, is not what it should be, or cannot be downloaded.
    """
    if image_size is not None and not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise DataError(f"image size must be from 1 to {MAX_IMAGE_SIZE} pixels, not {image_size}")
    try:
        if data in PUBLISHED:
            return _load_published(data, (data_dir or DEFAULT_DATA_DIR) / data, image_size)
        name, whole, label_names = _read_undivided(data, image_size)
    except OSError as error:  # no permission, a full disk: the message names the path
        raise DataError(f"{data}: {error}") from error
    return _divide(name, whole, label_names, seed)


def _read_undivided(data: str, image_size: int | None) -> tuple[str, Split, tuple[str, ...] | None]:
    """Name, rows and label names of a set that has no published split."""
    if data == "digits":
        return data, _resized(_read_digits(), image_size), _DIGIT_NAMES
    path = Path(data).expanduser()
    if data and path.is_dir():  # an unset shell variable is not the current folder
        return path.resolve().name, *_read_folder(path, image_size)
    if path.suffix.lower() == ".npz" and path.is_file():
        whole = _resized(_read_npz(path), image_size)
        return path.stem, whole, _numbered(whole.labels)
    problem = "is neither a folder nor an .npz file" if path.exists() else "is no data set, and no file or folder"
    raise DataError(f"{data} {problem}: give {', '.join(PUBLISHED)}, digits, a folder of images, or an .npz file")


# --- IDX files ---------------------------------------------------------------------------------------------------


def read_idx(path: Path) -> Images:
    """Read an IDX file of unsigned bytes with one to three dimensions, gzipped or not: told by content, not by name.

    The format: two zero bytes, a type (8 is unsigned byte), the number of dimensions, each dimension as a big-endian
    uint32, and then exactly as many bytes as they say. http://yann.lecun.com/exdb/mnist/ defined it.

    Returns:
        An array of the file's shape.

    Raises:
        DataError: Unreadable, not IDX, truncated, or longer than its header says. Memory stays within a small multiple
            of the file's true content, whatever the header claims.
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


def _load_published(name: str, folder: Path, image_size: int | None) -> Dataset:
    published = PUBLISHED[name]
    paths = _locate(published, folder)
    arrays = {file: _read_verified(paths[file], published.sha256[file]) for file in published.sha256}
    known = _resized(Split(arrays[_TRAIN_IMAGES][..., None], arrays[_TRAIN_LABELS].astype(np.int64)), image_size)
    test = _resized(Split(arrays[_TEST_IMAGES][..., None], arrays[_TEST_LABELS].astype(np.int64)), image_size)
    cut = len(known.images) - published.validation_images
    train, validation = _take(known, slice(None, cut)), _take(known, slice(cut, None))
    return Dataset(name, train, validation, test, published.label_names, _checksum(train, validation, test))


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
            _write_whole(target, raw)
            return []
    return reasons


def _fetch(url: str, sha256: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:  # noqa: S310 — from our own table
        raw: bytes = response.read(MAX_DOWNLOAD_BYTES)
    _require_sha256(_idx_content(raw, url), sha256, url)
    return raw


def _write_whole(target: Path, raw: bytes) -> None:
    """Appear under the final name only when whole: whoever stops us leaves no half file there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_path = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with partial_path.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(target)
    finally:
        partial_path.unlink(missing_ok=True)


# --- scikit-learn's digits ---------------------------------------------------------------------------------------


def _read_digits() -> Split:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 — slow to import, and an extra
    except ImportError as error:
        raise DataError("digits comes with scikit-learn, which is not installed: install the train extra") from error
    rows, labels = load_digits(return_X_y=True)  # float64 (1797, 64) of whole numbers 0 ... 16
    return Split(np.rint(rows * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int64))


# --- .npz files --------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> Split:
    arrays = _npz_arrays(path)
    if "images" not in arrays:
        raise DataError(f"{path}: has no array called images")
    images = _npz_images(path, arrays["images"])
    return Split(images, _npz_labels(path, arrays["labels"], len(images)) if "labels" in arrays else None)


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
            raise DataError(f"{path}: cannot be read as .npz: {_one_line(error)}") from error


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
        shown = _listed([str(label) for label in classes])
        raise DataError(f"{path}: labels must be 0 ... K-1, each of them used, found {shown}")
    return labels.astype(np.int64)


def _numbered(labels: Labels | None) -> tuple[str, ...] | None:
    return None if labels is None else tuple(str(label) for label in range(int(labels.max()) + 1))


# --- Folders of images -------------------------------------------------------------------------------------------


def _read_folder(folder: Path, image_size: int | None) -> tuple[Split, tuple[str, ...] | None]:
    """The images sorted by path, which makes the split the same wherever the folder is copied to; and label names."""
    loose, classes = _find_images(folder)
    if loose and classes:
        raise DataError(
            f"{folder}: has images both directly in it ({loose[0].name}) and in sub-folders ({next(iter(classes))}): "
            "use sub-folders for all, as class labels, or for none"
        )
    paths = loose or [path for members in classes.values() for path in members]
    if not paths:
        raise DataError(f"{folder}: no images in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
    images = _stack(folder, _decode_all(folder, paths, image_size))
    if loose:
        return Split(images, None), None
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(members) for members in classes.values()])
    return Split(images, labels), tuple(classes)


def _find_images(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Images directly in the folder, and those below each sub-folder. A sub-folder without any is no class."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    loose = [entry for entry in entries if _is_image(entry, folder)]
    classes = {
        entry.name: sorted(path for path in entry.rglob("*") if _is_image(path, entry))
        for entry in entries
        if entry.is_dir()
    }
    return loose, {name: members for name, members in classes.items() if members}


def _is_image(path: Path, root: Path) -> bool:
    # Hidden names are no pictures of the user's: macOS archives hold a "._cat.jpg" of metadata beside "cat.jpg".
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _decode_all(folder: Path, paths: Sequence[Path], image_size: int | None) -> list[Images]:
    Image.init()  # registers every format now: done lazily in the threads, it can race and miss one
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        # Between its limit and twice that, Pillow only warns of a decompression bomb. The filter holds for all threads.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        results = list(pool.map(partial(_decode, image_size=image_size), paths))
    rows = [result for result in results if not isinstance(result, str)]
    if len(rows) < len(paths):
        faults = [
            f"{path.relative_to(folder)}: {why}"
            for path, why in zip(paths, results, strict=True)
            if isinstance(why, str)
        ]
        raise DataError(f"{folder}: {len(faults)} of {len(paths)} images cannot be read: {_listed(faults, '; ')}")
    return rows


def _decode(path: Path, image_size: int | None) -> Images | str:
    """One image, (h, w, 1) where the file is grey and (h, w, 3) where not; or why there is none."""
    try:
        with Image.open(path) as image:
            plain = _grey_or_rgb(ImageOps.exif_transpose(image))
        return _fit(plain, image_size)
    except UnidentifiedImageError:
        return "not an image that Pillow knows"
    # On damaged files Pillow's decoders raise errors of almost every kind, and the user needs each file's name.
    except Exception as error:  # noqa: BLE001
        return _one_line(error)


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


def _fit(image: Image.Image, image_size: int | None) -> Images:
    """(h, w, c) of an image in mode L or RGB; with a size, of its central square, resized with antialiasing."""
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def _resized(split: Split, image_size: int | None) -> Split:
    if image_size is None:
        return split
    flat = split.images[..., 0] if split.images.shape[-1] == 1 else split.images  # Pillow's grey has no channel axis
    return Split(np.stack([_fit(Image.fromarray(row), image_size) for row in flat]), split.labels)


def _stack(folder: Path, rows: Sequence[Images]) -> Images:
    sizes = Counter((row.shape[1], row.shape[0]) for row in rows)
    if len(sizes) > 1:
        found = _listed([f"{width}x{height} ({count})" for (width, height), count in sizes.most_common()])
        raise DataError(f"{folder}: images of {len(sizes)} sizes: {found}: make them one size with --image-size")
    channels = max(row.shape[2] for row in rows)
    images = np.empty((len(rows), *rows[0].shape[:2], channels), np.uint8)
    for index, row in enumerate(rows):
        images[index] = row  # a grey row in an RGB set is repeated over the channels
    return images


# --- Dividing ----------------------------------------------------------------------------------------------------


def _divide(name: str, whole: Split, label_names: tuple[str, ...] | None, seed: int) -> Dataset:
    """A tenth each, rounded down, for validation and test, and the rest for training."""
    count = len(whole.images)
    if count < MIN_IMAGES:
        raise DataError(f"{name}: {count} images are too few to divide: {MIN_IMAGES} is the least")
    # Generator.permutation may change between numpy versions; a bit generator's own stream may not.
    order = np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")
    tenth = count // 10
    validation, test, train = (_take(whole, rows) for rows in np.split(order, [tenth, 2 * tenth]))
    return Dataset(name, train, validation, test, label_names, _checksum(train, validation, test))


def _take(split: Split, rows: slice | npt.NDArray[np.intp]) -> Split:
    return Split(split.images[rows], None if split.labels is None else split.labels[rows])


def _checksum(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        # Shapes first: without them, bytes could move between neighbours and hash the same.
        digest.update(f"{split.images.shape} {'unlabelled' if split.labels is None else 'labelled'}\n".encode())
        digest.update(np.ascontiguousarray(split.images).data)
        if split.labels is not None:
            digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    return digest.hexdigest()


# --- Messages ----------------------------------------------------------------------------------------------------


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
