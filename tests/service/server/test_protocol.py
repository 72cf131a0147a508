"""What a connection writes and when, on a transport that records it; test_middleware.py uses real sockets."""

import asyncio
import errno
import gc
import json
import logging
import re
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from service.app import create_app
from service.http.requests.memory_budget import SMALL_BYTES
from service.server.protocol import HEAD_BYTES, MAX_CHUNKS, HttpConnection, HttpRequest
from service.server.write_burst import MAX_BURST, WriteBurst
from service.settings import Settings

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """A transport that records what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_read = True

    def write(self, data: Any) -> None:  # noqa: D102
        self.writes.append(data)

    def close(self) -> None:  # noqa: D102
        self.writes.append(b"closed")

    def write_eof(self) -> None:  # noqa: D102
        self.writes.append(b"end")

    def can_write_eof(self) -> bool:  # noqa: D102
        return True

    def abort(self) -> None:  # noqa: D102
        self.writes.append(b"closed")

    def is_closing(self) -> bool:  # noqa: D102
        return b"closed" in self.writes

    def has_ended(self) -> bool:
        """Whether the client sees the end of the connection, even if it may still send."""
        return self.is_closing() or b"end" in self.writes

    def pause_reading(self) -> None:  # noqa: D102
        self.is_read = False

    def resume_reading(self) -> None:  # noqa: D102
        self.is_read = True


async def test_of_a_body_that_nobody_wants_one_piece_is_read_in_a_turn(until: Any) -> None:
    """Of refused clients that go on sending, one piece each is read in a turn of the loop."""

    async def refuse(_: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body"})

    wire = Wire()
    one = connect(refuse, wire)
    one.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300\r\n\r\n")
    await until(lambda: len(wire.writes) == 1)
    assert wire.is_read
    for _ in range(2):
        one.data_received(bytes(100))
        assert not wire.is_read
        await asyncio.sleep(0)
        assert wire.is_read
    one.data_received(bytes(100))
    assert wire.is_read
    one.data_received(b"POST / HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: len(wire.writes) == 2)
    one.connection_lost(None)


# ------------------------------------------------------------------------------------------- the service on such a wire


@pytest.fixture
async def service(tiny_settings: Callable[..., Settings]) -> AsyncIterator[FastAPI]:
    app = create_app(tiny_settings())
    async with app.router.lifespan_context(app):
        await app.state.starting
        yield app


class Connection(HttpConnection):
    """A connection that can wait for its requests' tasks."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self.tasks = state.tasks


