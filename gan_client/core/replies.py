"""Reads replies. Whatever answers, it is bounded in bytes and time, and comes out as a result or one of our errors."""

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from gan_client.core.retries import Attempts, parse_retry_after
from gan_client.errors import BadReplyError, DeadlineError, GanServiceError, ReplyTooLargeError, error_class
from gan_client.results import Float32, Problem, UInt8

T = TypeVar("T")

_MAX_ERROR_BYTES = 2**16
_MAX_TEXT = 1000
MAX_REPLY_BYTES = 2**28
MAX_PIXELS = 2**26
# What JSON of another shape than ours makes code raise that reads it.
_UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
_NO_PICTURE = (
    *(UnidentifiedImageError, OSError, SyntaxError, ValueError),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
JSON = "application/json"
NPY = "application/x-npy"
# What numpy.save writes for an image array. NumPy's own reader would evaluate the header as Python's compiler does, and
# make room for whatever shape it claims.
_NPY_HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \(([0-9]{1,9}), ([0-9]{1,9}), ([0-9]{1,9}), ([0-9]{1,9})\), \} *\n"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer with status 200."""

    headers: Mapping[str, str]
    body: bytearray


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how its reply is read.

    Attributes:
        accept: The media type that is asked for; a reply of another one is refused.
        most_bytes: Of the reply's body.
        recover: Makes the result of an error, or raises it; None where every error is raised.
        read: Makes the result. It may raise BadReplyError, or trip over what is not as it should be.
    """

    method: str
    path: str
    accept: str
    read: Callable[[Reply], T]
    query: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    media_type: str | None = None
    most_bytes: int = MAX_REPLY_BYTES
    recover: Callable[[GanServiceError], T] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Nothing compressed: a few bytes could then become as many as they like."""
        kind = {"Content-Type": self.media_type} if self.media_type else {}
        return {"Accept": self.accept, "Accept-Encoding": "identity", "User-Agent": "gan-client", **kind}


class ReplyReader(Generic[T]):
    """Collects one reply as it arrives."""

    def __init__(self, call: Call[T], attempts: Attempts, status: int, headers: Mapping[str, str]) -> None:
        self._call = call
        self._attempts = attempts
        self._status = status
        self._headers = headers
        self._body = bytearray()
        if status == 200 and int(_digits(headers.get("content-length")) or 0) > call.most_bytes:
            raise self._too_large()

    def add(self, chunk: bytes) -> None:
        """The next part of the body.

        Raises:
            ReplyTooLargeError: That is more than the call allows.
            DeadlineError: It is too late.
        """
        if self._attempts.is_over:
            raise DeadlineError("The answer was not there in time.", status=self._status)
        if self._status != 200:
            self._body += chunk[: _MAX_ERROR_BYTES - len(self._body)]
        elif len(self._body) + len(chunk) > self._call.most_bytes:
            raise self._too_large()
        else:
            self._body += chunk

    def finish(self) -> T:
        """The result.

        Raises:
            GanServiceError: The answer is an error, or none that such a service gives.
        """
        if self._status != 200:
            error = self._error()
            if self._call.recover is None:
                raise error
            return self._call.recover(error)
        try:
            self._check_type()
            return self._call.read(Reply(self._headers, self._body))
        except (BadReplyError, *_UNREADABLE) as error:
            said = error.detail if isinstance(error, BadReplyError) else f"it can't be read ({type(error).__name__})"
            detail = f"This is no answer of a gan-service to {self._call.method} {self._call.path}: {said}."
            raise BadReplyError(detail, status=200, request_id=self._request_id()) from error

    def _check_type(self) -> None:
        kind = self._headers.get("content-type", "").partition(";")[0].strip()
        if kind != self._call.accept:
            raise BadReplyError(f"asked for {self._call.accept}, got {_printable(kind) or 'no type'}")

    def _too_large(self) -> ReplyTooLargeError:
        return ReplyTooLargeError(
            f"The answer to {self._call.method} {self._call.path} has over {self._call.most_bytes} bytes."
        )

    def _request_id(self) -> str | None:
        return _printable(self._headers.get("x-request-id", "")) or None

    def _error(self) -> GanServiceError:
        """The error that a reply stands for; a problem as the service writes it, or something in between's page."""
        try:
            problem = json.loads(self._body)
            code, detail = problem["code"], problem["detail"]
            if not (isinstance(code, str) and isinstance(detail, str)):
                raise TypeError
        except _UNREADABLE:
            code, detail = None, f"The answer has status {self._status}, and does not say why as a gan-service would."
        if self._status == 404 and code != "unknown_bundle":
            detail = f"There is no {self._call.path} at this address: {detail}"
        return error_class(self._status, code)(
            _printable(detail),
            status=self._status,
            code=code and _printable(code),
            request_id=self._request_id(),
            retry_after_s=parse_retry_after(self._headers.get("retry-after")),
        )


