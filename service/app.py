"""Builds the application: makes the parts from the settings and hands them to one another."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from fastapi import APIRouter, FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models.bundle import BundleError
from service import __version__
from service.codecs.decoders import Decoders
from service.codecs.time_slices import TimeSlices
from service.cpu import cpu_limit
from service.engine.model_manager import ModelManager
from service.http.auth import Keys, KeyScope, read_keys
from service.http.bundles import bundle_routes
from service.http.discriminate import discriminate_routes
from service.http.middleware import Admission, Authentication, Observe, Problems, RouteTable, Shortcut
from service.http.openapi import complete
from service.http.pages import page_routes
from service.http.probes import metrics_routes, probe_routes
from service.http.repository import repository_routes
from service.http.route_context import RouteContext
from service.http.sample import sample_routes
from service.metrics import Metrics
from service.settings import Settings
from service.worker_group import WorkerGroup

MAX_JSON_BYTES = 4 * 2**20  # of a body that holds no images
# All others need a client's key, where keys are set. Pages hold nothing that is secret.
SCOPES = {
    **dict.fromkeys(("/livez", "/readyz", "/startupz", "/metrics"), KeyScope.NONE),
    **dict.fromkeys(("/", "/docs", "/openapi.json", "/static/{name}"), KeyScope.NONE),
    "/v2/repository/models/{name}/load": KeyScope.ADMIN,
    "/v2/repository/models/{name}/unload": KeyScope.ADMIN,
}

log = logging.getLogger(__name__)


class Application(FastAPI):
    """FastAPI, with what surrounds requests outermost: its own layers are for the routes that need them.

    Args:
        surround: Puts everything around those layers; what it returns is `outermost`.
        complete: Adds to the OpenAPI document what FastAPI can't see.
        options: FastAPI's.
    """

    def __init__(
        self, surround: Callable[[ASGIApp], ASGIApp], complete: Callable[[dict[str, Any]], None], **options: Any
    ) -> None:
        super().__init__(**options)
        self._complete = complete
        self.outermost = surround(super().__call__)
        # What its routes raise is answered outside: nothing may be sent before.
        self.add_exception_handler(Exception, _raise)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or go through start and end."""
        await self.outermost(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, made once."""
        is_new = self.openapi_schema is None
        document = super().openapi()
        if is_new:
            self._complete(document)
        return document


def work_routes(settings: Settings) -> dict[str, int]:
    """The routes that need the engine, each with the most bytes that its body may have."""
    return {
        "/sample": min(MAX_JSON_BYTES, settings.max_body_bytes),
        "/discriminate": settings.max_body_bytes,
    }


def _raise(_: Request, error: Exception) -> NoReturn:
    raise error


def create_app(settings: Settings, keys: Keys | None = None, worker_group: WorkerGroup | None = None) -> FastAPI:
    """The application, not yet started: its lifespan loads the bundles while probes are answered already.

    `keys` are those of the settings where they are not given; `worker_group` is of the other workers, if there are any.

    `app.state.manager` is the model manager. `app.state.starting`, once the lifespan has begun, is the task that loads:
    it raises BundleError where that fails, and the service then stays not ready.

    Raises:
        ValueError: The settings name a device that is not there, or keys that can't be used.
    """
    keys = keys or read_keys(settings)
    context = _parts(settings, keys, worker_group)
    routers = _routers(context)
    app = Application(
        partial(_surround, context, keys, _routes(routers)),
        partial(complete, scopes=SCOPES, are_keys_needed=keys.are_needed, max_count=settings.max_count),
        title="gan-service",
        summary="Images of generative adversarial nets: reproducible, batched, observable.",
        version=__version__,
        lifespan=partial(_lifespan, context=context),
        redirect_slashes=False,
        # FastAPI's own pages load their scripts from elsewhere; ours are in http/pages.py.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    for router in routers:
        app.include_router(router)
    app.state.manager = context.manager
    return app


def _parts(settings: Settings, keys: Keys, worker_group: WorkerGroup | None) -> RouteContext:
    """What the routes work with; threads and processes are started when they are needed."""
    metrics = Metrics(CollectorRegistry())
    metrics.build_info.labels(__version__, torch.__version__).set(1)
    processors = max(1, cpu_limit() // settings.workers)
    return RouteContext(
        settings=settings,
        manager=ModelManager(settings, metrics, worker_group=worker_group),
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
        discriminate_routes(context),
        bundle_routes(manager),
        repository_routes(manager),
        probe_routes(manager),
        metrics_routes(context.metrics, manager.worker_group),
        page_routes(),
    ]


def _routes(routers: list[APIRouter]) -> list[Route]:
    return [route for router in routers for route in router.routes if isinstance(route, Route)]


def _surround(context: RouteContext, keys: Keys, routes: list[Route], app: ASGIApp) -> ASGIApp:
    """Everything that a request goes through before FastAPI, from the inside out."""
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
        max_reply_bytes=settings.max_output_pixels,
    )
    app = Authentication(app, keys, SCOPES)
    app = Problems(app, context.metrics, lambda: manager.is_draining)
    return Observe(app, context.metrics, RouteTable(routes), lambda: manager.is_draining)


@asynccontextmanager
async def _lifespan(app: FastAPI, context: RouteContext) -> AsyncIterator[None]:
    """Load the bundles beside serving; at the end, stop what was started."""
    starting = app.state.starting = asyncio.create_task(context.manager.start(), name="start")
    starting.add_done_callback(_report_start)
    try:
        yield
    finally:
        starting.cancel()
        if not context.manager.is_draining:  # unless whoever runs the application has drained it already
            await context.manager.stop()
        context.encoders.shutdown(wait=False, cancel_futures=True)
        context.decoders.close()


def _report_start(starting: "asyncio.Task[None]") -> None:
    """Say why start-up failed: in one line where the reason is the operator's to mend."""
    if starting.cancelled():
        return
    error = starting.exception()
    if isinstance(error, BundleError):
        log.error("cannot start: %s", error, exc_info=error.__cause__)  # which only unforeseen errors have
    elif error is not None:
        log.error("cannot start", exc_info=error)
