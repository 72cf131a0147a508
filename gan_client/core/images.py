"""Makes request bodies of what callers have images as: paths, file contents, PIL images, arrays."""

import io
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gan_client.core.replies import NPY

Array = NDArray[Any]
ImageLike = str | os.PathLike[str] | bytes | Image.Image | Array
Images = ImageLike | Iterable[ImageLike]

MAX_UPLOAD_IMAGES = 256
MAX_UPLOAD_BYTES = 2**23  # of one request, unless a single image is larger
_PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}


class Uploads:
    """Images that go to the service, as many in one request as are good for both sides."""

    def __init__(self, images: Images) -> None:
        self._stack, self._items = _sort(images)
        self._sizes = [self._stack[0].nbytes] * len(self._stack) if self._stack is not None else _sizes(self._items)

    def __len__(self) -> int:
        """Images."""
        return len(self._sizes)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first image, images) of each request."""
        start = size = 0
        for index, more in enumerate(self._sizes):
            if index > start and (index - start == MAX_UPLOAD_IMAGES or size + more > MAX_UPLOAD_BYTES):
                yield start, index - start
                start, size = index, 0
            size += more
        if start < len(self):
            yield start, len(self) - start

    def body(self, start: int, count: int) -> tuple[bytes, str]:
        """A request's body with these images, and its media type.

        Raises:
            OSError: A file can't be read.
        """
        if self._stack is not None:
            return npy_file(self._stack[start : start + count]), NPY
        return _form([_file(item) for item in self._items[start : start + count]])


def _sort(images: Images) -> tuple[Array | None, Sequence[ImageLike]]:
    """One array of many images, or a list of single ones."""
    if isinstance(images, np.ndarray) and images.ndim > 2:
        return _checked(images, (3, 4)), ()
    if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
        return None, [images]
    return None, list(images)


def _checked(images: Array, dimensions: tuple[int, ...]) -> Array:
    if images.dtype != np.uint8 or images.ndim not in dimensions or not images.size:
        raise ValueError(
            f"an array of {images.dtype} with shape {images.shape}: images are uint8 arrays (h, w) or (h, w, c), "
            "and several in one array are (n, h, w) or (n, h, w, c)"
        )
    return images


def _sizes(items: Sequence[ImageLike]) -> list[int]:
    """About how many bytes each image will have in a request."""
    return [_size(item) for item in items]


def _size(item: ImageLike) -> int:
    match item:
        case bytes():
            return len(item)
        case np.ndarray():
            return _checked(item, (2, 3)).nbytes
        case Image.Image():
            return item.width * item.height * len(item.getbands())
        case str() | os.PathLike():
            return Path(item).stat().st_size
    raise TypeError(f"{type(item).__name__} is no image: give a path, a file's bytes, a PIL image or an array")


def _file(item: ImageLike) -> bytes:
    match item:
        case bytes():
            return item
        case np.ndarray():
            return png_file(Image.fromarray(item.squeeze(2) if item.ndim == 3 and item.shape[2] == 1 else item))
        case Image.Image():
            return png_file(item if item.mode in _PNG_MODES else item.convert("RGB"))
        case _:
            return Path(item).read_bytes()


def png_file(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def npy_file(array: Array) -> bytes:
    """An array in NumPy's format."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _form(files: Sequence[bytes]) -> tuple[bytes, str]:
    """Files as multipart/form-data. The boundary is random, so that no file can hold it on purpose."""
    boundary = secrets.token_hex(16)
    parts = []
    for number, content in enumerate(files):
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{number}"\r\n\r\n'
        parts += [head.encode(), content, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def to_images(array: NDArray[np.uint8]) -> list[Image.Image]:
    """The rows of an array (n, h, w, c) as images."""
    return [Image.fromarray(row.squeeze(2) if row.shape[2] == 1 else row) for row in array]
