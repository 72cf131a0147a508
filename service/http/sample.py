"""GET and POST /sample: what is asked, what a client has of it already, and the images."""

import time
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.pixels import UInt8
from service.codecs.encode import MEDIA_TYPES, RenderOptions, SampleMetadata, encode
from service.codecs.time_slices import timed
from service.errors import UnsupportedMediaType
from service.http.caching import Caching, caching, client_has_it
from service.http.json_limits import json_limits
from service.http.openapi import SAMPLE_BY_BODY, SAMPLE_BY_QUERY
from service.http.request_context import RequestContext, context_of
from service.http.responses import JSON, BytesResponse
from service.http.route_context import Deadline, RouteContext, read_body
from service.http.schemas import SamplePlan, SampleRequest, Schema, parse_body, parse_query, resolve_sample

# What costs less than a hand-over between threads does on a busy machine is done where it stands: this much as an
# array, as a grey PNG (0.4 ms at most), and as what Pillow makes.
SMALL_ARRAY, SMALL_GREY, SMALL_PICTURE = 2**20, 2**16, 2**12
# Where a reply's time went, in milliseconds, in the header that browsers draw.
TIMING = b"queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f"


def sample_routes(context: RouteContext) -> APIRouter:
    """GET and POST /sample."""
    router = APIRouter()

    @router.get("/sample", **SAMPLE_BY_QUERY)
    async def sample_by_query(request: Request) -> Response:
        """Draw images from the generator: everything in the query, cacheable where there is a seed."""
        asked = parse_query(SampleRequest, request.scope["query_string"])
        return await _get(context, context_of(request), asked)

    @router.post("/sample", **SAMPLE_BY_BODY)
    async def sample_by_body(request: Request) -> Response:
        """Draw images from the generator: everything in a JSON body; an empty one asks for one image."""
        if request.scope["query_string"]:
            parse_query(Schema, request.scope["query_string"])  # a field in the wrong place is refused, not ignored
        return await _post(context, context_of(request))

    return router


async def _get(context: RouteContext, request: RequestContext, asked: SampleRequest) -> Response:
    """Images, unless the client has them already."""
    deadline = Deadline(request, context.settings)
    bundle = context.manager.find(asked.bundle)
    plan = _plan(context, request, asked, bundle)
    tags = request.all_of_header(b"if-none-match")
    if not tags:
        context.manager.batcher.admit(plan.count)  # what will be refused is refused before it costs more
    kept = _caching(context, asked, plan, bundle)
    if client_has_it(tags, kept.etag):
        return BytesResponse(b"", _names(bundle, plan) | kept.headers, "", 304)
    return await _draw(context, request, bundle, plan, deadline, kept.headers)


async def _post(context: RouteContext, request: RequestContext) -> Response:
    """Images, once the body has come and is understood."""
    deadline = Deadline(request, context.settings)
    asked = await _read(context, request, deadline)
    bundle = context.manager.find(asked.bundle)
    plan = _plan(context, request, asked, bundle)
    context.manager.batcher.admit(plan.count)
    return await _draw(context, request, bundle, plan, deadline, {})


async def _read(context: RouteContext, request: RequestContext, deadline: Deadline) -> SampleRequest:
    content_type = request.header(b"content-type") or ""
    if request.media_type() not in {JSON, ""}:
        raise UnsupportedMediaType(content_type, [JSON])
    body = await read_body(request, deadline)
    if body and not content_type:
        raise UnsupportedMediaType(content_type, [JSON])
    asked, _ = await context.decode(parse_body(SampleRequest, body, json_limits(context.settings.max_count)), deadline)
    return asked


def _plan(context: RouteContext, request: RequestContext, asked: SampleRequest, bundle: Bundle) -> SamplePlan:
    """All that was left open is settled."""
    manifest = bundle.manifest
    plan = resolve_sample(asked, manifest.image, manifest.labels, request.accept(), context.settings)
    request.bundle, request.count = bundle.name, plan.count
    return plan


def _names(bundle: Bundle, plan: SamplePlan) -> dict[bytes, bytes]:
    """The headers by which a client can ask for the same images again."""
    return {
        b"x-seed": b"%d" % plan.seed,
        b"x-first-index": b"%d" % plan.first_index,
        b"x-bundle": f"{bundle.name}@{bundle.version}".encode(),
    }


def _caching(context: RouteContext, asked: SampleRequest, plan: SamplePlan, bundle: Bundle) -> Caching:
    kind = context.manager.fingerprint(bundle)
    return caching(asked, plan, bundle, kind, exact=context.settings.exact, is_private=context.is_private)


async def _draw(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    plan: SamplePlan,
    deadline: Deadline,
    headers: dict[bytes, bytes],
) -> Response:
    """Have the images computed, encode them, and say how long that took."""
    request.reserve_reply(plan.count * bundle.manifest.image.size * plan.render.scale**2)
    images, labels, timing = await context.manager.sample(
        bundle,
        seed=plan.seed,
        first_index=plan.first_index,
        labels=plan.labels,
        count=plan.count,
        truncation=plan.truncation,
        deadline_s=deadline.left_s(),
    )
    metadata = SampleMetadata(bundle.name, bundle.version, plan.seed, plan.first_index, labels)
    content, encode_s = await _encode(context, images, plan.render, metadata, deadline)
    deadline.left_s()  # an answer that comes too late is none
    took = TIMING % (1e3 * timing.queue_s, 1e3 * timing.compute_s, 1e3 * encode_s)
    headers = _names(bundle, plan) | headers | {b"server-timing": took}
    return BytesResponse(content, headers, MEDIA_TYPES[plan.render.format])


async def _encode(
    context: RouteContext, images: UInt8, render: RenderOptions, metadata: SampleMetadata, deadline: Deadline
) -> tuple[bytes, float]:
    """The images as the client wants them, and the seconds that encoding took: here, or apart where it takes long."""
    work = partial(encode, images, render, metadata)
    if _is_small(images, render):
        began = time.perf_counter()
        content = work()
        seconds = time.perf_counter() - began
    else:
        content, seconds = await context.run_in_time(context.encoders, timed(work), deadline)
    context.metrics.encode.labels(render.format).observe(seconds)
    return content, seconds


def _is_small(images: UInt8, render: RenderOptions) -> bool:
    small = SMALL_PICTURE
    if render.format == "npy":
        small = SMALL_ARRAY
    elif render.format == "png" and images.shape[3] == 1:
        small = SMALL_GREY
    return images.size * render.scale**2 <= small
