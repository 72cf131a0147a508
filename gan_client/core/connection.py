"""What both transports are told: the address, the key, and how httpx's errors are to be read."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from gan_client.core.replies import Call
from gan_client.core.retries import Attempts
from gan_client.errors import ConnectionFailedError, DeadlineError, InvalidRequestError


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the service is, and how patient its client is.

    Raises:
        ValueError: The address or the key can't be sent.
    """

    url: str
    key: str | None
    timeout_s: float
    retries: int
    in_flight: int

    def __post_init__(self) -> None:
        """Refuse what would only fail at the first request, where the reason is harder to see."""
        if httpx.URL(self.url).scheme not in {"http", "https"} or not httpx.URL(self.url).host:
            raise ValueError(f"{self.url!r} is no address of a service: http://localhost:8000 would be one")
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise ValueError("the key is empty, or has characters that no key has")  # which, nobody needs to read
        if not self.timeout_s > 0 or self.retries < 0 or self.in_flight < 1:
            raise ValueError("timeout_s is over 0, retries at least 0, in_flight at least 1")

    def attempts(self) -> Attempts:
        """For a new call."""
        return Attempts(self.retries, self.timeout_s)

    def request(self, call: Call[Any], attempts: Attempts) -> dict[str, Any]:
        """The arguments of httpx's `stream` for the next attempt."""
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {
            "method": call.method,
            "url": self.url.rstrip("/") + call.path,
            "params": dict(call.query),
            "content": call.body,
            "headers": call.headers | attempts.headers | key,
            "timeout": httpx.Timeout(**attempts.timeouts),
            "follow_redirects": False,  # the key would go along
        }


@contextmanager
def errors_of_httpx(connection: Connection) -> Iterator[None]:
    """Ours in place of httpx's."""
    try:
        yield
    except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        if _is_about_tls(error):  # its certificate, or that there is none: a moment later it is the same
            raise InvalidRequestError(f"No TLS with {connection.url}: {error}") from error
        detail = f"No whole answer from {connection.url}: {error or type(error).__name__}"
        raise ConnectionFailedError(detail) from error
    except (httpx.TimeoutException, TimeoutError) as error:
        raise DeadlineError(f"No answer from {connection.url} within {connection.timeout_s:g} s.") from error
    except httpx.TransportError as error:  # what is wrong with the request itself
        raise InvalidRequestError(f"The request can't be sent: {error}") from error


def _is_about_tls(error: BaseException | None) -> bool:
    """Whether there was an answer, which TLS refuses; a connection that only broke off is no such thing."""
    while error and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
