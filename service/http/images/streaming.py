"""Streams images that are too many to be made whole, piece by piece, as npy or zip.

While a piece is encoded and sent, the next one is computed; sending waits for the client. So a stream holds about two
pieces, however many images it has and however slow its client is, and its first bytes leave after the first piece. All
of it has to be over by the request's deadline.

The first piece is computed before the reply begins: whatever refuses or fails it still becomes a problem. A failure
later on can only break the connection off.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from functools import partial
from typing import NamedTuple

from models.bundle import Bundle
from models.inference.pixels import UInt8
from service.codecs.encode import STREAMED, NpyStream, SampleMetadata
from service.codecs.time_slices import timed_call
from service.engine.model_manager import Timing
from service.http.images.drawing import draw, metadata_of
from service.http.images.resolving import SamplePlan
from service.http.requests.request_context import RequestContext
from service.http.requests.route_context import Deadline, RouteContext

WHOLE_BYTES = 2**20  # of pixels: replies up to this are made whole
PIECE_BYTES, PIECE_ROWS = 2**22, 512  # of pixels, and the most images in a piece


class Drawn(NamedTuple):
    """Some of the images, what they come from, and how long they took."""

    images: UInt8
    metadata: SampleMetadata
    timing: Timing


class Piece(NamedTuple):
    """A part of the reply's body, and the Server-Timing header of all parts so far."""

    content: bytes
    took: dict[bytes, bytes]


def is_streamed(bundle: Bundle, plan: SamplePlan) -> bool:
    """Whether the reply is too large to be made whole."""
    is_large = plan.count > 1 and plan.count * _row_bytes(bundle, plan) > WHOLE_BYTES
    return is_large and plan.render.format in STREAMED and not plan.is_selected  # whose rate stands before the body


def held_bytes(bundle: Bundle, plan: SamplePlan) -> int:
    """Memory that a stream holds: a piece that is sent, and one that is encoded."""
    return 2 * _piece_rows(bundle, plan) * _row_bytes(bundle, plan)


def stream_bytes(bundle: Bundle, plan: SamplePlan) -> int | None:
    """The body's size where it is known before the images are; else None."""
    if plan.render.format == "zip":
        return None
    image = bundle.manifest.image
    return NpyStream(plan.count, (image.height, image.width, image.channels), plan.render.scale).size


async def contents(first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[bytes, None]:
    """The body, from its first piece and the others."""
    async with aclosing(pieces):
        yield first.content
        async for piece in pieces:
            yield piece.content


async def stream_pieces(
    context: RouteContext, request: RequestContext, bundle: Bundle, plan: SamplePlan, deadline: Deadline
) -> AsyncGenerator[Piece, None]:
    """Compute and encode the images, piece by piece; the first raises what would refuse the whole request."""
    image, render = bundle.manifest.image, plan.render
    stream = STREAMED[render.format](plan.count, (image.height, image.width, image.channels), render.scale)
    encode_s = 0.0
    async with aclosing(_computed(context, bundle, plan, deadline)) as computed:
        async for images, metadata, timing in computed:
            work = partial(timed_call, partial(stream.encode, images, metadata, deadline.left_s))
            content, seconds = await context.run_in_time(context.encoders, work, deadline)
            encode_s += seconds
            yield Piece(content, request.took(queue=timing.queue_s, compute=timing.compute_s, encode=seconds))
    context.metrics.encode.labels(render.format).observe(encode_s)


async def _computed(
    context: RouteContext, bundle: Bundle, plan: SamplePlan, deadline: Deadline
) -> AsyncGenerator[Drawn, None]:
    """The images piece by piece, each computed while the last one is with the caller."""
    rows = _piece_rows(bundle, plan)

    async def compute(start: int) -> Drawn:
        part = plan.part(start, min(rows, plan.count - start))
        images, labels, timing = await deadline.wait_for(
            draw(context.manager, bundle, part, deadline.left_s(), is_accepted=start > 0)
        )
        return Drawn(images, metadata_of(bundle, part, labels), timing)

    with ExitStack() as accepted:
        accepted.enter_context(context.manager.reserve(plan.count))
        accepted.enter_context(context.manager.batcher.accept(plan.count))
        coming: asyncio.Task[Drawn] | None = asyncio.create_task(compute(0))
        try:
            for start in range(0, plan.count, rows):
                assert coming is not None  # noqa: S101 - only the last piece has no successor
                images = await coming
                coming = None
                if start + rows < plan.count:
                    coming = asyncio.create_task(compute(start + rows))
                else:  # all is computed: a drain need not wait until it is sent
                    accepted.close()
                yield images
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


def _row_bytes(bundle: Bundle, plan: SamplePlan) -> int:
    return bundle.manifest.image.size * plan.render.scale**2


def _piece_rows(bundle: Bundle, plan: SamplePlan) -> int:
    return min(plan.count, PIECE_ROWS, max(1, PIECE_BYTES // _row_bytes(bundle, plan)))
