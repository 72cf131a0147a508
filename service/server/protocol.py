"""HTTP/1.1 on one connection: bytes → requests → the application → bytes, in order.

httptools finds where requests begin and end, asyncio moves the bytes, and uvicorn, which takes this class as its
option `http`, starts and ends connections. In short:

- A `RequestContext` begins with its head and takes the body as it comes in. Requests are answered one after the other,
  each in a task of its own. Those that come ahead wait, and nothing more is read meanwhile.
- Nothing is read either while 64 KiB of a body wait for the application, and nothing more is written while a client is
  slow to take what was written: the application waits.
- A client that offers an upgrade, as Java's and curl's do for HTTP/2, is answered as if it had not (RFC 9110, 7.8). The
  parser would take such a request for one without a body, and the body for the next request.
- What can't be understood is handed to the application after the requests before it, and answered, counted and logged
  as every request is. Then the connection is closed.
- A client that is still sending when the connection is to close gets to read its reply: it would be lost in the reset.
- A connection on which nobody is answered ends after a while: one that has sent nothing or half a head, too.
- Half a close counts as leaving: work for the client is dropped, and only what is answered at once is answered.
- The fields that may follow a body are thrown away: they are no part of its head.
"""

import asyncio
import http
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import Context
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

from httptools import (
    HttpParserError,
    HttpParserInvalidURLError,
    HttpParserUpgrade,
    HttpRequestParser,
    parse_url,
)
from starlette.types import Message, Scope
from uvicorn import Config
from uvicorn.server import ServerState

from service.errors import Malformed, ServiceError
from service.http.memory_budget import SMALL_BYTES
from service.http.request_context import Header, RequestContext
from service.server.head import MOST_FIELDS, check_head

HEAD_BYTES = 2**16  # of a head, or between two pieces of a body; and up to as much more as comes in one piece
BODY_BYTES = 2**16  # of a body that wait for the application
WHITE = b" \t"  # that HTTP allows around a header's value
LATE_BODY_S = 10.0  # a client that is refused may go on sending for so long, so that it gets to read why
LATE_BODY_AT_END_S = 1.0  # and for so long where the server is about to end
_WITHOUT_BODY = frozenset({204, 304})
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

log = logging.getLogger(__name__)


