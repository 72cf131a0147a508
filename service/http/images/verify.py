"""POST /verify: computes the recipe within each picture again, and compares what it gives with the picture.

Pictures come from anywhere, and so do their recipes. Of every picture the header and the recipe are read first, and
nothing is computed for one whose recipe does not give exactly its size, or names a bundle that is not in memory. The
others together may ask for as many images and pixels as one request to /sample. A picture is decoded before its recipe
is computed: a few bytes that only claim to be a large picture end there. Then the images take the way that those of
/sample take, and are compared with what the picture shows: on black and on white, if it may be transparent.
"""

import asyncio
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import Bundle
from models.images.image_file import ImageFile
from models.images.preparation import Preparation
from models.inference.pixels import UInt8
from service.codecs.decode import (
    UPLOAD_TYPES,
    check_count,
    decode_image,
    files_of,
    from_base64,
    parse_file,
    read_images,
    without_traceback,
)
from service.codecs.encode import MAX_SIDE, RenderOptions, picture_pixels, picture_size
from service.codecs.npy import NPY
from service.codecs.picture import Shape, check_pixels
from service.codecs.recipe import MAX_RECIPE_IMAGES, Recipe, find_recipe, is_animation
from service.codecs.time_slices import Steps
from service.engine.model_manager import Timing
from service.errors import Invalid, ServiceError, UnsupportedMediaType
from service.http.images.drawing import draw
from service.http.images.resolving import SamplePlan
from service.http.images.selecting import refusal, select
from service.http.openapi.routes import VERIFY
from service.http.problems import problem
from service.http.requests.json_limits import JsonLimits, check_json, json_limits
from service.http.requests.parsing import parse_body, parse_query
from service.http.requests.request_context import RequestContext, context_of
from service.http.requests.responses import JSON, BytesResponse
from service.http.requests.route_context import Deadline, RouteContext, read_body
from service.http.schemas import Schema, Verdict, VerifyRequest

TOGETHER = 64  # pictures that are computed at a time, so that their images share batches
TOGETHER_PIXELS = 2**24  # of all of these, unless one alone has more
PIXEL_BYTES = 8  # that a pixel takes until it is compared: in colour, on two grounds, beside what was computed
SMALL_PICTURE = 2**14  # numbers that are encoded and compared on the event loop, in a fraction of a millisecond
_BLACK, _WHITE = (Preparation("squeeze", background, "lanczos") for background in ("#000000", "#ffffff"))
_RECIPE_LIMITS = JsonLimits(values=MAX_RECIPE_IMAGES + 64, keys=16, containers=2, depth=2)

# What is said of a picture: its verdict and recipe as JSON, or why it can't be decoded.
Result = bytes | ServiceError
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Order:
    """A picture whose recipe is to be computed, by a bundle that is in memory."""

    file: ImageFile
    recipe: Recipe
    bundle: Bundle

    @property
    def render(self) -> RenderOptions:
        """How the recipe's images make the picture."""
        return RenderOptions(self.recipe.format, self.recipe.columns, self.recipe.scale)

    @property
    def plan(self) -> SamplePlan:
        """What a request with these fields comes to."""
        recipe, labels = self.recipe, self.recipe.labels
        return SamplePlan(
            count=recipe.count,
            seed=recipe.seed,
            first_index=recipe.first_index,
            labels=labels * recipe.count if labels and len(labels) == 1 else labels,
            truncation=recipe.truncation,
            render=self.render,
            is_selected=recipe.select == "discriminator",
        )

    @property
    def pixels(self) -> int:
        """Of the picture."""
        return self.file.width * self.file.height

    @property
    def size(self) -> int:
        """Numbers in the picture."""
        return self.pixels * self.bundle.manifest.image.channels


class Done(NamedTuple):
    """The result of an order, and the seconds that it took."""

    result: Result
    decode_s: float = 0.0
    timing: Timing = Timing(0.0, 0.0)


def verify_routes(context: RouteContext) -> APIRouter:
    """POST /verify."""
    router = APIRouter()

    @router.post("/verify", **VERIFY)
    async def verify(request: Request) -> Response:
        """Compute the recipe that each picture carries again, and say whether it gives the picture."""
        return await _verify(context, context_of(request))

    return router


