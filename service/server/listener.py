"""The socket that clients connect to."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

BACKLOG = 2048
TAKES_NOTHING_S = 60  # a client that leaves a reply lying for so long is cut off
AT_ONCE = 64  # connections that are taken before anything else gets its turn
BREATH_S = 0.05  # when there is no way to take a connection

_NO_ADDRESS_OF_OURS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL})

log = logging.getLogger(__name__)


class HostError(ValueError):
    """Nobody can listen there; the message says why."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients can connect from now on, and wait until they are served.

    Every address of IPv6, `::`, is every one of IPv4 too. Brackets around an address, as in URLs, make no difference.

    Raises:
        HostError: There is no such name, or it is no address of this machine.
        OSError: The port can't be had.
    """
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except ValueError:  # what no resolver takes for a name: an empty label, a character that is none
        raise HostError("it is no name or address") from None
    except OSError as error:
        number = error.errno or 0
        if number < 0:  # of name resolution
            raise HostError(str(error.strerror).partition(" (while")[0]) from None
        if number in _NO_ADDRESS_OF_OURS:
            raise HostError(os.strerror(number)) from None
        raise
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it; without it one that takes nothing stays for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * TAKES_NOTHING_S)
    return listener


def url(listener: socket.socket) -> str:
    """Where it listens, as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Acceptor:
    """Takes connections on the event loop, many in one of its turns.

    uvloop alone takes one a turn. While hundreds of clients send large bodies, a turn is long, and who wants no more
    than to know whether we are alive would wait behind them all.

    Args:
        listener: Where clients connect.
        take: Called with each connection, which is its own from then on. It raises OSError where there is no way; the
            connection is closed then, and others wait a moment.
    """

    def __init__(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._take = take
        self._is_wanted = False
        listener.settimeout(0)

    def start(self) -> None:
        """Take connections from now on."""
        self._is_wanted = True
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Leave clients in the listener's queue."""
        self._is_wanted = False
        asyncio.get_running_loop().remove_reader(self._listener)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if not self._is_wanted:  # what takes them can have had enough
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # most likely no file number is left
                log.error("cannot accept connections: %s", error)  # noqa: TRY400 - the reason is all there is to know
                self._take_breath()
                return
            try:
                self._take(connection)
            except OSError as error:
                connection.close()
                log.error("a connection was lost: %s", error)  # noqa: TRY400 - as above
                self._take_breath()
                return

    def _take_breath(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener)
        loop.call_later(BREATH_S, self._go_on)

    def _go_on(self) -> None:
        if self._is_wanted:
            self.start()