def connect(app: ASGIApp, wire: Wire, keep_alive_s: float = 60) -> Connection:
    """A connection to this application, on the wire."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=keep_alive_s)  # type: ignore[arg-type]  # whole seconds are uvicorn's
    one = Connection(config, ServerState())
    one.connection_made(wire)
    return one


def replies(wire: Wire) -> list[tuple[dict[str, str], bytes]]:
    """Headers and bodies of all replies that were written, in order."""
    left, found = b"".join(data for data in wire.writes if data not in {b"closed", b"end"}), []
    while left:
        head, _, left = left.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        length = int(headers.get("content-length", 0))
        found.append((headers, left[:length]))
        left = left[length:]
    return found


async def test_a_small_reply_is_written_in_one_piece_and_a_large_one_is_not_copied(until: Any) -> None:
    """Head and body are one write if the body is small, and two if it is large."""

    async def answer(scope: Scope, _: Receive, send: Send) -> None:
        body = bytes(2 * SMALL_BYTES if scope["path"] == "/large" else 10)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    wire = Wire()
    one = connect(answer, wire)
    one.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: len(wire.writes) == 3)
    assert wire.writes[0].endswith(bytes(10))
    assert wire.writes[1].endswith(b"\r\n\r\n")
    assert wire.writes[2] == bytes(2 * SMALL_BYTES)
    one.connection_lost(None)


async def test_replies_that_are_ready_together_are_written_together() -> None:
    """A few at a time, so that no client waits for all of them; each in the order in which it was ready."""
    written: list[int] = []

    class Numbered:
        def __init__(self, number: int) -> None:
            self.number = number

        def flush(self) -> None:
            written.append(self.number)

    burst = WriteBurst()
    for number in range(MAX_BURST + 1):
        burst.add(Numbered(number))
    assert written == [*range(MAX_BURST)]
    await asyncio.sleep(0)
    assert written == [*range(MAX_BURST + 1)]


@pytest.mark.parametrize("size", [2**10, 2 * SMALL_BYTES])
async def test_where_a_client_takes_nothing_the_application_waits(until: Any, size: int) -> None:
    """For small and large pieces; otherwise replies would pile up in memory."""
    written = 0

    async def stream(_: Scope, __: Receive, send: Send) -> None:
        nonlocal written
        await send({"type": "http.response.start", "status": 200})
        while True:
            await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            written += size
            await asyncio.sleep(0)

    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with theirs:
        ours.settimeout(0)
        config, state = uvicorn.Config(stream, log_config=None, lifespan="off"), ServerState()
        transport, one = await loop.create_connection(lambda: Connection(config, state), sock=ours)
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: written > 0)
        before = -1
        while before < written:  # until nothing more is written
            before = written
            for _ in range(100):
                await asyncio.sleep(0)
        assert written < 2**24  # bytes, far more than the system's own buffers take
        transport.abort()
        for task in one.tasks:
            task.cancel()
        await until(lambda: not one.tasks)


async def test_who_leaves_before_a_reply_is_taken_is_no_error(until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The last of the reply was written, and waits for a client that has gone."""

    async def answer(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": bytes(2**24)})

    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with theirs:
        ours.settimeout(0)
        config, state = uvicorn.Config(answer, log_config=None, lifespan="off"), ServerState()
        transport, one = await loop.create_connection(lambda: Connection(config, state), sock=ours)
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: one.drained is not None)
        transport.abort()
        await until(lambda: not one.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_while_draining_every_reply_closes_its_connection(service: FastAPI, until: Any) -> None:
    """Its client then sends the next request to another process."""
    service.state.manager.is_draining = True
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /sample?seed=7 HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(wire.has_ended)
    assert replies(wire)[0][0]["connection"] == "close"
    service.state.manager.is_draining = False
    one.connection_lost(None)


@pytest.mark.parametrize("piece", [1, 7, 50, 10_000])
async def test_bodies_sent_ahead_do_not_mix(service: FastAPI, until: Any, piece: int) -> None:
    """Pipelined requests, cut anywhere, are answered in order, each for its own body."""
    wire = Wire()
    one = connect(service, wire)
    bodies = [json.dumps({"seed": seed, "count": 1 + seed % 3, "format": "npy"}).encode() for seed in range(5)]
    sent = b"".join(
        b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
        for body in bodies
    )
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
        if start % 3:
            await asyncio.sleep(0)
    await until(lambda: len(replies(wire)) == len(bodies))
    assert [headers["x-seed"] for headers, _ in replies(wire)] == [*"01234"]
    assert [len(body) for _, body in replies(wire)] == [128 + 64 * (1 + seed % 3) for seed in range(5)]
    one.connection_lost(None)


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
@pytest.mark.parametrize(
    "sent",
    [
        b"GET /sample?seed=7 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /sample?seed=7 HTTP/1.1\r\n\r\n",
        b"POST /sample HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n",
        b"\0",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 50,
    ],
)
async def test_nothing_of_a_connection_waits_for_the_garbage_collector(
    service: FastAPI, until: Any, sent: bytes, error: Exception | None
) -> None:
    """The collector runs rarely, so connections must be freed by reference counting."""
    gc.collect()
    gc.disable()
    try:
        wire = Wire()
        one = connect(service, wire)
        one.data_received(sent)
        await until(lambda: len(wire.writes) >= 1)
        seen = weakref.ref(one)
        one.connection_lost(error)
        del one
        for _ in range(20):  # pending callbacks
            await asyncio.sleep(0)
        assert seen() is None
    finally:
        gc.enable()


POST = b"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"


@pytest.mark.parametrize("piece", [1, 20, 10_000])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_an_offer_to_upgrade_changes_nothing(service: FastAPI, until: Any, piece: int, framing: str) -> None:
    """As Java's client and curl --http2 make it: the body belongs to the request, even if it looks like another one."""
    wire = Wire()
    one = connect(service, wire)
    bodies = [b'{"seed":%d}' % seed for seed in range(3)] + [b"GET /bundles HTTP/1.1\r\nHost: x\r\n\r\n"]
    if framing == "length":
        requests = [POST + UPGRADE + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies]
    else:
        head = POST + UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n"
        requests = [head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) for body in bodies]
    sent = b"".join([*requests[:3], b"GET /livez HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n", requests[3]])
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
    await until(lambda: len(replies(wire)) == 5)
    assert [headers.get("x-seed") for headers, _ in replies(wire)] == [*"012", None, None]
    assert [statuses(wire)[n] for n in (3, 4)] == [200, 400]
    assert b"not JSON" in replies(wire)[4][1]
    assert not wire.has_ended()
    one.connection_lost(None)


