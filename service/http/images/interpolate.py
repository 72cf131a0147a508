"""GET /interpolate: the way between two images through latent space, as a strip or an animation.

Nets take labels as whole numbers, so where the label changes it changes at once: each image has the label of the end
that it is nearer to, the middle one that of the second.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.noise import Float32, PathMethod, draw_latents, latent_path, sampled_labels
from models.inference.pixels import UInt8
from service.codecs.animation import (
    MAX_SEQUENCE_SIDE,
    SEQUENCE_TYPES,
    SequenceOptions,
    encode_sequence,
    sequence_size,
)
from service.codecs.encode import encoding_bytes
from service.codecs.recipe import mark
from service.engine.bundles.index import Version
from service.errors import Invalid
from service.http.images.caching import Caching, caching, has_current_copy
from service.http.images.resolving import check_pixels, check_side, negotiate, resolve_label
from service.http.openapi.routes import INTERPOLATE
from service.http.requests.parsing import parse_query
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import BytesResponse
from service.http.requests.route_context import Deadline, RouteContext
from service.http.schemas import InterpolateRequest
from service.settings import Settings

STEP_MS, USUAL_MS = 20, 2000  # of an image at least: browsers slow down what is faster; of an animation, if that fits
LATENTS_BYTES = 4 * 256 * 65536  # of the most steps and the widest latents
SMALL_PATH = 2**16  # numbers of all latents, computed on the event loop in a millisecond


@dataclass(slots=True)
class InterpolationPlan:
    """A resolved request: these fields and the bundle determine every byte of the reply."""

    ends: tuple[tuple[int, int], tuple[int, int]]  # seed and index of both
    steps: int
    method: PathMethod
    labels: list[int] | None
    truncation: float
    options: SequenceOptions


def interpolate_routes(context: RouteContext) -> APIRouter:
    """GET /interpolate."""
    router = APIRouter()

    @router.get("/interpolate", **INTERPOLATE)
    async def interpolate(request: Request) -> Response:
        """Go from one image to another, step by step through the latents between theirs."""
        asked = parse_query(InterpolateRequest, request.scope["query_string"])
        return await _interpolate(context, context_of(request), asked)

    return router


async def _interpolate(context: RouteContext, request: RequestContext, asked: InterpolateRequest) -> Response:
    """Compute the images between, or answer 304 if the client has a current copy."""
    deadline = Deadline(request, context.settings)
    tags = request.all_of_header(b"if-none-match")
    if tags and (cold := context.manager.bundles.cold(asked.bundle)) is not None:  # it need not be loaded to compare
        _, kept, headers = _resolved(context, request, asked, *cold)
        if has_current_copy(tags, kept.etag):
            return BytesResponse(b"", headers, "", 304)
    bundle = await context.find(asked.bundle, deadline)
    plan, kept, headers = _resolved(context, request, asked, bundle, context.manager.fingerprint(bundle))
    if not tags:
        context.manager.batcher.admit(plan.steps)
    if has_current_copy(tags, kept.etag):
        return BytesResponse(b"", headers, "", 304)
    content, took = await _draw(context, request, bundle, plan, deadline)
    headers |= {b"content-disposition": _file_name(bundle, plan)} | took
    return BytesResponse(content, headers, SEQUENCE_TYPES[plan.options.format])


def _resolved(
    context: RouteContext, request: RequestContext, asked: InterpolateRequest, bundle: Bundle | Version, kind: str
) -> tuple[InterpolationPlan, Caching, dict[bytes, bytes]]:
    """The plan, how the reply is cached, and the headers that say so; notes bundle and count for the log line."""
    plan = resolve_interpolation(asked, bundle, request.accept(), context.settings)
    request.works_on(bundle, plan.steps)
    kept = _caching(context, asked, plan, bundle, kind)
    return plan, kept, {b"x-bundle": f"{bundle.name}@{bundle.version}".encode()} | kept.headers


async def _draw(
    context: RouteContext, request: RequestContext, bundle: Bundle, plan: InterpolationPlan, deadline: Deadline
) -> tuple[bytes, dict[bytes, bytes]]:
    """The file, and the Server-Timing header."""
    image, numbers = bundle.manifest.image, plan.steps * bundle.manifest.latent.dim
    pixels = math.prod(sequence_size(plan.options, plan.steps, image.height, image.width))
    size = plan.steps * image.size * plan.options.scale**2
    request.reserve_reply(4 * numbers + encoding_bytes(plan.options.format, size, pixels))
    path = partial(_path, bundle, plan)
    latents = path() if numbers <= SMALL_PATH else await context.run_in_time(context.encoders, path, deadline)
    drawn = context.manager.sample_latents(
        bundle, latents, labels=plan.labels, truncation=plan.truncation, deadline_s=deadline.left_s()
    )
    images, timing = await deadline.wait_for(drawn)
    work = partial(_encode, images, plan.options, deadline, is_marked=context.settings.recipe)
    content, encode_s = await context.encode(work, plan.options.format, deadline, is_small=False)
    deadline.left_s()  # raises if the deadline has passed
    return content, request.took(queue=timing.queue_s, compute=timing.compute_s, encode=encode_s)


def _encode(images: UInt8, options: SequenceOptions, deadline: Deadline, *, is_marked: bool) -> bytes:
    file = encode_sequence(images, options, deadline.left_s)
    return mark(file, options.format, None) if is_marked else file


def _path(bundle: Bundle, plan: InterpolationPlan) -> Float32:
    start, stop = (draw_latents(bundle.manifest.latent, seed, index, 1)[0] for seed, index in plan.ends)
    return latent_path(start, stop, plan.steps, plan.method)


def _file_name(bundle: Bundle, plan: InterpolationPlan) -> bytes:
    """The name under which browsers keep the file; they show it all the same. Its characters are safe in any folder."""
    ends = "-to-".join(f"seed-{seed}-image-{index}" for seed, index in plan.ends)
    return f'inline; filename="{bundle.name}-{ends}.{plan.options.format}"'.encode()


def _caching(
    context: RouteContext, asked: InterpolateRequest, plan: InterpolationPlan, bundle: Bundle | Version, kind: str
) -> Caching:
    drawn = f"interpolate {plan.ends} {plan.steps} {plan.method} {plan.labels} {plan.truncation}"
    made = f"{drawn} {plan.options} {context.settings.recipe}"
    return caching(asked.bundle, made, bundle, kind, exact=context.settings.exact, is_private=context.is_private)


def resolve_interpolation(
    asked: InterpolateRequest, bundle: Bundle | Version, accept: str | None, settings: Settings
) -> InterpolationPlan:
    """Resolve a request for a bundle; fills in the defaults.

    Raises:
        Invalid: Over a limit, or labels that the bundle does not have.
        NotAcceptable: `Accept` allows none of the formats.
    """
    if asked.steps > settings.max_count:
        raise Invalid(f"steps: {asked.steps} images; one request may ask for up to {settings.max_count}.")
    ends = (asked.seed_from, asked.index_from), (asked.seed_to, asked.index_to)
    return InterpolationPlan(
        ends=ends,
        steps=asked.steps,
        method=asked.method,
        labels=_labels(asked, bundle),
        truncation=asked.truncation,
        options=_options(asked, bundle, accept, settings.max_output_pixels),
    )


def _labels(asked: InterpolateRequest, bundle: Bundle | Version) -> list[int] | None:
    """The label of each image; None for a bundle without."""
    names = bundle.manifest.labels
    first = resolve_label(asked.label, names, "label")
    last = resolve_label(asked.label_to, names, "label_to")
    if (
        first is None
        and (drawn := sampled_labels(bundle.manifest.latent, asked.seed_from, asked.index_from, 1)) is not None
    ):
        first = int(drawn[0])
    if first is None:
        return None
    own, steps = [first, first if last is None else last], asked.steps
    nearer = (2 * np.arange(steps) + steps - 1) // (2 * (steps - 1))
    return [own[end] for end in nearer.tolist()]


def _options(
    asked: InterpolateRequest, bundle: Bundle | Version, accept: str | None, max_pixels: int
) -> SequenceOptions:
    """The format, which has to hold the picture, and the time that an animation takes."""
    form = asked.format or negotiate(accept, SEQUENCE_TYPES)
    least_ms = STEP_MS * asked.steps
    duration_ms = max(USUAL_MS, least_ms) if asked.duration_ms is None else asked.duration_ms
    if form == "png":
        duration_ms = 0  # a strip takes no time
    elif duration_ms < least_ms:
        raise Invalid(f"duration_ms: {asked.steps} images take at least {least_ms} ms, {STEP_MS} each.")
    options = SequenceOptions(form, asked.scale, duration_ms)
    image = bundle.manifest.image
    check_side(form, MAX_SEQUENCE_SIDE[form], *sequence_size(options, asked.steps, image.height, image.width))
    check_pixels("steps, scale", asked.steps * image.height * image.width * asked.scale**2, max_pixels)
    return options
