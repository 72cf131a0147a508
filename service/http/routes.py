"""The routes that do the service's work: sample, discriminate, and which bundles there are."""

import time
from functools import partial

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.noise import Float32
from models.inference.pixels import UInt8
from models.spec import Calibration
from service.codecs.decode import UPLOAD_TYPES, Limits, Upload, decode_base64, decode_upload
from service.codecs.encode import MEDIA_TYPES, RenderOptions, SampleMetadata, encode
from service.codecs.time_slices import Steps, timed
from service.engine.model_manager import Timing
from service.errors import UnsupportedMediaType
from service.http.caching import caching, client_has_it
from service.http.client import reserve_reply
from service.http.exchange import BytesResponse
from service.http.headers import accept, all_of_header, header
from service.http.json_limits import JsonLimits
from service.http.openapi import BUNDLE, BUNDLES, DISCRIMINATE, SAMPLE_BY_BODY, SAMPLE_BY_QUERY
from service.http.problems import problem
from service.http.route_context import Deadline, RouteContext, media_type, read_body
from service.http.schemas import (
    BundleFacts,
    BundleList,
    DiscriminateQuery,
    DiscriminateRequest,
    Judged,
    Labels,
    Reply,
    SampleRequest,
    Schema,
    discriminate_reply,
    parse_body,
    parse_query,
    resolve_labels,
    resolve_sample,
)
from service.logs import current_request
from service.settings import Settings

JSON = "application/json"
# What costs less than a hand-over between threads does on a busy machine is done where it stands: this much as an
# array, as a grey PNG (0.4 ms at most), and as what Pillow makes.
SMALL_ARRAY, SMALL_GREY, SMALL_PICTURE = 2**20, 2**16, 2**12
# Where a reply's time went, in milliseconds, in the header that browsers draw.
SAMPLE_TIMING = b"queue;dur=%.3f, compute;dur=%.3f, encode;dur=%.3f"
DISCRIMINATE_TIMING = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f"


def sample_routes(context: RouteContext) -> APIRouter:
    """GET and POST /sample."""
    router = APIRouter()

    @router.get("/sample", **SAMPLE_BY_QUERY)
    async def sample_by_query(request: Request) -> Response:
        """Draw images from the generator: everything in the query, cacheable where there is a seed."""
        asked = parse_query(SampleRequest, request.scope["query_string"])
        return await _sample(context, request, asked, Deadline(request, context.settings))

    @router.post("/sample", **SAMPLE_BY_BODY)
    async def sample_by_body(request: Request) -> Response:
        """Draw images from the generator: everything in a JSON body; an empty one asks for one image."""
        if request.scope["query_string"]:
            parse_query(Schema, request.scope["query_string"])  # a field in the wrong place is refused, not ignored
        deadline = Deadline(request, context.settings)
        content_type = header(request.scope, b"content-type") or ""
        if media_type(request) not in {JSON, ""}:
            raise UnsupportedMediaType(content_type, [JSON])
        body = await read_body(request, deadline)
        if body and not content_type:
            raise UnsupportedMediaType(content_type, [JSON])
        asked, _ = await context.decode(parse_body(SampleRequest, body, _limits(context.settings)), deadline)
        return await _sample(context, request, asked, deadline)

    return router


def _limits(settings: Settings) -> JsonLimits:
    """Room for an image and a label of each that a request may have, and for all fields."""
    return JsonLimits(values=2 * settings.max_count + 64)