async def test_thousands_of_offers_in_one_piece_are_taken_in_turn(until: Any) -> None:
    """Thousands of pipelined requests with such an offer are parsed without recursion."""
    asked = 0

    async def count(_: Scope, __: Receive, send: Send) -> None:
        nonlocal asked
        asked += 1
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    one = connect(count, Wire())
    one.data_received((b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n") * 4000)
    await until(lambda: asked == 4000)
    one.connection_lost(None)


def statuses(wire: Wire) -> list[int]:
    written = b"".join(data for data in wire.writes if data not in {b"closed", b"end"})
    return [int(line.split()[1]) for line in re.findall(rb"HTTP/1.1 [0-9]{3} ", written)]


async def test_who_pipelines_and_leaves_is_no_error(
    service: FastAPI, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that leaves while two of its requests wait causes no error in the log."""
    one = connect(service, Wire())
    one.data_received(b"GET /sample?count=500 HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(0)
    one.connection_lost(None)
    await until(lambda: not one.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /li",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /li",
        b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx",
        POST + b'Transfer-Encoding: chunked\r\n\r\na\r\n{"seed":1}\r\n0\r\nConnection: close\r\n\r\n',
    ],
)
async def test_where_nobody_is_answered_a_connection_ends(service: FastAPI, until: Any, sent: bytes) -> None:
    """A connection without a request in progress is closed in time, whatever has arrived on it."""
    wire = Wire()
    one = connect(service, wire, keep_alive_s=0.05)
    for byte in sent:
        one.data_received(bytes([byte]))
    await until(wire.has_ended)
    assert len(replies(wire)) == (b"\r\n\r\n" in sent)
    one.connection_lost(None)


async def test_a_connection_lasts_while_somebody_is_answered(until: Any) -> None:
    """A request may take any time; between two requests the connection stays for the keep-alive time."""
    go_on = asyncio.Event()

    async def wait(_: Scope, __: Receive, send: Send) -> None:
        await go_on.wait()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    wire, other = Wire(), Wire()
    one, idle = connect(wait, wire, keep_alive_s=0.01), connect(wait, other, keep_alive_s=0.05)
    one.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(other.has_ended)  # five times as long
    assert not wire.has_ended()
    go_on.set()
    await until(wire.has_ended)
    assert statuses(wire) == [204]
    one.connection_lost(None)
    idle.connection_lost(None)


@pytest.mark.parametrize("piece", [10, 5000])
async def test_a_head_has_a_largest_size(service: FastAPI, until: Any, piece: int) -> None:
    """A head without end would fill the memory."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ")
    for _ in range(2 * HEAD_BYTES // piece):  # what comes after the refusal is ignored
        one.data_received(b"x" * piece)
    await until(wire.has_ended)
    assert statuses(wire) == [200, 400]
    assert b"over 65536 bytes" in replies(wire)[1][1]
    one.connection_lost(None)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GARBAGE\0\r\n\r\n", [400]),
        (b"GET /sample?count=300 HTTP/1.1\r\nHost: x\r\n\r\nGARBAGE\0\r\n\r\n", [200, 400]),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /sample HTTP/1.1\r\nHost: x\r\n\r\n\0", [200, 200, 400]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n", [400]),
        (
            b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + POST + b"Transfer-Encoding: chunked\r\n\r\nno number\r\n",
            [200, 400],
        ),
    ],
)
async def test_what_is_no_http_is_answered_in_its_turn(
    service: FastAPI, until: Any, sent: bytes, expected: list[int]
) -> None:
    """Requests before it are answered, it gets a problem, and the connection is closed."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(sent)
    one.data_received(b"more of it")
    await until(wire.has_ended)
    assert statuses(wire) == expected
    headers, body = replies(wire)[-1]
    problem = json.loads(body)
    assert (problem["code"], problem["status"]) == ("malformed", 400)
    assert problem["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"
    one.connection_lost(None)
    await until(lambda: not one.tasks)


async def test_who_resets_before_the_refusal_is_no_error(
    service: FastAPI, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio's transport can't half-close such a connection; the application has not failed because of it."""

    class ResetWire(Wire):
        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    wire = ResetWire()
    one = connect(service, wire)
    one.data_received(b"GARBAGE\0\r\n\r\n")
    await until(lambda: bool(wire.writes))
    await until(lambda: not one.tasks)
    one.connection_lost(None)
    assert statuses(wire) == [400]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_head_that_is_both_too_long_and_wrong_is_refused_once(
    service: FastAPI, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is also logged once."""
    caplog.set_level(logging.INFO, "service")
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ")
    one.data_received(b"x" * 60_000)
    one.data_received(b"x" * 6000 + b"\0")
    await until(wire.has_ended)
    assert statuses(wire) == [400]
    await until(lambda: not one.tasks)
    assert [record.fields["status"] for record in caplog.records if hasattr(record, "fields")] == [400]
    one.connection_lost(None)


async def test_what_was_answered_gets_no_second_answer(service: FastAPI, until: Any) -> None:
    """The body of an answered request is malformed: the connection ends without a second reply."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"POST /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await until(lambda: statuses(wire) == [404])
    one.data_received(b"no number\r\n")
    await until(wire.has_ended)
    assert statuses(wire) == [404]
    one.connection_lost(None)


async def test_no_refusal_gets_into_a_reply_that_has_begun(until: Any) -> None:
    """If the body becomes malformed during the reply, the connection ends and the application gets a disconnect."""
    heard: list[str] = []

    async def begin(_: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        heard.append((await receive())["type"])
        await send({"type": "http.response.body", "body": b" more"})

    wire = Wire()
    one = connect(begin, wire)
    one.data_received(POST + b"Transfer-Encoding: chunked\r\n\r\n")
    await until(lambda: b"".join(wire.writes).endswith(b"half"))
    one.data_received(b"no number\r\n")
    await until(wire.has_ended)
    await until(lambda: heard == ["http.disconnect"])
    assert b"".join(wire.writes).count(b"HTTP/1.1") == 1
    assert b" more" not in wire.writes
    one.connection_lost(None)


# ---------------------------------------------------------------------------------------------- what is not understood

HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize(
    ("sent", "route", "method", "status"),
    [
        pytest.param(b"\0", "unmatched", "other", 400, id="no method"),
        pytest.param(b"BREW / HTTP/1.1\r\n", "unmatched", "other", 400, id="an unheard of method"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "unmatched", "other", 400, id="HTTP/2"),
        pytest.param(b"PUT /livez HTTP/9.9\r\n", "unmatched", "PUT", 400, id="no version"),
        pytest.param(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", "unmatched", "other", 400, id="another host"),
        pytest.param(b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", "unmatched", "GET", 400, id="a broken target"),
        pytest.param(HEAD + b"No field\r\n\r\n", "unmatched", "GET", 400, id="no field"),
        pytest.param(HEAD + b"A: b\r\n c\r\n\r\n", "unmatched", "GET", 400, id="a folded field"),
        pytest.param(HEAD + b"A: b\r\n" * 300, "unmatched", "GET", 400, id="too many fields"),
        pytest.param(b"GET /livez HTTP/1.1\r\n\r\n", "unmatched", "GET", 400, id="no Host"),
        pytest.param(HEAD + b"Transfer-Encoding: gzip\r\n\r\n", "unmatched", "GET", 501, id="an unknown coding"),
        pytest.param(CHUNKED + b"no number\r\n", "/sample", "POST", 400, id="no chunk"),
        pytest.param(CHUNKED + b"1\r\n{no end\r\n", "/sample", "POST", 400, id="half a chunk"),
    ],
)
async def test_what_is_not_understood_is_one_request_in_the_metrics_and_in_the_log(
    service: FastAPI, until: Any, caplog: pytest.LogCaptureFixture, sent: bytes, route: str, method: str,
    status: int, piece: int,
) -> None:  # fmt: skip
    """Whatever its pieces, it is counted and logged, so that an operator notices repeated attempts."""
    caplog.set_level(logging.INFO, "service")
    wire = Wire()
    one = connect(service, wire)
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
        await asyncio.sleep(0)
    await until(wire.has_ended)
    await until(lambda: not one.tasks)
    assert statuses(wire) == [status]
    metrics = service.state.manager.metrics.registry
    requests = [sample for family in metrics.collect() if family.name == "gan_requests" for sample in family.samples]
    assert [sample.labels for sample in requests] == [{"route": route, "method": method, "status": str(status)}]
    assert [sample.value for sample in requests] == [1]
    assert metrics.get_sample_value("gan_rejected_total", {"route": route, "reason": "invalid"}) == 1
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [(line["route"], line["method"], line["status"]) for line in lines] == [(route, method, status)]
    assert lines[0]["request_id"] == replies(wire)[0][0]["x-request-id"]
    one.connection_lost(None)


INSIDE = b"GET /inside HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("piece", [1, 10_000])
@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked;a=b", 501, "not_implemented"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: ,chunked", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, chunked", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\ntransfer-encoding: chunked", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: ", 400, "malformed"),
        ("HTTP/1.0\r\nTransfer-Encoding: chunked", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 5", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: +5", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nContent-Length: 0x5", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x\r\nHost: x\r\nContent-Length: 0", 400, "malformed"),
        ("HTTP/1.0\r\nHost: x\r\nHost: y\r\nContent-Length: 0", 400, "malformed"),
        ("HTTP/1.1\r\nHost: x y\r\nContent-Length: 0", 400, "malformed"),
        ("HTTP/1.1\r\nContent-Length: 0", 400, "malformed"),
    ],
)
async def test_where_a_request_may_be_taken_for_another_nothing_after_its_head_is_answered(
    service: FastAPI, until: Any, head: str, status: int, code: str, piece: int
) -> None:
    """Bytes after it are neither its body nor a request, because a proxy may read them differently."""
    wire = Wire()
    one = connect(service, wire)
    sent = HEAD + f"\r\nPOST /sample {head}\r\n\r\n0\r\n\r\n".encode() + INSIDE
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
    await until(wire.has_ended)
    assert statuses(wire) == [200, status]
    headers, body = replies(wire)[1]
    problem = json.loads(body)
    assert (problem["code"], problem["request_id"]) == (code, headers["x-request-id"])
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    assert headers["cache-control"] == "no-store"
    one.connection_lost(None)


@pytest.mark.parametrize(
    "request_head",
    [
        "GET /livez HTTP/1.0\r\n",
        "GET /livez HTTP/1.0\r\nHost: x\r\n",
        "GET /livez HTTP/1.1\r\nHost:\r\n",
        "GET /livez HTTP/1.1\r\nhOST:  images.example.com:8000 \t\r\n",
        "GET http://x/livez HTTP/1.1\r\nHost: [::1]:8000\r\n",
        "GET /livez HTTP/1.1\r\nHost: gan_service-1\r\n",
    ],
)
async def test_whom_a_request_is_for_can_be_said_in_many_ways(service: FastAPI, until: Any, request_head: str) -> None:
    """Every form of target and Host that RFC 9112 allows is answered."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(f"{request_head}\r\n".encode())
    await until(lambda: statuses(wire) == [200])
    one.connection_lost(None)


async def test_white_space_after_a_value_is_no_part_of_it(service: FastAPI, until: Any) -> None:
    """White space around a header's value is removed."""
    wire = Wire()
    one = connect(service, wire)
    body = b'{"seed":3}'
    one.data_received(
        b"POST /sample HTTP/1.1\r\nHost: x \r\nContent-Type:\tapplication/json \t\r\nContent-Length: %d \r\n"
        b"X-Timeout-Ms: 60000 \r\nAccept: application/json\t\r\nX-Request-ID:  a \t \r\n\r\n%b" % (len(body), body)
    )
    await until(lambda: statuses(wire) == [200])
    headers, _ = replies(wire)[0]
    assert (headers["x-seed"], headers["content-type"]) == ("3", "application/json")
    assert headers["x-request-id"] == "a"
    one.connection_lost(None)


@pytest.mark.parametrize("piece", [1, 10_000])
async def test_a_field_after_a_body_is_no_part_of_its_head(service: FastAPI, until: Any, piece: int) -> None:
    """Trailer fields are ignored: a proxy that checks heads only would not have seen them."""
    wire = Wire()
    one = connect(service, wire)
    sent = CHUNKED + b"2\r\n{}\r\n0\r\nX-Request-ID: after\r\nX-Timeout-Ms: never\r\nHost: y\r\n\r\n" + HEAD + b"\r\n"
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
    await until(lambda: statuses(wire) == [200, 200])
    assert "after" not in [headers["x-request-id"] for headers, _ in replies(wire)]
    assert not wire.has_ended()
    one.connection_lost(None)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(CHUNKED + b"2\r\n{}\r\n0\r\nX-Long: ", id="a field after the body"),
        pytest.param(CHUNKED + b"2;long=", id="an extension of a chunk"),
    ],
)
async def test_what_is_around_a_body_has_a_largest_size(service: FastAPI, until: Any, sent: bytes) -> None:
    """Trailers without end would fill the memory, as a head would."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(sent)
    for _ in range(2 * HEAD_BYTES // 5000):  # what comes after the refusal is ignored
        one.data_received(b"x" * 5000)
    await until(wire.has_ended)
    assert statuses(wire) == [400]
    assert b"over 65536 bytes" in replies(wire)[0][1]
    one.connection_lost(None)


async def test_a_body_may_be_large_in_many_small_chunks(service: FastAPI, until: Any) -> None:
    """The limit on bytes outside the body counts from one chunk to the next."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(CHUNKED)
    for _ in range(3):
        one.data_received(b"1;long=%b\r\n \r\n" % (b"x" * 50_000))
    one.data_received(b"2\r\n{}\r\n0\r\n\r\n")
    await until(lambda: statuses(wire) == [200])
    one.connection_lost(None)


