"""Every way a request can fail: an error knows its status, its code and its headers; nothing else decides one.

A client's mistake is explained in full, so the text of such an error goes into the reply. The text of our own
failures (`Internal`) goes into the log, beside the request id that the client gets.
"""

# ruff: noqa: N818 - the names say what happened; that they are errors is said by the module and by `raise`
from collections.abc import Sequence
from typing import ClassVar


class ServiceError(Exception):
    """Base of the errors that become a problem reply.

    Attributes:
        status: HTTP status.
        code: What a program looks at; never changes.
        title: What the code means, the same for every occurrence.
        rejection: The `reason` under which `gan_rejected_total` counts it, where it does. The edge counts, once,
            when the error becomes a reply: whoever raises it counts nothing.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    title: ClassVar[str]
    rejection: ClassVar[str | None] = None

    @property
    def detail(self) -> str:
        """What happened this time, for the client."""
        return str(self)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to this reply."""
        return {}


class Malformed(ServiceError):
    """The body, the query or a header can't be parsed."""

    status = 400
    code = "malformed"
    title = "The request can't be parsed"
    rejection = "invalid"


class Unauthorized(ServiceError):
    """No key, or one that is not known."""

    status = 401
    code = "unauthorized"
    title = "A valid key is needed"
    rejection = "unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        """`WWW-Authenticate` (RFC 9110, 11.6.1; RFC 6750)."""
        return {"WWW-Authenticate": 'Bearer realm="gan-service"'}


class Forbidden(ServiceError):
    """A valid key that is not good for this."""

    status = 403
    code = "forbidden"
    title = "The key is not good for this"
    rejection = "unauthorized"


class NotFound(ServiceError):
    """No such route."""

    status = 404
    code = "not_found"
    title = "There is nothing here"


class UnknownBundle(ServiceError):
    """No loaded bundle has this name, or this name and version."""

    status = 404
    code = "unknown_bundle"
    title = "No such bundle is loaded"
    rejection = "invalid"

    def __init__(self, name: str, loaded: Sequence[str]) -> None:
        super().__init__(f"Bundle {name[:100]!r} is not loaded. Loaded: {', '.join(loaded) or 'none'}.")


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
        """`Allow`, which RFC 9110 asks for."""
        return {"Allow": ", ".join(self.allowed)}


class NotAcceptable(ServiceError):
    """None of the formats in `Accept` can be made."""

    status = 406
    code = "not_acceptable"
    title = "No acceptable format"
    rejection = "invalid"


class RequestTimeout(ServiceError):
    """The client was too slow to send its body."""

    status = 408
    code = "request_timeout"
    title = "The body came too slowly"
    rejection = "deadline"

    @property
    def headers(self) -> dict[str, str]:
        """`Connection: close`: the rest of the body would be taken for the next request."""
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
        """`Accept`: what the route would have read (RFC 9110, 15.5.16)."""
        return {"Accept": ", ".join(self.supported)}


class UnsupportedEncoding(UnsupportedMediaType):
    """The body is compressed."""

    def __init__(self, encoding: str) -> None:
        super().__init__(f"Content-Encoding: {encoding}", ["identity"])

    @property
    def headers(self) -> dict[str, str]:
        """`Accept-Encoding`: what the route would have read (RFC 9110, 15.5.16)."""
        return {"Accept-Encoding": "identity"}


class Invalid(ServiceError):
    """A value out of range, or one that contradicts another."""

    status = 422
    code = "invalid"
    title = "The request asks for what can't be done"
    rejection = "invalid"


class QueueFull(ServiceError):
    """The service is busy; the same request may succeed in a moment."""

    status = 429
    code = "queue_full"
    title = "Too much is waiting"
    rejection = "queue_full"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"The service is busy; try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s  # whole seconds: queued images over the measured rate

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds."""
        return {"Retry-After": str(self.retry_after_s)}


class UnknownTransferCoding(ServiceError):
    """The body comes in another transfer coding than `chunked`: where it ends is not known."""

    status = 501
    code = "not_implemented"
    title = "The service does not know how to do this"
    rejection = "invalid"

    def __init__(self) -> None:
        super().__init__("The only transfer coding that is understood here is chunked.")


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
    """The service is shutting down; another replica, or this one's successor, will answer."""

    status = 503
    code = "draining"
    title = "The service is shutting down"
    rejection = "draining"

    def __init__(self) -> None:
        super().__init__("The service is shutting down; try again.")

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`: a successor is up, or about to be."""
        return {"Retry-After": "1"}


class DeadlinePassed(ServiceError):
    """The images never reached the engine in time, or the answer came too late."""

    status = 504
    code = "deadline_exceeded"
    title = "The deadline passed"
    rejection = "deadline"

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"The deadline of {deadline_s:.3g} s passed before the answer was there.")


class Internal(ServiceError):
    """An error on our side; the log has it under the request's id. The text of such an error is not for clients."""

    status = 500
    code = "internal"
    title = "The service failed"

    @property
    def detail(self) -> str:
        """Nothing of the inside: the request id leads to the log."""
        return "An error on our side. It is logged under this request_id."


class EngineFailed(Internal):
    """The engine raised, or returned another number of rows than it was given. Only this batch is hurt."""