async def _verify(context: RouteContext, request: RequestContext) -> Response:
    """Read the pictures, compute their recipes, and build the reply."""
    deadline = Deadline(request, context.settings)
    found, decode_s = await context.decode(await _read(context, request, deadline), deadline)
    request.count = len(found)
    orders = {place: one for place, one in enumerate(found) if isinstance(one, Order)}
    results = {place: one for place, one in enumerate(found) if not isinstance(one, Order)}
    queue_s = compute_s = 0.0
    rows = sum(order.plan.rows for order in orders.values())
    with _accept(context, request, orders.values()), context.manager.reserve(rows):
        for places in _some(orders):
            all_done = await _all_of([_settle(context, orders[place], deadline) for place in places])
            results |= zip(places, [done.result for done in all_done], strict=True)
            decode_s += max(done.decode_s for done in all_done)
            queue_s += max(done.timing.queue_s for done in all_done)
            compute_s += max(done.timing.compute_s for done in all_done)
    context.metrics.decode.observe(decode_s)
    if len(found) == 1 and isinstance(only := results[0], ServiceError):
        try:
            raise only
        finally:  # the traceback refers to this frame: without this, a reference cycle would keep the body
            del only, results
    deadline.left_s()  # raises if the deadline has passed
    shown = [_shown(results[place], request.id) for place in range(len(found))]
    took = request.took(decode=decode_s, queue=queue_s, compute=compute_s)
    return BytesResponse(b'{"results":[%b]}' % b",".join(shown), took, JSON)


def _shown(result: Result, request_id: str) -> bytes:
    return b'{"error":%b}' % to_json(problem(result, request_id)) if isinstance(result, ServiceError) else result


async def _read(context: RouteContext, request: RequestContext, deadline: Deadline) -> Steps[list[Result | Order]]:
    """Read the body; returns the steps that will look at its pictures."""
    settings, kind = context.settings, request.media_type()
    parse_query(Schema, request.scope["query_string"], body=VerifyRequest)
    if kind == JSON:
        body = await read_body(request, deadline)
        limits = json_limits(settings.max_count)
        asked, _ = await context.decode(parse_body(VerifyRequest, body, limits), deadline)
        check_count(len(asked.images), settings.max_count)
        return _look_at_all(context, asked.images, deadline)
    content_type = request.header(b"content-type") or ""
    if kind not in UPLOAD_TYPES:
        raise UnsupportedMediaType(content_type, [*UPLOAD_TYPES, JSON])
    body = await read_body(request, deadline)
    if kind == NPY:
        return _without_recipes(body, settings.max_count)
    return _look_at_files(context, body, content_type, deadline)


def _look_at_files(
    context: RouteContext, body: bytes, content_type: str, deadline: Deadline
) -> Steps[list[Result | Order]]:
    files = yield from files_of(body, content_type, context.settings.max_count, deadline.left_s)
    return (yield from _look_at_all(context, files, deadline))


def _without_recipes(body: bytes, max_count: int) -> Steps[list[Result | Order]]:
    """Of an array, which holds pixels alone."""
    count = len(read_images(body))
    check_count(count, max_count)
    yield None
    return [_result("no_recipe")] * count


def _look_at_all(
    context: RouteContext, sources: Sequence[bytes | bytearray | str], deadline: Deadline
) -> Steps[list[Result | Order]]:
    """Of each picture, a file or one in base64, what can be said without decoding it, or the order to compute it."""
    bundles = {f"{one.name}@{one.version}": one for one in context.manager.bundles.loaded()}
    found: list[Result | Order] = []
    for source in sources:
        deadline.left_s()
        found.append((yield from _look(source, bundles, context.settings.max_image_pixels)))
        yield None
    return found


def _look(source: bytes | bytearray | str, bundles: Mapping[str, Bundle], max_pixels: int) -> Steps[Result | Order]:
    try:
        content = (yield from from_base64(source)) if isinstance(source, str) else source
        file = yield from parse_file(content)
        check_pixels(file.width, file.height, max_pixels)
    except ServiceError as error:
        return without_traceback(error)
    recipe = yield from _recipe_of(content)
    if recipe is None:
        return _result("no_recipe")
    bundle = bundles.get(recipe.bundle)
    if bundle is None:
        return _result("unknown_bundle", recipe)
    if not _can_give(recipe, bundle, file) or (yield from is_animation(content)):
        return _result("different", recipe)
    return Order(file, recipe, bundle)


def _recipe_of(content: bytes | bytearray) -> Steps[Recipe | None]:
    """The recipe within a file; None if there is none, or something that is not one of ours."""
    text = yield from find_recipe(content)
    if text is None:
        return None
    try:
        yield from check_json(text, _RECIPE_LIMITS)
        return Recipe.model_validate_json(text)
    except (Invalid, ValidationError):
        return None


