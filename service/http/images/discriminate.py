"""POST /discriminate: decodes a client's images and returns the discriminator's output for each."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.images.preparation import UNDECLARED
from models.inference.noise import Float32
from models.inference.pixels import UInt8
from service.codecs.decode import UPLOAD_TYPES, Limits, Upload, decode_base64, decode_upload
from service.codecs.time_slices import Steps
from service.engine.bundles.index import Version
from service.engine.hints import Hints
from service.engine.model_manager import Timing
from service.engine.scoring import probabilities_real
from service.errors import NoDiscriminator, UnsupportedMediaType
from service.http.images.resolving import resolve_labels
from service.http.images.verdicts import DiscriminatorOutput, discriminate_reply
from service.http.openapi.routes import DISCRIMINATE
from service.http.problems import problem
from service.http.requests.json_limits import json_limits
from service.http.requests.parsing import parse_body, parse_query
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import JSON, BytesResponse
from service.http.requests.route_context import Deadline, RouteContext, read_body
from service.http.schemas import DiscriminateQuery, DiscriminateRequest, Labels, Schema

_HINT_BYTES = 2**20  # of pixels, looked at in one step


class Verdicts(NamedTuple):
    """The discriminator's output for each image, and the classes that they were judged as, if there are any."""

    probabilities_real: NDArray[np.float64]
    logits: Float32
    predicted: list[int] | None


def discriminate_routes(context: RouteContext) -> APIRouter:
    """POST /discriminate."""
    router = APIRouter()

    @router.post("/discriminate", **DISCRIMINATE)
    async def discriminate(request: Request) -> Response:
        """Score how real each image looks to the discriminator, in the order they were sent."""
        return await _discriminate(context, context_of(request))

    return router


async def _discriminate(context: RouteContext, request: RequestContext) -> Response:
    """Read the body, decode its images, run the discriminator, and build the reply."""
    deadline = Deadline(request, context.settings)
    bundle, labels, steps = await read_upload(context, request, deadline, _check_discriminator)
    (upload, hints), decode_s = await context.decode(_find_hints(steps, context.manager.hints(bundle)), deadline)
    context.metrics.decode.observe(decode_s)
    request.works_on(bundle, len(upload))
    if len(upload) == len(upload.errors) == 1:
        try:
            raise upload.errors[0]
        finally:  # the traceback refers to this frame: without this, a reference cycle would keep the body
            del upload
    classes = resolve_labels(labels, bundle.manifest.labels, len(upload))
    output, timing = await _discriminate_images(context, bundle, upload, classes, deadline)
    output = output._replace(hints=hints)
    deadline.left_s()  # raises if the deadline has passed
    took = request.took(decode=decode_s, queue=timing.queue_s, compute=timing.compute_s)
    problems = {index: problem(error, request.id) for index, error in upload.errors.items()}
    body = discriminate_reply(bundle.name, bundle.version, output, problems)
    return BytesResponse(body, took, JSON)


async def read_upload(
    context: RouteContext,
    request: RequestContext,
    deadline: Deadline,
    check: Callable[[Bundle | Version], object],
) -> tuple[Bundle, Labels, Steps[Upload]]:
    """The bundle and labels that a request names, and the steps that will decode its images.

    `check` may refuse the bundle, if possible before the images are read.
    """
    query, kind = request.scope["query_string"], request.media_type()
    if kind == JSON:
        parse_query(Schema, query, body=DiscriminateRequest)
        body = await read_body(request, deadline)
        limits = json_limits(context.settings.max_count)
        asked, _ = await context.decode(parse_body(DiscriminateRequest, body, limits), deadline)
        bundle = await context.find(asked.bundle, deadline)
        check(bundle)
        return bundle, asked.labels, decode_base64(asked.images, _upload_limits(context, bundle, deadline))
    content_type = request.header(b"content-type") or ""
    if kind not in UPLOAD_TYPES:
        raise UnsupportedMediaType(content_type, [*UPLOAD_TYPES, JSON])
    options = parse_query(DiscriminateQuery, query)
    check(context.manager.bundles.look_up(options.bundle))  # before the body
    body = await read_body(request, deadline)
    bundle = await context.find(options.bundle, deadline)
    return bundle, options.labels, decode_upload(body, content_type, _upload_limits(context, bundle, deadline))


def _check_discriminator(bundle: Bundle | Version) -> None:
    """Refuse a bundle as soon as it is known.

    Raises:
        NoDiscriminator: It has none.
    """
    if not bundle.manifest.has_discriminator:
        raise NoDiscriminator(bundle.name)


def _upload_limits(context: RouteContext, bundle: Bundle, deadline: Deadline) -> Limits:
    return Limits(
        bundle.manifest.image,
        context.settings.max_image_pixels,
        context.settings.max_count,
        check_deadline=deadline.left_s,
        decode=context.decoders.decode,
        preparation=bundle.manifest.preparation or UNDECLARED,
    )


def _find_hints(steps: Steps[Upload], hints: Hints) -> Steps[tuple[Upload, dict[int, str]]]:
    """Decode, and find the hints for images that can't be what was meant, by their place among the decoded ones."""
    upload = yield from steps
    found: dict[int, str] = {}
    rows = _HINT_BYTES // math.prod(upload.pixels.shape[1:]) + 1
    for start in range(0, len(upload.pixels), rows):
        some = hints.find(upload.pixels[start : start + rows])
        found |= {start + place: hint for place, hint in some.items()}
        yield None
    return upload, found


async def _discriminate_images(
    context: RouteContext, bundle: Bundle, upload: Upload, classes: list[int] | None, deadline: Deadline
) -> tuple[DiscriminatorOutput, Timing]:
    """Run the discriminator on the images that could be decoded."""
    calibration, names = bundle.manifest.calibration, bundle.manifest.labels
    if not len(upload.pixels):
        return DiscriminatorOutput([], [], None, bool(calibration), []), Timing(0.0, 0.0)
    if classes is not None:
        classes = [label for index, label in enumerate(classes) if index not in upload.errors]
    verdicts, timing = await judge(context, bundle, upload.pixels, classes, deadline)
    named = None
    if names and verdicts.predicted and classes is None:
        named = [names[label] for label in verdicts.predicted]
    probabilities, logits = verdicts.probabilities_real.tolist(), verdicts.logits.tolist()
    return DiscriminatorOutput(probabilities, logits, named, bool(calibration), upload.converted), timing


async def judge(
    context: RouteContext, bundle: Bundle, images: UInt8, classes: list[int] | None, deadline: Deadline
) -> tuple[Verdicts, Timing]:
    """Run the discriminator on images of the bundle's shape, with a class for each or None."""
    judged = context.manager.discriminate(bundle, images, labels=classes, deadline_s=deadline.left_s())
    logits, predicted, timing = await deadline.wait_for(judged)
    probabilities = probabilities_real(logits, bundle.manifest.calibration)
    series = context.metrics.discriminator_probability.labels(bundle.name, bundle.version, "uploaded")
    series.observe(*probabilities.tolist())
    return Verdicts(probabilities, logits, predicted), timing
