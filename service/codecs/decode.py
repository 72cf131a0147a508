"""Checks uploaded bodies, decodes their images and brings them into a bundle's shape.

The work is split into `Steps` for time_slices.py. Whatever a client sends, only ServiceError may be raised, and no
memory may be allocated for a size that a header claims but the body does not have.
"""

import base64
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from python_multipart.multipart import MultipartParser, parse_options_header

from models.images.image_file import QUICK_PIXELS, ImageFile, ImageFileError, parse_image_file
from models.images.preparation import UNDECLARED, Preparation
from models.inference.pixels import UInt8
from models.spec import ImageSpec
from service.codecs.npy import NPY, read_npy
from service.codecs.picture import Decoded, Shape, check_pixels, decode_picture
from service.codecs.time_slices import OffLoopWork, Steps
from service.errors import Invalid, Malformed, ServiceError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # exists for type checkers only

MULTIPART = "multipart/form-data"
UPLOAD_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/bmp", MULTIPART, NPY)
_DATA_URL = re.compile(r"[ \t\r\n]*+data:[^,]{0,200};base64,", re.IGNORECASE)
# One that is not closed ends with the text: if it were no match, the search would begin again at each quote in it.
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*+"?')
# Some clients name a file in this way alone (RFC 5987, 6266). The parser leaves it out, because forms should not (RFC
# 7578, 4.2).
_EXTENDED_FILENAME = re.compile(rb";[ \t]*filename\*", re.IGNORECASE)
_MAX_CONTENT_TYPE = 1024
_PIECE_BYTES = 2**14  # of a form or of base64, processed in one step

Source = TypeVar("Source", bytes | bytearray, str, UInt8)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """A request's images in a bundle's shape, in order, and the errors of those that could not be decoded.

    Attributes:
        pixels: uint8 (n, h, w, c); the n images that could be decoded.
        converted: For each of these, whether its size or colour mode was changed.
        errors: For each of the others, by its index in the request.
    """

    pixels: UInt8
    converted: Sequence[bool]
    errors: Mapping[int, ServiceError]

    def __len__(self) -> int:
        return len(self.pixels) + len(self.errors)


@dataclass(frozen=True)
class Limits:
    """The shape that images are brought into, the limits on an upload, and the decoder of slow images.

    Attributes:
        image: The bundle's image shape.
        max_pixels: Largest image as it was sent. Compared with its header before it is decoded.
        max_count: Most images in one request.
        check_deadline: Called before each image, because a small body can hold much work. Raises DeadlinePassed.
        decode: Does `decode_picture` in bounded time. Called on a thread.
        preparation: The bundle's, of what isn't in its shape.
    """

    image: ImageSpec
    max_pixels: int
    max_count: int
    check_deadline: Callable[[], object]
    decode: Callable[[ImageFile, Shape], Decoded]
    preparation: Preparation = UNDECLARED

    @property
    def shape(self) -> Shape:
        """The shape that each image is brought into, with the limit on its pixels, and how."""
        image = self.image
        return Shape(image.height, image.width, image.channels, self.max_pixels, self.preparation)


def decode_upload(body: bytes, content_type: str, limits: Limits) -> Steps[Upload]:
    """Decode a body of one of `UPLOAD_TYPES`. `content_type` is the header with its parameters.

    A file that can't be decoded raises nothing: its error goes into `Upload.errors`.

    Raises:
        Malformed, Invalid, TooLarge: See `split_multipart` and `decode_npy`.
        DeadlinePassed: From `check_deadline`.
    """
    kind = content_type.split(";", maxsplit=1)[0].strip().lower()
    if kind == NPY:
        return (yield from decode_npy(body, limits))
    files = yield from files_of(body, content_type, limits.max_count, limits.check_deadline)
    return (yield from _decode_all(_decode_file, files, limits))


def files_of(
    body: bytes, content_type: str, max_count: int, check_deadline: Callable[[], object]
) -> Steps[Sequence[bytes | bytearray]]:
    """The image files of a body that is a form, or a single one. Raises what `split_multipart` raises."""
    if content_type.split(";", maxsplit=1)[0].strip().lower() != MULTIPART:
        return [body]
    return (yield from split_multipart(body, content_type, max_count, check_deadline))


