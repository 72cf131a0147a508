"""One request and its reply, as they go by, and what our own server lets an application do beyond ASGI."""

from collections.abc import Callable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.http.headers import header
from service.http.memory_budget import SMALL_BYTES
from service.logs import RequestMetadata

CONNECTION = "gan.connection"  # in a scope's extensions
EXCHANGE = "gan.exchange"  # in a scope
CLIENT_LEFT = 499  # in logs and metrics only: nobody is there to read it

Header = tuple[bytes, bytes]


class Connection:
    """A client's connection, of a server that puts one into its requests' scopes.

    With ASGI's messages alone, each request would need a task that waits to hear of its client's departure, and its
    body and its reply would go through half a dozen callbacks each, one layer after the other.
    """

    _is_over = False
    _tell: Callable[[], None] | None = None

    def hang_up(self) -> None:
        """End it at once, whatever the client has yet to take."""

    def take_body(self) -> bytes | None:
        """The whole body of the request that is being answered, if it is there and nothing of it was received yet."""
        return None

    def reply(self, status: int, headers: Sequence[Header], body: bytes) -> bool:  # noqa: ARG002 - see the class
        """Answer that request in one go; False, with nothing sent, where that takes messages."""
        return False

    def has_to_be_kept(self) -> bool:
        """Whether it stays open after the reply only if that says so, and says where it ends: HTTP/1.0."""
        return False

    def check(self) -> None:
        """Return unless what has come of that request, or instead of it, can't be understood.

        Raises:
            ServiceError: It can't. The server asks its application to answer all the same, as it does every request.
        """

    def end(self) -> None:
        """The client has left. Called by the server, on the event loop."""
        self._is_over = True
        if self._tell is not None:
            self._tell()

    def watch(self, tell: Callable[[], None] | None) -> None:
        """Have this called when the client leaves, now if it has; None for nothing any more."""
        self._tell = tell
        if tell is not None and self._is_over:
            tell()


class BytesResponse(Response):
    """A response whose headers are bytes already. Starlette's are turned into them one by one, and searched.

    Args:
        body: All of it.
        headers: Names in lower case.
        media_type: Of the body; empty where there can be none.
    """

    def __init__(self, body: bytes, headers: Mapping[bytes, bytes], media_type: str, status: int = 200) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        self.raw_headers = [*headers.items()]
        if media_type:
            self.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]


def connection(scope: Scope) -> Connection | None:
    """A request's connection, where the server has told of it."""
    found: Connection | None = scope.get("extensions", {}).get(CONNECTION)
    return found


class Exchange:
    """One request and its reply: notes its status and its bytes, and adds the headers that all replies have.

    Args:
        facts: Of the request.
        scope, receive, send: Its own.
        is_draining: Whether the process is about to end. Every reply then closes its connection.
    """

    def __init__(
        self, facts: RequestMetadata, scope: Scope, receive: Receive, send: Send, is_draining: Callable[[], bool]
    ) -> None:
        self.facts = facts
        self.status = CLIENT_LEFT  # until a reply starts
        self.bytes_in = 0
        self.bytes_out = 0
        # A body that we leave unread is thrown away by the server, so the connection stays good. But one that has no
        # announced end may never end, and one that waits for our "100 Continue" may never come.
        self._closes = header(scope, b"transfer-encoding") is not None or header(scope, b"expect") is not None
        self._is_draining = is_draining
        self._connection = connection(scope)
        self._receive = receive
        self._send = send

    @property
    def has_started(self) -> bool:
        """Whether a part of the reply is out."""
        return self.status != CLIENT_LEFT

    def take_body(self) -> bytes | None:
        """The whole body, where it can be had at once."""
        body = None if self._connection is None else self._connection.take_body()
        if body is not None:
            self.bytes_in += len(body)
            self._closes = False
        return body

    def cut_off(self) -> bool:
        """End the connection, so that the client sees that its reply is not whole; False where that can't be done."""
        if self._connection is None:
            return False
        self._connection.hang_up()
        return True

    def check(self) -> None:
        """See `Connection`."""
        if self._connection is not None:
            self._connection.check()

    async def receive(self) -> Message:
        """ASGI's. Raises what `check` does, while that can be answered."""
        message = await self._receive()
        if not self.has_started:
            self.check()
        self.bytes_in += len(message.get("body", b""))
        if not message.get("more_body"):
            self._closes = False
        return message

    async def answer(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a response, in one go where that is possible, else by what surrounds this."""
        body = bytes(response.body)
        is_simple = len(body) <= SMALL_BYTES and self.facts.method != "HEAD" and not self._closes
        if is_simple and self._connection is not None and not self._is_draining():
            headers = self._complete(response.raw_headers)
            if self._connection.reply(response.status_code, headers, body):
                self.status = response.status_code
                self.bytes_out += len(body)
                return
        await response(scope, receive, send)

    async def send(self, message: Message) -> None:
        """ASGI's."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = self._complete(message.get("headers", ()))
            if self._closes or self._is_draining():
                headers = [header for header in headers if header[0] != b"connection"]
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _complete(self, headers: Sequence[Header]) -> list[Header]:
        """These headers, and those that every reply has."""
        complete = [
            *headers,
            (b"x-request-id", self.facts.id.encode("latin-1")),
            (b"x-content-type-options", b"nosniff"),
        ]
        names = [name for name, _ in headers]
        if b"cache-control" not in names:
            complete.append((b"cache-control", b"no-store"))
        if self._connection is not None and self._connection.has_to_be_kept() and b"connection" not in names:
            complete.append((b"connection", b"keep-alive" if b"content-length" in names else b"close"))
        return complete
