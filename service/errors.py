"""Every way a request can fail. An error defines its status, code and headers; nothing else decides them.

The text of a client's mistake goes into the reply. The text of our own failures (`Internal`) goes into the log only,
under the request id that the client gets.
"""

# ruff: noqa: N818 - the module and `raise` say that these are errors, so their names need no suffix
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar


def duration(seconds: float) -> str:
    """A duration as a client writes it: 250 ms, 1.5 s."""
    return f"{1000 * seconds:g} ms" if seconds < 1 else f"{seconds:g} s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that it is most like; empty if none is."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name[:100].lower(), by_lower, n=1, cutoff=0.75)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


class ServiceError(Exception):
    """Base of the errors that become a problem reply.

    Attributes:
        status: HTTP status.
        code: For programs; a kind of error keeps its code.
        title: What the code means; the same for every occurrence.
        field: The request's field that it is about, where it is known to be one.
        rejection: The `reason` under which `gan_rejected_total` counts it; None if it does not. It is counted once, by
            the middleware that turns the error into a reply.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    rejection: ClassVar[str | None] = None
    field: str | None = None

    @property
    def detail(self) -> str:
        """What happened this time, for the client."""
        return str(self)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        return {}


class Malformed(ServiceError):
    """The body, the query or a header can't be parsed."""

    status = 400
    code = "malformed"
    title = "The request can't be parsed"
    rejection = "invalid"