def decode_base64(texts: Sequence[str], limits: Limits) -> Steps[Upload]:
    """Decode image files in base64. The error of one that can't be decoded goes into `Upload.errors`.

    Raises:
        Invalid: Too many images.
        DeadlinePassed: From `check_deadline`.
    """
    check_count(len(texts), limits.max_count)
    return (yield from _decode_all(_decode_base64_file, texts, limits))


def _decode_all(
    decode: Callable[[Source, Limits], Steps[Decoded]], sources: Sequence[Source], limits: Limits
) -> Steps[Upload]:
    """Decode each source, and collect the errors of those that can't be decoded."""
    image = limits.image
    pixels = np.empty((len(sources), image.height, image.width, image.channels), np.uint8)
    converted: list[bool] = []
    errors: dict[int, ServiceError] = {}
    for index, source in enumerate(sources):
        limits.check_deadline()
        try:
            result = yield from decode(source, limits)
        except ServiceError as error:
            errors[index] = without_traceback(error)
        else:
            pixels[len(converted)] = result.pixels
            converted.append(result.converted)
        yield None
    return Upload(pixels[: len(converted)], converted, errors)


def without_traceback(error: ServiceError) -> ServiceError:
    """Prepare an error to be stored: its traceback would form a reference cycle that keeps the file and the body."""
    error.__context__ = None
    return error.with_traceback(None)


def _decode_base64_file(text: str, limits: Limits) -> Steps[Decoded]:
    return (yield from _decode_file((yield from from_base64(text)), limits))


def from_base64(text: str) -> Steps[bytes]:
    """Decode base64 (RFC 4648), which may contain white space and begin as a data URL (RFC 2397).

    Raises:
        Invalid: It is none.
    """
    head = _DATA_URL.match(text)
    pieces, rest, has_ended = [], b"", False
    try:
        for start in range(head.end() if head else 0, len(text), _PIECE_BYTES):
            piece = rest + text[start : start + _PIECE_BYTES].encode("ascii").translate(None, b" \t\r\n")
            whole = len(piece) - len(piece) % 4
            if whole and has_ended:
                raise ValueError("data after the padding")  # noqa: TRY301 - b64decode finds this only within a piece
            pieces.append(base64.b64decode(piece[:whole], validate=True))
            rest, has_ended = piece[whole:], has_ended or piece[:whole].endswith(b"=")
            yield None
        if rest:
            raise ValueError("incomplete at its end")  # noqa: TRY301 - as above
    except ValueError:  # binascii.Error is one
        raise Invalid("The image is not base64.") from None
    return b"".join(pieces)


def _decode_file(file: bytes | bytearray, limits: Limits) -> Steps[Decoded]:
    found = yield from parse_file(file)
    return (yield from decode_image(found, limits.shape, limits.decode))


def parse_file(file: bytes | bytearray) -> Steps[ImageFile]:
    """An image file as `parse_image_file` leaves it.

    Raises:
        Invalid: It is none, or has too many segments.
    """
    try:
        return (yield from parse_image_file(file))
    except ImageFileError as error:
        raise Invalid(str(error)) from None


def decode_image(file: ImageFile, shape: Shape, decode: Callable[[ImageFile, Shape], Decoded]) -> Steps[Decoded]:
    """Decode a file, with `decode` off the event loop if it may take long.

    Raises:
        Invalid, TooLarge: See `decode_picture`.
    """
    check_pixels(file.width, file.height, shape.max_pixels)  # from the header, before anything is decoded
    if file.is_quick and shape.height * shape.width <= QUICK_PIXELS:  # resizing takes time as well
        return decode_picture(file, shape)

    def attempt() -> Decoded | ServiceError:
        try:
            return decode(file, shape)
        except ServiceError as error:  # returned, because an error raised off the loop would end the whole request
            return without_traceback(error)

    result: Decoded | ServiceError = yield OffLoopWork(attempt, file.cost)
    if isinstance(result, ServiceError):
        raise result
    return result


def check_count(count: int, most: int) -> None:
    """Check that a request has not too many images.

    Raises:
        Invalid: It has.
    """
    if count > most:
        raise Invalid(f"images: {count} images; one request may bring {most}.")


