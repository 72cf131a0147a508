"""Health and metrics for machines: answered from what is known already, never behind work."""

from fastapi import APIRouter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from service.errors import Draining, NotReady
from service.metrics import Metrics
from service.openapi import METRICS, PROBE
from service.serving import Serving

_YES = b'{"status":"ok"}'


def probe_routes(serving: Serving) -> APIRouter:
    """GET /livez, /readyz and /startupz: 200, or 503 with the reason."""
    router = APIRouter()

    @router.get("/livez", **PROBE)
    async def livez(_: Request) -> Response:
        """Whether this process is worth keeping; if not, replace it."""
        return _answer(serving, serving.health.live())

    @router.get("/readyz", **PROBE)
    async def readyz(_: Request) -> Response:
        """Whether requests should be sent here now."""
        return _answer(serving, serving.health.ready())

    @router.get("/startupz", **PROBE)
    async def startupz(_: Request) -> Response:
        """Whether start-up is over: every bundle loaded and warm."""
        return _answer(serving, serving.health.started())

    return router


def _answer(serving: Serving, reason: str | None) -> Response:
    if reason is None:
        return Response(_YES, media_type="application/json")
    raise Draining if serving.is_draining else NotReady(reason)


def metrics_routes(metrics: Metrics) -> APIRouter:
    """GET /metrics."""
    router = APIRouter()

    @router.get("/metrics", **METRICS)
    async def metrics_page(request: Request) -> Response:
        """Every series of this service, for Prometheus."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(metrics.registry), headers={"Content-Type": content_type})

    return router
