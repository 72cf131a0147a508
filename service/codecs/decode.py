"""Uploaded bytes to images: what may be sent, checked before it is decoded, and brought into a bundle's shape.

Works in steps, for time_slices.py. Nothing that a client sends may raise anything but a ServiceError, or take memory in
proportion to what it merely claims.
"""

import base64
import io
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from python_multipart.multipart import MultipartParser, parse_options_header

from models.inference.pixels import UInt8
from models.spec import ImageSpec
from service.codecs.image_file import QUICK_PIXELS, ImageFile, walk
from service.codecs.picture import Decoded, Shape, check_pixels, decode_picture
from service.codecs.time_slices import Apart, Steps
from service.errors import Invalid, Malformed, ServiceError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # there for type checkers only

NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
UPLOAD_TYPES = ("image/png", "image/jpeg", "image/webp", "image/bmp", MULTIPART, NPY)
_MAX_NPY_HEADER_BYTES, _MAX_LENGTH = 4096, 2**63
_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_MAX_CONTENT_TYPE = 1024
_PIECE_BYTES = 2**14  # of a form, split in one step

Source = TypeVar("Source", bytes, bytearray, str, UInt8)

log = logging.getLogger(__name__)


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
    """What images become, what is too much, and who decodes what takes long.

    Attributes:
        image: The shape that every image is brought into.
        max_pixels: Of one image as it was sent; compared with its header, before it is decoded.
        max_count: Images in one request.
        still_wanted: Asked before each image; raises DeadlinePassed where nobody waits for the answer any more. A
            small file can hold a large image, and a body many of them.
        decode: As `decode_picture`, in a time that is bounded. Called on a thread.
    """

    image: ImageSpec
    max_pixels: int
    max_count: int
    still_wanted: Callable[[], object]
    decode: Callable[[ImageFile, Shape], Decoded]

    @property
    def shape(self) -> Shape:
        """What each image becomes."""
        return Shape(self.image.height, self.image.width, self.image.channels, self.max_pixels)


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
        files = yield from split_multipart(body, content_type, limits)
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
    decode: Callable[[Source, Limits], Steps[Decoded]], sources: Sequence[Source], limits: Limits
) -> Steps[Upload]:
    """Decode each of the sources; of those that can't be decoded, keep why."""
    image = limits.image
    pixels = np.empty((len(sources), image.height, image.width, image.channels), np.uint8)
    converted: list[bool] = []
    errors: dict[int, ServiceError] = {}
    for place, source in enumerate(sources):
        limits.still_wanted()
        try:
            result = yield from decode(source, limits)
        except ServiceError as error:
            errors[place] = _alone(error)
        else:
            pixels[len(converted)] = result.pixels
            converted.append(result.converted)
        yield None
    return Upload(pixels[: len(converted)], converted, errors)


def _alone(error: ServiceError) -> ServiceError:
    """Their frames lead back to the dictionary that it goes into: a circle, with the file and the body in it."""
    error.__context__ = None
    return error.with_traceback(None)


def _decode_text(text: str, limits: Limits) -> Steps[Decoded]:
    return (yield from _decode_file((yield from _from_base64(text)), limits))


def _from_base64(text: str) -> Steps[bytes]:
    """Base64 (RFC 4648), with line ends in it or not, on its own or as a URL that holds its data (RFC 2397)."""
    head = _DATA_URL.match(text)
    pieces, rest, is_over = [], b"", False
    try:
        for start in range(head.end() if head else 0, len(text), _PIECE_BYTES):
            piece = rest + text[start : start + _PIECE_BYTES].encode("ascii").translate(None, b" \t\r\n")
            whole = len(piece) - len(piece) % 4
            if whole and is_over:
                raise ValueError("it goes on after its end")  # noqa: TRY301 - as the decoder says within a piece
            pieces.append(base64.b64decode(piece[:whole], validate=True))
            rest, is_over = piece[whole:], is_over or piece[:whole].endswith(b"=")
            yield None
        if rest:
            raise ValueError("its end is missing")  # noqa: TRY301 - as above
    except ValueError:  # binascii.Error is one
        raise Invalid("The image is not base64.") from None
    return b"".join(pieces)


def _decode_file(file: bytes | bytearray, limits: Limits) -> Steps[Decoded]:
    return (yield from _decode_image((yield from walk(file)), limits))


def _decode_image(file: ImageFile, limits: Limits) -> Steps[Decoded]:
    check_pixels(file.width, file.height, limits.max_pixels)  # by the header: nothing is decoded yet
    if file.is_quick:
        return decode_picture(file, limits.shape)

    def attempt() -> Decoded | ServiceError:
        try:
            return limits.decode(file, limits.shape)
        except ServiceError as error:  # its own image's; what is raised there would end the whole request
            return _alone(error)

    result: Decoded | ServiceError = yield Apart(attempt, file.cost)
    if isinstance(result, ServiceError):
        raise result
    return result


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.max_count:
        raise Invalid(f"images: {count} images; one request may bring {limits.max_count}.")


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
    check_pixels(width, height, limits.max_pixels)
    pictures = array if array.ndim == 4 else array[..., np.newaxis]
    if not pictures.flags.c_contiguous:
        pictures = yield Apart(partial(np.ascontiguousarray, pictures), pictures.size)
    if pictures.shape[1:] != (image.height, image.width, image.channels):
        return (yield from _decode_all(_convert, list(pictures), limits))
    return Upload(pictures, [False] * n, {})


def _convert(pixels: UInt8, limits: Limits) -> Steps[Decoded]:
    """Pixels (h, w, c) of another shape than the bundle's."""
    height, width, channels = pixels.shape
    is_quick = pixels.size <= QUICK_PIXELS
    file = ImageFile("L" if channels == 1 else "RGB", [pixels.data.cast("B")], width, height, 1, pixels.size, is_quick)
    return (yield from _decode_image(file, limits))


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


def split_multipart(body: bytes, content_type: str, limits: Limits) -> Steps[list[bytearray]]:
    """The file parts of a multipart/form-data body, in order.

    Raises:
        Malformed: Not such a body, or no boundary in its Content-Type, or that is too long.
        Invalid: A part that is no file, no parts, or too many.
        DeadlinePassed: From `still_wanted`.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise Malformed("Content-Type is too long.")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Malformed("Content-Type has no boundary.")
    parts = _Parts(limits.max_count)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        for start in range(0, len(body), _PIECE_BYTES):
            limits.still_wanted()
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
            if len(self._value) > _MAX_CONTENT_TYPE:  # to parse its parameters takes as long as for that
                raise Malformed("A part's Content-Disposition is too long.")
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
