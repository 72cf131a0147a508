"""The middleware covers every request, also those that fail and those whose client leaves."""

import io
import logging
import re
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.types import Message

from service.app import all_reply_bytes, create_app
from service.errors import Draining
from service.http.layers.middleware import BUDGET_FACTOR, Admission
from service.http.requests.request_context import AsgiRequest
from service.server import protocol
from service.settings import Settings

Problem = Callable[[httpx.Response, int, str], str]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


def metric(app: FastAPI, name: str, **labels: str) -> float:
    return app.state.manager.metrics.registry.get_sample_value(name, labels) or 0.0


# ----------------------------------------------------------------------------------------------- ids, routes, methods


@pytest.mark.anyio
async def test_a_sane_request_id_is_kept(client: httpx.AsyncClient) -> None:
    """A client's own request id is kept, so that a request can be traced through several services."""
    for sane in ("a", "7f3c-42", "trace:1/span=2", "x" * 128):
        assert (await client.get("/livez", headers={"X-Request-ID": sane})).headers["x-request-id"] == sane


@pytest.mark.anyio
@pytest.mark.parametrize("odd", ["", "two words", "x" * 129, "semi;colon", "new\tline", "<script>", "größe"])
async def test_an_odd_request_id_is_replaced(client: httpx.AsyncClient, odd: str) -> None:
    """An id that is unsafe in a log line or a header is replaced."""
    reply = await client.get("/livez", headers={b"X-Request-ID": odd.encode()})
    assert reply.headers["x-request-id"] != odd
    assert len(reply.headers["x-request-id"]) == 32


