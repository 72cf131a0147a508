"""The context of one request: its headers, its body, its reply, and the memory that it holds.

There is one object for each request. Under our own server the connection creates it, feeds the body into it and writes
its reply (server/protocol.py), without ASGI messages in between. Under any other ASGI server the outermost middleware
creates one from `receive` and `send`.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.bundle import Bundle
from service.engine.bundles.index import Version
from service.errors import DeadlinePassed, TooLarge
from service.http.requests.memory_budget import SMALL_BYTES, MemoryBudget
from service.http.requests.responses import StreamedResponse
from service.logs import RequestMetadata, is_request_id, new_request_id

KEY = "gan.request"  # of the context in the request's scope
CLIENT_LEFT = 499  # status in logs and metrics of a request whose client left before a reply
UNMATCHED = "unmatched"  # the route in logs and metrics of a path without one
MAX_ACCEPT = 1024  # characters

Header = tuple[bytes, bytes]


class FoundRoute(NamedTuple):
    """A route: its template and the methods that it has."""

    template: str
    methods: tuple[str, ...]


class RequestContext(RequestMetadata, ABC):
    """One request and its reply.

    Attributes:
        scope: ASGI's.
        status: Of the reply; `CLIENT_LEFT` until it has started, and if the client leaves before its end.
        has_started: Whether the reply has started.
        bytes_in, bytes_out: Of the request's body and the reply's body so far.
        found: The route of its path; None if there is none.
        should_close: Called when the reply starts; True closes the connection after the reply.
        is_head: Whether it asks for the reply's head alone.
        more_headers: Of the reply, whatever it will be.
        limit_headers: Called when a successful reply starts; returns its RateLimit header fields, if it has any.
    """

    def __init__(self, scope: Scope) -> None:
        self._first = dict(reversed(scope["headers"]))  # reversed, so that the first of several with one name stays
        super().__init__(self._request_id(), scope["method"], UNMATCHED, time.monotonic())
        self.scope = scope
        self.status = CLIENT_LEFT
        self.has_started = False
        self.bytes_in = self.bytes_out = 0
        self.found: FoundRoute | None = None
        self.should_close: Callable[[], bool] = bool
        self.more_headers: Sequence[Header] = ()
        self.limit_headers: Callable[[], Sequence[Header]] = tuple
        self.is_head = scope["method"] == "HEAD"
        self._expects_body = scope["method"] not in {"GET", "HEAD"}
        self._budgets: tuple[MemoryBudget, MemoryBudget] | None = None  # for bodies, for replies
        self._max_body_bytes = 0
        self._body_bytes = self._reply_bytes = 0  # counted in the budgets
        self._work: asyncio.Task[None] | None = None
        self._was_cancelled = False
        scope[KEY] = self

    # ---------------------------------------------------------------------------------------- implemented by servers

    @abstractmethod
    async def read_message(self) -> Message:
        """The next message from the client; ASGI's `receive`."""

    @abstractmethod
    async def start_reply(self, status: int, headers: list[Header]) -> None:
        """Send the reply's head, at the latest together with the first part of its body."""

    @abstractmethod
    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """Send a part of the reply's body. Waits while the client is slow to read it."""

    @abstractmethod
    def hang_up(self) -> None:
        """End the connection at once, even if the client has not read all of the reply."""

    def check(self) -> None:
        """Raise the error for a request that could not be parsed, so that it gets a reply like any other request.

        Raises:
            ServiceError: Its head or its body could not be parsed.
        """

    def take_whole_body(self) -> bytes | None:
        """The whole body, if all of it has arrived and none of it was read; else None."""
        return None

    def client_left(self) -> None:
        """The client has disconnected or closed its sending side. Called by the server, on the event loop.

        Cancels the request's work, unless its body is still being read: that ends by a disconnect message.
        """
        self.has_left = True
        if self._work is not None and not self._expects_body:
            self._was_cancelled = True
            self._work.cancel()

    # ------------------------------------------------------------------------------------------- for log and traces

    def works_on(self, bundle: Bundle | Version, count: int) -> None:
        """Note the bundle, and how many images the request is for."""
        self.bundle, self.count = f"{bundle.name}@{bundle.version}", count

    def took(self, **seconds: float) -> dict[bytes, bytes]:
        """Add these seconds to those that were noted before; returns the Server-Timing header, which has them all."""
        for what, more in seconds.items():
            self.took_s[what] = self.took_s.get(what, 0.0) + more
        shown = [f"{what};dur={1e3 * all_s:.3f}" for what, all_s in self.took_s.items()]
        return {b"server-timing": ", ".join(shown).encode()}

    # ------------------------------------------------------------------------------------------------------- the head

    def header(self, name: bytes) -> str | None:
        """The first header of this name (lower case); None if there is none."""
        value = self._first.get(name)
        return None if value is None else str(value, "latin-1")

    def all_of_header(self, name: bytes) -> str:
        """All headers of this name, joined by commas (RFC 9110, 5.3); empty if there is none."""
        if name not in self._first:
            return ""
        return ", ".join([str(value, "latin-1") for given, value in self.scope["headers"] if given == name])

    def accept(self) -> str:
        """The Accept header, cut to its first `MAX_ACCEPT` characters."""
        given = self.all_of_header(b"accept")
        return given if len(given) <= MAX_ACCEPT else given[:MAX_ACCEPT].rpartition(",")[0]

    def media_type(self) -> str:
        """The body's media type in lower case, without parameters; empty if there is none."""
        return (self.header(b"content-type") or "").split(";", maxsplit=1)[0].strip().lower()

    def _request_id(self) -> str:
        """The client's X-Request-ID if it is safe in headers and logs, else a new id."""
        given = self.header(b"x-request-id")
        return given if given is not None and is_request_id(given) else new_request_id()

    # ------------------------------------------------------------------------------------------------------- the body

    def announced_bytes(self, most: int) -> int:
        """The body's size by its Content-Length; 0 if there is none.

        Raises:
            TooLarge: It is more than `most`.
        """
        length = self.header(b"content-length") or ""
        if not length.isdecimal():
            return 0
        if len(length) > 18 or int(length) > most:
            raise TooLarge(f"The body has {length[:100]} bytes; the most is {most}.")
        return int(length)

    def limit_body(self, most: int) -> None:
        """Lower the most bytes that the body may have.

        Raises:
            TooLarge: More are announced.
        """
        self._max_body_bytes = min(self._max_body_bytes, most)
        self.announced_bytes(self._max_body_bytes)

    async def receive(self) -> Message:
        """ASGI's `receive`, which also counts the body.

        Raises:
            TooLarge: The body is larger than it may be.
            QueueFull: All bodies together are.
            ServiceError: From `check`, if no reply has started.
        """
        if self._budgets is not None and self._body_bytes > SMALL_BYTES:
            self._budgets[0].wait_for_client(self)
        message = await self.read_message()
        if not self.has_started:
            self.check()
        self._count_body(len(message.get("body", b"")))
        if not message.get("more_body"):
            self._body_ended()
        return message

    def take_body(self) -> bytes | None:
        """The whole body if it has arrived, else None. Raises what `receive` raises."""
        body = self.take_whole_body()
        if body is not None:
            self._count_body(len(body))
            self._body_ended()
        return body

    async def read_body(self) -> bytes:
        """Wait for the whole body. Raises what `receive` raises.

        Raises:
            ClientDisconnect: The client left before the end of the body.
        """
        parts = []
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)

    def _count_body(self, more: int) -> None:
        self.bytes_in += more
        if self._budgets is None:
            return
        if self._body_bytes + more > self._max_body_bytes:
            raise TooLarge(f"The body has more than {self._max_body_bytes} bytes.")
        self.reserve_body(more)

    def reserve_body(self, more: int) -> None:
        """Count memory that the body takes beside the bytes that were sent.

        Raises:
            QueueFull: There is no room for it.
        """
        if self._budgets is not None:
            self._budgets[0].check(more, self._body_bytes + more)
            self._budgets[0].used_bytes += more
            self._body_bytes += more

    def _body_ended(self) -> None:
        self._expects_body = False
        if self._budgets is not None:
            self._budgets[0].stop_waiting_for_client(self)

    # ------------------------------------------------------------------------------------------------------ the reply

    def reserve_reply(self, size: int) -> None:
        """Count the memory that making the reply takes, in bytes. Of a whole reply, from when it is made, its own size.

        Raises:
            QueueFull: There is no room for it.
        """
        if self._budgets is not None:
            self._budgets[1].check(size)
            self._count_reply(size)

    async def answer(self, response: Response) -> None:
        """Send a response."""
        await self._start(response.status_code, response.raw_headers)
        if isinstance(response, StreamedResponse):
            await self._stream(response)
        else:
            await self._write(bytes(response.body), is_last=True)

    async def _stream(self, response: StreamedResponse) -> None:
        """Send a body part by part, as fast as the client reads it.

        Raises:
            DeadlinePassed: It took too long, in making or in reading.
        """
        async with aclosing(response.parts) as parts:
            async for part in parts:
                await self._write_in_time(part, response.left_s)
        await self._write(b"", is_last=True)

    async def _write_in_time(self, part: bytes, left_s: Callable[[], float]) -> None:
        try:
            async with asyncio.timeout(left_s()):
                await self._write(part, is_last=False)
        except TimeoutError:
            left_s()
            raise DeadlinePassed from None
        if self._budgets is not None:  # it waits for the next part now
            self._budgets[1].stop_waiting_for_client(self)

    async def send(self, message: Message) -> None:
        """ASGI's `send`, which also adds the headers that every reply has."""
        if message["type"] == "http.response.start":
            await self._start(message["status"], message.get("headers", ()))
        else:
            await self._write(message.get("body", b""), is_last=not message.get("more_body"))

    async def _start(self, status: int, headers: Iterable[Header]) -> None:
        complete = self._complete(headers)
        if status < 400:
            complete += self.limit_headers()
        await self.start_reply(status, complete)
        self.status = status
        self.has_started = True

    async def _write(self, body: bytes, *, is_last: bool) -> None:
        if self.is_head:  # same headers as GET, but no body
            body = b""
        size = len(body)
        self.bytes_out += size
        if self._budgets is not None:
            more = size - self._reply_bytes
            # Once all is made, nothing is held but what the client has not read. The length of replies that nothing was
            # reserved for, such as JSON results, is known only now.
            if size > SMALL_BYTES or (is_last and self._reply_bytes):
                self._count_reply(more if is_last else max(0, more))
            if size > SMALL_BYTES:
                self._budgets[1].wait_for_client(self)
        await self.write_reply(body, is_last=is_last)

    def _count_reply(self, more: int) -> None:
        assert self._budgets is not None  # noqa: S101 - checked by its callers
        self._budgets[1].used_bytes += more
        self._reply_bytes += more

    def _complete(self, headers: Iterable[Header]) -> list[Header]:
        complete = [*headers, *self.more_headers]
        names = {name for name, _ in complete}
        complete += [(b"x-request-id", self.id.encode("latin-1")), (b"x-content-type-options", b"nosniff")]
        if b"cache-control" not in names:
            complete.append((b"cache-control", b"no-store"))
        if self.should_close() and b"connection" not in names:
            complete.append((b"connection", b"close"))
        return complete

    # ------------------------------------------------------------------------------------------------------- the work

    async def work(self, app: ASGIApp, bodies: MemoryBudget, replies: MemoryBudget, max_body_bytes: int) -> None:
        """Have `app` answer the request within the memory budgets, and cancel it if the client leaves.

        Args:
            app: The next layer.
            bodies, replies: Count what all requests together hold.
            max_body_bytes: Largest body of this request.
        """
        if self.has_left:
            return
        self._budgets, self._max_body_bytes = (bodies, replies), max_body_bytes
        work = self._work = asyncio.current_task()
        assert work is not None  # noqa: S101 - servers run requests in tasks
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            # Swallowed only if `client_left` has cancelled the task: no client is left to answer. Otherwise the server
            # is stopping.
            if not self._was_cancelled or work.uncancel() > 0:
                raise
            self.status = CLIENT_LEFT
        except ClientDisconnect:
            pass
        finally:
            self._work = None
            self._release_memory()

    def evict(self) -> None:
        """End the connection, because other requests need this one's memory.

        The memory is released first: until the connection has really ended, each further piece of another body would
        otherwise evict one more client.
        """
        self._release_memory()
        self.hang_up()

    def _release_memory(self) -> None:
        if self._budgets is None:
            return
        bodies, replies = self._budgets
        bodies.used_bytes -= self._body_bytes
        replies.used_bytes -= self._reply_bytes
        self._body_bytes = self._reply_bytes = 0
        for budget in self._budgets:
            budget.stop_waiting_for_client(self)


