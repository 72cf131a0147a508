"""HTTP/1.1 on one connection: parses requests, has the application answer them in order, and writes the replies.

httptools parses the bytes, asyncio transports them, and uvicorn, which gets this class as its option `http`, starts
and ends connections. In short:

- A request context is created once its head is parsed; its body is fed into it as it arrives. Requests are answered one
  after the other, each in a task of its own. A pipelined request waits, and reading pauses meanwhile.
- Reading also pauses while 64 KiB of a body wait for the application. The application waits while a client is slow to
  read its reply.
- An offer to upgrade, as Java's client and curl make for HTTP/2, is ignored (RFC 9110, 7.8). The parser would take such
  a request for one without a body, and its body for the next request.
- A request that can't be parsed is passed to the application after the requests before it, so that it is answered,
  counted and logged like any other. Then the connection is closed.
- If the connection is to be closed while the client is still sending, it stays open for a while, so that the client can
  read its reply: closing at once would reset the connection and lose the reply.
- A connection without a request in progress is closed after a while, also if it has sent nothing or half a head.
- A half-closed connection counts as left by its client: work is cancelled, but a reply that needs none is still sent.
- Trailer fields after a body are ignored, because they are not part of the head.
- Over TLS three things differ. The transport takes all that is written, even if the client does not read it, so large
  replies are written in pieces. It can't half-close: a client that is still sending knows the end of its reply by the
  length alone. And it closes only after the client has said goodbye too, for which there is little time at shutdown.
"""

import asyncio
import contextlib
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
    HttpParserCallbackError,
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
from service.http.requests.memory_budget import SMALL_BYTES
from service.http.requests.request_context import KEY, Header, RequestContext
from service.server.head import MAX_FIELDS, check_head
from service.server.write_burst import WriteBurst

HEAD_BYTES = 2**16  # most bytes of a head, or between two pieces of a body; one received piece may exceed it
PARSED_HEAD_BYTES, PARSED_BODY_BYTES = 2**12, 2**14  # at once: so many requests at most are queued
MAX_CHUNKS = 2**16  # of a body: each costs a call, however small it is
BUFFERED_BODY_BYTES = 2**16  # reading pauses while more than this of a body waits for the application
MAX_UNWRITTEN = 16  # pieces of replies that wait for the end of the turn
WHITESPACE = b" \t"  # allowed around a header's value
LATE_BODY_S = 10.0  # a client that is still sending when it is refused has so long to read its reply
LATE_BODY_AT_END_S = 1.0  # the same while the server shuts down
GOODBYE_AT_END_S = 3.0  # while the server shuts down, a client has so long to read the rest over TLS and to say goodbye
TLS_PIECE_BYTES = 2**17  # of a large reply, encrypted in one go: a tenth of a millisecond
TLS_BUFFER_BYTES = 2**16  # that TLS keeps each way, read and not yet parsed, or written and not yet sent
_WITHOUT_BODY = frozenset({204, 304})
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

log = logging.getLogger(__name__)


