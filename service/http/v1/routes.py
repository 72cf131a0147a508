"""OpenAI's image API: POST /v1/images/generations and GET /v1/models, for clients that speak it already.

A request becomes one of /sample: the bundle is the model, the class is the first that the prompt names, and n, the seed
and the format are what they are there. Each image then lies, enlarged, in the middle of a picture of the size that is
asked for. Fields and queries that mean nothing here are ignored, as are those of other versions of that API. Errors
have its shape (problems.py).
"""

import base64
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from fastapi import APIRouter
from PIL import ImageColor
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.images.preparation import UNDECLARED
from models.inference.pixels import UInt8
from models.spec import ImageSpec
from service.codecs.encode import (
    MAX_SIDE,
    MAX_WEBP_PIXELS,
    Check,
    RenderOptions,
    SampleMetadata,
    encode,
    encoding_bytes,
)
from service.codecs.time_slices import Steps
from service.engine.bundles.index import Version
from service.engine.model_manager import ModelManager
from service.errors import Invalid, UnsupportedMediaType
from service.http.images.drawing import draw
from service.http.images.resolving import SamplePlan, resolve_sample
from service.http.openapi.routes import OPENAI_IMAGES, OPENAI_MODEL, OPENAI_MODELS
from service.http.requests.json_limits import JsonLimits
from service.http.requests.parsing import parse_body
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import JSON, BytesResponse
from service.http.requests.route_context import Deadline, RouteContext, read_body
from service.http.schemas import SampleRequest
from service.http.v1.messages import AUTO, MAX_PROMPT, ImageFile, ImagesReply, ImagesRequest, ModelEntry, ModelList
from service.settings import Settings

# A character of the prompt is up to 12 bytes of JSON: two escapes.
LIMITS = JsonLimits(values=256, text_bytes=12 * MAX_PROMPT)
_WORD = re.compile(r"[^\W_]+|[^\w\s]")  # a run of letters and digits, or one other character
_WORDS_IN_A_STEP = 256


class Canvas(NamedTuple):
    """A picture's width and height in pixels, and the factor by which the image in its middle is enlarged."""

    width: int
    height: int
    scale: int


def v1_routes(context: RouteContext) -> APIRouter:
    """POST /v1/images/generations, GET /v1/models and /v1/models/{name}."""
    router = APIRouter()

    @router.post("/v1/images/generations", **OPENAI_IMAGES)
    async def images(request: Request) -> Response:
        """Draw images for a client of OpenAI's image API: `model` is a bundle, and `prompt` may name a class."""
        return await _images(context, context_of(request))

    @router.get("/v1/models", **OPENAI_MODELS)
    async def models(_: Request) -> Response:
        """The bundles, as that API lists models."""
        return _json(ModelList(data=_models(context.manager)))

    @router.get("/v1/models/{name}", **OPENAI_MODEL)
    async def model(request: Request) -> Response:
        """One bundle, by name or name@version."""
        name = request.path_params["name"]
        return _json(_model(name, context.manager.bundles.look_up(name)))

    return router


def _json(reply: ModelEntry | ModelList) -> Response:
    return Response(reply.model_dump_json(), 200, media_type=JSON)


def _models(manager: ModelManager) -> list[ModelEntry]:
    manager.bundles.look_up(None)  # raises while they are being loaded
    return [_model(version.name, version) for version in manager.bundles.names()]


def _model(name: str, bundle: Version) -> ModelEntry:
    return ModelEntry(id=name, created=int(bundle.manifest.created.timestamp()))


async def _images(context: RouteContext, request: RequestContext) -> Response:
    """Read the body, draw the images, and put each on its canvas."""
    deadline = Deadline(request, context.settings)
    asked = await _read(context, request, deadline)
    bundle = await context.find(asked.model, deadline)
    image, names = bundle.manifest.image, bundle.manifest.labels
    canvas = choose_canvas(asked, image, context.settings)
    label, _ = await context.decode(find_label(asked.prompt, names or ()), deadline)
    # As JSON, because each image becomes a file of its own.
    wanted = SampleRequest(count=asked.n, seed=asked.seed, labels=label, format="json")
    plan = resolve_sample(wanted, image, names, None, context.settings)
    request.works_on(bundle, plan.count)
    context.manager.batcher.admit(plan.count)
    return await _draw(context, request, bundle, plan, (asked, canvas), deadline)


async def _read(context: RouteContext, request: RequestContext, deadline: Deadline) -> ImagesRequest:
    if request.media_type() != JSON:
        raise UnsupportedMediaType(request.header(b"content-type") or "", [JSON])
    asked, _ = await context.decode(parse_body(ImagesRequest, await read_body(request, deadline), LIMITS), deadline)
    return asked


