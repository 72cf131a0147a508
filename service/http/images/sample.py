"""GET and POST /sample: parses the request, compares cached copies, draws the images and encodes them."""

import math
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.noise import Float32, draw_latents
from models.inference.pixels import UInt8
from models.spec import LatentSpec
from service.codecs.encode import MEDIA_TYPES, RenderOptions, SampleMetadata, encode, encoding_bytes, picture_size
from service.codecs.npy import NPY
from service.engine.bundles.index import Version
from service.errors import UnsupportedMediaType
from service.http.images.caching import Caching, caching, has_current_copy
from service.http.images.drawing import draw, metadata_of
from service.http.images.given_latents import (
    check_latents,
    check_shown,
    latents_of_json,
    latents_of_npy,
    rows_of,
    sample_limits,
)
from service.http.images.resolving import SamplePlan, fingerprint, resolve_sample
from service.http.images.selecting import check_selectable, select, selecting_bytes
from service.http.images.streaming import contents, held_bytes, is_streamed, stream_bytes, stream_pieces
from service.http.openapi.routes import SAMPLE_BY_BODY, SAMPLE_BY_QUERY
from service.http.requests.parsing import parse_body, parse_query
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import JSON, BytesResponse, StreamedResponse
from service.http.requests.route_context import Deadline, RouteContext, read_body
from service.http.schemas import SampleBody, SampleRequest, Schema

# Replies of up to this many values (pixels times channels) are encoded on the event loop: arrays, grey PNGs (0.4 ms at
# most), and what Pillow encodes. On a busy machine that takes less time than handing them to a thread.
SMALL_ARRAY, SMALL_GREY, SMALL_PICTURE = 2**20, 2**16, 2**12
MAX_JSON_BYTES = 4 * 2**20  # of a body
DOWNLOADS = frozenset({"npy", "zip"})


def sample_routes(context: RouteContext) -> APIRouter:
    """GET and POST /sample."""
    router = APIRouter()

    @router.get("/sample", **SAMPLE_BY_QUERY)
    async def sample_by_query(request: Request) -> Response:
        """Draw images from the generator. All options are in the query; with a seed the reply can be cached."""
        asked = parse_query(SampleRequest, request.scope["query_string"])
        return await _get(context, context_of(request), asked)

    @router.post("/sample", **SAMPLE_BY_BODY)
    async def sample_by_body(request: Request) -> Response:
        """Draw images from the generator. All options are in a JSON body; an empty body asks for one image.

        Or the body is an array of latents, and the options are in the query.
        """
        return await _post(context, context_of(request))

    return router


async def _get(context: RouteContext, request: RequestContext, asked: SampleRequest) -> Response:
    """Draw images, or answer 304 if the client has a current copy."""
    deadline = Deadline(request, context.settings)
    tags = request.all_of_header(b"if-none-match")
    if tags and (cold := context.manager.bundles.cold(asked.bundle)) is not None:  # it need not be loaded to compare
        version, kind = cold
        plan = _plan(context, request, asked, version)
        kept = _caching(context, asked, plan, version, kind)
        if has_current_copy(tags, kept.etag):
            return BytesResponse(b"", _names(version, plan) | kept.headers, "", 304)
    bundle = await context.find(asked.bundle, deadline)
    plan = _plan(context, request, asked, bundle)
    if not tags:
        context.manager.batcher.admit(plan.rows)  # refuse early, before computing the entity tag
    kept = _caching(context, asked, plan, bundle, context.manager.fingerprint(bundle))
    if has_current_copy(tags, kept.etag):
        return BytesResponse(b"", _names(bundle, plan) | kept.headers, "", 304)
    return await _draw(context, request, bundle, plan, deadline, kept.headers)


async def _post(context: RouteContext, request: RequestContext) -> Response:
    """Read the body, then draw images."""
    deadline = Deadline(request, context.settings)
    asked, latents = await _read(context, request, deadline)
    bundle = await context.find(asked.bundle, deadline)
    if latents is not None:
        check_latents(asked, latents, bundle.manifest.latent, context.settings.max_count)
    plan = _plan(context, request, asked, bundle, latents)
    context.manager.batcher.admit(plan.rows)
    return await _draw(context, request, bundle, plan, deadline, {})


async def _read(
    context: RouteContext, request: RequestContext, deadline: Deadline
) -> tuple[SampleRequest, Float32 | None]:
    """The request, and the latents that it brings: in a JSON body, or beside a query as an array."""
    content_type, kind = request.header(b"content-type") or "", request.media_type()
    query = request.scope["query_string"]
    if kind == NPY:
        asked = parse_query(SampleRequest, query)
        latents, _ = await context.decode(latents_of_npy(await read_body(request, deadline)), deadline)
        return asked, latents
    if query:  # its fields would be ignored
        parse_query(Schema, query, body=SampleBody)
    if kind not in {JSON, ""}:
        raise UnsupportedMediaType(content_type, [JSON, NPY])
    request.limit_body(MAX_JSON_BYTES)
    body = await read_body(request, deadline)
    if body and not content_type:
        raise UnsupportedMediaType(content_type, [JSON, NPY])
    steps = parse_body(SampleBody, body, sample_limits(context.settings.max_count))
    parsed, _ = await context.decode(steps, deadline)
    rows = rows_of(parsed)
    return parsed, None if rows is None else latents_of_json(rows)


