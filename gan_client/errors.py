"""What a call can fail with: one class for all of it, and a subclass wherever a caller would do something else."""


class GanServiceError(Exception):
    """A call failed. This class itself stands for a failure on the service's side.

    Attributes:
        detail: What happened, in the service's words where it answered.
        status: The HTTP status; None where no answer came.
        code: The service's name for this kind of error, such as `queue_full`; None where it gave none.
        request_id: The service's log has the request under it.
        retry_after_s: Seconds after which the service asks to be tried again; None where it did not say.
    """

    may_be_retried = False

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """The detail, with what one needs to find the request in the service's log."""
        return f"{self.detail} (request {self.request_id})" if self.request_id else self.detail


class InvalidRequestError(GanServiceError):
    """The service does not take this request; the same one will not succeed later either."""


class UnauthorizedError(GanServiceError):
    """No key, an unknown one, or one that does not allow this."""


class NotFoundError(GanServiceError):
    """The service has no such route; perhaps it is older than this client."""


class UnknownBundleError(NotFoundError):
    """The service has no bundle of this name, or not in this version."""


class BusyError(GanServiceError):
    """Too much is waiting, or the service is starting or shutting down, and the retries have been used up."""

    may_be_retried = True


class ConnectionFailedError(GanServiceError):
    """No answer came, or it broke off, and the retries have been used up."""

    may_be_retried = True


class DeadlineError(GanServiceError):
    """The answer was not there in time."""


class BadReplyError(GanServiceError):
    """The answer is not what such a service gives: something else answers there, or something between changed it."""


class ReplyTooLargeError(BadReplyError):
    """The answer has more bytes than the call allows."""


_CLASSES: dict[int, type[GanServiceError]] = {
    401: UnauthorizedError,
    403: UnauthorizedError,
    404: NotFoundError,
    408: DeadlineError,
    429: BusyError,
    503: BusyError,
    504: DeadlineError,
}


def error_class(status: int, code: str | None) -> type[GanServiceError]:
    """The class that stands for an answer's status and code."""
    if code == "unknown_bundle":
        return UnknownBundleError
    # What is neither a mistake nor a failure is a redirection, say. None is followed: the key would go along.
    others = InvalidRequestError if 400 <= status < 500 else GanServiceError if status >= 500 else BadReplyError
    return _CLASSES.get(status, others)
