"""Traces: a span for each request and each batch, linked with each other, and a collector that nobody waits for."""

import asyncio
import json
import logging
import re
import secrets
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from benchmarks.tools.client import Connection, Request
from benchmarks.tools.process import running
from service.__main__ import BAD_SETTING, prepare
from service.app import create_app
from service.http.layers import traces
from service.http.layers.traces import Traces
from service.logs import JsonFormatter
from service.settings import Settings, SettingsError

Make = Callable[..., Settings]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


@pytest.fixture(autouse=True)
def _no_otel_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the machine that runs the tests are none of theirs."""
    for name in ("SERVICE_NAME", "RESOURCE_ATTRIBUTES", "TRACES_SAMPLER", "SDK_DISABLED", "EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(f"OTEL_{name}", raising=False)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Where spans go, in place of a collector."""
    kept = InMemorySpanExporter()
    monkeypatch.setattr(traces, "Exporter", lambda: kept)
    return kept


@pytest.fixture
def traced(exporter: InMemorySpanExporter, tiny_settings: Make) -> FastAPI:  # noqa: ARG001 - it must be there first
    """An application whose spans stay in memory."""
    return create_app(tiny_settings(traces="otlp", api_keys="alpha", trusted_proxies="127.0.0.1"))


@pytest.fixture
async def client(traced: FastAPI, start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key."""
    async with start(traced) as one:
        one.headers["X-API-Key"] = "alpha"
        yield one


@pytest.fixture
def spans(traced: FastAPI, exporter: InMemorySpanExporter) -> Callable[[str], list[ReadableSpan]]:
    """The spans so far whose names begin like this."""

    def find(name: str) -> list[ReadableSpan]:
        traced.state.traces.provider.force_flush()
        return [span for span in exporter.get_finished_spans() if span.name.startswith(name)]

    return find


def ids(span: ReadableSpan) -> tuple[str, str]:
    assert span.context is not None
    return f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"


def linked(span: ReadableSpan) -> set[tuple[str, str]]:
    return {(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in span.links}


@pytest.mark.anyio
async def test_a_request_is_a_span_by_http_conventions(
    client: httpx.AsyncClient, spans: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It continues the client's trace, the reply and the log name it, and it says what the log's line says."""
    with caplog.at_level(logging.INFO, "service"):
        reply = await client.get(
            "/sample?seed=1&count=3&bundle=rgb", headers={"traceparent": SAMPLED, "X-Forwarded-For": "203.0.113.9"}
        )
    [span] = spans("GET /sample")
    assert (span.kind, span.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    assert ids(span)[0] == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    assert reply.headers["traceparent"] == f"00-{TRACE}-{ids(span)[1]}-01"
    said = dict(span.attributes)
    assert {name: said.pop(name) for name in [*said] if name.endswith("_ms")}.keys() == {
        "gan.queue_ms",
        "gan.compute_ms",
        "gan.encode_ms",
    }
    assert said == {
        "http.request.method": "GET",
        "http.route": "/sample",
        "http.response.status_code": 200,
        "http.request.body.size": 0,
        "http.response.body.size": len(reply.content),
        "url.scheme": "http",
        "server.address": "service",
        "client.address": "203.0.113.9",
        "gan.request_id": reply.headers["x-request-id"],
        "gan.bundle": reply.headers["x-bundle"],
        "gan.images": 3,
        "gan.key": "unnamed",
    }
    [record] = [one for one in caplog.records if one.message == "request"]
    assert vars(record)["fields"]["key"] == "unnamed"
    assert span.resource.attributes["service.name"] == "gan-service"


@pytest.mark.anyio
async def test_lines_of_a_traced_request_name_its_span(
    client: httpx.AsyncClient, spans: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that from a trace one gets to the log, and back."""
    monkeypatch.setattr(caplog.handler, "formatter", JsonFormatter())
    with caplog.at_level(logging.INFO, "service"):
        await client.get("/bundles")
    [span] = spans("GET /bundles")
    [line] = [line for line in caplog.text.splitlines() if '"request"' in line]
    assert (json.loads(line)["trace_id"], json.loads(line)["span_id"]) == ids(span)


@pytest.mark.anyio
async def test_a_batch_is_linked_with_the_requests_that_share_it(
    client: httpx.AsyncClient, spans: Any, traced: FastAPI, hold_engine: Hold, until: Any
) -> None:
    """Its span is a child of the oldest sampled one's, and says how many images were computed, and how many in vain."""
    batcher = traced.state.manager.batcher
    async with hold_engine(traced):
        first = asyncio.create_task(client.get("/sample?count=64"))  # what the engine has begun, and stays with
        await until(lambda: batcher.busy_s() > 0)
        asked = []
        for number, given in enumerate([NOT_SAMPLED, SAMPLED, f"00-{'1' * 32}-{PARENT}-01"]):
            asked.append(asyncio.create_task(client.get("/sample?count=3", headers={"traceparent": given})))
            await until(lambda number=number: batcher.queued_rows == 3 * (number + 1))
    await asyncio.gather(first, *asked)
    [batch] = [span for span in spans("batch sample") if span.attributes["gan.batch.images"] == 9]
    requests = [one for one in spans("GET /sample") if ids(one)[0] in {TRACE, "1" * 32}]
    assert linked(batch) == set(map(ids, requests))
    assert len(requests) == 2
    assert all(linked(one) == {ids(batch)} for one in requests)
    assert batch.kind == SpanKind.INTERNAL
    assert batch.parent is not None
    assert (ids(batch)[0], f"{batch.parent.span_id:016x}") == next(ids(one) for one in requests if ids(one)[0] == TRACE)
    padded = next(iter(traced.state.manager.bundles.loaded())).sample.padded
    tiny = next(one for one in traced.state.manager.bundles.loaded() if one.name == "tiny")
    assert dict(batch.attributes) == {
        "gan.bundle": f"tiny@{tiny.version}",
        "gan.operation": "sample",
        "gan.batch.requests": 2,
        "gan.batch.images": 9,
        "gan.batch.padding_images": padded(9) - 9,
    }


@pytest.mark.anyio
async def test_what_the_parent_does_not_sample_leaves_no_span(
    client: httpx.AsyncClient, spans: Any, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of the request nor of its batch; the reply still names the trace. What is no traceparent begins one.

    None of them is worth a warning: clients could fill the log with those.
    """
    reply = await client.get("/sample", headers={"traceparent": NOT_SAMPLED})
    assert re.fullmatch(f"00-{TRACE}-(?!{PARENT})[0-9a-f]{{16}}-00", reply.headers["traceparent"])
    assert not spans("")
    for odd in ("", "00-0-0-0", SAMPLED.upper(), f"{SAMPLED}-", "x" * 8000, f"00-{'0' * 32}-{PARENT}-01"):
        reply = await client.get("/sample", headers={"traceparent": odd})
        assert reply.headers["traceparent"].endswith(("-01", "-03"))  # 2: the id is random
        assert TRACE not in reply.headers["traceparent"]
    warnings = [line for line in caplog.records if line.levelno >= logging.WARNING]
    assert not [line for line in warnings if ".exporter." not in line.name]  # another test's may still try again
    exporter.clear()


@pytest.mark.anyio
async def test_errors_are_told_by_status_and_code(
    client: httpx.AsyncClient, spans: Any, traced: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours fail the span, the client's don't; no span has an error's words."""

    async def bug(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    await client.get("/sample?count=0")
    await client.request("BREW", "/coffee")
    monkeypatch.setattr(traced.state.manager, "find", bug)
    await client.get("/sample")
    mistake, failure = spans("GET /sample")
    [unknown] = spans("HTTP")
    assert (mistake.status.status_code, "error.type" in mistake.attributes) == (StatusCode.UNSET, False)
    assert (failure.status.status_code, failure.attributes["error.type"]) == (StatusCode.ERROR, "internal")
    assert (unknown.attributes["http.request.method"], "http.route" in unknown.attributes) == ("_OTHER", False)
    assert unknown.attributes["http.response.status_code"] == 404
    assert not any(span.events or span.status.description for span in spans(""))


@pytest.mark.anyio
async def test_a_failed_batch_and_a_client_that_left_are_seen(
    client: httpx.AsyncClient,
    spans: Any,
    traced: FastAPI,
    hold_engine: Hold,
    until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch has the kind of its error; the request that nobody waits for has no status."""
    async with hold_engine(traced):
        leaver = asyncio.create_task(client.get("/sample?count=2"))
        await until(lambda: traced.state.manager.batcher.busy_s() > 0)
        leaver.cancel()
        await until(lambda: spans("GET /sample") != [])
    [left] = spans("GET /sample")
    assert left.attributes["error.type"] == "client_left"
    assert "http.response.status_code" not in left.attributes

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    tiny = next(one for one in traced.state.manager.bundles.loaded() if one.name == "tiny")
    monkeypatch.setattr(type(tiny.sample), "run", broken)
    assert (await client.get("/sample?count=7")).status_code == 500
    [failed] = [span for span in spans("batch") if span.attributes["gan.batch.images"] == 7]
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, "ZeroDivisionError")
    assert not failed.events


@pytest.mark.anyio
async def test_probes_leave_no_spans(client: httpx.AsyncClient, spans: Any) -> None:
    """Nor do scrapes: they would be most of what a quiet service sends."""
    for path in ("/livez", "/readyz", "/metrics"):
        assert "traceparent" not in (await client.get(path)).headers
    assert not spans("")


@pytest.mark.anyio
async def test_pages_of_other_origins_get_their_headers_too(
    exporter: InMemorySpanExporter, tiny_settings: Make, start: Start
) -> None:
    """One layer's headers do not take the place of the other's."""
    app = create_app(tiny_settings(traces="otlp", cors_origins="https://example.com"))
    async with start(app) as client:
        reply = await client.get("/bundles", headers={"Origin": "https://example.com", "traceparent": SAMPLED})
    assert reply.headers["access-control-allow-origin"] == "https://example.com"
    assert TRACE in reply.headers["traceparent"]
    assert [span.name for span in exporter.get_finished_spans()] == ["GET /bundles"]  # the end sends what is left


def secret_requests(word: Callable[[], str]) -> Iterator[bytes]:
    """Requests with secrets wherever clients can write something but X-Request-ID."""
    fields = b"Host: %b\r\nX-API-Key: %b\r\nCookie: %b\r\ntracestate: a=%b\r\nbaggage: b=%b\r\n%b: x\r\nReferer: /%b"
    bodies = [b'{"bundle": "%b"}', b"\x89PNG\r\n\x1a\n%b", b'{"%b": 1}', b'{"labels": "%b"', b"%b", b'{"count": "%b"}']
    kinds = ["application/json", "image/png", "application/x-npy", "multipart/form-data; boundary=%b", "text/%b"]
    targets = [
        *("/sample", "/discriminate", "/v1/images/generations", "/v2/models/%b/infer", "/verify", "/encode"),
        *("/bundles/%b", "/%b", "/static/%b", "/v2/repository/models/%b/load", "//%b/../%b?%b", "*%b", "http://%b/"),
    ]

    def filled(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        while b"%b" in raw:
            raw = raw.replace(b"%b", word().encode(), 1)
        return raw

    for number, target in enumerate(targets):
        for method in (b"GET", b"POST", b"BREW"):
            body, kind = filled(bodies[number % len(bodies)]), filled(kinds[number % len(kinds)])
            head = filled(target) + filled("?bundle=%b&seed=%b&%b") + b" HTTP/1.1\r\n" + filled(fields)
            length = b"%d" % len(body)
            yield (
                method
                + b" "
                + head
                + b"\r\nContent-Type: "
                + kind
                + b"\r\nContent-Length: "
                + length
                + b"\r\n\r\n"
                + body
            )
    for broken in (b"GET /%b HTTP/9.9\r\n\r\n", b"%b\r\n\r\n", b"GET / HTTP/1.1\r\n%b\r\n\r\n", b"GET /%b\r\n\r\n"):
        yield filled(broken)
    yield b"POST /sample HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + filled(b"%b\r\n")


@pytest.mark.parametrize("key", [None, "alpha"])
@pytest.mark.anyio
async def test_nothing_that_clients_write_gets_out(
    exporter: InMemorySpanExporter,
    tiny_settings: Make,
    live_server: Any,
    key: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither bodies nor paths, queries, headers and keys: the log at its usual level and the spans have none of it."""
    words: list[str] = []

    def word() -> str:
        words.append(f"s{secrets.token_hex(8)}")
        return words[-1]

    caplog.set_level(logging.INFO)
    more = {} if key is None else {"api_keys": word()}
    server = live_server(tiny_settings(traces="otlp", admin_keys=word(), **more))
    with server.running():
        for sent in secret_requests(word):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            writer.write_eof()
            await reader.read()
            writer.close()
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {words[0]}"}) as client:
            await client.get(f"{server.url}/sample")
    shown = "\n".join(map(JsonFormatter().format, caplog.records)) + repr(
        [(span.to_json(), span.resource.to_json()) for span in exporter.get_finished_spans()]
    )
    assert len(exporter.get_finished_spans()) > 40
    assert [one for one in words if one in shown] == []


class Collector(ThreadingHTTPServer):
    """An OTLP/HTTP receiver.

    Attributes:
        received: What was sent so far, parsed.
        targets: Paths that it was sent to, and media types.
        can_answer: Unset, it takes requests and answers none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.received: deque[ExportTraceServiceRequest] = deque()
        self.targets: set[tuple[str, str]] = set()
        self.has_received, self.can_answer = threading.Event(), threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.targets.add((self.path, self.headers["Content-Type"]))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.received.append(ExportTraceServiceRequest.FromString(body))
                collector.has_received.set()
                collector.can_answer.wait()
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A receiver that answers nobody until it is let."""
    one = Collector()
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    yield one
    one.can_answer.set()
    one.shutdown()
    thread.join(60)
    one.server_close()


@contextmanager
def slowly(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process' variables for a collector that takes hours, and for little room."""
    settings = {"ENDPOINT": collector.url, "TIMEOUT": "10000"}
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
        for name, size in {"MAX_QUEUE_SIZE": "4", "MAX_EXPORT_BATCH_SIZE": "2"}.items():
            patch.setenv(f"OTEL_BSP_{name}", size)
        yield


def test_a_collector_that_hangs_holds_nobody_up(
    collector: Collector, live_server: Any, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies come while it has a request and the queue is full, and the end does not wait for it."""
    monkeypatch.setattr(traces, "END_S", 0.01)
    monkeypatch.setattr(traces, "GIVE_UP_S", 0.01)
    with slowly(collector, monkeypatch):
        server = live_server(tiny_settings(traces="otlp"))
    with server.running():
        for _ in range(20):
            assert httpx.get(f"{server.url}/sample").status_code == 200
        assert collector.has_received.wait(60)
    assert not server.thread.is_alive()
    assert len(collector.received) == 1  # it hangs to this moment


def test_a_collector_that_is_not_there_holds_nobody_up(
    live_server: Any, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where nobody listens, and nothing tries on when the service has ended."""

    def sending() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("OtelBatchSpan")}

    before = sending()
    monkeypatch.setattr(traces, "END_S", 0.01)
    monkeypatch.setattr(traces, "GIVE_UP_S", 60)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    server = live_server(tiny_settings(traces="otlp"))
    with server.running():
        assert httpx.get(f"{server.url}/sample").status_code == 200
        [thread] = sending() - before
    assert not server.thread.is_alive()
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.anyio
async def test_each_worker_sends_its_own_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, tiny_bundles: Any
) -> None:
    """By OTLP over HTTP, as one service with two instances; what is left when they end is sent then."""
    collector.can_answer.set()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # its own spans would have paths and queries
    folder = tiny_bundles["tiny"].folder.parent
    replies = []
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2, traces="otlp") as service:
        connections = [await Connection.open(service.port) for _ in range(4)]
        for connection in connections:
            replies += [await connection.ask(Request("GET", target)) for target in ("/sample", "/bundles")]
            connection.close()
    groups = [group for request in collector.received for group in request.resource_spans]
    resources = [{one.key: one.value.string_value for one in group.resource.attributes} for group in groups]
    assert {one["service.name"] for one in resources} == {"pictures"}
    assert len({one["service.instance.id"] for one in resources}) == 2
    sent = [span for group in groups for scope in group.scope_spans for span in scope.spans]
    assert collector.targets == {("/v1/traces", "application/x-protobuf")}
    assert {span.name for span in sent} == {"GET /sample", "GET /bundles", "batch sample"}
    assert len(sent) == 12
    told = {span.trace_id.hex() for span in sent if span.name.startswith("GET")}
    assert told == {reply.headers["traceparent"].split("-")[1] for reply in replies}
    batches = [span for span in sent if span.name == "batch sample"]
    drawn = {span.trace_id.hex() for span in sent if span.name == "GET /sample"}
    assert {link.trace_id.hex() for batch in batches for link in batch.links} == drawn


@pytest.mark.anyio
async def test_by_default_nothing_is_traced(start: Start, tiny_settings: Make) -> None:
    """No header, and nothing is kept for a batch."""
    app = create_app(tiny_settings())
    async with start(app) as client:
        assert "traceparent" not in (await client.get("/sample", headers={"traceparent": SAMPLED})).headers
    assert app.state.traces is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
    ],
)
def test_a_variable_that_cannot_be_used_is_a_bad_setting(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so at the start."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="OTEL_"):
        Traces()


@pytest.mark.usefixtures("logging_as_before")
def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before anything is loaded."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    assert prepare(["--traces", "otlp"]) == BAD_SETTING
    assert capsys.readouterr().err == (
        "gan-service: GAN_TRACES (or --traces) is 'otlp': install the extra otlp first "
        "(pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http)\n"
    )
