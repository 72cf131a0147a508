"""The socket that clients connect to."""

import socket

BACKLOG = 2048
TAKES_NOTHING_S = 60  # a client that leaves a reply lying for so long is cut off


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; clients can connect from now on, and wait until they are served.

    Raises:
        OSError: The address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # connections inherit it; without it one that takes nothing stays for ever
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * TAKES_NOTHING_S)
    return listener


def url(listener: socket.socket) -> str:
    """Where it listens, as clients write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