def choose_canvas(asked: ImagesRequest, image: ImageSpec, settings: Settings) -> Canvas:
    """The picture that each image will lie on.

    Raises:
        Invalid: It is smaller than the image or too large for its format, or all together have too many pixels.
    """
    if asked.n > settings.max_count:
        raise Invalid(f"n: {asked.n} images; one request may ask for 1 to {settings.max_count}.", "n")
    if asked.size == AUTO:
        canvas = Canvas(image.width, image.height, 1)
    else:
        width, height = map(int, asked.size.split("x"))
        canvas = Canvas(width, height, min(width // image.width, height // image.height))
    if not canvas.scale:
        raise Invalid(f"size: the images of this bundle are {image.width}x{image.height}, and none is shrunk.", "size")
    side, most = MAX_SIDE[asked.output_format], settings.max_output_pixels
    if max(canvas.width, canvas.height) > side:
        raise Invalid(f"size: {asked.output_format} holds up to {side} pixels a side.", "size")
    if asked.output_format == "webp" and canvas.width * canvas.height > MAX_WEBP_PIXELS:
        raise Invalid(f"size: a webp has up to {MAX_WEBP_PIXELS} pixels here.", "size")
    pixels = asked.n * canvas.width * canvas.height
    if pixels > most:
        raise Invalid(f"n, size: the reply would have {pixels} pixels; the most is {most}.", "size")
    return canvas


def find_label(prompt: str, names: Sequence[str]) -> Steps[int | None]:
    """The index of the first class that a prompt names; of names that begin at the same word the longest.

    A name is found as whole words, in any case. `_`, which folders have in place of a space, counts as one.
    """
    classes, lengths = _phrases(tuple(names))
    words = _WORD.findall(prompt.casefold())
    for start in range(len(words)):
        for length in lengths:
            found = classes.get(tuple(words[start : start + length]))
            if found is not None:
                return found
        if start % _WORDS_IN_A_STEP == 0:
            yield None
    return None


@lru_cache(maxsize=64)
def _phrases(names: tuple[str, ...]) -> tuple[Mapping[tuple[str, ...], int], Sequence[int]]:
    """The class of each name, by the name's words, and the numbers of words that names have, the largest first."""
    classes: dict[tuple[str, ...], int] = {}
    for index, name in enumerate(names):  # names of folders may be decomposed; what people type is not
        classes.setdefault(tuple(_WORD.findall(unicodedata.normalize("NFC", name).casefold())), index)
    classes.pop((), None)
    return classes, sorted({len(words) for words in classes}, reverse=True)


async def _draw(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    plan: SamplePlan,
    pictures: tuple[ImagesRequest, Canvas],
    deadline: Deadline,
) -> Response:
    """Compute the images and build the reply."""
    asked, canvas = pictures
    pixels = canvas.width * canvas.height
    size = plan.count * pixels * bundle.manifest.image.channels
    request.reserve_reply(encoding_bytes(asked.output_format, size, pixels))
    images, _, timing = await deadline.wait_for(draw(context.manager, bundle, plan, deadline.left_s()))
    background = (bundle.manifest.preparation or UNDECLARED).background
    work = partial(_reply, images, canvas, background, asked, deadline.left_s, is_marked=plan.is_marked)
    content, encode_s = await context.encode(work, asked.output_format, deadline, is_small=False)
    headers = {
        b"x-seed": b"%d" % plan.seed,
        b"x-bundle": f"{bundle.name}@{bundle.version}".encode(),
    }
    headers |= request.took(queue=timing.queue_s, compute=timing.compute_s, encode=encode_s)
    return BytesResponse(content, headers, JSON)


def _reply(
    images: UInt8, canvas: Canvas, background: str, asked: ImagesRequest, check: Check, *, is_marked: bool
) -> bytes:
    render = RenderOptions(asked.output_format, columns=1, scale=1)
    # On its canvas an image is no picture that a recipe gives.
    metadata = SampleMetadata("", "", None, None, None, is_marked=is_marked)
    files = [encode(_placed(image, canvas, background)[None], render, metadata, check) for image in images]
    return (
        ImagesReply(
            created=int(time.time()),
            data=[ImageFile(b64_json=base64.b64encode(file).decode()) for file in files],
            output_format=asked.output_format,
            size=f"{canvas.width}x{canvas.height}",
        )
        .model_dump_json()
        .encode()
    )


def _placed(image: UInt8, canvas: Canvas, background: str) -> UInt8:
    """An image (h, w, c), enlarged in the middle of the background."""
    large = image.repeat(canvas.scale, axis=0).repeat(canvas.scale, axis=1)
    height, width, channels = large.shape
    picture = np.empty((canvas.height, canvas.width, channels), np.uint8)
    picture[:] = ImageColor.getcolor(background, {1: "L", 3: "RGB", 4: "RGBA"}[channels])
    top, left = (canvas.height - height) // 2, (canvas.width - width) // 2
    picture[top : top + height, left : left + width] = large
    return picture
