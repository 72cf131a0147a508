"""Probes and metrics. They are answered from known state and never wait for the engine."""

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import APIRouter
from prometheus_client import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from service.codecs.time_slices import OffLoopWork, Steps, TimeSlices
from service.engine.model_manager import ModelManager
from service.errors import Draining, NotReady
from service.http.openapi.routes import METRICS, PROBE
from service.http.operations.merged_metrics import MergedCollector, Series, read_series
from service.http.requests.request_context import context_of
from service.machine.worker_group import WorkerGroup
from service.metrics import Metrics

METRICS_S = 5.0  # within which all workers must answer; Prometheus itself waits 10 s
STEP_SAMPLES = 64  # encoded at a time
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


class _Some(Collector):
    """Metrics that were collected already."""

    def __init__(self, *metrics: Metric) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Called by the encoder."""
        yield from self._metrics


def encode_page(encoder: Callable[[Collector], bytes], collector: Collector) -> Steps[bytes]:
    """The page that the encoder makes of all metrics, in small steps: that of many bundles takes long."""
    end = encoder(_Some())
    pieces = []
    for metric in collector.collect():
        some = Metric(metric.name, metric.documentation, metric.type)
        head = encoder(_Some(some)).removesuffix(end)
        pieces.append(head)
        for start in range(0, len(metric.samples), STEP_SAMPLES):
            some.samples = metric.samples[start : start + STEP_SAMPLES]
            pieces.append(encoder(_Some(some)).removesuffix(end).removeprefix(head))
            yield None
    return b"".join([*pieces, end])


async def _off_loop(_: OffLoopWork) -> tuple[Any, float]:
    raise AssertionError("no step of a page asks for this")


def metrics_routes(metrics: Metrics, worker_group: WorkerGroup, time_slices: TimeSlices) -> APIRouter:
    """GET /metrics. Pages are made in time slices: no probe waits for one."""
    router = APIRouter()

    async def own_series() -> Series:
        series, _ = await time_slices.run(read_series(metrics.registry), _off_loop)
        return series

    worker_group.answer({"metrics": own_series})

    @router.get("/metrics", **METRICS)
    async def metrics_page(request: Request) -> Response:
        """All metrics of this service, for Prometheus."""
        encoder, content_type = choose_encoder(context_of(request).accept())
        # All workers or none: without one worker's share, Prometheus would see counters that restarted.
        others = await worker_group.ask("metrics", within_s=METRICS_S)
        collector = MergedCollector([await own_series(), *others]) if others else metrics.registry
        page, _ = await time_slices.run(encode_page(encoder, collector), _off_loop)
        return Response(page, headers={"Content-Type": content_type})

    return router