class AsgiRequest(RequestContext):
    """A request under another ASGI server. Such a server reports a disconnect only through `receive`.

    Args:
        scope, receive, send: ASGI's.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope)
        self._receive = receive
        self._send = send
        self._body_read = asyncio.Event()

    async def read_message(self) -> Message:
        """See the base class."""
        message = await self._receive()
        if not message.get("more_body"):
            self._body_read.set()
        return message

    async def start_reply(self, status: int, headers: list[Header]) -> None:
        """See the base class."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """See the base class."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    def hang_up(self) -> None:
        """ASGI has no call that ends a connection, so cancel the work in the middle of the reply."""
        self._expects_body = False
        self.client_left()

    async def work(self, app: ASGIApp, bodies: MemoryBudget, replies: MemoryBudget, max_body_bytes: int) -> None:
        """See the base class."""
        watcher = asyncio.create_task(self._wait_for_departure())
        try:
            await super().work(app, bodies, replies, max_body_bytes)
        finally:
            watcher.cancel()

    async def _wait_for_departure(self) -> None:
        """Once the body has been read, wait for the disconnect message."""
        if self._expects_body:
            await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body of a GET
        self.client_left()


def context_of(request: Request) -> RequestContext:
    """The context of a Starlette request."""
    context: RequestContext = request.scope[KEY]
    return context
