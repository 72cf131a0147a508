"""The listening socket, and accepting connections from it."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

BACKLOG = 2048
STALLED_CLIENT_S = 60  # a client that does not acknowledge sent data for so long is disconnected
MAX_ACCEPTS = 64  # connections accepted in one step of the event loop
PAUSE_S = 0.05  # wait after a connection could not be accepted

_BAD_ADDRESS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL})

log = logging.getLogger(__name__)


class HostError(ValueError):
    """The host can't be listened on; the message says why."""


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Clients can connect from now on, and wait until they are served.

    `::` also listens on all IPv4 addresses. An address may be in brackets, as in URLs.

    Raises:
        HostError: The name can't be resolved, or is not an address of this machine.
        OSError: The port is in use or not permitted.
    """
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except ValueError:  # such as an empty label, which Python refuses before asking a resolver
        raise HostError("it is no name or address") from None
    except OSError as error:
        number = error.errno or 0
        if number < 0:  # an error of name resolution
            raise HostError(str(error.strerror).partition(" (while")[0]) from None
        if number in _BAD_ADDRESS:
            raise HostError(os.strerror(number)) from None
        raise
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by connections; without it such clients would never go away
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALLED_CLIENT_S)
    return listener


def in_words(listener: socket.socket, *, has_tls: bool = False) -> str:
    """Where this machine reaches the listener, for the log: a URL, and that there are others where it has them all."""
    scheme = "https" if has_tls else "http"
    host, port = listener.getsockname()[:2]
    if host not in {"0.0.0.0", "::"}:  # noqa: S104 - only compared
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    only_ipv6 = host == "::" and listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return f"{scheme}://{'[::1]' if only_ipv6 else '127.0.0.1'}:{port}, and on every other address of this machine"


class Acceptor:
    """Accepts connections on the event loop, up to `MAX_ACCEPTS` in one step.

    uvloop itself accepts one in each step. While hundreds of clients send large bodies, steps are long, and a probe
    that connects after them would wait for as many steps.

    Args:
        listener: The listening socket.
        take: Called with each connection, which it then owns. If it raises OSError, the connection is closed, and
            accepting pauses for `PAUSE_S`.
    """

    def __init__(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._take = take
        self._is_started = False
        listener.settimeout(0)

    def start(self) -> None:
        """Start to accept connections."""
        self._is_started = True
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Stop accepting; new clients wait in the listener's queue."""
        self._is_started = False
        asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS):
            if not self._is_started:  # `take` has called `stop`
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # most likely no file descriptor is left
                log.error("cannot accept connections: %s", error)  # noqa: TRY400 - a traceback would say no more
                self._pause()
                return
            try:
                self._take(connection)
            except OSError as error:
                connection.close()
                log.error("a connection was lost: %s", error)  # noqa: TRY400 - as above
                self._pause()
                return

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        if self._is_started:
            self.start()