class HttpRequest(RequestContext):
    """A request on a connection, and its reply.

    Args:
        scope: ASGI's.
        connection: Its connection.
        keeps_alive: Whether the connection stays open after the reply.
    """

    def __init__(self, scope: Scope, connection: "HttpConnection", *, keeps_alive: bool) -> None:
        super().__init__(scope)
        self.keeps_alive = keeps_alive
        self.is_whole = False  # all of its body has arrived
        self.is_answered = False
        self._connection = connection
        self._is_http_1_0 = scope["http_version"] < "1.1"
        expects = (self.header(b"expect") or "").lower()
        self._waits_for_continue = expects == "100-continue" and not self._is_http_1_0  # RFC 9110, 10.1.1
        self._parts: list[bytes] = []  # of the body, received but not yet read by the application
        self._size = 0  # bytes in _parts
        self._was_read = False  # some of the body
        self._end_was_read = False
        self._waiter: asyncio.Future[None] | None = None  # read_message waits on it
        self._refusal: ServiceError | None = None
        self._head: bytes | None = None  # of the reply, until it is written with the first bytes of the body
        self._is_chunked = self._has_no_body = False

    # ------------------------------------------------------------------------------------------ what the client sends

    def feed(self, part: bytes) -> None:
        """A piece of the body has arrived."""
        if self.is_answered or self.has_left:  # it is not needed any more
            return
        self._parts.append(part)
        self._size += len(part)
        self._wake_reader()

    def end_body(self) -> None:
        """All of the body has arrived."""
        self.is_whole = True
        self._wake_reader()

    def refuse(self, error: ServiceError) -> None:
        """Answer this request, which can't be parsed, with an error, and close the connection afterwards."""
        self._refusal = error
        self.keeps_alive = self._waits_for_continue = False
        self._wake_reader()

    def client_left(self) -> None:
        """See the base class."""
        super().client_left()
        self._wake_reader()

    def release(self) -> None:
        """Free the body, and break the reference cycles: the scope's, and that of a refusal's traceback."""
        self.scope.pop(KEY, None)
        self._refusal = None
        self._parts.clear()

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def is_full(self) -> bool:
        """Whether so much of the body waits for the application that no more should be read."""
        return self._size > BUFFERED_BODY_BYTES

    # --------------------------------------------------------------------------------------- what the application does

    def check(self) -> None:
        """See the base class."""
        if self._refusal is not None:
            raise self._refusal

    def take_whole_body(self) -> bytes | None:
        """See the base class."""
        if not self.is_whole or self._was_read or self.has_left:
            return None
        self._end_was_read = True
        return self._take_parts()

    async def read_message(self) -> Message:
        """See the base class."""
        while not (self.has_left or self.is_answered or self._refusal):
            if not self._end_was_read and (self._parts or self.is_whole):
                is_last = self._end_was_read = self.is_whole  # asked first, for taking the parts makes room for more
                return {"type": "http.request", "body": self._take_parts(), "more_body": not is_last}
            if self._waits_for_continue:
                self._waits_for_continue = False
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return {"type": "http.disconnect"}

    def _take_parts(self) -> bytes:
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size, self._was_read = 0, True
        self._connection.resume_reading()
        return body

    async def write_message(self, message: Message) -> None:
        """ASGI's `send`, for an application that does not use the context."""
        if message["type"] == "http.response.start":
            await self.start_reply(message["status"], message.get("headers", ()))
        else:
            await self.write_reply(message.get("body", b""), is_last=not message.get("more_body"))

    async def start_reply(self, status: int, headers: Iterable[Header]) -> None:
        """See the base class."""
        self._head = self._begin(status, headers)
        self.status = status
        self.has_started = True

    async def write_reply(self, body: bytes, *, is_last: bool) -> None:
        """See the base class."""
        if self._connection.is_closing:  # the client has left
            return
        framed: bytes | memoryview = self._framed(body, is_last=is_last)
        if self._connection.has_tls and len(framed) > TLS_PIECE_BYTES:
            framed = await self._write_pieces(memoryview(framed))
        self._write_out(framed)
        if self._connection.drained is not None:
            await asyncio.shield(self._connection.drained)
        if is_last and not self.is_answered:
            self.is_answered = True
            self._wake_reader()
            self._connection.request_answered(self)

    def hang_up(self) -> None:
        """See the base class."""
        self._connection.hang_up()

    def _begin(self, status: int, headers: Iterable[Header]) -> bytes:
        """Build the reply's head, with the fields that frame its body and that keep or close the connection."""
        fields = [*self._connection.default_headers, *headers]
        if _UNPRINTABLE.search(b"".join([value for _, value in fields])):
            raise ValueError(f"a header of the reply has a character that HTTP does not allow: {fields}")
        lines = [_status_line(status), *[b"%b: %b\r\n" % field for field in fields]]
        names = {name for name, _ in fields}
        self._has_no_body = self.is_head or status in _WITHOUT_BODY
        if b"content-length" not in names and not self._has_no_body:
            self._is_chunked = not self._is_http_1_0
            self.keeps_alive &= self._is_chunked
            if self._is_chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        if (b"connection", b"close") in fields or self._may_never_end():
            self.keeps_alive = False
        if b"connection" not in names and (not self.keeps_alive or self._is_http_1_0):
            lines.append(b"connection: keep-alive\r\n" if self.keeps_alive else b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _may_never_end(self) -> bool:
        """Whether the rest of the body may never come: it is chunked, or the client waits for a 100 that is not sent.

        The rest of any other body is read and dropped, and the connection can be used again.
        """
        return not self.is_whole and (self._waits_for_continue or self.header(b"transfer-encoding") is not None)

    def _framed(self, body: bytes, *, is_last: bool) -> bytes:
        if self._has_no_body:
            return b""
        if not self._is_chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk + b"0\r\n\r\n" if is_last else chunk

    async def _write_pieces(self, framed: memoryview) -> memoryview:
        """Write all but the last piece, which is returned. Between two pieces others have their turn."""
        while len(framed) > TLS_PIECE_BYTES:
            self._write_out(framed[:TLS_PIECE_BYTES])
            framed = framed[TLS_PIECE_BYTES:]
            if self._connection.drained is not None:
                await asyncio.shield(self._connection.drained)
            await asyncio.sleep(0)
        return framed

    def _write_out(self, body: bytes | memoryview) -> None:
        head, self._head = self._head or b"", None
        if head and len(body) > SMALL_BYTES:  # copying a large body would take longer than a second call
            self._connection.write(head)
            head = b""
        if data := head + body if head else body:
            self._connection.write(data)


class HttpConnection(asyncio.Protocol):
    """One client's connection.

    Args:
        config, server_state, app_state, _loop: The arguments of uvicorn's option `http`.
        burst: Where its replies wait to be written with those of other connections.
        when_closed: Called when the connection has ended.

    Attributes:
        drained: Done once the client has read most of what was written; None unless it is slow to read.
        has_tls: Whether it is encrypted.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        burst: WriteBurst | None = None,
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
        self._burst = burst or WriteBurst()
        self._when_closed = when_closed
        self._unwritten: list[bytes | memoryview] = []
        self._transport: asyncio.Transport
        self._parser = self._new_parser()
        self._requests: deque[HttpRequest] = deque()  # not yet answered; the first is in progress
        self._incoming: HttpRequest | None = None  # the one whose body is being read
        self._url = b""
        self._headers: list[Header] = []
        self._is_in_head = False
        self._offers_upgrade = False
        self._is_broken = False  # a request could not be parsed: later bytes are ignored
        self._unparsed = memoryview(b"")  # received, while there is a reason to wait
        self._bytes_outside_body = 0  # parsed since the last piece of a body or the last edge of a head
        self._is_reading = True
        self.drained: asyncio.Future[None] | None = None
        self._late_body_s = LATE_BODY_S
        self._close_timer: asyncio.TimerHandle | None = None  # closes the connection of a client that is still sending
        self._is_at_end = False  # the server shuts down

    def _new_parser(self) -> HttpRequestParser:
        parser = HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # bytes after the last request are ignored
        return parser

    # --------------------------------------------------------------------------------------------- callbacks of asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as it is for TCP
        """See asyncio."""
        self._transport = transport
        self._client, self._server = _address(transport, "peername"), _address(transport, "sockname")
        self.has_tls = transport.get_extra_info("sslcontext") is not None
        if self.has_tls:
            transport.set_write_buffer_limits(TLS_BUFFER_BYTES)
            transport.set_read_buffer_limits(TLS_BUFFER_BYTES)  # type: ignore[attr-defined]  # only TLS has them
        self._idle_since = self._loop.time()
        self._idle_timer = self._loop.call_later(self._keep_alive_s, self._close_if_idle)
        self._state.connections.add(self)  # type: ignore[arg-type]  # uvicorn's annotation allows its own classes only

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
        self._parse_received()
        self._pause_if_needed()

    def eof_received(self) -> bool:
        """See asyncio. A half-closed connection counts as left, but still gets replies that need no work."""
        for request in self._requests:
            request.client_left()
            request.keeps_alive = False
        self._incoming = None
        return bool(self._requests) and self._close_timer is None and self._transport.can_write_eof()

    def pause_writing(self) -> None:
        """See asyncio."""
        self.drained = self._loop.create_future()

    def resume_writing(self) -> None:
        """See asyncio."""
        if self.drained is not None and not self.drained.done():
            self.drained.set_result(None)
        self.drained = None

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """See asyncio."""
        self._state.connections.discard(self)
        self._idle_timer.cancel()
        if self._close_timer is not None:
            self._close_timer.cancel()
        for request in self._requests:
            request.client_left()
        if self._requests:
            self._requests.popleft()  # is still in progress, and released at its end
        self._release_waiting()
        self._incoming = None
        self.resume_writing()
        del self._parser  # a reference cycle
        self._when_closed()

    # ------------------------------------------------------------------------------------------ callbacks of the parser

    def _parse_received(self) -> None:
        """Parse in small pieces until there is a reason to wait: a piece may hold hundreds of requests."""
        while self._unparsed and not self._should_pause():
            if self._is_broken or self._close_timer is not None:  # nobody answers what comes now
                self._unparsed = memoryview(b"")
                return
            size = PARSED_HEAD_BYTES if self._incoming is None else PARSED_BODY_BYTES
            piece, self._unparsed = self._unparsed[:size], self._unparsed[size:]
            self._bytes_outside_body += len(piece)
            try:
                self._parse(piece)
                if self._bytes_outside_body > HEAD_BYTES:
                    raise Malformed(f"The request has over {HEAD_BYTES} bytes that are no part of a body.")
            except (ServiceError, HttpParserError) as error:
                self._refuse(_refusal(error))

    def _parse(self, left: memoryview) -> None:
        while left:
            try:
                self._parser.feed_data(left)
            except HttpParserUpgrade as stopped:
                if not self._offers_upgrade:  # a CONNECT: what follows may be anything, so it is ignored
                    return
                left = left[stopped.args[0] :]
                self._parse_without_upgrade()
            else:
                return

    def _parse_without_upgrade(self) -> None:
        """Parse the same head again, without its Upgrade field."""
        method, version = self._parser.get_method(), self._parser.get_http_version()
        headers = [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        url = self._url
        self._parser = self._new_parser()
        self._parser.feed_data(b"".join([b"%b %b HTTP/%b\r\n" % (method, url, version.encode()), *headers, b"\r\n"]))

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._url, self._headers = b"", []
        self._is_in_head, self._bytes_outside_body, self._chunks = True, 0, 0
        self._idle_since = self._loop.time()

    def on_url(self, url: bytes) -> None:
        """Called by the parser, possibly several times for one target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for trailer fields after a body."""
        if self._is_in_head:
            if len(self._headers) == MAX_FIELDS:
                raise Malformed(f"The request's head has over {MAX_FIELDS} fields.")
            self._headers.append((name.lower(), value.strip(WHITESPACE)))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        is_connect = self._parser.get_method() == b"CONNECT"  # the parser treats it as a request without a body
        self._offers_upgrade = self._parser.should_upgrade() and not is_connect
        self._bytes_outside_body = 0
        if self._offers_upgrade:
            return
        version = self._parser.get_http_version()
        check_head(version, self._headers)
        scope = self._scope(self._parser.get_method().decode(), version)
        self._is_in_head = False
        keeps_alive = self._parser.should_keep_alive() and not is_connect and not _says_close(self._headers)
        self._begin(HttpRequest(scope, self, keeps_alive=keeps_alive))

    def on_chunk_header(self) -> None:
        """Called by the parser."""
        self._chunks += 1
        if self._chunks > MAX_CHUNKS:
            raise Malformed(f"The request's body has over {MAX_CHUNKS} chunks.")

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._bytes_outside_body = 0
        if self._incoming is not None:
            self._incoming.feed(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._incoming is not None and not self._offers_upgrade:  # else the head is parsed again, without the offer
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
            "scheme": "https" if self.has_tls else "http",
            "method": method,
            "root_path": self._root_path,
            "path": self._root_path + (unquote(path) if "%" in path else path),
            "raw_path": self._root_path.encode() + path.encode(),
            "query_string": target.query or b"",
            "headers": self._headers,
            "state": self._app_state.copy(),
        }

    def _refuse(self, error: ServiceError) -> None:
        """Answer the request that is being read with this error, after those before it, and close the connection."""
        self._is_broken = True
        request = self._incoming
        if request is None:
            request = self._unread_request()
            request.refuse(error)
            self._begin(request)
        elif request.is_answered:
            self._close()
        elif request.has_started:  # the client sees that its reply is incomplete
            request.client_left()
            self.flush()
            self._close_transport()
        else:
            request.refuse(error)

    def _unread_request(self) -> HttpRequest:
        """A request whose head could not be parsed: without a route, and without a method if that is unknown too."""
        if not self._is_in_head:
            self.on_message_begin()
        method = self._parser.get_method().decode() if self._url else ""
        self._url = b"/"
        return HttpRequest({**self._scope(method, "1.1"), "path": ""}, self, keeps_alive=False)

    # -------------------------------------------------------------------------------------------------------- requests

    def _begin(self, request: HttpRequest) -> None:
        """Queue a request whose head has been parsed, and start on it if it is the first."""
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
        except ServiceError:  # it came too late for a problem, and is logged
            pass
        except Exception:
            if not self.is_closing:
                log.exception("the application failed")
        finally:
            if not request.is_answered:  # only a broken connection can tell the client that its reply is incomplete
                self.hang_up()
            request.release()

    def request_answered(self, request: HttpRequest) -> None:
        """The request in progress has its whole reply: close the connection or go on to the next request."""
        if request not in self._requests:  # the connection was lost meanwhile
            return
        self._requests.popleft()
        self._state.total_requests += 1
        self._idle_since = self._loop.time()
        if not request.keeps_alive:
            self._release_waiting()
            self._close()
        elif self._requests:
            self._answer(self._requests[0])
        elif self._incoming is not None:  # the rest of its body is dropped, but not for ever
            self._idle_timer.cancel()
            seconds = min(self._late_body_s, self._keep_alive_s)
            self._idle_timer = self._loop.call_later(seconds, self._close_if_idle, context=Context())
        self.resume_reading()

    def _release_waiting(self) -> None:
        for request in self._requests:
            request.release()
        self._requests.clear()

    # ------------------------------------------------------------------------------------------- reading and writing

    @property
    def default_headers(self) -> list[Header]:
        """The headers of all replies: the date."""
        return self._state.default_headers

    @property
    def is_closing(self) -> bool:
        """Whether it is too late to write."""
        return self._transport.is_closing()

    def write(self, data: bytes | memoryview) -> None:
        """Write, what is small at the end of this turn of the loop; nothing if the client has left."""
        if len(data) > SMALL_BYTES or len(self._unwritten) >= MAX_UNWRITTEN:
            self.flush()
            if not self._transport.is_closing():
                self._transport.write(data)
            return
        if not self._unwritten:
            self._burst.add(self)
        self._unwritten.append(data)

    def flush(self) -> None:
        """Write what was kept for the end of this turn."""
        unwritten, self._unwritten = self._unwritten, []
        if unwritten and not self._transport.is_closing():
            self._transport.write(b"".join(unwritten))

    def resume_reading(self) -> None:
        """Read again, unless there is still a reason to pause."""
        self._parse_received()
        if not self._is_reading and not self._should_pause() and not self._transport.is_closing():
            self._is_reading = True
            self._transport.resume_reading()

    def _pause_if_needed(self) -> None:
        """Pause reading if enough has arrived. Of data that is dropped, read one piece in each turn of the loop.

        Otherwise a hundred clients that go on sending after their replies would keep all others waiting.
        """
        is_unwanted = self._close_timer is not None or (self._incoming is not None and self._incoming.is_answered)
        if self._is_reading and (is_unwanted or self._should_pause()):
            self._is_reading = False
            self._transport.pause_reading()
        if is_unwanted:
            self._loop.call_soon(self.resume_reading)

    def _should_pause(self) -> bool:
        """Whether to read no more until the application has answered a request or read from its body."""
        if self._close_timer is not None:
            return False
        return len(self._requests) > 1 or (bool(self._requests) and self._requests[0].is_full)

    # --------------------------------------------------------------------------------------------------------- the end

    def shutdown(self) -> None:
        """Called by uvicorn at shutdown: close now, or after the reply of a request in progress."""
        self._is_at_end, self._late_body_s = True, LATE_BODY_AT_END_S
        if self._requests:
            self._requests[0].keeps_alive = False
        else:
            self.flush()
            self._close_transport()

    def hang_up(self) -> None:
        """End the connection at once, even if the client has not read or sent everything."""
        self._transport.abort()

    def _close(self) -> None:
        """Close after writing everything. A client that may still be sending first gets some time to read its reply."""
        if self._close_timer is not None or self._transport.is_closing():
            return
        self.flush()
        is_sending = self._is_broken or self._incoming is not None or not self._is_reading
        if not is_sending:
            self._close_transport()
            return
        # In an empty context: the current one refers to the answered request and would keep it until then.
        end = self._transport.abort if self.has_tls else self._transport.close  # TLS would go on reading after a close
        self._close_timer = self._loop.call_later(self._late_body_s, end, context=Context())
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # from asyncio's transport, if the client has reset the connection
                self._transport.write_eof()
        self.resume_reading()

    def _close_transport(self) -> None:
        """Close once everything is written and, over TLS, the client has said goodbye; at shutdown it has not long."""
        self._transport.close()
        if self.has_tls and self._is_at_end:
            self._loop.call_later(GOODBYE_AT_END_S, self._transport.abort, context=Context())

    def _close_if_idle(self) -> None:
        """Timer: close if no request is in progress and none has begun for a while; else set the timer again."""
        left: float = self._keep_alive_s
        if not self._requests:
            allowed_s = self._keep_alive_s if self._incoming is None else min(self._late_body_s, self._keep_alive_s)
            left = self._idle_since + allowed_s - self._loop.time()
        if left > 0:
            self._idle_timer = self._loop.call_later(left, self._close_if_idle)
        elif not self._transport.is_closing():
            self._close_transport()


def _says_close(headers: Iterable[Header]) -> bool:
    """Whether `close` is among the connection's options (RFC 9112, 9.3: it wins over all others)."""
    options = b",".join([value for name, value in headers if name == b"connection"])
    return b"close" in {option.strip(WHITESPACE) for option in options.lower().split(b",")}


def _refusal(error: Exception) -> ServiceError:
    """The reply's error: ours, if a callback of the parser raised it, else one for the parser's."""
    raised = error.__context__ if isinstance(error, HttpParserCallbackError) else error
    if isinstance(raised, ServiceError):
        return raised
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
