"""A small HTTP/1.1 client that offers load on a schedule, whatever becomes of it.

A request's latency counts from the moment at which it was due, not from when this client sent it. A client that counts
from the sending leaves out the time that a slow server kept it from sending ("coordinated omission").
"""

import asyncio
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self, cast

MAX_CONNECTIONS = 1500
HEAD_END = b"\r\n\r\n"
HOST = "127.0.0.1"  # nothing else is ever asked

REFUSED = "connection refused"  # before a byte was sent
UNANSWERED = "closed unanswered"  # the request was sent, and the connection ended without a byte of a reply
CUT = "reply cut off"
UNSENT = "not sent"  # all of this client's connections were busy


class NoReply(Exception):  # noqa: N818 — what happened, not which error
    """There is no whole reply; `outcome` is REFUSED, UNANSWERED or CUT."""

    def __init__(self, outcome: str) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Reply(NamedTuple):
    """A whole reply. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Request(NamedTuple):
    """What to ask. `images` is what a 200 is worth."""

    method: str
    target: str
    images: int = 0
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Exchange:
    """One request and what became of it. Times are seconds by `time.perf_counter`."""

    request: Request
    due: float
    sent: float = 0.0
    done: float = 0.0
    outcome: int | str = UNSENT  # the status, or why there is none
    retry_after_s: int | None = None
    reply: Reply | None = None  # where it was asked for

    @property
    def latency_s(self) -> float:
        """From when it was due."""
        return self.done - self.due


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._received = bytearray()
        self._body_from = 0
        self._missing: int | None = None  # bytes of the body still to come, once the head is in
        self._reply: asyncio.Future[Reply] | None = None
        self._status, self._headers = 0, dict[str, str]()

    @classmethod
    async def open(cls, port: int, tls: ssl.SSLContext | None = None) -> "Connection":
        """Connect.

        Raises:
            NoReply: Nobody listens.
        """
        try:
            _, connection = await asyncio.get_running_loop().create_connection(cls, HOST, port, ssl=tls)
        except OSError:
            raise NoReply(REFUSED) from None
        return connection

    async def ask(self, request: Request) -> Reply:
        """Send a request and wait for the whole reply.

        Raises:
            NoReply: The connection ended before.
        """
        if not self.is_open:
            raise NoReply(UNANSWERED)
        self._reply = asyncio.get_running_loop().create_future()
        self._received.clear()
        self._missing = None
        self._transport.write(_head(request) + request.body)
        return await self._reply

    def close(self) -> None:
        """Hang up."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is none by inheritance
        self.is_open = True

    def connection_lost(self, _: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self.is_open = False
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(NoReply(CUT if self._received else UNANSWERED))

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._received += data
        if self._missing is None:
            end = self._received.find(HEAD_END)
            if end < 0:
                return
            self._status, self._headers = _parse_head(bytes(self._received[:end]))
            self._body_from = end + len(HEAD_END)
            self._missing = int(self._headers.get("content-length", "0"))
        if (
            self._reply is not None
            and not self._reply.done()
            and len(self._received) >= self._body_from + self._missing
        ):
            self._reply.set_result(Reply(self._status, self._headers, bytes(self._received[self._body_from :])))


def _head(request: Request) -> bytes:
    lines = [f"{request.method} {request.target} HTTP/1.1", f"Host: {HOST}"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    if request.body or request.method == "POST":
        lines.append(f"Content-Length: {len(request.body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in fields}


class Client:
    """Asks one port, over connections that it keeps open between requests as clients do.

    Args:
        port: Of 127.0.0.1.
        reuse: Keep connections open; else each request gets its own.
        keep_replies: Leave the whole reply in each Exchange.
        max_connections: At most this many requests at once; past it they are not sent, and said to be UNSENT.
        tls: Speak HTTPS by this.
    """

    def __init__(
        self,
        port: int,
        *,
        reuse: bool = True,
        keep_replies: bool = False,
        max_connections: int = MAX_CONNECTIONS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._port = port
        self._tls = tls
        self._reuse = reuse
        self._keep_replies = keep_replies
        self._free = max_connections
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()

    async def ask(self, request: Request) -> Reply:
        """One reply.

        Raises:
            NoReply: There is none.
        """
        connection = self._take() or await Connection.open(self._port, self._tls)
        try:
            reply = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if self._reuse and reply.headers.get("connection", "").lower() != "close":
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def exchange(self, request: Request, due: float | None = None) -> Exchange:
        """Ask, and say what became of it; never raises."""
        now = time.perf_counter()
        exchange = Exchange(request, now if due is None else due, sent=now)
        if self._free:
            self._free -= 1
            try:
                reply = await self.ask(request)
                exchange.outcome = reply.status
                if after := reply.headers.get("retry-after"):
                    exchange.retry_after_s = int(after)
                exchange.reply = reply if self._keep_replies else None
            except NoReply as error:
                exchange.outcome = error.outcome
            finally:
                self._free += 1
        exchange.done = time.perf_counter()
        return exchange


async def send_at(client: Client, schedule: Iterable[tuple[float, Request]]) -> list[Exchange]:
    """Open loop: send each request at its time, in seconds from now, whatever becomes of the others.

    Times rise. Returns when all have ended, in order.
    """
    start = time.perf_counter()
    tasks: list[asyncio.Task[Exchange]] = []
    async with asyncio.TaskGroup() as group:
        for seconds, request in schedule:
            due = start + seconds
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(client.exchange(request, due)))
    return [task.result() for task in tasks]
