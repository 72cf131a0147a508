"""Uploaded bytes to images: what may be sent, checked before it is decoded, and brought into a bundle's shape.

Works in steps, for slices.py. Nothing that a client sends may raise anything but a ServiceError, or take memory in
proportion to what it merely claims.
"""

import base64
import binascii
import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from python_multipart.multipart import MultipartParser, parse_options_header

from models.sampler import UInt8
from models.spec import ImageSpec
from service.errors import Invalid, Malformed, ServiceError, TooLarge
from service.slices import Steps

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # there for type checkers only

NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
UPLOAD_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", MULTIPART, NPY)
# Pillow reads some fifty formats; only these are opened, whatever the body is called.
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MAX_NPY_HEADER_BYTES, _MAX_LENGTH = 4096, 2**63
# What is larger takes so long, and so much of it without the interpreter, that it is worth a thread's hand-over: by the
# bytes of a source, since a file can unpack to a thousand times as many before its size is known, and by its pixels.
_SMALL_BYTES, _SMALL_PIXELS = 2**14, 2**16
# And these make a small file take as long as a large one: text and profiles that are compressed, EXIF, of which Pillow
# may read and write every value to turn a picture, and a JPEG's scans without number, of a few bytes each, where it is
# progressive or arithmetically coded.
_LONG_PARTS = re.compile(rb"zTXt|iTXt|iCCP|eXIf|EXIF")
_LONG_JPEG_PARTS = re.compile(rb"Exif|\xff[\xc2\xc6\xc9\xca\xcd\xce]")
_MAX_CONTENT_TYPE = 1024
_PIECE_BYTES = 2**14  # of a form, split in one step

Source = TypeVar("Source", bytes, bytearray, str, UInt8)

log = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """One uploaded image in a bundle's shape.

    Attributes:
        pixels: uint8 (h, w, c).
        converted: Whether size or colour had to be changed to get there.
    """

    pixels: UInt8
    converted: bool


@dataclass(frozen=True)
class Upload:
    """A request's images in a bundle's shape, in order, and why others of them could not be read.

    Attributes:
        pixels: uint8 (n, h, w, c); the n images that could be read.
        converted: Of each of these, whether size or colour had to be changed to get there.
        errors: Of each of the others, by its place in the request.
    """

    pixels: UInt8
    converted: Sequence[bool]
    errors: Mapping[int, ServiceError]

    def __len__(self) -> int:
        return len(self.pixels) + len(self.errors)


@dataclass(frozen=True)
class Limits:
    """What images become, and what is too much.

    Attributes:
        image: The shape that every image is brought into.
        max_pixels: Of one image as it was sent; compared with its header, before it is decoded.
        max_count: Images in one request.
        still_wanted: Asked before each image; raises DeadlinePassed where nobody waits for the answer any more. A
            small file can hold a large image, and a body many of them.
    """

    image: ImageSpec
    max_pixels: int
    max_count: int
    still_wanted: Callable[[], object]


def decode_upload(body: bytes, content_type: str, limits: Limits) -> Steps[Upload]:
    """A body of one of `UPLOAD_TYPES` as images. `content_type` is the header, parameters included.

    Raises:
        Malformed, Invalid, TooLarge: As `split_multipart` and `decode_npy` say. A file that can't be read is no such
            error, but gives its own in its place.
        DeadlinePassed: From `still_wanted`.
    """
    kind = content_type.split(";", maxsplit=1)[0].strip().lower()
    if kind == NPY:
        return (yield from decode_npy(body, limits))
    if kind == MULTIPART:
        files = yield from split_multipart(body, content_type, limits.max_count)
        return (yield from _decode_all(_decode_file, files, limits))
    return (yield from _decode_all(_decode_file, [body], limits))


def decode_base64(texts: Sequence[str], limits: Limits) -> Steps[Upload]:
    """Image files in base64 as images; one that can't be read gives its own error in its place.

    Raises:
        Invalid: Too many.
        DeadlinePassed: From `still_wanted`.
    """
    _check_count(len(texts), limits)
    return (yield from _decode_all(_decode_text, texts, limits))


