"""uvicorn's HTTP protocol, but replies are written together, and clients that still send get to read theirs.

Parsing, ASGI, pipelining and flow control are uvicorn's. Where a request's `Connection` answers in one go, it does with
uvicorn's `RequestResponseCycle` what two messages would do. What uvicorn leaves open is closed here:

- A client that offers an upgrade, as Java's and curl's do for HTTP/2, is answered as if it had not (RFC 9110, 7.8). The
  parser would take such a request for one without a body, and the body for the next request.
- A connection on which nobody is answered ends after a while, also one that has sent nothing, or half a head; and a
  head has a largest size.
- What is no HTTP is answered after the requests before it, as every error is.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE as NO_VALUE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.errors import Malformed
from service.exchange import CONNECTION, Connection, Header
from service.held import SMALL_BYTES
from service.logs import new_request_id
from service.problems import problem_reply

BURST = 8  # replies
HEAD_BYTES = 2**16  # of a request line and its headers, and up to as much more as comes in one piece
LATE_BODY_S = 10.0  # a client that is refused may go on sending for so long, so that it gets to read why
LATE_BODY_AT_END_S = 1.0  # and for so long where the server is about to end

log = logging.getLogger(__name__)


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
        if not self._kept:
            self._burst.add(self)
        self._kept.append(data)
        if len(data) > SMALL_BYTES:
            self.write_kept()

    def write_kept(self) -> None:
        """Write what was kept."""
        kept, self._kept = self._kept, []
        if kept and not self.is_closing():  # the client may have left since
            self._transport.writelines(kept)

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
        self._head_bytes = -1  # that came in pieces of the head that is being read, if one is
        self._offers_upgrade = False
        self._is_broken = False  # what comes is no HTTP any more
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
        self._head_bytes = 0
        self._idle_since = self.loop.time()
        self.scope["extensions"] = {CONNECTION: self._connection}  # type: ignore[dict-item]  # uvicorn knows dicts only

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._connection.cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._head_bytes = -1
        # A CONNECT has no body whatever it says, as the parser takes it.
        self._offers_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._offers_upgrade:
            self._has_whole_body = False
            super().on_headers_complete()

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
            was_in_head = self._head_bytes >= 0
            try:
                self._parse(data)
            except HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            else:
                if was_in_head and self._head_bytes >= 0:
                    self._head_bytes += len(data)
                    if self._head_bytes > HEAD_BYTES:
                        self.send_400_response(f"The request's head has over {HEAD_BYTES} bytes.")
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

    def send_400_response(self, msg: str) -> None:
        """Answer what can't be parsed, after the requests before it, and close."""
        self._is_broken, self._refusal = True, msg
        current = self._connection.cycle
        if self.pipeline and not self._has_whole_body:  # it is in the body of one that waits
            self.pipeline.popleft()
            self._has_whole_body = True
        if current is not None and self._has_whole_body and not current.response_complete:
            return  # see `on_response_complete`
        if current is not None and not self._has_whole_body and current.response_started:
            self._connection.disconnect()
            self.transport.close()
            return
        self._connection.disconnect()
        request_id = new_request_id()
        log.warning(msg, extra={"facts": {"request_id": request_id}})
        reply = problem_reply(Malformed(msg), request_id, "")
        more = [
            (b"x-request-id", request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"connection", b"close"),
        ]
        headers = (*self.server_state.default_headers, *reply.raw_headers, *more)
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[reply.status_code], *lines, b"\r\n", bytes(reply.body)]))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Called by the cycle that was answered."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        if self._is_broken:
            self.send_400_response(self._refusal)
            return
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
        self._connection.disconnect()  # uvicorn knows that of the latest request only
        self._connection.end()
        # What refers to what refers to it would wait for the garbage collector.
        self.cycle = self._connection.cycle = None  # type: ignore[assignment]  # as before the first request
        self.pipeline.clear()
        self._joining.forget()
        self._when_closed()
