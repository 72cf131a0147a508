"""The protocol's routes: the service, its models, and running them."""

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from service import __version__
from service.engine.model_manager import ModelManager
from service.errors import Draining, NotReady
from service.http.openapi.routes import (
    V2_ALL_STATISTICS,
    V2_CONFIG,
    V2_HEALTH,
    V2_INFER,
    V2_METADATA,
    V2_READY,
    V2_SERVER,
    V2_STATISTICS,
    of_version,
)
from service.http.requests.request_context import context_of
from service.http.requests.responses import JSON
from service.http.requests.route_context import RouteContext
from service.http.v2.catalogue import Model, config, metadata, model_of, models_of, split_name
from service.http.v2.infer import infer
from service.http.v2.messages import ModelReady, ServerHealth, ServerMetadata
from service.http.v2.statistics import model_statistics

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics"]
_MODEL, _VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"


def v2_routes(context: RouteContext) -> APIRouter:
    """GET /v2, /v2/health/…, /v2/models/…, and POST …/infer."""
    router = APIRouter()
    _server_routes(router, context)
    _model_routes(router, context)
    return router


def _server_routes(router: APIRouter, context: RouteContext) -> None:
    manager = context.manager

    @router.get("/v2", **V2_SERVER)
    async def server_metadata(_: Request) -> Response:
        """Name, version, and the extensions of the protocol that the service has."""
        return _json(ServerMetadata(name="gan-service", version=__version__, extensions=EXTENSIONS))

    @router.get("/v2/health/live", **V2_HEALTH)
    async def server_live(_: Request) -> Response:
        """Whether this process works: as `/livez`."""
        return _health(manager, manager.health.live())

    @router.get("/v2/health/ready", **V2_HEALTH)
    async def server_ready(_: Request) -> Response:
        """Whether requests should be sent here now: as `/readyz`."""
        return _health(manager, manager.health.ready())

    @router.get("/v2/models/stats", **V2_ALL_STATISTICS)
    async def statistics_of_all(_: Request) -> Response:
        """What each model has done since the start."""
        manager.bundles.look_up(None)  # raises while they are being loaded
        return await _statistics(context, [model for bundle in manager.bundles.names() for model in models_of(bundle)])


def _model_routes(router: APIRouter, context: RouteContext) -> None:
    manager = context.manager

    @router.get(_VERSION, **of_version(V2_METADATA))
    @router.get(_MODEL, **V2_METADATA)
    async def model_metadata(request: Request) -> Response:
        """A model's versions, inputs and outputs."""
        model = _model(manager, request)
        versions = [one.version for one in manager.bundles.versions(model.bundle.name)]
        return _json(metadata(model, versions))

    @router.get(f"{_VERSION}/ready", **of_version(V2_READY))
    @router.get(f"{_MODEL}/ready", **V2_READY)
    async def model_ready(request: Request) -> Response:
        """Whether a model can be asked now."""
        model = _model(manager, request)
        _check(manager, manager.health.ready())
        return _json(ModelReady(name=model.name, ready=True))

    @router.get(f"{_VERSION}/config", **of_version(V2_CONFIG))
    @router.get(f"{_MODEL}/config", **V2_CONFIG)
    async def model_config(request: Request) -> Response:
        """A model's inputs and outputs in the form of Triton's model configuration."""
        return Response(to_json(config(_model(manager, request))), media_type=JSON)

    @router.get(f"{_VERSION}/stats", **of_version(V2_STATISTICS))
    @router.get(f"{_MODEL}/stats", **V2_STATISTICS)
    async def model_stats(request: Request) -> Response:
        """What a model has done since the start."""
        return await _statistics(context, [_model(manager, request)])

    @router.post(f"{_VERSION}/infer", **of_version(V2_INFER))
    @router.post(f"{_MODEL}/infer", **V2_INFER)
    async def model_infer(request: Request) -> Response:
        """Draw images from a generator, or judge images by a discriminator."""
        return await infer(context, context_of(request), request.path_params["name"], _version(request))


def _version(request: Request) -> str | None:
    return request.path_params.get("version")


def _model(manager: ModelManager, request: Request) -> Model:
    """The model that a path names."""
    bundle, is_discriminator = split_name(request.path_params["name"], _version(request))
    return model_of(manager.bundles.look_up(bundle), is_discriminator=is_discriminator)


def _health(manager: ModelManager, reason: str | None) -> Response:
    _check(manager, reason)
    return _json(ServerHealth(live=True, ready=True))


def _check(manager: ModelManager, reason: str | None) -> None:
    """Raise what a probe says no with."""
    if reason is not None:
        raise Draining if manager.is_draining else NotReady(reason)


async def _statistics(context: RouteContext, models: list[Model]) -> Response:
    found = await model_statistics(context.metrics, context.manager.worker_group, models)
    return Response(to_json(found), media_type=JSON)


def _json(reply: BaseModel) -> Response:
    return Response(reply.model_dump_json(), media_type=JSON)
