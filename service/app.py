"""Builds the application: creates the parts from the settings and connects them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models.bundle import BundleError
from service import __version__
from service.codecs.decoders import Decoders
from service.codecs.encode import most_encoding_bytes
from service.codecs.time_slices import TimeSlices
from service.engine.model_manager import ModelManager
from service.http.images.discriminate import discriminate_routes
from service.http.images.encode import encode_routes
from service.http.images.interpolate import LATENTS_BYTES, interpolate_routes
from service.http.images.sample import MAX_JSON_BYTES, sample_routes
from service.http.images.streaming import PIECE_BYTES
from service.http.images.verify import verify_routes
from service.http.layers.auth import Keys, KeyScope, read_keys
from service.http.layers.client_address import TrustedProxies
from service.http.layers.cross_origin import CrossOrigin, Preflights
from service.http.layers.middleware import (
    BUDGET_FACTOR,
    Admission,
    Authentication,
    Observe,
    Problems,
    RouteTable,
    Shortcut,
)
from service.http.openapi.document import operation_id
from service.http.openapi.routes import complete
from service.http.operations.bundles import bundle_routes
from service.http.operations.pages import page_routes
from service.http.operations.probes import metrics_routes, probe_routes
from service.http.requests.route_context import RouteContext
from service.http.v1.routes import v1_routes
from service.http.v2.repository import repository_routes
from service.http.v2.routes import v2_routes
from service.machine.cpu import cpu_limit
from service.machine.worker_group import WorkerGroup
from service.metrics import Metrics
from service.settings import Settings, networks

if TYPE_CHECKING:
    from service.http.layers.traces import Traces

# Other routes need a client's key, if keys are set. Pages hold nothing secret.
SCOPES = {
    **dict.fromkeys(("/livez", "/readyz", "/health", "/startupz", "/metrics"), KeyScope.NONE),
    **dict.fromkeys(("/v2/health/live", "/v2/health/ready"), KeyScope.NONE),
    **dict.fromkeys(("/", "/docs", "/openapi.json", "/static/{name:path}"), KeyScope.NONE),
    "/v2/repository/models/{name}/load": KeyScope.ADMIN,
    "/v2/repository/models/{name}/unload": KeyScope.ADMIN,
}

log = logging.getLogger(__name__)


class Application(FastAPI):
    """FastAPI with our middleware outside its own layers, so that the busiest routes can skip those.

    Args:
        surround: Wraps our middleware around FastAPI.
        complete: Adds to the OpenAPI document what FastAPI can't derive.
        options: FastAPI's.
    """

    def __init__(
        self, surround: Callable[[ASGIApp], ASGIApp], complete: Callable[[dict[str, Any]], None], **options: Any
    ) -> None:
        super().__init__(**options)
        self._complete = complete
        self.outermost = surround(super().__call__)
        # Our middleware answers errors, so FastAPI must send nothing for them.
        self.add_exception_handler(Exception, _raise)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or run the lifespan."""
        await self.outermost(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, built once."""
        is_new = self.openapi_schema is None
        document = super().openapi()
        if is_new:
            self._complete(document)
        return document


def work_routes(settings: Settings) -> dict[str, int]:
    """The routes that need the engine, each with its largest body in bytes."""
    return {
        "/sample": settings.max_body_bytes,
        "/interpolate": 0,
        "/discriminate": settings.max_body_bytes,
        "/v2/models/{name}/infer": settings.max_body_bytes,
        "/v2/models/{name}/versions/{version}/infer": settings.max_body_bytes,
        "/verify": settings.max_body_bytes,
        "/v1/images/generations": min(MAX_JSON_BYTES, settings.max_body_bytes),
        "/encode": settings.max_body_bytes,
    }


def _raise(_: Request, error: Exception) -> NoReturn:
    raise error


def create_app(settings: Settings, keys: Keys | None = None, worker_group: WorkerGroup | None = None) -> FastAPI:
    """Build the application. Its lifespan loads the bundles, while probes are already answered.

    `app.state.manager` is the model manager, `app.state.keys` the keys that are in force, `app.state.traces` the traces
    or None. `app.state.starting`, once the lifespan has begun, is the task that loads the bundles. If it raises
    BundleError, the service stays not ready.

    Args:
        settings: All settings.
        keys: By default read from the settings.
        worker_group: The other workers, if there are any.

    Raises:
        ValueError: The settings name a device that does not exist, unusable keys, or traces that can't be made.
    """
    keys = keys or read_keys(settings)
    traces = _traces(settings)
    context = _parts(settings, keys, worker_group, traces)
    routers = _routers(context)
    app = Application(
        partial(_surround, context, keys, _routes(routers), traces),
        partial(complete, scopes=SCOPES, are_keys_needed=keys.are_needed, max_count=settings.max_count),
        title="gan-service",
        summary="Images of generative adversarial nets: reproducible, batched, observable.",
        version=__version__,
        servers=[{"url": settings.root_path}] if settings.root_path else None,
        lifespan=partial(_lifespan, context=context, traces=traces),
        generate_unique_id_function=operation_id,
        redirect_slashes=False,
        # FastAPI's own pages load scripts from the internet; ours are in http/operations/pages.py.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # FastAPI's own telemetry, which newer versions have, would show the paths and queries of requests.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    for router in routers:
        app.include_router(router)
    app.state.manager, app.state.keys, app.state.traces = context.manager, keys, traces
    return app


def _traces(settings: Settings) -> "Traces | None":
    if settings.traces == "off":
        return None
    from service.http.layers.traces import Traces  # noqa: PLC0415 - what it imports need not be installed

    return Traces()


def _parts(settings: Settings, keys: Keys, worker_group: WorkerGroup | None, traces: "Traces | None") -> RouteContext:
    """Create the parts that routes work with. Threads and processes start when they are first needed."""
    metrics = Metrics(CollectorRegistry())
    metrics.build_info.labels(__version__, torch.__version__).set(1)
    processors = max(1, min(cpu_limit(), settings.processors or cpu_limit()) // settings.worker_count)
    return RouteContext(
        settings=settings,
        manager=ModelManager(
            settings,
            metrics,
            worker_group=worker_group,
            trace_batch=traces.begin_batch if traces else None,
            has_several_keys=lambda: keys.have_several_names,
        ),
        metrics=metrics,
        encoders=ThreadPoolExecutor(processors, thread_name_prefix="encoder"),
        decoders=Decoders(
            max(2, processors),
            seconds=settings.decode_timeout_s,
            max_pixels=settings.max_image_pixels,
            max_bytes=settings.max_body_bytes,
        ),
        time_slices=TimeSlices(),
        is_private=keys.are_needed,
    )


def _routers(context: RouteContext) -> list[APIRouter]:
    manager = context.manager
    return [
        sample_routes(context),
        interpolate_routes(context),
        discriminate_routes(context),
        verify_routes(context),
        encode_routes(context),
        bundle_routes(manager.bundles),
        repository_routes(manager),
        v2_routes(context),
        v1_routes(context),
        probe_routes(manager),
        metrics_routes(context.metrics, manager.worker_group, context.time_slices),
        page_routes(),
    ]


def _routes(routers: list[APIRouter]) -> list[Route]:
    return [route for router in routers for route in router.routes if isinstance(route, Route)]


def _surround(context: RouteContext, keys: Keys, routes: list[Route], traces: "Traces | None", app: ASGIApp) -> ASGIApp:
    """Wrap FastAPI in our middleware, from the inside out."""
    settings, manager = context.settings, context.manager
    work = work_routes(settings)
    busiest = [route for route in routes if route.path in work]
    endpoints = {(route.path, method): route.endpoint for route in busiest for method in route.methods or ()}
    app = Shortcut(app, endpoints)
    app = Admission(
        app,
        work,
        manager.admit,
        max_body_bytes=settings.max_body_bytes,
        all_reply_bytes=all_reply_bytes(settings),
        key_limits=manager.key_limits,
        check_key=manager.check_key,
    )
    app = Authentication(app, keys, SCOPES)
    if settings.cors_origins:
        app = Preflights(app)
    app = Problems(app, context.metrics, lambda: manager.is_draining)
    if settings.cors_origins:
        app = CrossOrigin(app, settings.cors_origins.split(","))
    table, proxies = RouteTable(routes, settings.root_path), TrustedProxies(networks(settings.trusted_proxies))
    return Observe(app, context.metrics, table, lambda: manager.is_draining, proxies, traces)


def all_reply_bytes(settings: Settings) -> int:
    """Memory for all replies together: for several streams, or for one of the largest that are made whole."""
    several = BUDGET_FACTOR * max(settings.max_output_pixels, PIECE_BYTES)
    return max(several, most_encoding_bytes(settings.max_output_pixels) + LATENTS_BYTES)


@asynccontextmanager
async def _lifespan(app: FastAPI, context: RouteContext, traces: "Traces | None") -> AsyncIterator[None]:
    """Load the bundles in the background; at the end, stop everything."""
    starting = app.state.starting = asyncio.create_task(context.manager.start(), name="start")
    starting.add_done_callback(partial(_report_start, context.manager.worker_group))
    try:
        yield
    finally:
        starting.cancel()
        if not context.manager.is_draining:  # the server may have drained it already
            await context.manager.stop()
        context.encoders.shutdown(wait=False, cancel_futures=True)
        context.decoders.close()
        if traces is not None:
            await traces.close()


def _report_start(worker_group: WorkerGroup, starting: "asyncio.Task[None]") -> None:
    """Log why start-up failed; in one line if the operator can fix it."""
    if starting.cancelled():
        return
    error = starting.exception()
    if isinstance(error, BundleError):
        if error.__cause__ is not None or not worker_group.cannot_start(str(error)):  # unexpected errors have a cause
            log.error("cannot start: %s", error, exc_info=error.__cause__)
    elif error is not None:
        log.error("cannot start", exc_info=error)