def _digits(text: str | None) -> str | None:
    return text if text and re.fullmatch("[0-9]{1,18}", text) else None


def _printable(text: str) -> str:
    """What may go to a terminal: others' control characters would be obeyed there."""
    return "".join(one if one.isprintable() else " " for one in text[:_MAX_TEXT])


def read_array(body: bytearray, count: int) -> UInt8:
    """The images (n, h, w, c) of a body in NumPy's format, as a view of it.

    Raises:
        BadReplyError: It holds something else, or another number of images.
    """
    if body[:8] != b"\x93NUMPY\x01\x00":
        raise BadReplyError("the body is no array")
    start = 10 + int.from_bytes(body[8:10], "little")
    header = _NPY_HEADER.fullmatch(body[10:start])
    if header is None:
        raise BadReplyError("the array is not one of images")
    shape = tuple(int(length) for length in header.groups())
    images = np.frombuffer(body, np.uint8, offset=start)
    if shape[0] != count or shape[3] not in {1, 3} or images.size != np.prod(shape, dtype=object) or not images.size:
        raise BadReplyError(f"the array has shape {shape} and {images.size} bytes; {count} images were asked for")
    return images.reshape(shape)


def read_object(reply: Reply) -> dict[str, Any]:
    """The body as a JSON object."""
    body = json.loads(reply.body)
    if not isinstance(body, dict):
        raise BadReplyError("the body is no JSON object")
    return body


def read_results(reply: Reply, count: int) -> list[dict[str, Any]]:
    """The body's `results`, of which there is one for each image that was sent."""
    results = read_object(reply)["results"]
    if not isinstance(results, list) or len(results) != count or not all(isinstance(one, dict) for one in results):
        raise BadReplyError(f"{count} results were asked for")
    return results


def read_problem(result: Mapping[str, Any]) -> Problem | None:
    """Why an image has no result, if so."""
    error = result.get("error")
    if not isinstance(error, dict):  # /encode has a number there
        return None
    return Problem(int(error["status"]), _printable(str(error["code"])), _printable(str(error["detail"])))


def optional_text(result: Mapping[str, Any], name: str) -> str | None:
    """A field that is a string, or missing."""
    value = result.get(name)
    return None if value is None else _printable(str(value))


def optional_number(result: Mapping[str, Any], name: str) -> float | None:
    """A field that is a number, or missing."""
    value = result.get(name)
    return None if value is None else float(value)


def read_picture(content: bytes | bytearray) -> Image.Image:
    """A PNG file as an image, in memory; its size is looked at before it is decoded.

    Raises:
        BadReplyError: It is none, or has too many pixels.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=["PNG"])
        if picture.width * picture.height > MAX_PIXELS:
            raise BadReplyError(f"the picture has {picture.width}×{picture.height} pixels")
        picture.load()
    except _NO_PICTURE as error:
        raise BadReplyError("the picture is no PNG file") from error
    return picture


def read_base64(text: str) -> bytes:
    """A file that stands in JSON."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise BadReplyError("the picture is not base64") from error


def read_latent(value: object) -> Float32:
    """A list of numbers as float32 (dim,)."""
    with np.errstate(over="ignore"):
        latent = np.array(value, np.float32)
    if latent.ndim != 1 or not latent.size or not np.isfinite(latent).all():
        raise BadReplyError("the latent is no list of numbers")
    return latent