async def test_a_body_has_a_largest_number_of_chunks(service: FastAPI, until: Any) -> None:
    """A body of millions of single bytes would keep the event loop busy for as long as its client likes."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(CHUNKED)
    for _ in range(MAX_CHUNKS // 1024 + 1):
        one.data_received(b"1\r\n \r\n" * 1024)
        await asyncio.sleep(0)  # the application reads
    await until(wire.has_ended)
    assert statuses(wire) == [400]
    assert b"over 65536 chunks" in replies(wire)[0][1]
    one.connection_lost(None)


async def test_who_asks_by_http_1_0_can_keep_the_connection(service: FastAPI, until: Any) -> None:
    """As `ab -k` does: every reply says keep-alive and has a length."""
    wire = Wire()
    one = connect(service, wire)
    keep = b"GET /%b HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n"
    kept = [b"livez", b"sample?seed=1", b"sample?count=2000&format=npy", b"nope", b"metrics", b"docs"]
    for count, path in enumerate(kept, 1):
        one.data_received(keep % path)
        await until(lambda count=count: len(replies(wire)) == count)
        headers, _ = replies(wire)[-1]
        assert headers["connection"] == "keep-alive"
        assert "transfer-encoding" not in headers
        assert not wire.has_ended()
    one.data_received(b"GET /livez HTTP/1.0\r\n\r\n")
    await until(wire.has_ended)
    assert replies(wire)[-1][0]["connection"] == "close"
    one.connection_lost(None)


async def test_a_draining_service_keeps_no_connection_by_http_1_0(service: FastAPI, until: Any) -> None:
    """Its replies say Connection: close, and have no second Connection field."""
    service.state.manager.is_draining = True
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /livez HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
    await until(wire.has_ended)
    assert b"".join(wire.writes).lower().count(b"\r\nconnection:") == 1
    assert replies(wire)[0][0]["connection"] == "close"
    service.state.manager.is_draining = False
    one.connection_lost(None)


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "OPTIONS"])
async def test_a_method_that_no_route_has_is_405(service: FastAPI, until: Any, method: str) -> None:
    """It gets 405 with the route's methods; bytes after a CONNECT are ignored, and the connection is closed."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(f"{method} /livez HTTP/1.1\r\nHost: x\r\nContent-Length: {len(INSIDE)}\r\n\r\n".encode())
    one.data_received(INSIDE)
    await until(lambda: len(replies(wire)) > 0)
    assert statuses(wire) == [405]
    assert replies(wire)[0][0]["allow"] == "GET, HEAD"
    assert wire.has_ended() is (method == "CONNECT")
    one.connection_lost(None)


