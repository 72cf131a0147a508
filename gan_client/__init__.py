"""The client of gan-service: images, verdicts and what else it gives, from Python. Needs httpx, Pillow and NumPy."""

from gan_client.async_client import AsyncClient
from gan_client.client import Client
from gan_client.errors import (
    BadReplyError,
    BusyError,
    ConnectionFailedError,
    DeadlineError,
    GanServiceError,
    InvalidRequestError,
    NotFoundError,
    ReplyTooLargeError,
    UnauthorizedError,
    UnknownBundleError,
)
from gan_client.results import Bundle, Encoding, Problem, Verdict, Verification

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "BadReplyError",
    "Bundle",
    "BusyError",
    "Client",
    "ConnectionFailedError",
    "DeadlineError",
    "Encoding",
    "GanServiceError",
    "InvalidRequestError",
    "NotFoundError",
    "Problem",
    "ReplyTooLargeError",
    "UnauthorizedError",
    "UnknownBundleError",
    "Verdict",
    "Verification",
]