def _plan(
    context: RouteContext,
    request: RequestContext,
    asked: SampleRequest,
    bundle: Bundle | Version,
    latents: Float32 | None = None,
) -> SamplePlan:
    """Resolve the request for this bundle, and note bundle and count for the log line."""
    manifest = bundle.manifest
    plan = resolve_sample(asked, manifest.image, manifest.labels, request.accept(), context.settings, latents)
    request.works_on(bundle, plan.count)
    if plan.is_selected:
        check_selectable(bundle)
    if plan.shows_latents:
        check_shown(plan.count * manifest.latent.dim)
    return plan


def _names(bundle: Bundle | Version, plan: SamplePlan) -> dict[bytes, bytes]:
    """The headers with which a client can request the same images again; latents it has itself."""
    made_by = {b"x-bundle": f"{bundle.name}@{bundle.version}".encode()}
    if plan.latents is not None:
        return made_by
    return {b"x-seed": b"%d" % plan.seed, b"x-first-index": b"%d" % plan.first_index} | made_by


def _file_name(bundle: Bundle, plan: SamplePlan) -> dict[bytes, bytes]:
    """The name under which browsers keep formats that they can't show. All its characters are safe in any folder."""
    if plan.render.format not in DOWNLOADS:
        return {}
    source = "latents" if plan.latents is not None else f"seed-{plan.seed}"
    images = f"{plan.first_index}-{plan.first_index + plan.count - 1}"
    name = f"{bundle.name}-{source}-images-{images}.{plan.render.format}"
    return {b"content-disposition": f'attachment; filename="{name}"'.encode()}


def _caching(
    context: RouteContext, asked: SampleRequest, plan: SamplePlan, bundle: Bundle | Version, kind: str
) -> Caching:
    made_of = None if asked.seed is None else fingerprint(plan)
    return caching(asked.bundle, made_of, bundle, kind, exact=context.settings.exact, is_private=context.is_private)


async def _draw(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    plan: SamplePlan,
    deadline: Deadline,
    headers: dict[bytes, bytes],
) -> Response:
    """Compute the images, encode them and build the reply."""
    if is_streamed(bundle, plan):
        return await _stream(context, request, bundle, plan, deadline, headers)
    image = bundle.manifest.image
    pixels = math.prod(picture_size(plan.render, plan.count, image.height, image.width))
    size = plan.count * image.size * plan.render.scale**2
    beside = selecting_bytes(bundle, plan) if plan.is_selected else 0
    request.reserve_reply(encoding_bytes(plan.render.format, size, pixels) + beside)
    latents = plan.latents
    if plan.is_selected:
        chosen = await deadline.wait_for(select(context.manager, bundle, plan, deadline.left_s()))
        images, labels, latents, timing = chosen.images, chosen.labels, chosen.latents, chosen.timing
        headers = headers | chosen.header()
    else:
        images, labels, timing = await deadline.wait_for(draw(context.manager, bundle, plan, deadline.left_s()))
    metadata = metadata_of(bundle, plan, labels)._replace(latents=latents)
    content, encode_s = await _encode(context, images, plan, metadata, bundle.manifest.latent, deadline)
    deadline.left_s()  # raises if the deadline has passed
    took = request.took(queue=timing.queue_s, compute=timing.compute_s, encode=encode_s)
    headers = _names(bundle, plan) | _file_name(bundle, plan) | headers | took
    return BytesResponse(content, headers, MEDIA_TYPES[plan.render.format])


async def _stream(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    plan: SamplePlan,
    deadline: Deadline,
    headers: dict[bytes, bytes],
) -> Response:
    """Compute the first of the images, and build a reply that computes the others while it is sent."""
    request.reserve_reply(held_bytes(bundle, plan))
    headers = _names(bundle, plan) | _file_name(bundle, plan) | headers
    if (size := stream_bytes(bundle, plan)) is not None:
        headers[b"content-length"] = b"%d" % size
    media_type = MEDIA_TYPES[plan.render.format]
    if request.is_head:  # of which nothing has to be computed
        return BytesResponse(b"", headers | {b"content-type": media_type.encode()}, "")
    pieces = stream_pieces(context, request, bundle, plan, deadline)
    first = await anext(pieces)
    return StreamedResponse(contents(first, pieces), headers | first.took, media_type, deadline.left_s)


async def _encode(
    context: RouteContext,
    images: UInt8,
    plan: SamplePlan,
    metadata: SampleMetadata,
    latent: LatentSpec,
    deadline: Deadline,
) -> tuple[bytes, float]:
    """Encode images; returns the bytes and the seconds that it took."""
    if not plan.shows_latents:
        work = partial(encode, images, plan.render, metadata._replace(latents=None), deadline.left_s)
        return await context.encode(work, plan.render.format, deadline, is_small=_is_small(images, plan.render))

    def with_latents() -> bytes:
        shown = metadata.latents
        if shown is None:
            shown = draw_latents(latent, plan.seed, plan.first_index, plan.count)
        return encode(images, plan.render, metadata._replace(latents=shown), deadline.left_s)

    return await context.encode(with_latents, plan.render.format, deadline, is_small=False)


def _is_small(images: UInt8, render: RenderOptions) -> bool:
    small = SMALL_PICTURE
    if render.format == "npy":
        small = SMALL_ARRAY
    elif render.format == "png" and images.shape[3] == 1:
        small = SMALL_GREY
    return images.size * render.scale**2 <= small