def decode_npy(body: bytes, limits: Limits) -> Steps[Upload]:
    """Decode a uint8 array (n, h, w) or (n, h, w, c), c 1 or 3, in NumPy's .npy format.

    Raises:
        Malformed: Not an .npy file, or its size differs from what its header says.
        Invalid: Another type or shape, or too many images.
        TooLarge: The images have too many pixels.
        DeadlinePassed: From `check_deadline`.
    """
    array, image = read_images(body), limits.image
    n, height, width = array.shape[:3]
    check_count(n, limits.max_count)
    check_pixels(width, height, limits.max_pixels)
    pictures = array if array.ndim == 4 else array[..., np.newaxis]
    if not pictures.flags.c_contiguous:
        pictures = yield OffLoopWork(partial(np.ascontiguousarray, pictures), pictures.size)
    if pictures.shape[1:] != (image.height, image.width, image.channels):
        return (yield from _decode_all(_decode_pixels, list(pictures), limits))
    return Upload(pictures, [False] * n, {})


def _decode_pixels(pixels: UInt8, limits: Limits) -> Steps[Decoded]:
    """Bring raw pixels (h, w, c), whose shape is not the bundle's, into its shape."""
    height, width, channels = pixels.shape
    is_quick = pixels.size <= QUICK_PIXELS
    file = ImageFile("L" if channels == 1 else "RGB", [pixels.data.cast("B")], width, height, 1, pixels.size, is_quick)
    return (yield from decode_image(file, limits.shape, limits.decode))


def read_images(body: bytes) -> UInt8:
    """An array of images as a view of the body. Raises what `read_npy` raises."""
    wanted = "(n, h, w) or (n, h, w, c) with c 1 or 3"
    images: UInt8 = read_npy(
        body, np.uint8, lambda shape: len(shape) == 3 or (len(shape) == 4 and shape[3] in {1, 3}), wanted
    )
    return images


def split_multipart(
    body: bytes, content_type: str, max_count: int, check_deadline: Callable[[], object]
) -> Steps[list[bytearray]]:
    """The file parts of a multipart/form-data body, in order.

    Raises:
        Malformed: Not such a body, or its Content-Type is too long or has no boundary.
        Invalid: A part is not a file, or there are no parts, or too many.
        DeadlinePassed: From `check_deadline`.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise Malformed("Content-Type is too long.")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise Malformed("Content-Type has no boundary.")
    parts = _FilePartCollector(max_count)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        for start in range(0, len(body), _PIECE_BYTES):
            check_deadline()
            parser.write(body[start : start + _PIECE_BYTES])
            yield None
        parser.finalize()
    except ServiceError:
        raise
    except Exception as error:  # the parser's errors, and what unusual boundaries and headers make it raise
        log.debug("unreadable multipart body", exc_info=error)
        raise Malformed("The body is not multipart/form-data.") from None
    if not parts.ended:
        raise Malformed("The multipart body ends before its last boundary.")
    if not parts.files:
        raise Invalid("images: the form has no file.")
    return parts.files


class _FilePartCollector:
    """The parser's callbacks: collects the file parts of a form and refuses parts that are not files."""

    def __init__(self, max_count: int) -> None:
        self.files: list[bytearray] = []
        self.ended = False
        self._max_count = max_count
        self._header = b""
        self._value = b""
        self._name = b""
        self._is_file = False

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
        self._name, self._is_file = b"", False

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        match self._header.lower():
            case b"content-disposition":
                self._read_disposition(self._value)
            case b"content-type" if self._value.strip().lower().startswith(b"image/"):
                self._is_file = True
        self._header = self._value = b""

    def _read_disposition(self, value: bytes) -> None:
        if len(value) > _MAX_CONTENT_TYPE:  # parsing its parameters takes as long as for Content-Type
            raise Malformed("A part's Content-Disposition is too long.")
        _, parameters = parse_options_header(value)
        self._name = parameters.get(b"name", b"")
        if b"filename" in parameters or _EXTENDED_FILENAME.search(_QUOTED.sub(b"", value)):
            self._is_file = True

    def _headers_finished(self) -> None:
        if not self._is_file:
            name = self._name.decode("utf-8", "replace")
            raise Invalid(
                f"{name[:100]}: every part must be an image file, with a filename or an image's Content-Type; "
                "bundle and labels go in the query."
            )
        if len(self.files) == self._max_count:
            raise Invalid(f"images: more than {self._max_count} images, the most in one request.")
        self.files.append(bytearray())

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.files[-1] += data[start:end]

    def _end(self) -> None:
        self.ended = True
