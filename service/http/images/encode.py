"""POST /encode: where in the generator's latent space images lie. No bundle has an encoder yet, so each is refused."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from service.engine.bundles.index import Version
from service.errors import NoEncoder
from service.http.images.discriminate import read_upload
from service.http.openapi.routes import ENCODE
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.route_context import Deadline, RouteContext


def encode_routes(context: RouteContext) -> APIRouter:
    """POST /encode."""
    router = APIRouter()

    @router.post("/encode", **ENCODE)
    async def encode(request: Request) -> Response:
        """Find the latent of each image, in the order they were sent, by the bundle's encoder."""
        return await _encode(context, context_of(request))

    return router


async def _encode(context: RouteContext, request: RequestContext) -> Response:
    bundle, _, _ = await read_upload(context, request, Deadline(request, context.settings), _check_encoder)
    raise NoEncoder(bundle.name)


def _check_encoder(bundle: Bundle | Version) -> None:
    """Refuse a bundle as soon as it is known, before its images are read.

    Raises:
        NoEncoder: It has none.
    """
    raise NoEncoder(bundle.name)
