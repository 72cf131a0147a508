"""What a request is, from its head to its last byte: who asks for what, what is held for it, and how it is answered.

There is one object for each request. Under our own server the connection makes it, fills it with the body as that comes
in and writes the reply from it (server/protocol.py), so that nothing stands between the two. Under any other ASGI
server the outermost middleware makes one around `receive` and `send`.
"""

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import TooLarge
from service.http.memory_budget import SMALL_BYTES, MemoryBudget
from service.logs import RequestMetadata, new_request_id

KEY = "gan.request"  # of a request's own context in its scope
CLIENT_LEFT = 499  # in logs and metrics only: nobody is there to read it
UNMATCHED = "unmatched"  # the route of what leads to none
MAX_ACCEPT = 1024  # characters
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

Header = tuple[bytes, bytes]


class FoundRoute(NamedTuple):
    """A route by its template, with the methods that it answers."""

    template: str
    methods: tuple[str, ...]


class RequestContext(RequestMetadata, ABC):
    """One request and its reply.

    Attributes:
        scope: ASGI's.
        status: Of the reply; `CLIENT_LEFT` until one has started.
        bytes_in, bytes_out: Of the body and of the reply, without heads.
        found: The route that its path leads to.
        is_last: Says when a reply starts whether its connection is to be closed after it.
    """

    def __init__(self, scope: Scope) -> None:
        self._first = dict(reversed(scope["headers"]))  # of several of a name the first one stays
        super().__init__(self._own_id(), scope["method"], UNMATCHED, time.monotonic())
        self.scope = scope
        self.status = CLIENT_LEFT
        self.bytes_in = self.bytes_out = 0
        self.found: FoundRoute | None = None
        self.is_last: Callable[[], bool] = bool
        self._is_head = scope["method"] == "HEAD"
        self._expects_body = scope["method"] != "GET"
        self._budgets: tuple[MemoryBudget, MemoryBudget] | None = None  # of bodies and of replies
        self._max_body_bytes = 0
        self._body_held = self._reply_held = 0  # bytes
        self._work: asyncio.Task[None] | None = None
        self._has_left = self._was_cancelled = False
        scope[KEY] = self

    # ---------------------------------------------------------------------------------------------- what a server does

    @abstractmethod
    async def read_message(self) -> Message:
        """The next message from the client, as ASGI's `receive`."""

    @abstractmethod
    async def start_reply(self, status: int, headers: list[Header]) -> None:
        """Send the reply's head, at the latest with the first of its body."""

    @abstractmethod
    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """Send a part of the reply's body; what is large is waited for until nearly all of it is taken."""

    @abstractmethod
    def hang_up(self) -> None:
        """End the connection at once, whatever the client has yet to take."""

    def check(self) -> None:
        """Return unless what came as this request, or in place of it, can't be understood.

        Raises:
            ServiceError: It can't. It is answered all the same, as every request is.
        """

    def take_whole_body(self) -> bytes | None:
        """The whole body, if all of it is there and nothing of it was read yet."""
        return None

    def client_left(self) -> None:
        """The client has gone, or sends no more. Called by the server, on the event loop; more than once is the same.

        Work is cancelled, but for a body that is being read: whoever reads it hears of it.
        """
        self._has_left = True
        if self._work is not None and not self._expects_body:
            self._was_cancelled = True
            self._work.cancel()

    # ------------------------------------------------------------------------------------------------------- the head

    def header(self, name: bytes) -> str | None:
        """The first header of this name (lower case); None where there is none."""
        value = self._first.get(name)
        return None if value is None else str(value, "latin-1")

    def all_of_header(self, name: bytes) -> str:
        """Every header of this name, joined as RFC 9110, 5.3 allows; empty where there is none."""
        if name not in self._first:
            return ""
        return ", ".join([str(value, "latin-1") for given, value in self.scope["headers"] if given == name])

    def accept(self) -> str:
        """What the client accepts; of a list longer than any client needs, the first part."""
        given = self.all_of_header(b"accept")
        return given if len(given) <= MAX_ACCEPT else given[:MAX_ACCEPT].rpartition(",")[0]

    def media_type(self) -> str:
        """The body's media type without parameters, in lower case; empty where none is named."""
        return (self.header(b"content-type") or "").split(";", maxsplit=1)[0].strip().lower()

    def _own_id(self) -> str:
        """The client's own id where it can go into headers and logs as it is, else a new one."""
        given = self.header(b"x-request-id")
        return given if given is not None and _REQUEST_ID.fullmatch(given) else new_request_id()

    # ------------------------------------------------------------------------------------------------------- the body

    async def receive(self) -> Message:
        """ASGI's, for whatever answers this request.

        Raises:
            TooLarge, QueueFull: The body is larger than it may be, or all bodies together are.
            ServiceError: What `check` raises, while that can be answered.
        """
        if self._budgets is not None and self._body_held > SMALL_BYTES:
            self._budgets[0].wait_for_client(self)
        message = await self.read_message()
        if not self.has_started:
            self.check()
        self._count_body(len(message.get("body", b"")))
        if not message.get("more_body"):
            self._body_is_in()
        return message

    def take_body(self) -> bytes | None:
        """The whole body, where it can be had without waiting. Errors are those of `receive`."""
        body = self.take_whole_body()
        if body is not None:
            self._count_body(len(body))
            self._body_is_in()
        return body

    async def read_body(self) -> bytes:
        """The whole body. Errors are those of `receive`.

        Raises:
            ClientDisconnect: The client left before its end.
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
        if self._body_held + more > self._max_body_bytes:
            raise TooLarge(f"The body has more than {self._max_body_bytes} bytes.")
        bodies, _ = self._budgets
        bodies.check(more, self._body_held + more)
        bodies.now += more
        self._body_held += more

    def _body_is_in(self) -> None:
        self._expects_body = False
        if self._budgets is not None:
            self._budgets[0].client_moved(self)

    # ------------------------------------------------------------------------------------------------------ the reply

    @property
    def has_started(self) -> bool:
        """Whether a part of the reply is out."""
        return self.status != CLIENT_LEFT

    def reserve_reply(self, size: int) -> None:
        """Hold the memory for the reply until its client has taken it. `size` is in bytes, not encoded.

        Raises:
            QueueFull: There is none.
        """
        if self._budgets is not None:
            self._budgets[1].check(size)
            self._hold_reply(size)

    async def answer(self, response: Response) -> None:
        """Send a response that is there as a whole."""
        await self._start(response.status_code, response.raw_headers)
        await self._write(bytes(response.body), is_last=True)

    async def send(self, message: Message) -> None:
        """ASGI's, for whatever answers this request: adds the headers that every reply has."""
        if message["type"] == "http.response.start":
            await self._start(message["status"], message.get("headers", ()))
        else:
            await self._write(message.get("body", b""), is_last=not message.get("more_body"))

    async def _start(self, status: int, headers: Iterable[Header]) -> None:
        await self.start_reply(status, self._complete(headers))
        self.status = status

    async def _write(self, body: bytes, *, is_last: bool) -> None:
        if self._is_head:  # the same work and the same headers as GET
            body = b""
        size = len(body)
        self.bytes_out += size
        if self._budgets is not None and size > SMALL_BYTES:
            # Reserved is what the images take; how long a list of verdicts is, is known only once it is there.
            self._hold_reply(max(0, size - self._reply_held))
            self._budgets[1].wait_for_client(self)
        await self.write_reply(body, is_last=is_last)

    def _hold_reply(self, more: int) -> None:
        assert self._budgets is not None  # noqa: S101 - its callers have asked
        self._budgets[1].now += more
        self._reply_held += more

    def _complete(self, headers: Iterable[Header]) -> list[Header]:
        complete = [*headers]
        names = {name for name, _ in complete}
        complete += [(b"x-request-id", self.id.encode("latin-1")), (b"x-content-type-options", b"nosniff")]
        if b"cache-control" not in names:
            complete.append((b"cache-control", b"no-store"))
        if self.is_last() and b"connection" not in names:
            complete.append((b"connection", b"close"))
        return complete

    # ------------------------------------------------------------------------------------------------------- the work

    async def work(self, app: ASGIApp, bodies: MemoryBudget, replies: MemoryBudget, max_body_bytes: int) -> None:
        """Have `app` answer the request, within what all requests together may hold, while its client waits.

        Args:
            app: Gets GET for HEAD.
            bodies, replies: What all requests together hold.
            max_body_bytes: Largest body of this one.
        """
        if self._has_left:
            return
        self._budgets, self._max_body_bytes = (bodies, replies), max_body_bytes
        work = self._work = asyncio.current_task()
        assert work is not None  # noqa: S101 - servers run requests in tasks
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            # Ours only if the client left; else the server is stopping. There is nobody left to answer.
            if not self._was_cancelled or work.uncancel() > 0:
                raise
        except ClientDisconnect:
            pass
        finally:
            self._work = None
            self._hold_nothing()

    def give_up(self) -> None:
        """End the connection, because others need the memory that is held for this client.

        It counts as free from now on: or each piece of what others send before the end is through would end one more.
        """
        self._hold_nothing()
        self.hang_up()

    def _hold_nothing(self) -> None:
        if self._budgets is None:
            return
        bodies, replies = self._budgets
        bodies.now -= self._body_held
        replies.now -= self._reply_held
        self._body_held = self._reply_held = 0
        for budget in self._budgets:
            budget.client_moved(self)


