"""Traces by OpenTelemetry: a span for each request, and one for each batch that rows of requests were computed in.

- Only imported with `GAN_TRACES=otlp`: what it needs comes with the extra `otlp`.
- A request's span continues its `traceparent`, and is sampled as that says. The reply's `traceparent` names it, and the
  log has both ids. Probes and scrapes have none.
- A batch belongs to many requests. Its span is a child of the first one's, and is linked to the spans of all, as they
  are to it. Requests that are not sampled count for nothing here.
- A span holds what the request's line in the log holds, and as little of what clients write.
- Spans wait in a bounded queue for a thread of the SDK's, which sends them. What finds no room is lost: neither replies
  nor the end of the process wait for the collector.
"""

import asyncio
import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service import __version__
from service.engine.batching.batch import ModelRunner
from service.http.requests.request_context import CLIENT_LEFT, UNMATCHED, RequestContext
from service.logs import Trace
from service.settings import SettingsError

SERVICE_NAME = "gan-service"
PROTOCOL = "http/protobuf"
END_S = 2.0  # how long a process that ends waits for the collector
GIVE_UP_S = 0.5  # and then for the sending thread, which is told to try no more
MAX_PARENT = 512  # characters of a traceparent, of which today's have 55; OpenTelemetry would warn of longer ones

_propagator = TraceContextTextMapPropagator()


class Traces:
    """Begins and ends spans, and has them sent as the `OTEL_…` variables say.

    Raises:
        SettingsError: One of these variables can't be used.
    """

    def __init__(self) -> None:
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if os.environ.get(name, PROTOCOL) not in {PROTOCOL, ""}:
                raise SettingsError(f"{name} is {os.environ[name]!r}: only {PROTOCOL} is spoken here")
        try:
            self.provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
            self._exporter = Exporter()
            self.provider.add_span_processor(BatchSpanProcessor(self._exporter))
        except (ValueError, OSError) as error:
            raise SettingsError(f"an OTEL_… variable can't be used: {error}") from None
        self._tracer = self.provider.get_tracer(SERVICE_NAME, __version__)

    def begin(self, request: RequestContext) -> None:
        """Begin the span of a request whose route is known."""
        method = "_OTHER" if request.method == "other" else request.method
        attributes: dict[str, str | int] = {"http.request.method": method, "url.scheme": request.scope["scheme"]}
        name = "HTTP" if method == "_OTHER" else method
        if request.route != UNMATCHED:
            attributes["http.route"] = request.route
            name = f"{name} {request.route}"
        if request.scope.get("server"):  # our own end of the connection: the Host header is the client's
            address, port = request.scope["server"]
            attributes |= (
                {"server.address": address} if port is None else {"server.address": address, "server.port": port}
            )
        parent, given = Context(), request.header(b"traceparent")
        if given is not None and len(given) <= MAX_PARENT:
            parent = _propagator.extract({"traceparent": given}, parent)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        ids = span.get_span_context()
        if not ids.is_valid:  # OTEL_SDK_DISABLED
            return
        request.trace = Trace(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", span if ids.trace_flags.sampled else None)
        shown = f"00-{request.trace.trace_id}-{request.trace.span_id}-{ids.trace_flags:02x}"
        request.more_headers = (*request.more_headers, (b"traceparent", shown.encode()))

    def end(self, request: RequestContext, client: str | None) -> None:
        """End the span of a request, which has its whole reply or has lost its client."""
        if request.trace is None or request.trace.span is None:
            return
        span: Span = request.trace.span
        known: dict[str, Any] = {
            "client.address": client,
            "http.request.body.size": request.bytes_in,
            "http.response.body.size": request.bytes_out,
            "gan.request_id": request.id,
            "gan.bundle": request.bundle,
            "gan.images": request.count,
            "gan.key": request.key,
            **{f"gan.{what}_ms": round(1000 * took_s, 3) for what, took_s in request.took_s.items()},
        }
        if request.status == CLIENT_LEFT:
            known["error.type"] = "client_left"
        else:
            known["http.response.status_code"] = request.status
        if request.status >= 500:  # others are the client's mistakes
            known["error.type"] = request.error
            span.set_status(StatusCode.ERROR)
        span.set_attributes({what: value for what, value in known.items() if value is not None})
        span.end()

    def begin_batch(
        self, runner: ModelRunner, rows: int, requests: Sequence[Span]
    ) -> Callable[[Exception | None], None] | None:
        """Begin the span of a batch that has rows of these requests; what is returned ends it, with the error if any.

        None where no request is sampled: nobody looks at this batch then.
        """
        requests = list(dict.fromkeys(requests))  # one may have rows in several submits
        if not requests:
            return None
        span = self._tracer.start_span(
            f"batch {runner.operation}",
            set_span_in_context(requests[0], Context()),
            attributes={
                "gan.bundle": f"{runner.bundle}@{runner.version}",
                "gan.operation": runner.operation,
                "gan.batch.requests": len(requests),
                "gan.batch.images": rows,
                "gan.batch.padding_images": runner.padded(rows) - rows,
            },
            links=[Link(request.get_span_context()) for request in requests],
        )
        for request in requests:
            request.add_link(span.get_span_context())

        def end(error: Exception | None) -> None:
            if error is not None:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
            span.end()

        return end

    async def close(self) -> None:
        """Send what is left, but wait no longer than END_S; what is not sent then is lost."""
        loop, is_done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self.provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody has waited so long
                loop.call_soon_threadsafe(is_done.set)

        threading.Thread(target=shut_down, name="end of traces", daemon=True).start()
        for wait_s in (END_S, GIVE_UP_S):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_done.wait(), wait_s)
                return
            self._exporter.shutdown()


class Exporter(OTLPSpanExporter):
    """The SDK's, which may be shut down by us, and then by its processor, with one word in the log at most."""

    _is_ended = False

    def shutdown(self) -> None:
        """End what is being tried, or nothing the second time."""
        if not self._is_ended:
            self._is_ended = True
            super().shutdown()  # type: ignore[no-untyped-call]


def _resource() -> Resource:
    """What the spans of this process come from, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say otherwise."""
    usual = {"service.version": __version__, "service.instance.id": str(uuid.uuid4())}
    named = Resource.create()
    if str(named.attributes["service.name"]).startswith("unknown_service"):  # the SDK's own word for nothing
        named = named.merge(Resource({"service.name": SERVICE_NAME}))
    return Resource(usual).merge(named)
