"""POST /discriminate: images of a client's own, and what the discriminator says of each."""

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.noise import Float32
from models.spec import Calibration
from service.codecs.decode import UPLOAD_TYPES, Limits, Upload, decode_base64, decode_upload
from service.codecs.time_slices import Steps
from service.engine.model_manager import Timing
from service.errors import UnsupportedMediaType
from service.http.json_limits import json_limits
from service.http.openapi import DISCRIMINATE
from service.http.problems import problem
from service.http.request_context import RequestContext, context_of
from service.http.responses import JSON, BytesResponse
from service.http.route_context import Deadline, RouteContext, read_body
from service.http.schemas import (
    DiscriminateQuery,
    DiscriminateRequest,
    Judged,
    Labels,
    Schema,
    discriminate_reply,
    parse_body,
    parse_query,
    resolve_labels,
)

# Where a reply's time went, in milliseconds, in the header that browsers draw.
TIMING = b"decode;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f"


def discriminate_routes(context: RouteContext) -> APIRouter:
    """POST /discriminate."""
    router = APIRouter()

    @router.post("/discriminate", **DISCRIMINATE)
    async def discriminate(request: Request) -> Response:
        """Ask the discriminator how real images look to it, in the order they were sent."""
        return await _discriminate(context, context_of(request))

    return router


async def _discriminate(context: RouteContext, request: RequestContext) -> Response:
    """Read, decode, judge, and say how long that took."""
    deadline = Deadline(request, context.settings)
    bundle, labels, steps = await _read_upload(context, request, deadline)
    upload, decode_s = await context.decode(steps, deadline)
    context.metrics.decode.observe(decode_s)
    request.bundle, request.count = bundle.name, len(upload)
    if len(upload) == len(upload.errors) == 1:
        try:
            raise upload.errors[0]
        finally:  # its traceback keeps this frame, which must not keep it: the body is in that circle
            del upload
    classes = resolve_labels(labels, bundle.manifest.labels, len(upload))
    judged, timing = await _judge(context, bundle, upload, classes, deadline)
    deadline.left_s()  # an answer that comes too late is none
    took = TIMING % (1e3 * decode_s, 1e3 * timing.queue_s, 1e3 * timing.compute_s)
    problems = {place: problem(error, request.id) for place, error in upload.errors.items()}
    verdicts = discriminate_reply(bundle.name, bundle.version, judged, problems)
    return BytesResponse(verdicts, {b"server-timing": took}, JSON)


async def _read_upload(
    context: RouteContext, request: RequestContext, deadline: Deadline
) -> tuple[Bundle, Labels, Steps[Upload]]:
    """The bundle and the labels that a request names, and what will decode its images."""
    query, kind = request.scope["query_string"], request.media_type()
    if kind == JSON:
        parse_query(Schema, query)
        body = await read_body(request, deadline)
        limits = json_limits(context.settings.max_count)
        asked, _ = await context.decode(parse_body(DiscriminateRequest, body, limits), deadline)
        bundle = context.manager.find(asked.bundle)
        return bundle, asked.labels, decode_base64(asked.images, _upload_limits(context, bundle, deadline))
    content_type = request.header(b"content-type") or ""
    if kind not in UPLOAD_TYPES:
        raise UnsupportedMediaType(content_type, [*UPLOAD_TYPES, JSON])
    options = parse_query(DiscriminateQuery, query)
    bundle = context.manager.find(options.bundle)
    body = await read_body(request, deadline)
    return bundle, options.labels, decode_upload(body, content_type, _upload_limits(context, bundle, deadline))


def _upload_limits(context: RouteContext, bundle: Bundle, deadline: Deadline) -> Limits:
    return Limits(
        bundle.manifest.image,
        context.settings.max_image_pixels,
        context.settings.max_count,
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
    logits, judged_as, timing = await context.manager.discriminate(
        bundle, upload.pixels, labels=classes, deadline_s=deadline.left_s()
    )
    named = None
    if names and judged_as and classes is None:
        named = [names[label] for label in judged_as]
    probabilities = _probabilities(logits, calibration).tolist()
    context.metrics.discriminator_probability.labels(bundle.name, "uploaded").observe(*probabilities)
    judged = Judged(probabilities, logits.tolist(), named, bool(calibration), upload.converted)
    return judged, timing


def _probabilities(logits: Float32, calibration: Calibration | None) -> NDArray[np.float64]:
    """D's answers as probabilities: σ of the logit, calibrated where the bundle has a calibration."""
    scale, offset = (calibration.scale, calibration.offset) if calibration else (1.0, 0.0)
    probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0, -(scale * logits.astype(np.float64) + offset)))
    return probabilities
