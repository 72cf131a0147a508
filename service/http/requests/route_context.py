"""What routes share: the parts they work with, a request's deadline, reading its body, and work off the event loop."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from models.bundle import Bundle
from service.codecs.decoders import Decoders
from service.codecs.time_slices import OffLoopWork, Steps, TimeSlices, timed_call
from service.engine.model_manager import ModelManager
from service.errors import DeadlinePassed, Invalid, RequestTimeout, UnsupportedEncoding, duration
from service.http.requests.request_context import RequestContext
from service.metrics import Metrics
from service.settings import Settings

IDENTITY = "identity"  # a body that is not compressed

T = TypeVar("T")


@dataclass(frozen=True)
class RouteContext:
    """The parts that routes work with.

    Large replies are encoded in threads and large images decoded in processes, so that they hold up neither the event
    loop nor the engine. Other uploads are decoded on the loop, in time slices.

    Attributes:
        encoders: Threads for encoding.
        is_private: Whether clients need keys. If so, shared caches must not store replies.
    """

    settings: Settings
    manager: ModelManager
    metrics: Metrics
    encoders: Executor
    decoders: Decoders
    time_slices: TimeSlices
    is_private: bool

    async def find(self, name: str | None, deadline: "Deadline") -> Bundle:
        """The bundle that a request names, ready to compute; it is loaded first if it is not in memory.

        Raises:
            UnknownBundle: No such bundle.
            NotReady: It can't be loaded now.
            DeadlinePassed: It was not loaded in time.
        """
        return await deadline.wait_for(self.manager.find(name, deadline.left_s()))

    async def run_in_time(self, executor: Executor, work: Callable[[], T], deadline: "Deadline") -> T:
        """Run work in an executor and wait for its result until the deadline.

        Work that has not started by the deadline is not started.

        Raises:
            DeadlinePassed: It was not done in time.
        """

        def unless_late() -> T:
            deadline.left_s()
            return work()

        try:
            async with asyncio.timeout(deadline.left_s()):
                return await asyncio.get_running_loop().run_in_executor(executor, unless_late)
        except TimeoutError:
            raise DeadlinePassed(deadline.seconds) from None

    async def encode(
        self, work: Callable[[], bytes], form: str, deadline: "Deadline", *, is_small: bool
    ) -> tuple[bytes, float]:
        """Encode a reply, a large one in a thread; returns its bytes and the seconds that it took.

        Raises:
            DeadlinePassed: It was not done in time.
        """
        if is_small:
            content, seconds = timed_call(work)
        else:
            content, seconds = await self.run_in_time(self.encoders, partial(timed_call, work), deadline)
        self.metrics.encode.labels(form).observe(seconds)
        return content, seconds

    async def decode(self, steps: Steps[T], deadline: "Deadline") -> tuple[T, float]:
        """Run steps in time slices; returns their result and the seconds that they took.

        Raises:
            DeadlinePassed: Work off the loop was not done in time. The steps themselves check the deadline elsewhere.
        """

        async def off_loop(call: OffLoopWork) -> tuple[Any, float]:
            try:
                async with asyncio.timeout(deadline.left_s()):
                    return await self.decoders.run(call)
            except TimeoutError:
                raise DeadlinePassed(deadline.seconds) from None

        return await self.time_slices.run(steps, off_loop)


class Deadline:
    """When a request must be answered: by its X-Timeout-Ms or the settings, counted from its arrival."""

    def __init__(self, request: RequestContext, settings: Settings) -> None:
        self.seconds = timeout_s(request.header(b"x-timeout-ms"), settings)
        self._at = request.arrived_s + self.seconds

    def shorten(self, seconds: float) -> None:
        """Let the request take no more than these seconds since its arrival."""
        if seconds < self.seconds:
            self._at -= self.seconds - seconds
            self.seconds = seconds

    def left_s(self) -> float:
        """Seconds that are left. May be called on any thread.

        Raises:
            DeadlinePassed: There are none.
        """
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlinePassed(self.seconds)
        return left

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Wait for the engine, which ends work at the deadline by itself.

        Raises:
            DeadlinePassed: It did. Names the deadline that the client knows, not what was left of it for the engine.
        """
        try:
            return await work
        except DeadlinePassed:
            raise DeadlinePassed(self.seconds) from None


async def read_body(request: RequestContext, deadline: Deadline, encodings: Sequence[str] = (IDENTITY,)) -> bytes:
    """Read the whole body, as it was sent. The context bounds its size.

    Args:
        encodings: Content codings that the route reads.

    Raises:
        UnsupportedEncoding: It is compressed in another way.
        RequestTimeout: It did not arrive before the deadline.
    """
    encoding = content_encoding(request)
    if encoding not in encodings:
        raise UnsupportedEncoding(encoding, encodings)
    if (body := request.take_body()) is not None:
        return body
    try:
        async with asyncio.timeout(deadline.left_s()):
            return await request.read_body()
    except TimeoutError:
        raise RequestTimeout(f"The body was not there within {duration(deadline.seconds)}.") from None


def content_encoding(request: RequestContext) -> str:
    """The body's content coding in lower case."""
    return (request.header(b"content-encoding") or IDENTITY).strip().lower()


def timeout_s(header: str | None, settings: Settings) -> float:
    """Seconds that a request may take: its X-Timeout-Ms, capped at GAN_MAX_DEADLINE_S, or else GAN_DEADLINE_S.

    Raises:
        Invalid: Not a whole number of milliseconds from 1.
    """
    if header is None:
        return settings.deadline_s
    if not re.fullmatch("[0-9]{1,9}", header.strip()) or int(header) == 0:
        raise Invalid(f"X-Timeout-Ms: {header[:100]!r} is not a whole number of milliseconds from 1 to 999999999.")
    return min(int(header) / 1000, settings.max_deadline_s)