def _decode_all(
    decode: Callable[[Source, Limits, int | None], Decoded | None], sources: Sequence[Source], limits: Limits
) -> Steps[Upload]:
    """Decode each of the sources. `decode` gives None for what may take long, unless its last argument is None.

    That is the most pixels of what does not.
    """
    image = limits.image
    pixels = np.empty((len(sources), image.height, image.width, image.channels), np.uint8)
    converted: list[bool] = []
    errors: dict[int, ServiceError] = {}
    for place, source in enumerate(sources):
        small = len(source) <= _SMALL_BYTES
        result = _attempt(decode, source, limits, _SMALL_PIXELS) if small else None
        if result is None:
            result = yield partial(_attempt, decode, source, limits, None)
        if isinstance(result, ServiceError):
            errors[place] = result
        else:
            pixels[len(converted)] = result.pixels
            converted.append(result.converted)
        yield None
    return Upload(pixels[: len(converted)], converted, errors)


def _attempt(
    decode: Callable[[Source, Limits, int | None], Decoded | None], source: Source, limits: Limits, most: int | None
) -> Decoded | ServiceError | None:
    limits.still_wanted()
    try:
        return decode(source, limits, most)
    except ServiceError as error:
        # Their frames lead back to the dictionary that it goes into: a circle, with the file and the body in it.
        error.__context__ = None
        return error.with_traceback(None)


def _decode_text(text: str, limits: Limits, most: int | None) -> Decoded | None:
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid("The image is not base64.") from None
    return _decode_file(file, limits, most)


def _decode_file(file: bytes | bytearray, limits: Limits, most: int | None) -> Decoded | None:
    if most is not None and (_LONG_JPEG_PARTS if file[:2] == b"\xff\xd8" else _LONG_PARTS).search(file):
        return None
    try:
        with Image.open(io.BytesIO(file), formats=_PILLOW_FORMATS) as picture:
            _check_pixels(picture.width, picture.height, limits)  # by the header: nothing is decoded yet
            if most is not None and picture.width * picture.height > most:
                return None
            picture.load()  # of an animation, the first frame
            ImageOps.exif_transpose(picture, in_place=True)
            return _fit(picture, limits.image)
    except ServiceError:
        raise
    except UnidentifiedImageError:
        raise Invalid("The image is not PNG, JPEG, WebP or BMP.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"The image has far more than {limits.max_pixels} pixels.") from None
    except Exception as error:  # decoders raise nearly anything on broken or hostile bytes
        log.debug("undecodable image", exc_info=error)
        raise Invalid("The image is broken or cut short.") from None


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise TooLarge(f"The image has {width}×{height} pixels; the most is {limits.max_pixels}.")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_count:
        raise Invalid(f"images: {count} images; one request may bring {limits.max_count}.")


def _fit(picture: Image.Image, image: ImageSpec) -> Decoded:
    """A loaded picture in the bundle's mode and size; a picture that has them already keeps its pixels."""
    mode = "L" if image.channels == 1 else "RGB"
    size = (image.width, image.height)
    fitted = picture if picture.mode == mode else _opaque(picture).convert(mode)
    if fitted.size != size:
        fitted = fitted.resize(size, Image.Resampling.BILINEAR)  # averages when it shrinks, and never overshoots
    pixels = np.asarray(fitted, dtype=np.uint8).reshape(image.height, image.width, image.channels)
    return Decoded(pixels, converted=picture.mode != mode or picture.size != size)


def _opaque(picture: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel without transparency: what shines through is black, like these images' ground."""
    if picture.mode.startswith("I"):  # 16 bits of grey, whose conversion by Pillow would only clip
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), with_alpha)
    return picture


def decode_npy(body: bytes, limits: Limits) -> Steps[Upload]:
    """A uint8 array (n, h, w) or (n, h, w, c), c 1 or 3, in NumPy's file format, as images.

    Raises:
        Malformed: Not an .npy file, or one whose size differs from what its header says.
        Invalid: An array of another type or shape, or too many images.
        TooLarge: Images of too many pixels.
        DeadlinePassed: From `still_wanted`.
    """
    array, image = _read_array(body), limits.image
    n, height, width = array.shape[:3]
    _check_count(n, limits)
    _check_pixels(width, height, limits)
    pictures = array if array.ndim == 4 else array[..., np.newaxis]
    if pictures.shape[1:] != (image.height, image.width, image.channels):
        return (yield from _decode_all(_convert, list(pictures), limits))
    if not pictures.flags.c_contiguous:
        pictures = yield partial(np.ascontiguousarray, pictures)
    return Upload(pictures, [False] * n, {})