def _can_give(recipe: Recipe, bundle: Bundle, file: ImageFile) -> bool:
    """Whether a picture of this bundle and size can have this recipe."""
    image, labels = bundle.manifest.image, bundle.manifest.labels or ()
    size = picture_size(
        RenderOptions(recipe.format, recipe.columns, recipe.scale), recipe.count, image.height, image.width
    )
    upright = (file.width, file.height) if file.orientation >= 5 else (file.height, file.width)
    has_labels = recipe.labels is None or max(recipe.labels) < len(labels)
    has_select = recipe.select == "none" or refusal(bundle) is None
    return size == upright and max(size) <= MAX_SIDE[recipe.format] and has_labels and has_select


def _accept(context: RouteContext, request: RequestContext, orders: Collection[Order]) -> AbstractContextManager[None]:
    """Check that all recipes together ask for no more than one request may, and take what room they need.

    Once it is accepted, the request is not refused in its middle, for what waits by then or for a drain.

    Raises:
        Invalid: They ask for more.
        QueueFull, Draining: There is no room now.
    """
    settings = context.settings
    count = sum(order.recipe.count for order in orders)
    pixels = sum(order.pixels for order in orders)
    if count > settings.max_count:
        raise Invalid(f"images: the recipes ask for {count} images; one request may ask for {settings.max_count}.")
    if pixels > settings.max_output_pixels:
        raise Invalid(f"images: the recipes give {pixels} pixels; the most is {settings.max_output_pixels}.")
    if not orders:
        return nullcontext()
    rows = sum(order.plan.rows for order in orders)
    context.manager.batcher.admit(rows)
    largest = max(order.pixels for order in orders)
    request.reserve_reply(PIXEL_BYTES * min(pixels, max(largest, TOGETHER_PIXELS)))
    return context.manager.batcher.accept(rows)


def _some(orders: Mapping[int, Order]) -> Iterator[list[int]]:
    """Their places, those at a time that are computed together."""
    places, pixels = list[int](), 0
    for place, order in orders.items():
        if places and (len(places) == TOGETHER or pixels + order.pixels > TOGETHER_PIXELS):
            yield places
            places, pixels = [], 0
        places.append(place)
        pixels += order.pixels
    if places:
        yield places


async def _all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, or the error of the first that fails; the others are then cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _settle(context: RouteContext, order: Order, deadline: Deadline) -> Done:
    """Decode a picture, compute its recipe, and compare."""
    shown, decode_s = await context.decode(_pixels(context, order), deadline)
    if isinstance(shown, ServiceError):
        return Done(shown, decode_s)
    what = context.manager, order.bundle, order.plan, deadline.left_s()
    if order.plan.is_selected:
        chosen = await deadline.wait_for(select(*what, is_accepted=True))
        images, timing = chosen.images, chosen.timing
    else:
        images, _, timing = await deadline.wait_for(draw(*what, is_accepted=True))
    work = partial(_compare, images, order.render, shown)
    small = order.size <= SMALL_PICTURE
    verdict = work() if small else await context.run_in_time(context.encoders, work, deadline)
    return Done(_result(verdict, order.recipe), decode_s, timing)


def _pixels(context: RouteContext, order: Order) -> Steps[list[UInt8] | ServiceError]:
    """What a picture shows, uint8 (h, w, c); or why it can't be decoded.

    Other programs may have saved it with colours, a palette or transparency. So what the bundle's mode would change is
    compared in colour; and what has a palette or may be transparent, both on black and on white.
    """
    file, own = order.file, order.bundle.manifest.image.channels
    height, width = (file.width, file.height) if file.orientation >= 5 else (file.height, file.width)
    shown: list[UInt8] = []
    try:
        for channels, ground in dict.fromkeys([(own, _BLACK), (3, _BLACK), (3, _WHITE)]):
            shape = Shape(height, width, channels, context.settings.max_image_pixels, ground)
            decoded = yield from decode_image(file, shape, context.decoders.decode)
            if not decoded.converted:
                return [decoded.pixels]
            shown.append(decoded.pixels)
    except ServiceError as error:
        return without_traceback(error)
    return shown[-2:]


def _compare(images: UInt8, render: RenderOptions, shown: Sequence[UInt8]) -> Verdict:
    """Whether these images give the picture, whose pixels are `shown`, on each of its grounds."""
    expected = picture_pixels(images, render)
    if expected.shape[2] == 4 and any(one.shape[2] != 4 for one in shown):  # its transparency is gone
        return "different"
    levels = max(int((np.maximum(one, expected) - np.minimum(one, expected)).max()) for one in shown)
    return "identical" if levels == 0 else "within_one_level" if levels == 1 else "different"


def _result(verdict: Verdict, recipe: Recipe | None = None) -> bytes:
    said = b"" if recipe is None else b',"recipe":%b' % recipe.model_dump_json().encode()
    return b'{"verdict":"%b"%b}' % (verdict.encode(), said)
