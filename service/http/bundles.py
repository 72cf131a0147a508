"""GET /bundles and /bundles/{name}: the loaded bundles and the metadata of their manifests."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.images.preparation import UNDECLARED
from service.engine.model_manager import ModelManager
from service.http.openapi import BUNDLE, BUNDLES
from service.http.parsing import parse_query
from service.http.responses import JSON
from service.http.schemas import BundleList, BundleMetadata, Reply, Schema


def bundle_routes(manager: ModelManager) -> APIRouter:
    """GET /bundles and /bundles/{name}."""
    router = APIRouter()

    @router.get("/bundles", **BUNDLES)
    async def bundles(request: Request) -> Response:
        """Every loaded bundle, and the default one."""
        parse_query(Schema, request.scope["query_string"])
        default = manager.look_up(None).name
        return _json(BundleList(default=default, bundles=[_metadata(bundle) for bundle in manager.loaded()]))

    @router.get("/bundles/{name}", **BUNDLE)
    async def bundle_by_name(request: Request) -> Response:
        """One loaded bundle, by name or name@version."""
        parse_query(Schema, request.scope["query_string"])
        return _json(_metadata(manager.look_up(request.path_params["name"])))

    return router


def _json(reply: Reply) -> Response:
    return Response(reply.model_dump_json(), 200, media_type=JSON)


def _metadata(bundle: Bundle) -> BundleMetadata:
    manifest = bundle.manifest
    return BundleMetadata(
        name=bundle.name,
        version=bundle.version,
        created=manifest.created,
        image=manifest.image,
        latent=manifest.latent,
        labels=manifest.labels,
        calibration=manifest.calibration,
        preparation=manifest.preparation or UNDECLARED,
        training=manifest.training,
        evaluation=manifest.evaluation,
    )