async def _sample(context: RouteContext, request: Request, asked: SampleRequest, deadline: Deadline) -> Response:
    """Settle what was left open, see whether the client has the answer already, compute it, encode it."""
    bundle = context.serving.find(asked.bundle)
    manifest = bundle.manifest
    plan = resolve_sample(asked, manifest.image, manifest.labels, accept(request.scope), context.settings)
    _note(bundle, plan.count)
    headers = {
        b"x-seed": b"%d" % plan.seed,
        b"x-first-index": b"%d" % plan.first_index,
        b"x-bundle": f"{bundle.name}@{bundle.version}".encode(),
    }
    tags = all_of_header(request.scope, b"if-none-match")
    etag = None
    if not tags and not context.settings.cache_bytes:
        context.serving.batcher.admit(plan.count)  # what will be refused is refused before it costs more
    if request.method == "GET":
        device_kind = context.serving.fingerprint(bundle)
        kept = caching(asked, plan, bundle, device_kind, exact=context.settings.exact, is_private=context.is_private)
        headers |= kept.headers
        etag = kept.etag
        if client_has_it(tags, etag):
            return BytesResponse(b"", headers, "", 304)
        if (kept_content := context.cache.get(etag)) is not None:
            headers[b"server-timing"] = b"cache"
            return BytesResponse(kept_content, headers, MEDIA_TYPES[plan.render.format])
    reserve_reply(request.scope, plan.count * manifest.image.size * plan.render.scale**2)
    images, labels, timing = await context.serving.sample(
        bundle,
        seed=plan.seed,
        first_index=plan.first_index,
        labels=plan.labels,
        count=plan.count,
        truncation=plan.truncation,
        deadline_s=deadline.left_s(),
    )
    metadata = SampleMetadata(bundle.name, bundle.version, plan.seed, plan.first_index, labels)
    work = partial(encode, images, plan.render, metadata)
    if _is_small(images, plan.render):
        began = time.perf_counter()
        content = work()
        encode_s = time.perf_counter() - began
    else:
        content, encode_s = await context.run_in_time(context.encoders, timed(work), deadline)
    context.metrics.of_format(plan.render.format).observe(encode_s)
    deadline.left_s()  # an answer that comes too late is none
    headers[b"server-timing"] = SAMPLE_TIMING % (1e3 * timing.queue_s, 1e3 * timing.compute_s, 1e3 * encode_s)
    context.cache.put(etag, content)
    return BytesResponse(content, headers, MEDIA_TYPES[plan.render.format])


def _note(bundle: Bundle, count: int) -> None:
    """For the request's line in the log."""
    facts = current_request()
    facts.bundle, facts.count = bundle.name, count


def _is_small(images: UInt8, render: RenderOptions) -> bool:
    small = SMALL_PICTURE
    if render.format == "npy":
        small = SMALL_ARRAY
    elif render.format == "png" and images.shape[3] == 1:
        small = SMALL_GREY
    return images.size * render.scale**2 <= small


def discriminate_routes(context: RouteContext) -> APIRouter:
    """POST /discriminate."""
    router = APIRouter()

    @router.post("/discriminate", **DISCRIMINATE)
    async def discriminate(request: Request) -> Response:
        """Ask the discriminator how real images look to it, in the order they were sent."""
        deadline = Deadline(request, context.settings)
        bundle, labels, steps = await _read_upload(context, request, deadline)
        upload, decode_s = await context.decode(steps, deadline)
        context.metrics.decode.observe(decode_s)
        _note(bundle, len(upload))
        if len(upload) == len(upload.errors) == 1:
            try:
                raise upload.errors[0]
            finally:  # its traceback keeps this frame, which must not keep it: the body is in that circle
                del upload
        classes = resolve_labels(labels, bundle.manifest.labels, len(upload))
        judged, timing = await _judge(context, bundle, upload, classes, deadline)
        deadline.left_s()  # an answer that comes too late is none
        took = DISCRIMINATE_TIMING % (1e3 * decode_s, 1e3 * timing.queue_s, 1e3 * timing.compute_s)
        request_id = current_request().id
        problems = {place: problem(error, request_id) for place, error in upload.errors.items()}
        verdicts = discriminate_reply(bundle.name, bundle.version, judged, problems)
        return BytesResponse(verdicts, {b"server-timing": took}, JSON)

    return router


