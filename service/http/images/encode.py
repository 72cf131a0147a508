"""POST /encode: where in the generator's latent space images lie, and what the generator makes there."""

import base64
import json
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from fastapi import APIRouter
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.inference.pixels import UInt8
from service.codecs.encode import Check, encode_picture, rows_as_json
from service.codecs.time_slices import timed_call
from service.engine.bundles.index import Version
from service.engine.payloads import Encodings
from service.errors import NoEncoder
from service.http.images.discriminate import read_upload
from service.http.images.resolving import resolve_labels
from service.http.openapi.routes import ENCODE
from service.http.problems import Problem, problem
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import JSON, BytesResponse
from service.http.requests.route_context import Deadline, RouteContext

_NUMBER_BYTES = 64  # of a latent's number as text, and on its way there


def encode_routes(context: RouteContext) -> APIRouter:
    """POST /encode."""
    router = APIRouter()

    @router.post("/encode", **ENCODE)
    async def encode(request: Request) -> Response:
        """Find the latent of each image, in the order they were sent, by the bundle's encoder."""
        return await _encode(context, context_of(request))

    return router


async def _encode(context: RouteContext, request: RequestContext) -> Response:
    """Read the body, decode its images, find their latents, draw what lies there, and build the reply."""
    deadline = Deadline(request, context.settings)
    bundle, labels, steps = await read_upload(context, request, deadline, _check_encoder)
    upload, decode_s = await context.decode(steps, deadline)
    context.metrics.decode.observe(decode_s)
    request.works_on(bundle, len(upload))
    if len(upload) == len(upload.errors) == 1:
        try:
            raise upload.errors[0]
        finally:  # as in /discriminate: without this, a reference cycle would keep the body
            del upload
    manifest = bundle.manifest
    classes = resolve_labels(labels, manifest.labels, len(upload))
    problems = {index: problem(error, request.id) for index, error in upload.errors.items()}
    head = {"bundle": bundle.name, "version": bundle.version}
    if not len(upload.pixels):
        body = _reply(head, [], problems)
        return BytesResponse(body, request.took(decode=decode_s, queue=0.0, compute=0.0, encode=0.0), JSON)
    request.reserve_reply(len(upload.pixels) * (4 * manifest.image.size + _NUMBER_BYTES * manifest.latent.dim))
    if classes is not None:
        classes = [label for index, label in enumerate(classes) if index not in upload.errors]
    finding = context.manager.encode(bundle, upload.pixels, labels=classes, deadline_s=deadline.left_s())
    found, timing = await deadline.wait_for(finding)
    names = manifest.labels if classes is None else None
    work = partial(timed_call, partial(_results, upload.pixels, found, names, deadline.left_s))
    results, encode_s = await context.run_in_time(context.encoders, work, deadline)
    context.metrics.encode.labels("json").observe(encode_s)
    body = _reply(head, results, problems)
    deadline.left_s()  # raises if the deadline has passed
    took = request.took(decode=decode_s, queue=timing.queue_s, compute=timing.compute_s, encode=encode_s)
    return BytesResponse(body, took, JSON)


def _check_encoder(bundle: Bundle | Version) -> None:
    """Refuse a bundle as soon as it is known, before its images are read.

    Raises:
        NoEncoder: It has none.
    """
    if not bundle.manifest.has_encoder:
        raise NoEncoder(bundle.name)


def _results(images: UInt8, found: Encodings, names: Sequence[str] | None, check: Check) -> list[bytes]:
    """An `EncodeResult` as JSON for each image; `names` are the classes', where E named them."""
    results = []
    for image, made, latent, label in zip(
        images, found.images, rows_as_json(found.latents), found.labels.tolist(), strict=True
    ):
        check()
        error = float(np.square((image.astype(np.float64) - made) / 255).mean())
        named = "" if names is None else f', "label": {json.dumps(names[label])}'
        shown = f'{{"latent": {latent}, "error": {error!r}{named}, "image": "'.encode()
        results.append(b'%b%b"}' % (shown, base64.b64encode(encode_picture(made, "png", check))))
    return results


def _reply(head: Mapping[str, str], results: Sequence[bytes], problems: Mapping[int, Problem]) -> bytes:
    """An `EncodeReply` as JSON; the problems of images that could not be decoded stand in their places."""
    shown = list(results)
    for index in sorted(problems):  # in ascending order, so that each insertion ends up at its final index
        shown.insert(index, b'{"error":%b}' % to_json(problems[index]))
    return b'%b,"results":[%b]}' % (to_json(head)[:-1], b",".join(shown))
