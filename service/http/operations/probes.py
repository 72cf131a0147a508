"""Probes and metrics. They are answered from known state and never wait for the engine."""

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from service.engine.model_manager import ModelManager
from service.errors import Draining, NotReady
from service.http.openapi.routes import METRICS, PROBE
from service.http.operations.merged_metrics import MergedCollector, Series, series_of
from service.http.requests.request_context import context_of
from service.metrics import Metrics
from service.worker_group import WorkerGroup

METRICS_S = 5.0  # within which all workers must answer; Prometheus itself waits 10 s
_YES = b'{"status":"ok"}'


def probe_routes(manager: ModelManager) -> APIRouter:
    """GET /livez, /readyz (also as /health) and /startupz: 200 for yes, or 503 with the reason."""
    router = APIRouter()

    @router.get("/livez", **PROBE)
    async def livez(_: Request) -> Response:
        """Whether this process works; if not, it has to be replaced."""
        return _reply(manager, manager.health.live())

    @router.get("/health", **PROBE)
    @router.get("/readyz", **PROBE)
    async def readyz(_: Request) -> Response:
        """Whether requests should be sent here now."""
        return _reply(manager, manager.health.ready())

    @router.get("/startupz", **PROBE)
    async def startupz(_: Request) -> Response:
        """Whether start-up is over: every bundle loaded and warm."""
        return _reply(manager, manager.health.started())

    return router


def _reply(manager: ModelManager, reason: str | None) -> Response:
    if reason is None:
        return Response(_YES, media_type="application/json")
    raise Draining if manager.is_draining else NotReady(reason)


def metrics_routes(metrics: Metrics, worker_group: WorkerGroup) -> APIRouter:
    """GET /metrics."""
    router = APIRouter()

    async def own_series() -> Series:
        return series_of(metrics.registry)

    worker_group.answer({"metrics": own_series})

    @router.get("/metrics", **METRICS)
    async def metrics_page(request: Request) -> Response:
        """All metrics of this service, for Prometheus."""
        encoder, content_type = choose_encoder(context_of(request).accept())
        # All workers or none: without one worker's share, Prometheus would see counters that restarted.
        others = await worker_group.ask("metrics", within_s=METRICS_S)
        collector = MergedCollector([series_of(metrics.registry), *others]) if others else metrics.registry
        return Response(encoder(collector), headers={"Content-Type": content_type})

    return router