def _convert(pixels: UInt8, limits: Limits, most: int | None) -> Decoded | None:
    """Pixels (h, w, c) of another shape than the bundle's."""
    if most is not None and pixels.shape[0] * pixels.shape[1] > most:
        return None
    grey = pixels.shape[2] == 1
    return _fit(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels)), limits.image)


def _read_array(body: bytes) -> UInt8:
    """The array, a view of the body. What the header claims is compared with the body before anything is made of it."""
    start = _npy_header_bytes(body)
    shape, fortran, dtype = _read_npy_header(body[:start])
    if dtype != np.uint8:
        raise Invalid(f"The array is of {dtype}; send uint8.")
    whole = all(type(n) is int for n in shape)  # NumPy's reader takes True for a length
    if not whole or len(shape) not in {3, 4} or (len(shape) == 4 and shape[3] not in {1, 3}) or min(shape) < 1:
        raise Invalid(f"The array has shape {shape}; send (n, h, w) or (n, h, w, c) with c 1 or 3.")
    data = np.frombuffer(body, np.uint8, offset=start)
    if len(data) != math.prod(shape):
        raise Malformed(f"The array of shape {shape} needs {math.prod(shape)} bytes of data; there are {len(data)}.")
    return data.reshape(shape, order="F" if fortran else "C")


def _npy_header_bytes(body: bytes) -> int:
    """Where the data of an .npy file begins, by what it says of its header; no further on than headers are read."""
    start, number = (10, body[8:10]) if body[6:7] == b"\x01" else (12, body[8:12])
    return min(len(body), start + int.from_bytes(number, "little"), start + _MAX_NPY_HEADER_BYTES + 1)


@lru_cache(maxsize=64)  # a client's arrays are mostly of one shape, and NumPy has Python's compiler read what they say
def _read_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the first index changes fastest, and type.

    Raises:
        Malformed: It is not such a header.
    """
    file = io.BytesIO(header)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        reader = readers[np.lib.format.read_magic(file)]  # version 3 is for names of fields, which images have not
        shape, fortran, dtype = reader(file, max_header_size=_MAX_NPY_HEADER_BYTES)
        # In hexadecimal a header holds numbers that are longer than Python would write out.
        if any(abs(n) > _MAX_LENGTH for n in shape):
            raise ValueError("a length beyond any array's")  # noqa: TRY301 - as the reader does
    except Exception as error:  # NumPy evaluates the header as a literal, which fails in many ways
        log.debug("unreadable npy header", exc_info=error)
        raise Malformed("The body is not an array in NumPy's .npy format (1.0 or 2.0).") from None
    return shape, fortran, dtype


def split_multipart(body: bytes, content_type: str, max_count: int) -> Steps[list[bytearray]]:
    """The file parts of a multipart/form-data body, in order.

    Raises:
        Malformed: Not such a body, or no boundary in its Content-Type, or that is too long.
        Invalid: A part that is no file, no parts, or too many.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise Malformed("Content-Type is too long.")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Malformed("Content-Type has no boundary.")
    parts = _Parts(max_count)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        for start in range(0, len(body), _PIECE_BYTES):
            parser.write(body[start : start + _PIECE_BYTES])
            yield None
        parser.finalize()
    except ServiceError:
        raise
    except Exception as error:  # the parser's own errors, and those of odd boundaries and headers
        log.debug("unreadable multipart body", exc_info=error)
        raise Malformed("The body is not multipart/form-data.") from None
    if not parts.ended:
        raise Malformed("The multipart body ends before its last boundary.")
    if not parts.files:
        raise Invalid("images: the form has no file.")
    return parts.files


class _Parts:
    """Collects the file parts while the parser calls back, and refuses the rest."""

    def __init__(self, max_count: int) -> None:
        self.files: list[bytearray] = []
        self.ended = False
        self._max_count = max_count
        self._header = b""
        self._value = b""
        self._disposition: dict[bytes, bytes] = {}

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._disposition = {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, self._disposition = parse_options_header(self._value)
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        if b"filename" not in self._disposition:
            name = self._disposition.get(b"name", b"").decode("utf-8", "replace")
            raise Invalid(f"{name[:100]}: every part must be an image file; bundle and labels go in the query.")
        if len(self.files) == self._max_count:
            raise Invalid(f"images: more than {self._max_count} images, the most in one request.")
        self.files.append(bytearray())

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1] += data[start:end]

    def _end(self) -> None:
        self.ended = True
