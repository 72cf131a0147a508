"""GET /bundles and /bundles/{name}: what requests can ask for, and the metadata of the manifests."""

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.images.preparation import UNDECLARED
from service.engine.bundles.bundles import Bundles
from service.engine.bundles.index import Version
from service.http.openapi.routes import BUNDLE, BUNDLES
from service.http.requests.parsing import parse_query
from service.http.requests.responses import JSON
from service.http.schemas import BundleList, BundleMetadata, BundleVersion, Reply, Schema


def bundle_routes(bundles: Bundles) -> APIRouter:
    """GET /bundles and /bundles/{name}."""
    router = APIRouter()

    @router.get("/bundles", **BUNDLES)
    async def bundle_list(request: Request) -> Response:
        """Every bundle, and the default one."""
        parse_query(Schema, request.scope["query_string"])
        bundles.look_up(None)  # raises while they are being loaded
        listed = [_metadata(bundles, version) for version in bundles.names()]
        return _json(BundleList(default=bundles.default, bundles=listed, aliases=bundles.aliases()))

    @router.get("/bundles/{name}", **BUNDLE)
    async def bundle_by_name(request: Request) -> Response:
        """One bundle, by name, alias or name@version."""
        parse_query(Schema, request.scope["query_string"])
        return _json(_metadata(bundles, bundles.look_up(request.path_params["name"])))

    return router


def _json(reply: Reply) -> Response:
    return Response(reply.model_dump_json(), 200, media_type=JSON)


def _metadata(bundles: Bundles, version: Version) -> BundleMetadata:
    manifest = version.manifest
    return BundleMetadata(
        name=version.name,
        version=version.version,
        versions=[
            BundleVersion(version=one.version, created=one.manifest.created) for one in bundles.versions(version.name)
        ],
        created=manifest.created,
        image=manifest.image,
        latent=manifest.latent,
        labels=manifest.labels,
        calibration=manifest.calibration,
        preparation=manifest.preparation or UNDECLARED,
        training=manifest.training,
        evaluation=manifest.evaluation,
        networks=[Path(name).stem for name in manifest.files if name.endswith(".safetensors")],
    )