class AsgiRequest(RequestContext):
    """A request of another server than ours, which says that its client left only to whoever waits to hear that.

    Args:
        scope, receive, send: ASGI's.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(scope)
        self._receive = receive
        self._send = send
        self._body_read = asyncio.Event()

    async def read_message(self) -> Message:
        """See the base."""
        message = await self._receive()
        if not message.get("more_body"):
            self._body_read.set()
        return message

    async def start_reply(self, status: int, headers: list[Header]) -> None:
        """See the base."""
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """See the base."""
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    def hang_up(self) -> None:
        """To stop in the middle of a reply is all that another server lets us do."""
        self._expects_body = False
        self.client_left()

    async def work(self, app: ASGIApp, bodies: MemoryBudget, replies: MemoryBudget, max_body_bytes: int) -> None:
        """See the base."""
        watcher = asyncio.create_task(self._wait_for_departure())
        try:
            await super().work(app, bodies, replies, max_body_bytes)
        finally:
            watcher.cancel()

    async def _wait_for_departure(self) -> None:
        """Once the body is in, the next thing to hear from the client is that it left."""
        if self._expects_body:
            await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass  # what a GET carries as its body
        self.client_left()


def context_of(request: Request) -> RequestContext:
    """What is known of a request that a route was given."""
    context: RequestContext = request.scope[KEY]
    return context