async def test_who_sends_no_more_gets_what_is_answered_at_once(service: FastAPI, until: Any) -> None:
    """A half-closed connection counts as left: a probe is answered, but work is not started."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(HEAD + b"\r\n")
    assert one.eof_received()
    await until(wire.has_ended)
    assert statuses(wire) == [200]
    one.connection_lost(None)

    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /sample HTTP/1.1\r\nHost: x\r\n\r\n")
    one.eof_received()
    await until(wire.has_ended)
    assert statuses(wire) == []
    one.connection_lost(None)


@pytest.mark.parametrize("connection", ["close", "Close", "keep-alive, close"])
async def test_who_wants_its_connection_closed_has_it_closed(service: FastAPI, until: Any, connection: str) -> None:
    """The connection closes after the reply, which says Connection: close."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(HEAD + f"Connection: {connection}\r\n\r\n".encode())
    await until(wire.has_ended)
    assert statuses(wire) == [200]
    assert replies(wire)[0][0]["connection"] == "close"
    one.connection_lost(None)


async def test_uvicorn_itself_can_serve_by_it(service: FastAPI) -> None:
    """The class works as uvicorn's option `http` for any ASGI application."""
    config = uvicorn.Config(service, http=HttpConnection, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        serving = asyncio.create_task(server.serve([listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(HEAD + b"Connection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.close()
        await writer.wait_closed()
        server.should_exit = True
        await serving


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_work_ends_when_its_client_leaves(service: FastAPI, hold_engine: Any, until: Any, method: str) -> None:
    """Also where the client wanted only the headers."""
    one = connect(service, Wire())
    async with hold_engine(service):
        one.data_received(f"{method} /sample?count=3 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: service.state.manager.metrics.registry.get_sample_value(
            "gan_requests_in_flight", {"route": "/sample"}) == 1)  # fmt: skip
        await asyncio.sleep(0)
        one.connection_lost(None)
        await until(lambda: not one.tasks)


async def test_the_last_reply_can_be_read_where_requests_came_ahead(service: FastAPI, until: Any) -> None:
    """What is unread when a connection closes makes the system throw the reply away: so the client closes it first."""
    service.state.manager.is_draining = True
    wire = Wire()
    one = connect(service, wire)
    one.data_received((HEAD + b"\r\n") * 2)
    await until(wire.has_ended)
    assert statuses(wire) == [200]
    assert b"closed" not in wire.writes
    assert wire.is_read
    service.state.manager.is_draining = False
    one.connection_lost(None)


async def test_few_of_many_requests_in_one_piece_are_kept_ahead(until: Any) -> None:
    """A piece of a network's size may hold thousands, and each takes a hundred times as much memory as its bytes."""
    go_on, asked = asyncio.Event(), 0

    async def wait(_: Scope, __: Receive, send: Send) -> None:
        nonlocal asked
        asked += 1
        await go_on.wait()
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    wire = Wire()
    one = connect(wait, wire)
    one.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
    assert not wire.is_read
    assert sum(type(found) is HttpRequest for found in gc.get_objects()) < 500
    go_on.set()
    await until(lambda: asked == 5000)
    one.connection_lost(None)


async def test_who_leaves_in_the_body_of_a_small_request_is_no_error(
    service: FastAPI, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Routes that need no engine read bodies, too."""
    one = connect(service, Wire())
    one.data_received(b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await asyncio.sleep(0)
    one.connection_lost(None)
    await until(lambda: not one.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    left = {"route": "/v2/repository/index", "method": "POST", "status": "499"}
    assert service.state.manager.metrics.registry.get_sample_value("gan_requests_total", left) == 1


async def test_the_rest_of_a_refused_body_is_not_read_for_ever(
    service: FastAPI, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of it was announced."""
    monkeypatch.setattr("service.server.protocol.LATE_BODY_S", 0.01)
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n")
    await until(wire.has_ended)
    assert statuses(wire) == [404]
    one.connection_lost(None)


async def test_http_1_0_knows_no_interim_replies_and_close_wins(service: FastAPI, until: Any) -> None:
    """RFC 9110, 10.1.1, and RFC 9112, 9.3."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(
        b"POST /sample HTTP/1.0\r\nExpect: 100-continue\r\nConnection: keep-alive, close\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    )
    await asyncio.sleep(0)
    one.data_received(b"{}")
    await until(wire.has_ended)
    assert statuses(wire) == [200]
    one.connection_lost(None)


@pytest.mark.parametrize("piece", [5000, 2**16, 2**20])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_large_bodies_arrive_whole(until: Any, piece: int, framing: str) -> None:
    """However they are cut, one after the other, and read by the application in whatever parts there are."""
    bodies = [bytes([number]) * size for number, size in enumerate([300_000, 1, 70_000, 200_000])]
    seen = []

    async def read(_: Scope, receive: Receive, send: Send) -> None:
        body, has_more = b"", True
        while has_more:
            message = await receive()
            body, has_more = body + message["body"], message["more_body"]
        seen.append(body)
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    head = b"POST / HTTP/1.1\r\nHost: x\r\n"
    if framing == "length":
        sent = b"".join(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies)
    else:
        sent = b"".join(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(b), b) for b in bodies)
    one = connect(read, Wire())
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
        await asyncio.sleep(0)
    await until(lambda: len(seen) == len(bodies))
    assert seen == bodies
    one.connection_lost(None)


async def test_what_is_refused_gets_its_own_error(service: FastAPI, until: Any) -> None:
    """And not that of the request before it, at whose end it was parsed."""
    wire = Wire()
    one = connect(service, wire)
    one.data_received(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    one.data_received(b"GARBAGE\0\r\n\r\n")
    await until(wire.has_ended)
    assert statuses(wire) == [404, 404, 400]
    one.connection_lost(None)
