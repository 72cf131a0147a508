"""The socket that clients connect to."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

BACKLOG = 2048
TAKES_NOTHING_S = 60  # a client that acknowledges nothing of a reply for so long is cut off
AT_ONCE = 64  # connections that are accepted in one step of the event loop
PAUSE_S = 0.05  # after a connection could not be accepted

_NO_ADDRESS_OF_OURS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL})

log = logging.getLogger(__name__)


class HostError(ValueError):
    """Nobody can listen there; the message says why."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients can connect from now on, and wait until they are served.

    `::` listens on all addresses of IPv4 too. An address may stand in brackets, as in URLs.

    Raises:
        HostError: There is no such name, or it is no address of this machine.
        OSError: The port is taken, or not ours to take.
    """
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except ValueError:  # such as an empty label, which no resolver is asked for
        raise HostError("it is no name or address") from None
    except OSError as error:
        number = error.errno or 0
        if number < 0:  # of name resolution
            raise HostError(str(error.strerror).partition(" (while")[0]) from None
        if number in _NO_ADDRESS_OF_OURS:
            raise HostError(os.strerror(number)) from None
        raise
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it; without it such clients stay for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * TAKES_NOTHING_S)
    return listener


def url(listener: socket.socket) -> str:
    """Its address, as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Acceptor:
    """Accepts connections on the event loop, many in one step of it.

    uvloop itself accepts one a step. While hundreds of clients send large bodies a step is long, and a probe that
    connects after them would wait for as many steps.

    Args:
        listener: Where clients connect.
        take: Called with each connection, and owns it from then on. It may raise OSError; then the connection is
            closed, and nothing is accepted for a moment.
    """

    def __init__(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._take = take
        self._is_wanted = False
        listener.settimeout(0)

    def start(self) -> None:
        """Accept connections from now on."""
        self._is_wanted = True
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Leave clients in the listener's queue."""
        self._is_wanted = False
        asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if not self._is_wanted:  # `take` has called `stop`
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # most likely no file number is left
                log.error("cannot accept connections: %s", error)  # noqa: TRY400 - the reason is all there is to know
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
        if self._is_wanted:
            self.start()