class Unauthorized(ServiceError):
    """No key, or an unknown one."""

    status = 401
    code = "unauthorized"
    title = "A valid key is needed"
    rejection = "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        """`WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750)."""
        return {"WWW-Authenticate": 'Bearer realm="gan-service"'}


class Forbidden(ServiceError):
    """The key is valid but does not allow this request."""

    status = 403
    code = "forbidden"
    title = "The key does not allow this"
    rejection = "unauthorized"


class NotFound(ServiceError):
    """No such route."""

    status = 404
    code = "not_found"
    title = "There is nothing here"


class UnknownBundle(ServiceError):
    """No bundle has this name, or this name and version, or it can't be loaded: `reason` says why."""

    status = 404
    code = "unknown_bundle"
    title = "There is no such bundle"
    rejection = "invalid"

    def __init__(self, name: str, known: Sequence[str], reason: str | None = None) -> None:
        if reason is None:
            super().__init__(f"There is no bundle {name[:100]!r}. There are: {', '.join(known) or 'none'}.")
        else:
            super().__init__(f"Bundle {name[:100]!r} can't be loaded: {reason}.")


class MethodNotAllowed(ServiceError):
    """The route exists, for other methods."""

    status = 405
    code = "method_not_allowed"
    title = "The route has no such method"

    def __init__(self, allowed: Sequence[str]) -> None:
        super().__init__(f"This route allows {', '.join(allowed)}.")
        self.allowed = allowed

    @property
    def headers(self) -> dict[str, str]:
        """`Allow` (RFC 9110, 15.5.6)."""
        return {"Allow": ", ".join(self.allowed)}


class NotAcceptable(ServiceError):
    """`Accept` allows none of the formats."""

    status = 406
    code = "not_acceptable"
    title = "No acceptable format"
    rejection = "invalid"


class RequestTimeout(ServiceError):
    """The client was too slow to send its body."""

    status = 408
    code = "request_timeout"
    title = "The body came too slowly"
    rejection = "request_timeout"

    @property
    def headers(self) -> dict[str, str]:
        """`Connection: close`, because the rest of the body would be read as the next request."""
        return {"Connection": "close"}


class TooLarge(ServiceError):
    """More bytes, or more pixels in an uploaded image, than the service takes."""

    status = 413
    code = "too_large"
    title = "Too large"
    rejection = "too_large"


class UnsupportedMediaType(ServiceError):
    """The body's Content-Type is none of those the route reads."""

    status = 415
    code = "unsupported_media_type"
    title = "The body's media type is not supported"
    rejection = "invalid"

    def __init__(self, content_type: str, supported: Sequence[str]) -> None:
        given = f"{content_type[:100]!r} is not supported" if content_type else "Content-Type is missing"
        super().__init__(f"{given}; send {', '.join(supported)}.")
        self.supported = supported

    @property
    def headers(self) -> dict[str, str]:
        """`Accept`: the media types that the route reads (RFC 9110, 15.5.16)."""
        return {"Accept": ", ".join(self.supported)}


class UnsupportedEncoding(UnsupportedMediaType):
    """The body is compressed in a way that the route does not read."""

    def __init__(self, encoding: str, supported: Sequence[str]) -> None:
        super().__init__(f"Content-Encoding: {encoding}", supported)

    @property
    def headers(self) -> dict[str, str]:
        """`Accept-Encoding`: what the route reads (RFC 9110, 15.5.16)."""
        return {"Accept-Encoding": ", ".join(self.supported)}


class Invalid(ServiceError):
    """A value out of range, or one that contradicts another."""

    status = 422
    code = "invalid"
    title = "The request asks for what can't be done"
    rejection = "invalid"

    def __init__(self, text: str, field: str | None = None) -> None:
        super().__init__(text)
        self.field = field


class NoDiscriminator(ServiceError):
    """The bundle has no discriminator."""

    status = 422
    code = "no_discriminator"
    title = "The bundle has no discriminator"
    rejection = "invalid"

    def __init__(self, bundle: str) -> None:
        super().__init__(f"Bundle {bundle!r} has no discriminator, which says how real an image looks.")


class NoEncoder(ServiceError):
    """The bundle has no encoder."""

    status = 422
    code = "no_encoder"
    title = "The bundle has no encoder"
    rejection = "invalid"

    def __init__(self, bundle: str) -> None:
        super().__init__(f"Bundle {bundle!r} has no encoder, which finds the latent of an image.")


class QueueFull(ServiceError):
    """The service is busy; the same request may succeed in a moment."""

    status = 429
    code = "queue_full"
    title = "Too much is waiting"
    rejection = "queue_full"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"The service is busy; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s  # whole seconds

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds."""
        return {"Retry-After": str(self.retry_after_s)}


class RateLimited(ServiceError):
    """The client's key has used up its own limit; `reason` says which."""

    status = 429
    code = "rate_limited"
    title = "The key's limit is used up"
    rejection = "rate_limited"

    def __init__(self, reason: str, retry_after_s: int, fields: Mapping[str, str]) -> None:
        super().__init__(f"{reason}; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s  # whole seconds
        self._fields = fields  # the RateLimit header fields

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, and the RateLimit header fields."""
        return {"Retry-After": str(self.retry_after_s), **self._fields}


class UnknownTransferCoding(ServiceError):
    """The body has another transfer coding than `chunked`, so its end can't be found."""

    status = 501
    code = "not_implemented"
    title = "The service does not know how to do this"
    rejection = "invalid"

    def __init__(self) -> None:
        super().__init__("The only supported transfer coding is chunked.")


class NotReady(ServiceError):
    """The service can't work now: it is starting, or its engine is stuck or lost.

    `reason` says which, in a few words.
    """

    status = 503
    code = "not_ready"
    title = "The service is not ready"
    rejection = "not_ready"

    def __init__(self, reason: str, retry_after_s: int = 2) -> None:
        super().__init__(f"The service is not ready: {reason}.")
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds."""
        return {"Retry-After": str(self.retry_after_s)}


class Draining(ServiceError):
    """The service is shutting down; another process will answer."""

    status = 503
    code = "draining"
    title = "The service is shutting down"
    rejection = "draining"

    def __init__(self) -> None:
        super().__init__("The service is shutting down; try again.")

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds: a successor should be up soon."""
        return {"Retry-After": "1"}


class DeadlinePassed(ServiceError):
    """The images did not reach the engine in time, or the answer came too late."""

    status = 504
    code = "deadline_exceeded"
    title = "The deadline passed"
    rejection = "deadline"

    def __init__(self, deadline_s: float | None = None) -> None:
        named = "" if deadline_s is None else f" of {duration(deadline_s)}"
        super().__init__(f"The deadline{named} passed before the answer was there.")


class Internal(ServiceError):
    """An error on our side, which is in the log under the request id."""

    status = 500
    code = "internal"
    title = "The service failed"

    @property
    def detail(self) -> str:
        """A constant text, without internal details."""
        return "An error on our side. It is logged under this request_id."


class EngineFailed(Internal):
    """The engine raised, or returned another number of rows than it was given. Only this batch is hurt."""