async def _read_upload(
    context: RouteContext, request: Request, deadline: Deadline
) -> tuple[Bundle, Labels, Steps[Upload]]:
    """The bundle and the labels that a request names, and what will decode its images."""
    settings, query = context.settings, request.scope["query_string"]
    content_type, kind = header(request.scope, b"content-type") or "", media_type(request)
    if kind == JSON:
        parse_query(Schema, query)
        body = await read_body(request, deadline)
        asked, _ = await context.decode(parse_body(DiscriminateRequest, body, _limits(settings)), deadline)
        bundle = context.serving.find(asked.bundle)
        limits = _upload_limits(context, bundle, deadline)
        return bundle, asked.labels, decode_base64(asked.images, limits)
    if kind not in UPLOAD_TYPES:
        raise UnsupportedMediaType(content_type, [*UPLOAD_TYPES, JSON])
    options = parse_query(DiscriminateQuery, query)
    bundle = context.serving.find(options.bundle)
    body = await read_body(request, deadline)
    limits = _upload_limits(context, bundle, deadline)
    return bundle, options.labels, decode_upload(body, content_type, limits)


def _upload_limits(context: RouteContext, bundle: Bundle, deadline: Deadline) -> Limits:
    settings = context.settings
    return Limits(
        bundle.manifest.image,
        settings.max_image_pixels,
        settings.max_count,
        still_wanted=deadline.left_s,
        decode=context.decoders.decode,
    )


async def _judge(
    context: RouteContext, bundle: Bundle, upload: Upload, classes: list[int] | None, deadline: Deadline
) -> tuple[Judged, Timing]:
    """Ask D about the images that could be read."""
    calibration, names = bundle.manifest.calibration, bundle.manifest.labels
    if not len(upload.pixels):
        return Judged([], [], None, bool(calibration), []), Timing(0.0, 0.0)
    if classes is not None:
        classes = [label for place, label in enumerate(classes) if place not in upload.errors]
    logits, judged_as, timing = await context.serving.discriminate(
        bundle, upload.pixels, labels=classes, deadline_s=deadline.left_s()
    )
    named = None
    if names and judged_as and classes is None:
        named = [names[label] for label in judged_as]
    probabilities = _probabilities(logits, calibration).tolist()
    context.metrics.of_probability(bundle.name, "uploaded").observe(*probabilities)
    judged = Judged(probabilities, logits.tolist(), named, bool(calibration), upload.converted)
    return judged, timing


def _probabilities(logits: Float32, calibration: Calibration | None) -> NDArray[np.float64]:
    """D's answers in words that mean something: σ of the logit, calibrated where the bundle has a calibration."""
    scale, offset = (calibration.scale, calibration.offset) if calibration else (1.0, 0.0)
    probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0, -(scale * logits.astype(np.float64) + offset)))
    return probabilities


def bundle_routes(context: RouteContext) -> APIRouter:
    """GET /bundles and /bundles/{name}."""
    router = APIRouter()

    @router.get("/bundles", **BUNDLES)
    async def bundles(request: Request) -> Response:
        """Every loaded bundle, and which one requests get that name none."""
        parse_query(Schema, request.scope["query_string"])
        default = context.serving.find(None).name
        return _json(BundleList(default=default, bundles=[_facts(bundle) for bundle in context.serving.loaded()]))

    @router.get("/bundles/{name}", **BUNDLE)
    async def bundle_by_name(request: Request) -> Response:
        """One loaded bundle, by name or name@version."""
        parse_query(Schema, request.scope["query_string"])
        return _json(_facts(context.serving.find(request.path_params["name"])))

    return router


def _json(reply: Reply) -> Response:
    return Response(reply.model_dump_json(), 200, media_type=JSON)


def _facts(bundle: Bundle) -> BundleFacts:
    manifest = bundle.manifest
    return BundleFacts(
        name=bundle.name,
        version=bundle.version,
        created=manifest.created,
        image=manifest.image,
        latent=manifest.latent,
        labels=manifest.labels,
        calibration=manifest.calibration,
        training=manifest.training,
        evaluation=manifest.evaluation,
    )