@pytest.mark.anyio
async def test_a_scanner_adds_no_series(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Unknown paths share one label, and so do unknown methods; no bundle's name and no key becomes one."""
    app = create_app(tiny_settings(api_keys="secret"))

    def series() -> int:
        return sum(len(family.samples) for family in app.state.manager.metrics.registry.collect())

    async def scan(client: httpx.AsyncClient, word: str) -> None:
        ours, theirs = {"X-API-Key": "secret"}, {"X-API-Key": word}
        await client.get(f"/{word}?q={word}")
        await client.request(word, f"/bundles/{word}", headers=ours)
        await client.request(word, "/sample")
        await client.get(f"/sample?bundle={word}@{word}", headers=ours)
        await client.post("/v1/images/generations", json={"model": word, "prompt": word}, headers=ours)
        await client.post(f"/v2/models/{word}/infer", json={}, headers=ours)
        await client.get(f"/v2/models/tiny/versions/{word}", headers=theirs)
        await client.get("/sample", headers=theirs)

    async with start(app) as client:
        await scan(client, "first")
        before, requests = series(), metric(app, "gan_requests_total", route="unmatched", method="GET", status="404")
        for number in range(1000 // 8):
            await scan(client, f"word{number}")
        assert series() == before
        assert metric(app, "gan_requests_total", route="unmatched", method="GET", status="404") == requests + 125


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/sample", "GET, HEAD, POST"),
        ("OPTIONS", "/sample", "GET, HEAD, POST"),
        ("GET", "/discriminate", "POST"),
        ("HEAD", "/discriminate", "POST"),
        ("POST", "/bundles/tiny", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
        ("BREW", "/metrics", "GET, HEAD"),
        ("TRACE", "/sample", "GET, HEAD, POST"),
    ],
)
async def test_another_method_is_405(client: httpx.AsyncClient, method: str, path: str, allow: str) -> None:
    """A 405 names all methods of the route in Allow."""
    reply = await client.request(method, path)
    assert reply.status_code == 405
    assert reply.headers["allow"] == allow
    if method != "HEAD":
        assert reply.json()["code"] == "method_not_allowed"


@pytest.mark.anyio
async def test_an_unheard_of_method_is_counted_as_other(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Unknown methods share one label, too."""
    await client.request("BREW", "/sample")
    assert metric(app, "gan_requests_total", route="/sample", method="other", status="405") >= 1


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/sample/", "/bundles/", "//sample", "/SAMPLE", "/bundles/a/b"])
async def test_paths_are_exact(client: httpx.AsyncClient, problem: Problem, path: str) -> None:
    """A path that differs by a slash, a segment or its case is not found, and not redirected."""
    problem(await client.get(f"{str(client.base_url).rstrip('/')}{path}"), 404, "not_found")


@pytest.mark.anyio
async def test_all_outcomes_are_measured(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Refused requests are measured like successful ones."""
    for path, status in (("/sample?seed=1", "200"), ("/sample?seed=x", "422")):
        labels = {"route": "/sample", "method": "GET", "status": status}
        count = metric(app, "gan_requests_total", **labels)
        seen = metric(app, "gan_request_duration_seconds_count", route="/sample")
        sent = metric(app, "gan_response_bytes_sum", route="/sample")
        reply = await client.get(path)
        assert metric(app, "gan_requests_total", **labels) == count + 1
        assert metric(app, "gan_request_duration_seconds_count", route="/sample") == seen + 1
        assert metric(app, "gan_response_bytes_sum", route="/sample") == sent + len(reply.content)
    read = metric(app, "gan_request_bytes_sum", route="/sample")
    await client.post("/sample", json={"seed": 1})
    assert metric(app, "gan_request_bytes_sum", route="/sample") == read + len('{"seed":1}')


@pytest.mark.anyio
async def test_a_rejection_is_counted_once_with_its_reason(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Each refusal is counted once, under its reason."""
    before = metric(app, "gan_rejected_total", route="/sample", reason="invalid")
    await client.get("/sample?count=0")
    assert metric(app, "gan_rejected_total", route="/sample", reason="invalid") == before + 1


# ------------------------------------------------------------------------------------------------------- log and bugs


def own(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """The request lines of this thread. The live server of other tests logs from another one."""
    here = threading.get_ident()
    return [record for record in caplog.records if hasattr(record, "fields") and record.thread == here]


@pytest.mark.anyio
async def test_each_request_is_one_line_of_fields(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """A request's line has what it asked for, who asked, how it ended, and where its time went."""
    np.save(image := io.BytesIO(), np.zeros((2, 8, 8), np.uint8))
    npy = {"Content-Type": "application/x-npy"}
    with caplog.at_level(logging.INFO, "service"):
        drawn = await client.get("/sample?seed=1&count=3&bundle=rgb")
        await client.post("/discriminate", content=image.getvalue(), headers=npy)
        stream = await client.get("/sample?seed=1&count=600&scale=8&format=npy")
        await client.post("/sample?seed=1", content=b"no array", headers=npy)
        await client.get("/bundles/tiny")
    lines = [record.fields for record in own(caplog)]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("GET", "/sample", 200),
        ("POST", "/discriminate", 200),
        ("GET", "/sample", 200),
        ("POST", "/sample", 400),
        ("GET", "/bundles/{name}", 200),
    ]
    assert (lines[0]["bundle"], lines[0]["count"]) == (drawn.headers["x-bundle"], 3)
    assert [line.get("count") for line in lines] == [3, 2, 600, None, None]
    assert [line.get("error") for line in lines] == [None, None, None, "malformed", None]
    times = [[name for name in line if name.endswith("_ms") and name != "duration_ms"] for line in lines]
    drawing, judging = ["queue_ms", "compute_ms", "encode_ms"], ["decode_ms", "queue_ms", "compute_ms"]
    assert times == [drawing, judging, drawing, [], []]
    assert all(line["duration_ms"] >= line.get("compute_ms", 0) for line in lines[:2])
    first_s = re.findall("compute;dur=([0-9.]+)", stream.headers["server-timing"])
    assert lines[2]["compute_ms"] > float(first_s[0])  # the header is sent before the other pieces are computed
    assert "bundle" not in lines[4]


@pytest.mark.anyio
async def test_probes_do_not_fill_the_log(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """Lines of probes and scrapes are logged at debug level only."""
    with caplog.at_level(logging.DEBUG, "service"):
        for path in ("/livez", "/readyz", "/health", "/startupz", "/metrics"):
            await client.get(path)
    assert [record.levelname for record in own(caplog)] == ["DEBUG"] * 5


@pytest.mark.anyio
async def test_a_bug_is_500_and_leaves_a_traceback(
    client: httpx.AsyncClient,
    app: FastAPI,
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets the request id and no details; the log has the traceback."""

    async def bug(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(app.state.manager, "find", bug)
    assert "secret" not in problem(await client.get("/sample"), 500, "internal")
    assert "ZeroDivisionError: a secret" in caplog.text
    assert metric(app, "gan_requests_in_flight", route="/sample") == 0
    assert metric(app, "gan_requests_total", route="/sample", method="GET", status="500") >= 1


# ---------------------------------------------------------------------------------------------------------- admission


async def ask(app: FastAPI, receive: Callable[[], Any], *headers: tuple[bytes, bytes]) -> list[Message]:
    """Send POST /discriminate with this head; returns the ASGI messages of the reply."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/discriminate", "raw_path": b"/discriminate", "query_string": b"",
        "headers": list(headers), "http_version": "1.1", "scheme": "http", "root_path": "", "server": ("service", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


async def nothing_is_read() -> Message:
    raise AssertionError("the body was asked for")


@pytest.mark.anyio
async def test_a_draining_service_reads_no_bodies(
    tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draining service refuses by the head, without reading the body."""
    app = create_app(tiny_settings())
    sent = await ask(app, nothing_is_read, (b"content-type", b"image/png"))
    assert sent[0]["status"] == 503  # not started
    monkeypatch.setattr("service.engine.model_manager.ModelManager.admit", lambda _: (_ for _ in ()).throw(Draining()))
    sent = await ask(create_app(tiny_settings()), nothing_is_read, (b"content-type", b"image/png"))
    assert (sent[0]["status"], b'"draining"' in sent[1]["body"]) == (503, True)
    assert (b"retry-after", b"1") in [tuple(header) for header in sent[0]["headers"]]


@pytest.mark.anyio
@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("length", [b"33554433", b"9" * 5000])
async def test_a_body_announced_too_large_is_not_read(app: FastAPI, length: bytes) -> None:
    """A body whose Content-Length is too large is not read."""
    sent = await ask(app, nothing_is_read, (b"content-type", b"image/png"), (b"content-length", length))
    assert sent[0]["status"] == 413


@pytest.mark.anyio
@pytest.mark.parametrize("content_type", [b"", b"text/plain", b"image/tiff"])
@pytest.mark.usefixtures("client")
async def test_a_body_of_a_wrong_type_is_not_read(app: FastAPI, content_type: bytes) -> None:
    """A body of an unsupported Content-Type is not read."""
    sent = await ask(app, nothing_is_read, (b"content-type", content_type))
    assert sent[0]["status"] == 415
    assert b"image/png" in dict(map(tuple, sent[0]["headers"]))[b"accept"]


# ------------------------------------------------------------------------------------------------- over a real socket


class Wire:
    """A client on a raw socket."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")

    def send(self, *lines: str, body: bytes = b"") -> None:
        """Send a head of these lines, and a body."""
        self.socket.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode() + body)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """Read the next reply: (status, headers, body)."""
        status = int(self.file.readline().split()[1])
        headers = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        return status, headers, self.file.read(int(headers.get("content-length", 0)))

    def is_closed(self) -> bool:
        """Wait until the server ends the connection; False if it sends something instead."""
        return self.file.read(1) == b""

    def close(self) -> None:
        """Close the connection."""
        self.file.close()
        self.socket.close()


@pytest.fixture
def wire(live: Any) -> Any:
    one = Wire(live.port)
    yield one
    one.close()


UPLOAD = ("POST /discriminate HTTP/1.1", "Host: x", "Content-Type: image/png")


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (("GET /sample?seed=7 HTTP/1.1",), b""),
        (("GET /sample?seed=7&bundle=nope HTTP/1.1",), b""),
        (("GET /sample?seed=7 HTTP/1.1", "If-None-Match: *"), b""),
        (("POST /sample HTTP/1.1", "Content-Type: application/json", "Content-Length: 10"), b'{"seed":7}'),
        (("POST /sample HTTP/1.1", "Content-Type: application/json", "Content-Length: 10"), b'{"seed":x}'),
        (("POST /discriminate HTTP/1.1", "Content-Type: image/png", "Content-Length: 4"), b"junk"),
        (("POST /sample HTTP/1.1", "Content-Type: application/json", "Content-Length: 99999999"), b""),
    ],
)
def test_a_reply_is_the_same_however_it_is_sent(live: Any, head: tuple[str, ...], body: bytes) -> None:
    """With keep-alive or with close, the reply and the counted bytes are the same."""

    def counted() -> tuple[float, ...]:
        route = head[0].split()[1].partition("?")[0]
        names = ("gan_request_bytes_sum", "gan_response_bytes_sum", "gan_request_duration_seconds_count")
        return tuple(live.metric(name, route=route) for name in names)

    seen = []
    for connection in ("keep-alive", "close"):
        wire, before = Wire(live.port), counted()
        wire.send(*head, "Host: x", "X-Request-ID: the-same", f"Connection: {connection}", body=body)
        status, headers, content = wire.read()
        assert headers.pop("connection", "keep-alive") == connection
        headers.pop("date")  # a second may pass between the two
        timing = headers.pop("server-timing", "")
        live.wait_for(lambda before=before: counted()[-1] > before[-1])
        more = [round(now - then) for now, then in zip(counted(), before, strict=True)]
        seen.append((status, headers, content, re.sub("[0-9.]+", "", timing), more))
        wire.close()
    assert seen[0] == seen[1]
    assert seen[0][-1] == [len(body) if seen[0][0] != 413 else 0, len(seen[0][2]), 1]


def test_a_connection_outlives_a_refused_body(live: Any, wire: Wire) -> None:
    """413 comes before the body; a client that still sends it can use the connection afterwards."""
    wire.send(*UPLOAD, f"Content-Length: {live.app.state.manager.settings.max_body_bytes + 1}")
    status, headers, _ = wire.read()
    assert status == 413
    assert "connection" not in headers
    chunk = bytes(1 << 20)
    for _ in range(32):
        wire.socket.sendall(chunk)
    wire.socket.sendall(b"x")
    wire.send("GET /livez HTTP/1.1", "Host: x")
    assert wire.read()[0] == 200


def test_a_body_without_end_is_cut_off(wire: Wire) -> None:
    """Chunks are read up to the limit; then the reply is sent and the connection ends."""
    wire.send(*UPLOAD, "Transfer-Encoding: chunked")
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    for _ in range(40):
        wire.socket.sendall(chunk)
    status, headers, _ = wire.read()
    assert (status, headers["connection"]) == (413, "close")
    assert wire.is_closed()


def refused_while_sending(server: Any, connection: str = "close") -> Wire:
    """A client that was refused for a body that is too large, and has sent a part of it."""
    wire = Wire(server.port)
    size = server.app.state.manager.settings.max_body_bytes + 2**20
    wire.send(*UPLOAD, f"Connection: {connection}", f"Content-Length: {size}", body=bytes(2**20))
    return wire


def send_for_ever(wire: Wire) -> None:
    while True:
        wire.socket.sendall(b"x")


def test_a_client_that_is_refused_while_sending_can_read_why(live: Any) -> None:
    """The connection stays open while the client sends: closing it would reset it and lose the reply."""
    wire = refused_while_sending(live)
    wire.socket.sendall(bytes(live.app.state.manager.settings.max_body_bytes))
    status, headers, _ = wire.read()
    assert (status, headers["connection"]) == (413, "close")
    assert wire.is_closed()
    wire.close()


def test_a_client_that_goes_on_sending_for_too_long_is_cut_off(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused client that goes on sending is cut off after LATE_BODY_S."""
    monkeypatch.setattr(protocol, "LATE_BODY_S", 0.05)
    wire = refused_while_sending(live)
    assert wire.read()[0] == 413
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_for_ever(wire)
    wire.close()


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_goes_on_sending_does_not_hold_up_the_end(
    live_server: Any, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, connection: str
) -> None:
    """A client that still sends after its reply does not hold up the shutdown."""
    monkeypatch.setattr(protocol, "LATE_BODY_S", 1e6)
    monkeypatch.setattr(protocol, "LATE_BODY_AT_END_S", 1e6)
    server = live_server(tiny_settings(drain_timeout_s=1e6))
    with server.running():
        wire = refused_while_sending(server, connection)
        assert wire.read()[0] == 413
        assert connection == "keep-alive" or wire.is_closed()
    assert not server.thread.is_alive()
    wire.close()


def test_a_client_that_leaves_after_a_large_body_is_noticed(
    live_server: Any, tiny_settings: Callable[..., Settings]
) -> None:
    """A server that reads no further after a large body would not notice that its client has left."""
    images = io.BytesIO()
    np.save(images, np.zeros((300, 16, 16), np.uint8))
    with live_server(tiny_settings()).running() as server, server.engine_held():
        wire = Wire(server.port)
        length = f"Content-Length: {len(images.getvalue())}"
        wire.send("POST /discriminate HTTP/1.1", "Host: x", "Content-Type: application/x-npy", length)
        server.wait_for(lambda: server.metric("gan_requests_in_flight", route="/discriminate") == 1)
        wire.socket.sendall(images.getvalue())
        server.wait_for(lambda: server.metric("gan_batch_images_count", bundle="tiny", operation="discriminate") == 1)
        wire.close()
        left = {"method": "POST", "route": "/discriminate", "status": "499"}
        server.wait_for(lambda: server.metric("gan_requests_total", **left) == 1)


def test_a_chunked_body_within_the_limit_is_read(wire: Wire) -> None:
    """A chunked body within the limit is answered."""
    wire.send("POST /sample HTTP/1.1", "Host: x", "Content-Type: application/json", "Transfer-Encoding: chunked")
    wire.socket.sendall(b"9\r\n" + b'{"seed":1' + b"\r\n1\r\n}\r\n0\r\n\r\n")
    status, headers, _ = wire.read()
    assert (status, headers["x-seed"]) == (200, "1")
    assert "connection" not in headers


def test_a_client_that_waits_for_100_is_told_to_close(wire: Wire) -> None:
    """The client may never send the announced body, so the connection can't be used any more."""
    wire.send(*UPLOAD, "Content-Length: 999999999999", "Expect: 100-continue")
    status, headers, _ = wire.read()
    assert (status, headers["connection"]) == (413, "close")
    assert wire.is_closed()


def test_a_client_that_waits_for_100_gets_it(wire: Wire) -> None:
    """A client that expects 100 Continue gets it once the body is to be read."""
    wire.send(
        "POST /sample HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        "Content-Length: 10",
        "Expect: 100-continue",
    )
    assert wire.file.readline() == b"HTTP/1.1 100 Continue\r\n"
    assert wire.file.readline() == b"\r\n"
    wire.socket.sendall(b'{"seed":1}')
    assert wire.read()[0] == 200


def test_a_body_that_does_not_come_is_408(wire: Wire, live: Any) -> None:
    """Ten bytes are announced and one is sent: the deadline covers reading the body."""
    refused = partial(live.metric, "gan_rejected_total", route="/discriminate", reason="request_timeout")
    before = refused()
    wire.send(*UPLOAD, "Content-Length: 10", "X-Timeout-Ms: 50", body=b"x")
    status, headers, body = wire.read()
    assert (status, headers["connection"]) == (408, "close")
    assert b"request_timeout" in body
    assert refused() == before + 1
    assert wire.is_closed()


def send_nearly_all(server: Any, size: int) -> list[Wire]:
    """As many clients as the budget allows, each a hundred bytes short of the largest body."""
    wires = [Wire(server.port) for _ in range(BUDGET_FACTOR)]
    for one in wires:
        one.send(*UPLOAD, f"Content-Length: {size}", "X-Timeout-Ms: 60000", body=bytes(size - 100))
    server.wait_for(lambda: admission(server).bodies.used_bytes == BUDGET_FACTOR * (size - 100))
    return wires


def test_bodies_are_bounded_together(live_server: Any, tiny_settings: Callable[..., Settings]) -> None:
    """Each body is allowed alone; once the budget is used up, the next is refused before it is read."""
    size = 2**20
    with live_server(tiny_settings(max_body_bytes=size)).running() as server:
        half_sent = send_nearly_all(server, size)
        late = Wire(server.port)
        late.send(*UPLOAD, f"Content-Length: {size}")
        status, headers, body = late.read()
        assert (status, headers["retry-after"]) == (429, "1")
        assert b"queue_full" in body
        # A body of unknown size is refused once it exceeds the room.
        chunked = Wire(server.port)
        chunked.send(*UPLOAD, "Transfer-Encoding: chunked", body=b"80000\r\n" + bytes(2**19) + b"\r\n")
        assert chunked.read()[0] == 429
        small = Wire(server.port)
        small.send(*UPLOAD, "Content-Length: 3", body=b"abc")
        assert small.read()[0] == 422  # a small body is read even without room
        half_sent.pop().close()
        server.wait_for(lambda: admission(server).bodies.used_bytes == (BUDGET_FACTOR - 1) * (size - 100))
        again = Wire(server.port)
        again.send(*UPLOAD, f"Content-Length: {size // 2}", body=bytes(size // 2))
        assert again.read()[0] == 422
        for wire in (*half_sent, late, chunked, small, again):
            wire.close()
        server.wait_for(lambda: admission(server).bodies.used_bytes == 0)


def test_the_memory_of_an_evicted_request_is_free_at_once(
    live_server: Any, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new body evicts one stalled client, and not a further one for each of its pieces."""
    size = 2**20
    with live_server(tiny_settings(max_body_bytes=size)).running() as server:
        half_sent = send_nearly_all(server, size)
        monkeypatch.setattr("service.http.requests.memory_budget.STALLED_AFTER_S", 0.0)
        late = Wire(server.port)
        late.send(*UPLOAD, f"Content-Length: {size - 200}")
        for start in range(0, size - 200, 2**18):
            late.socket.sendall(bytes(min(2**18, size - 200 - start)))
        assert late.read()[0] == 422
        server.wait_for(lambda: admission(server).bodies.used_bytes == (BUDGET_FACTOR - 1) * (size - 100))
        left = {"method": "POST", "route": "/discriminate", "status": "499"}
        assert server.metric("gan_requests_total", **left) == 1
        for wire in (*half_sent, late):
            wire.close()
        server.wait_for(lambda: admission(server).bodies.used_bytes == 0)


def admission(server: Any) -> Any:
    """The admission of a live server."""
    layer = server.app.outermost
    while not isinstance(layer, Admission):
        layer = layer.app
    return layer


LARGE = "GET /sample?count=1024&scale=11&format=npy&seed=1 HTTP/1.1"  # more than the system's buffers hold


def test_replies_that_are_not_read_are_bounded_too(
    live_server: Any, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that do not read their replies hold memory until they have stalled and others need it."""
    settings = tiny_settings(max_output_pixels=10**6)
    room = all_reply_bytes(settings) // (2 * 512 * (8 * 11) ** 2)  # a stream holds two pieces of 512 images
    with live_server(settings).running() as server:
        readers: list[Wire] = []
        while True:
            wire = Wire(server.port)
            wire.send(LARGE, "Host: x")
            head = wire.file.readline()
            if b" 200 " not in head:
                break
            readers.append(wire)
        assert b" 429 " in head
        assert len(readers) == room
        wire.close()
        small = Wire(server.port)
        small.send("GET /sample HTTP/1.1", "Host: x")
        assert small.read()[0] == 200  # small replies are never refused
        monkeypatch.setattr("service.http.requests.memory_budget.STALLED_AFTER_S", 0.0)
        again = Wire(server.port)
        again.send(LARGE, "Host: x")
        assert again.read()[0] == 200  # the client that has stalled longest was evicted
        server.wait_for(lambda: server.metric("gan_requests_in_flight", route="/sample") == room - 1)
        for one in (*readers, small, again):
            one.close()
        server.wait_for(lambda: admission(server).replies.used_bytes == 0)


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["png", "json", "npy"])
async def test_what_making_a_reply_took_is_given_back_once_it_is_made(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """While its client reads it, a reply counts as much as it has bytes; afterwards nothing."""
    replies, held = admission(SimpleNamespace(app=app)).replies, list[int]()
    write = AsgiRequest.write_reply

    async def noted(request: AsgiRequest, body: bytes, *, is_last: bool) -> None:
        held.append(replies.used_bytes)
        await write(request, body, is_last=is_last)

    monkeypatch.setattr(AsgiRequest, "write_reply", noted)
    reply = await client.get(f"/sample?seed=1&count=64&scale=4&format={form}")
    assert held == [len(reply.content)]
    assert replies.used_bytes == 0


def test_a_long_reply_that_was_not_reserved_is_counted_too(live: Any) -> None:
    """A reply of thousands of results is counted from when it is written until the client has read it."""
    layer = admission(live)
    seen: list[int] = []
    waits = layer.replies.wait_for_client
    layer.replies.wait_for_client = lambda _: seen.append(layer.replies.used_bytes)
    try:
        np.save(body := io.BytesIO(), np.zeros((2000, 8, 8), np.uint8))
        reply = httpx.post(
            f"{live.url}/discriminate", content=body.getvalue(), headers={"Content-Type": "application/x-npy"}
        )
    finally:
        layer.replies.wait_for_client = waits
    assert reply.status_code == 200
    assert seen == [len(reply.content)]
    live.wait_for(lambda: layer.replies.used_bytes == 0)


@pytest.mark.parametrize("head", [("GET /sample?count=40 HTTP/1.1", "Host: x"), ("POST /sample HTTP/1.1", "Host: x")])
def test_work_for_a_client_that_left_is_dropped(live: Any, head: tuple[str, ...]) -> None:
    """Its work, queued behind a busy engine, is not computed, and counters and gauges are right."""

    def left() -> float:
        return float(live.metric("gan_requests_total", route="/sample", method=head[0].split()[0], status="499"))

    def cancelled() -> float:
        return float(live.metric("gan_cancelled_total", route="/sample", phase="queued"))

    def samples(name: str) -> float:
        return float(live.metric(name, bundle="tiny", operation="sample"))

    left_before, cancelled_before, batches = left(), cancelled(), samples("gan_batch_images_count")
    with live.engine_held():
        neighbour, leaver = Wire(live.port), Wire(live.port)
        neighbour.send("GET /sample?seed=1&format=npy HTTP/1.1", "Host: x")
        live.wait_for(lambda: samples("gan_batch_images_count") > batches)
        images = samples("gan_images_total")
        leaver.send(*head)
        live.wait_for(lambda: live.metric("gan_queue_images", device="cpu") > 0)
        leaver.close()
        live.wait_for(lambda: cancelled() == cancelled_before + 1)
        assert live.metric("gan_queue_images", device="cpu") == 0
    assert neighbour.read()[0] == 200
    neighbour.close()
    live.wait_for(lambda: left() == left_before + 1)
    live.wait_for(lambda: live.metric("gan_requests_in_flight", route="/sample") == 0)
    assert samples("gan_images_total") == images + 1


def test_a_client_that_leaves_amid_its_body_is_no_error(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that closes in the middle of an upload is counted, and not logged as an error of ours."""

    def left() -> float:
        return float(live.metric("gan_requests_total", route="/discriminate", method="POST", status="499"))

    before = left()
    wire = Wire(live.port)
    wire.send(*UPLOAD, "Content-Length: 1000", body=b"half")
    live.wait_for(lambda: live.metric("gan_requests_in_flight", route="/discriminate") == 1)
    wire.close()
    live.wait_for(lambda: left() == before + 1)
    assert live.metric("gan_requests_in_flight", route="/discriminate") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_requests_on_one_connection_do_not_mix(wire: Wire) -> None:
    """Three requests at once on one connection get three replies in order, each with its own id."""
    for number in range(3):
        wire.send(f"GET /sample?seed={number} HTTP/1.1", "Host: x", f"X-Request-ID: r{number}")
    for number in range(3):
        status, headers, _ = wire.read()
        assert (status, headers["x-seed"], headers["x-request-id"]) == (200, str(number), f"r{number}")
