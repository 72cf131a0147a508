"""The other workers of a service, as its parts see them: whom they ask, what they answer. Alone, there are none."""

import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

PROBES = ("started", "ready", "live")

Handler = Callable[..., Awaitable[Any]]
Reasons = dict[str, str | None]


class Server(Protocol):
    """What serves a worker's connections."""

    def reasons(self) -> Reasons:
        """Why it says no to each probe."""
        ...

    def take(self, connection: socket.socket) -> None:
        """Serve this connection; `connection_closed` is to be called at its end."""
        ...

    def be_alone(self) -> None:
        """The supervisor is gone, and nobody can reach us any more."""
        ...

    def stop_at_once(self, number: int) -> None:
        """A signal to stop, of this number, that is not the first."""
        ...


class WorkerGroup:
    """All workers of a service but this one: nobody, in a service of one process.

    Attributes:
        says_when_again: Whether a second signal comes from here: then what a process gets twice was meant once.
    """

    says_when_again = False

    async def ask(self, what: str, *, within_s: float, **details: Any) -> list[Any]:  # noqa: ARG002 - for those that have others
        """Every other worker's answer to this.

        Raises:
            NotReady: One of them gave none in time.
        """
        return []

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """Answer the others with what these return, by what is asked; called with its details."""

    def reason(self, probe: str) -> str | None:  # noqa: ARG002 - for those that have others
        """Why another worker says no to this probe; None where all say yes."""
        return None

    async def join(self, server: Server) -> None:
        """Begin to take connections for this worker's server, and to say how it is."""

    async def leave(self) -> None:
        """Take no more connections than those that are on their way."""

    def connection_closed(self) -> None:
        """A connection has ended."""
