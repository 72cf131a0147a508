"""uvicorn's HTTP protocol, but replies are written together, and clients that still send get to read theirs.

Parsing, ASGI, pipelining and flow control are uvicorn's. Where a request's `Connection` answers in one go, it does with
uvicorn's `RequestResponseCycle` what two messages would do. What uvicorn leaves open is closed here:

- A client that offers an upgrade, as Java's and curl's do for HTTP/2, is answered as if it had not (RFC 9110, 7.8). The
  parser would take such a request for one without a body, and the body for the next request.
- A connection on which nobody is answered ends after a while, also one that has sent nothing, or half a head; and a
  head has a largest size.
- What can't be understood is handed to the application after the requests before it, which answers it, counts it and
  notes it in the log as it does every request. Then the connection is closed.
- The fields that may follow a body are thrown away: they are no part of its head.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE as NO_VALUE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import Malformed, ServiceError
from service.http.exchange import CONNECTION, Connection, Header
from service.http.memory_budget import SMALL_BYTES
from service.server.head import MOST_FIELDS, check_head

BURST = 8  # replies
HEAD_BYTES = 2**16  # of a head, or between two pieces of a body; and up to as much more as comes in one piece
WHITE = b" \t"  # that HTTP allows around a header's value
LATE_BODY_S = 10.0  # a client that is refused may go on sending for so long, so that it gets to read why
LATE_BODY_AT_END_S = 1.0  # and for so long where the server is about to end


class Burst:
    """Replies that wait to be written together, at the latest at the end of a step of the loop.

    The kernel's half of a reply and ours, in turns, would drive each other out of a processor's caches. More than a few
    at a time would keep clients waiting who could send their next request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[Joining] = []

    def add(self, one: "Joining") -> None:
        """Have its `write_kept` called soon, after those of a burst that is full."""
        if len(self._waiting) >= BURST:
            self.write()
        if not self._waiting:
            self._loop.call_soon(self.write)
        self._waiting.append(one)

    def write(self) -> None:
        """Write them all."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.write_kept()


class Joining:
    """A transport that keeps what is written within a step of the loop, for what comes next and for others' bursts.

    So a reply's head goes out with its body: one system call instead of two, each of which takes as long as a PNG.

    Args:
        transport: The one that writes, and does all else.
        burst: Of its loop.
        linger: Called before it closes; whether it is to be left open, but for writing.
    """

    def __init__(self, transport: asyncio.Transport, burst: Burst, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._burst = burst
        self._linger = linger
        self._kept: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        """Write, at the latest at the end of this step."""
        if len(data) > SMALL_BYTES:  # to copy it would take longer than a call
            self.write_kept()
            self._write(data)
            return
        if not self._kept:
            self._burst.add(self)
        self._kept.append(data)

    def write_kept(self) -> None:
        """Write what was kept."""
        kept, self._kept = self._kept, []
        if kept:
            self._write(b"".join(kept))

    def _write(self, data: bytes) -> None:
        # Not `writelines`: asyncio's own, before Python 3.12.9 and 3.13.2, never says that its buffer is full.
        if not self.is_closing():  # the client may have left since
            self._transport.write(data)

    def close(self) -> None:
        """Close once all is written."""
        self.write_kept()
        if self._linger():
            self.is_closing = lambda: True
        else:
            self._transport.close()

    def forget(self) -> None:
        """The connection is lost, and nobody is asked any more."""
        self._linger = bool


class _Connection(Connection):
    """One of uvicorn's, and what uvicorn keeps of the request that is being answered on it, until it is lost."""

    cycle: RequestResponseCycle | None = None

    def __init__(self, client: asyncio.Transport) -> None:
        self._client = client
        self._refused: tuple[RequestResponseCycle, ServiceError] | None = None

    def has_to_be_kept(self) -> bool:
        """See `Connection`."""
        return self.cycle is not None and self.cycle.keep_alive and self.cycle.scope["http_version"] != "1.1"

    def refuse(self, cycle: RequestResponseCycle, error: ServiceError) -> None:
        """Have `check` raise this once it is the turn of this one, the last that is answered here."""
        self._refused = cycle, error
        cycle.keep_alive = cycle.waiting_for_100_continue = False
        cycle.message_event.set()  # for who waits for the rest of its body

    def check(self) -> None:
        """See `Connection`."""
        if self._refused is not None and self._refused[0] is self.cycle:
            raise self._refused[1]

    def lost(self) -> None:
        """The connection is lost. What refers to what refers to it would wait for the garbage collector."""
        self.disconnect()  # uvicorn knows that of the latest request only
        self.end()
        self.cycle = self._refused = None

    def hang_up(self) -> None:
        """See `Connection`."""
        self.disconnect()
        self._client.abort()

    def disconnect(self) -> None:
        """Have uvicorn know that the client of the request that is being answered has left."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def take_body(self) -> bytes | None:
        """See `Connection`."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def reply(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """See `Connection`. What uvicorn does with two messages, for the commonest of cases."""
        cycle = self.cycle
        if cycle is None:
            return False
        is_common = cycle.keep_alive and not (cycle.response_started or cycle.disconnected or cycle.flow.write_paused)
        if not is_common or (b"connection", b"close") in headers or NO_VALUE.search(b"".join([v for _, v in headers])):
            return False
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        cycle.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        cycle.on_response()
        return True


class Protocol(HttpToolsProtocol):
    """uvicorn's, but its requests' scopes have their `Connection`.

    Args:
        uvicorns: What uvicorn's own takes.
        burst: Where replies wait to be written.
        when_closed: Called at the connection's end.
    """

    def __init__(self, *uvicorns: Any, burst: Burst, when_closed: Callable[[], None]) -> None:
        super().__init__(*uvicorns)
        self._burst = burst
        self._when_closed = when_closed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Called by the transport."""
        self._socket = transport
        self._joining = Joining(transport, self._burst, self._linger)
        super().connection_made(cast("asyncio.Transport", self._joining))
        self._is_in_head = False
        self._new_bytes = 0  # that came in pieces since the last that was the beginning or the end of a head, or a body
        self._offers_upgrade = False
        self._is_broken = False  # what comes can't be understood any more
        self._idle_since = self.loop.time()
        self._wait_for_request(self.timeout_keep_alive)
        self._has_whole_body = True  # of the latest request
        self._end: asyncio.TimerHandle | None = None  # of one that was answered and is still sending
        self._late_body_s = LATE_BODY_S
        # One for all requests: they are answered one after the other.
        self._connection = _Connection(transport)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        self._is_in_head, self._new_bytes = True, 0
        self._idle_since = self.loop.time()
        self.scope["extensions"] = {CONNECTION: self._connection}  # type: ignore[dict-item]  # uvicorn knows dicts only

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._connection.cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, also for a field that follows a body."""
        if self._is_in_head:
            if len(self.headers) == MOST_FIELDS:
                raise Malformed(f"The request's head has over {MOST_FIELDS} fields.")
            super().on_header(name, value.strip(WHITE))

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        is_connect = self.parser.get_method() == b"CONNECT"  # has no body whatever it says, as the parser takes it
        self._offers_upgrade = self.parser.should_upgrade() and not is_connect
        self._new_bytes = 0
        if self._offers_upgrade:
            return
        check_head(self.parser.get_http_version(), self.headers)
        super().on_headers_complete()
        self._is_in_head = self._has_whole_body = False
        # uvicorn's own never lasts where it is HTTP/1.0. What follows a CONNECT is none of ours.
        self.cycle.keep_alive = self.parser.should_keep_alive() and not is_connect

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._new_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if self._offers_upgrade:  # it comes again, without
            return
        super().on_message_complete()
        self._has_whole_body = True
        if not self.pipeline:  # uvicorn stops reading at a large body, and would not see the client leave
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        if self._end is None and not self._is_broken:
            self._new_bytes += len(data)
            try:
                self._parse(data)
                if self._new_bytes > HEAD_BYTES:
                    raise Malformed(f"The request has over {HEAD_BYTES} bytes that are no part of a body.")
            except (ServiceError, HttpParserError) as error:
                self._refuse(_refusal(error))
        if self._is_answered_early():
            # Nobody wants it. As much of it as comes, a hundred times, would keep all others waiting.
            self.flow.pause_reading()
            self.loop.call_soon(self._read_on)

    def _parse(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                self.parser.feed_data(left)
            except HttpParserUpgrade as stopped:
                if not self._offers_upgrade:
                    return
                left = left[stopped.args[0] :]
                method, version = self.parser.get_method(), self.parser.get_http_version()
                headers = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
                head = [b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode()), *headers, b"\r\n"]
                self.parser.feed_data(b"".join(head))
            else:
                return

    def _refuse(self, error: ServiceError) -> None:
        """Have what is being read answered with this, after the requests before it, and the connection closed."""
        self._is_broken = True
        if self._has_whole_body:
            self._begin_without_head()
        if self.cycle.response_started:
            self._connection.disconnect()
            self.transport.close()
        else:
            self._connection.refuse(self.cycle, error)

    def _begin_without_head(self) -> None:
        """Begin a request as if its head had been read. It is for no route; its method is empty if it was not read."""
        if not self._is_in_head:
            self.on_message_begin()
        method = self.parser.get_method().decode() if self.url else ""
        self.url = b"/"
        super().on_headers_complete()
        self.scope["method"], self.scope["path"] = method, ""

    def on_response_complete(self) -> None:
        """Called by the cycle that was answered."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self._idle_since = self.loop.time()

    def _wait_for_request(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """uvicorn sets a new timer for each time that a connection falls idle; here one looks how long it has been."""

    def timeout_keep_alive_handler(self) -> None:
        """Called now and then."""
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if self._connection.cycle is not None and not self._connection.cycle.response_complete:
            left = self.timeout_keep_alive
        if left > 0:
            self._wait_for_request(left)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Called by the server at its end: a client that was answered has had the time to read that."""
        self._late_body_s = 0.0
        super().shutdown()
        self._late_body_s = min(LATE_BODY_S, LATE_BODY_AT_END_S)

    def hang_up(self) -> None:
        """End the connection at once, whatever the client has yet to take or to send."""
        self._socket.abort()

    def _is_answered_early(self) -> bool:
        cycle = self.cycle
        if self._has_whole_body or cycle is None or cycle.scope is not self.scope:
            return False
        return cycle.response_complete

    def _read_on(self) -> None:
        if not self._socket.is_closing():
            self.flow.resume_reading()

    def _linger(self) -> bool:
        """Whether the client may still be sending: where that finds the connection closed, it can't read its reply."""
        is_sending = self._is_broken or self._is_answered_early()
        if not (self._late_body_s and is_sending) or self._end is not None or self._socket.is_closing():
            return False
        self._end = self.loop.call_later(self._late_body_s, self._socket.close)
        self._socket.write_eof()
        self.flow.resume_reading()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        super().connection_lost(exc)
        if self._end is not None:
            self._end.cancel()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        self._connection.lost()
        self.cycle = None  # type: ignore[assignment]  # as before the first request
        self.pipeline.clear()
        self._joining.forget()
        self._when_closed()


def _refusal(error: Exception) -> ServiceError:
    """What to answer. What the parser called may have raised it; else the parser says what it did not understand."""
    for one in (error, error.__context__):
        if isinstance(one, ServiceError):
            return one
    if isinstance(error, HttpParserCallbackError):  # uvicorn reads nothing else
        return Malformed("The request's target can't be parsed.")
    return Malformed(f"This is no HTTP: {error}.")
