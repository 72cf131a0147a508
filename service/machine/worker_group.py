"""What a worker exchanges with the other workers of its service. A service of one process has no others."""

import socket
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

PROBES = ("started", "ready", "live")

Handler = Callable[..., Awaitable[Any]]
Reasons = dict[str, str | None]


class Server(Protocol):
    """The server of a worker, as its group calls it."""

    def reasons(self) -> Reasons:
        """Why it says no to each probe; None where it says yes."""
        ...

    def take(self, connection: socket.socket) -> None:
        """Serve this connection, and call `connection_closed` when it ends."""
        ...

    def supervisor_lost(self) -> None:
        """Called when the supervisor is gone, so that no new connections come."""
        ...

    def stop_at_once(self, number: int) -> None:
        """Called on a further signal to stop, of this number."""
        ...


class WorkerGroup:
    """All workers of a service but this one. This class is for a service of one process: there are none.

    Args:
        size: How many workers there are and why, as fields of the log's line at the start.

    Attributes:
        limits_file: Descriptor of the file in which the workers share the state of keys' limits, if they do.
        reports_second_signal: Whether the group reports a second signal to stop, through `Server.stop_at_once`. The
            process then ignores a second signal of its own, which may be the first one delivered twice.
    """

    limits_file: int | None = None
    reports_second_signal = False

    def __init__(self, size: Mapping[str, object] = MappingProxyType({"workers": 1})) -> None:
        self.size = size

    async def ask(self, what: str, *, within_s: float, **details: Any) -> list[Any]:  # noqa: ARG002 - for those that have others
        """Every other worker's answer to a question.

        Raises:
            NotReady: One of them gave none in time.
        """
        return []

    def has_started(self, serves: Mapping[str, object]) -> None:
        """Tell that this worker serves: fields for the log's line, which is written once all workers do."""

    def cannot_start(self, reason: str) -> bool:  # noqa: ARG002 - for those that have others
        """Tell why this worker can't start. False if nobody says it for all workers, so that the caller has to."""
        return False

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """Answer the others' questions with what these return: handlers by question, called with its details."""

    def reason(self, probe: str) -> str | None:  # noqa: ARG002 - for those that have others
        """Why another worker says no to this probe; None where all say yes."""
        return None

    async def join(self, server: Server) -> None:
        """Begin to take connections for this worker's server, and to report its probes."""

    async def leave(self) -> None:
        """Take no connections but those that are on their way already."""

    def connection_closed(self) -> None:
        """A connection has ended."""