class HttpRequest(RequestContext):
    """A request on a connection, and its reply.

    Args:
        scope: ASGI's.
        connection: Its connection.
        keeps_alive: Whether the client wants to send another one after it.
    """

    def __init__(self, scope: Scope, connection: "HttpConnection", *, keeps_alive: bool) -> None:
        super().__init__(scope)
        self.keeps_alive = keeps_alive
        self.is_whole = False  # its body
        self.is_answered = False
        self._connection = connection
        self._is_http_1_0 = scope["http_version"] < "1.1"
        self._waits_for_continue = (self.header(b"expect") or "").lower() == "100-continue"
        self._parts: list[bytes] = []  # of the body, that wait for the application
        self._size = 0  # of these
        self._was_read = False  # any of it
        self._end_was_read = False
        self._news: asyncio.Future[None] | None = None  # for whoever waits for more of it
        self._refusal: ServiceError | None = None
        self._head: bytes | None = None  # of the reply, until its first bytes are written with it
        self._is_chunked = self._has_no_body = False

    # ------------------------------------------------------------------------------------------ what the client sends

    def feed(self, part: bytes) -> None:
        """More of the body has come."""
        if self.is_answered or self._has_left:  # nobody wants it
            return
        self._parts.append(part)
        self._size += len(part)
        self._tell()

    def end_body(self) -> None:
        """All of the body has come."""
        self.is_whole = True
        self._tell()

    def refuse(self, error: ServiceError) -> None:
        """What comes as this request can't be understood; it is the last on its connection."""
        self._refusal = error
        self.keeps_alive = self._waits_for_continue = False
        self._tell()

    def client_left(self) -> None:
        """See the base."""
        super().client_left()
        self._tell()

    def forget(self) -> None:
        """Nobody asks any more. A refusal's traceback leads back here, and would wait for the garbage collector."""
        self._refusal = None
        self._parts.clear()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    @property
    def is_full(self) -> bool:
        """Whether so much of the body waits for the application that no more should be read."""
        return self._size > BODY_BYTES

    # --------------------------------------------------------------------------------------- what the application does

    def check(self) -> None:
        """See the base."""
        if self._refusal is not None:
            raise self._refusal

    def take_whole_body(self) -> bytes | None:
        """See the base."""
        if not self.is_whole or self._was_read or self._has_left:
            return None
        self._end_was_read = True
        return self._take()

    async def read_message(self) -> Message:
        """See the base."""
        while not (self._has_left or self.is_answered or self._refusal):
            if not self._end_was_read and (self._parts or self.is_whole):
                self._end_was_read = self.is_whole
                return {"type": "http.request", "body": self._take(), "more_body": not self.is_whole}
            if self._waits_for_continue:
                self._waits_for_continue = False
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        return {"type": "http.disconnect"}

    def _take(self) -> bytes:
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size, self._was_read = 0, True
        self._connection.read_on()
        return body

    async def write_message(self, message: Message) -> None:
        """ASGI's `send`, for an application that knows of nothing else."""
        if message["type"] == "http.response.start":
            await self.start_reply(message["status"], message.get("headers", ()))
        else:
            await self.write_reply(message.get("body", b""), is_last=not message.get("more_body"))

    async def start_reply(self, status: int, headers: Iterable[Header]) -> None:
        """See the base."""
        self._head = self._begin(status, headers)

    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """See the base."""
        if self._connection.is_closing:  # the client has left
            return
        self._write_now(self._framed(body, is_last=is_last))
        if self._connection.taken is not None:
            await asyncio.shield(self._connection.taken)
        if is_last and not self.is_answered:
            self.is_answered = True
            self._tell()
            self._connection.request_answered(self)

    def hang_up(self) -> None:
        """See the base."""
        self._connection.hang_up()

    def _begin(self, status: int, headers: Iterable[Header]) -> bytes:
        """The reply's head. It says where the reply ends, and whether the connection does."""
        fields = [*self._connection.default_headers, *headers]
        if _UNPRINTABLE.search(b"".join([value for _, value in fields])):
            raise ValueError(f"a header of the reply has a character that HTTP does not know: {fields}")
        lines = [_status_line(status), *[b"%b: %b\r\n" % field for field in fields]]
        names = {name for name, _ in fields}
        self._has_no_body = self._is_head or status in _WITHOUT_BODY
        if b"content-length" not in names and not self._has_no_body:
            self._is_chunked = not self._is_http_1_0
            self.keeps_alive &= self._is_chunked
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        if (b"connection", b"close") in fields or self._is_cut_short():
            self.keeps_alive = False
        if b"connection" not in names and (not self.keeps_alive or self._is_http_1_0):
            lines.append(b"connection: keep-alive\r\n" if self.keeps_alive else b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _is_cut_short(self) -> bool:
        """Whether there may be no end of the body: it has no announced end, or waits for a word that it won't get.

        The rest of any other body is thrown away, and the connection stays good.
        """
        return not self.is_whole and (self._waits_for_continue or self.header(b"transfer-encoding") is not None)

    def _framed(self, body: bytes, *, is_last: bool) -> bytes:
        if self._has_no_body:
            return b""
        if not self._is_chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk + b"0\r\n\r\n" if is_last else chunk

    def _write_now(self, body: bytes) -> None:
        head, self._head = self._head or b"", None
        if head and len(body) > SMALL_BYTES:  # to copy it would take longer than another call
            self._connection.write(head)
            head = b""
        if data := head + body:
            self._connection.write(data)


class HttpConnection(asyncio.Protocol):
    """One client's connection.

    Args:
        config, server_state, app_state, _loop: What uvicorn hands to its option `http`.
        when_closed: Called at the connection's end.

    Attributes:
        taken: Done once the client has taken most of what was written; None while it is not slow to do so.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        when_closed: Callable[[], None] = lambda: None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = config.loaded_app
        self._root_path = config.root_path
        self._keep_alive_s = config.timeout_keep_alive
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._when_closed = when_closed
        self._transport: asyncio.Transport
        self._parser = self._new_parser()
        self._requests: deque[HttpRequest] = deque()  # to be answered, the first of them now
        self._incoming: HttpRequest | None = None  # the one whose body is being read
        self._url = b""
        self._headers: list[Header] = []
        self._is_in_head = False
        self._offers_upgrade = False
        self._is_broken = False  # what comes can't be understood any more
        self._bytes_since = 0  # a head's beginning or end, or a piece of a body
        self._is_reading = True
        self.taken: asyncio.Future[None] | None = None  # while the client is slow to take what was written
        self._late_body_s = LATE_BODY_S
        self._closing: asyncio.TimerHandle | None = None  # the client may still be sending
        self._idle_since = self._loop.time()
        self._idle = self._loop.call_later(self._keep_alive_s, self._end_if_idle)

    def _new_parser(self) -> HttpRequestParser:
        parser = HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # what comes after the last one is thrown away
        return parser

    # ------------------------------------------------------------------------------------------------ asyncio's calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as it is for TCP
        """See asyncio."""
        self._transport = transport
        self._client, self._server = _address(transport, "peername"), _address(transport, "sockname")
        self._scheme = "https" if transport.get_extra_info("sslcontext") else "http"
        self._state.connections.add(self)  # type: ignore[arg-type]  # a set of uvicorn's own, says uvicorn

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._closing is None and not self._is_broken:
            self._bytes_since += len(data)
            try:
                self._parse(data)
                if self._bytes_since > HEAD_BYTES:
                    raise Malformed(f"The request has over {HEAD_BYTES} bytes that are no part of a body.")
            except (ServiceError, HttpParserError) as error:
                self._refuse(_refusal(error))
        self._read_as_wanted()

    def eof_received(self) -> bool:
        """See asyncio. Who sends no more counts as gone, but gets what is answered without work."""
        for request in self._requests:
            request.client_left()
            request.keeps_alive = False
        self._incoming = None
        return bool(self._requests) and self._closing is None and self._transport.can_write_eof()

    def pause_writing(self) -> None:
        """See asyncio."""
        self.taken = self._loop.create_future()

    def resume_writing(self) -> None:
        """See asyncio."""
        if self.taken is not None and not self.taken.done():
            self.taken.set_result(None)
        self.taken = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """See asyncio."""
        self._state.connections.discard(self)
        self._idle.cancel()
        if self._closing is not None:
            self._closing.cancel()
        for request in self._requests:
            request.client_left()
        self._requests.clear()
        self._incoming = None
        self.resume_writing()
        del self._parser  # which leads back here
        self._when_closed()

    # ----------------------------------------------------------------------------------------------- the parser's calls

    def _parse(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                self._parser.feed_data(left)
            except HttpParserUpgrade as stopped:
                if not self._offers_upgrade:  # of what follows a CONNECT nobody knows what it is
                    return
                left = left[stopped.args[0] :]
                self._parse_without_upgrade()
            else:
                return

    def _parse_without_upgrade(self) -> None:
        """Have the same head again, without the offer."""
        method, version = self._parser.get_method(), self._parser.get_http_version()
        headers = [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        url = self._url
        self._parser = self._new_parser()
        self._parser.feed_data(b"".join([b"%b %b HTTP/%b\r\n" % (method, url, version.encode()), *headers, b"\r\n"]))

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._url, self._headers = b"", []
        self._is_in_head, self._bytes_since = True, 0
        self._idle_since = self._loop.time()

    def on_url(self, url: bytes) -> None:
        """Called by the parser, for a target in pieces more than once."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for a field that follows a body."""
        if self._is_in_head:
            if len(self._headers) == MOST_FIELDS:
                raise Malformed(f"The request's head has over {MOST_FIELDS} fields.")
            self._headers.append((name.lower(), value.strip(WHITE)))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        is_connect = self._parser.get_method() == b"CONNECT"  # has no body whatever it says, as the parser takes it
        self._offers_upgrade = self._parser.should_upgrade() and not is_connect
        self._bytes_since = 0
        if self._offers_upgrade:
            return
        version = self._parser.get_http_version()
        check_head(version, self._headers)
        scope = self._scope(self._parser.get_method().decode(), version)
        self._is_in_head = False
        self._begin(HttpRequest(scope, self, keeps_alive=self._parser.should_keep_alive() and not is_connect))

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._bytes_since = 0
        if self._incoming is not None:
            self._incoming.feed(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._incoming is not None and not self._offers_upgrade:  # else it comes again, without
            self._incoming.end_body()
            self._incoming = None

    def _scope(self, method: str, version: str) -> Scope:
        try:
            target = parse_url(self._url)
            path = (target.path or b"/").decode("ascii")
        except (HttpParserInvalidURLError, UnicodeDecodeError):
            raise Malformed("The request's target can't be parsed.") from None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self._server,
            "client": self._client,
            "scheme": self._scheme,
            "method": method,
            "root_path": self._root_path,
            "path": self._root_path + (unquote(path) if "%" in path else path),
            "raw_path": self._root_path.encode() + path.encode(),
            "query_string": target.query or b"",
            "headers": self._headers,
            "state": self._app_state.copy(),
        }

    def _refuse(self, error: ServiceError) -> None:
        """Have what is being read answered with this, after the requests before it, and the connection closed."""
        self._is_broken = True
        request = self._incoming
        if request is None:
            request = self._unread_request()
            request.refuse(error)
            self._begin(request)
        elif request.has_started or request.is_answered:
            request.client_left()
            self._close()
        else:
            request.refuse(error)

    def _unread_request(self) -> HttpRequest:
        """A request whose head could not be read: for no route, and of no method if that could not be read either."""
        if not self._is_in_head:
            self.on_message_begin()
        method = self._parser.get_method().decode() if self._url else ""
        self._url = b"/"
        return HttpRequest({**self._scope(method, "1.1"), "path": ""}, self, keeps_alive=False)

    # -------------------------------------------------------------------------------------------------------- requests

    def _begin(self, request: HttpRequest) -> None:
        """A head has been read."""
        self._incoming = request
        self._requests.append(request)
        if len(self._requests) == 1:
            self._answer(request)

    def _answer(self, request: HttpRequest) -> None:
        task = self._loop.create_task(self._run(request))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    async def _run(self, request: HttpRequest) -> None:
        try:
            await self._app(request.scope, request.read_message, request.write_message)
        except Exception:
            if not self.is_closing:
                log.exception("the application failed")
        finally:
            if not request.is_answered:  # only a broken connection can tell the client
                self.hang_up()
            request.forget()

    def request_answered(self, request: HttpRequest) -> None:
        """The first of the requests has its reply."""
        if request not in self._requests:  # the connection was lost meanwhile
            return
        self._requests.popleft()
        self._state.total_requests += 1
        self._idle_since = self._loop.time()
        if not request.keeps_alive:
            self._requests.clear()
            self._close()
        elif self._requests:
            self._answer(self._requests[0])
        self.read_on()

    # ------------------------------------------------------------------------------------------- reading and writing

    @property
    def default_headers(self) -> list[Header]:
        """Of all replies: the date."""
        return self._state.default_headers

    @property
    def is_closing(self) -> bool:
        """Whether nothing that is written now will arrive."""
        return self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Write, unless the client has left."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def read_on(self) -> None:
        """Read again, if nothing speaks against it."""
        if not self._is_reading and not self._has_enough() and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    def _read_as_wanted(self) -> None:
        """Read no more where there is enough. Of what nobody wants, one piece is read in each turn of the loop.

        A hundred clients that go on sending after they were answered would otherwise keep all others waiting.
        """
        is_unwanted = self._closing is not None or (self._incoming is not None and self._incoming.is_answered)
        if self._is_reading and (is_unwanted or self._has_enough()):
            self._is_reading = False
            self._transport.pause_reading()
        if is_unwanted:
            self._loop.call_soon(self.read_on)

    def _has_enough(self) -> bool:
        """Whether the application has to answer, or to take from a body, before anything more is of use."""
        if self._closing is not None:
            return False
        return len(self._requests) > 1 or (bool(self._requests) and self._requests[0].is_full)

    # --------------------------------------------------------------------------------------------------------- the end

    def shutdown(self) -> None:
        """Called by uvicorn at its end: close now if nobody is answered, else after the reply."""
        if self._requests:
            self._requests[0].keeps_alive = False
        else:
            self._transport.close()  # a client that was answered has had the time to read that
        self._late_body_s = LATE_BODY_AT_END_S

    def hang_up(self) -> None:
        """End the connection at once, whatever the client has yet to take or to send."""
        self._transport.abort()

    def _close(self) -> None:
        """Close once all is written; a client that may still be sending can go on for a while."""
        if self._closing is not None or self._transport.is_closing():
            return
        is_sending = self._is_broken or self._incoming is not None
        if not (is_sending and self._transport.can_write_eof()):
            self._transport.close()
            return
        # In a context of its own: that of the request, which is answered, would keep it for as long.
        self._closing = self._loop.call_later(self._late_body_s, self._transport.close, context=Context())
        self._transport.write_eof()
        self.read_on()

    def _end_if_idle(self) -> None:
        """Called now and then."""
        left: float = self._keep_alive_s
        if not self._requests:
            left = self._idle_since + self._keep_alive_s - self._loop.time()
        if left > 0:
            self._idle = self._loop.call_later(left, self._end_if_idle)
        elif not self._transport.is_closing():
            self._transport.close()


def _refusal(error: Exception) -> ServiceError:
    """What to answer: what we have raised while the parser called us, else what the parser did not understand."""
    for one in (error, error.__context__):
        if isinstance(one, ServiceError):
            return one
    return Malformed(f"This is no HTTP: {error}.")


@lru_cache(maxsize=600)
def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def _address(transport: asyncio.Transport, name: str) -> tuple[str, int] | None:
    address = transport.get_extra_info(name)
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) and len(address) >= 2 else None
