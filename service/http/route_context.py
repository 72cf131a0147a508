"""What the routes share: the parts they work with, a request's deadline, its body, and work off the event loop."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from service.codecs.decoders import Decoders
from service.codecs.time_slices import Apart, Steps, TimeSlices
from service.engine.model_manager import ModelManager
from service.errors import DeadlinePassed, RequestTimeout, UnsupportedEncoding
from service.http.request_context import RequestContext
from service.http.schemas import timeout_s
from service.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True)
class RouteContext:
    """What the routes work with.

    What takes long is encoded in threads and decoded in processes, so that it holds up neither the event loop nor the
    engine. The rest is decoded on the loop, in time slices.

    Attributes:
        is_private: Whether keys are set: shared caches must then keep no reply.
    """

    settings: Settings
    manager: ModelManager
    metrics: Metrics
    encoders: Executor
    decoders: Decoders
    time_slices: TimeSlices
    is_private: bool

    async def run_in_time(self, executor: Executor, work: Callable[[], T], deadline: "Deadline") -> T:
        """The result of work that takes long enough to be felt by others on the event loop.

        What has not begun by the deadline is not begun, and nobody waits for it any longer.

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

    async def decode(self, steps: Steps[T], deadline: "Deadline") -> tuple[T, float]:
        """The result of these steps, and the seconds that they took.

        Raises:
            DeadlinePassed: One of those that take long was not done in time. The steps look at the deadline themselves.
        """

        async def apart(work: Apart) -> tuple[Any, float]:
            try:
                async with asyncio.timeout(deadline.left_s()):
                    return await self.decoders.run(work)
            except TimeoutError:
                raise DeadlinePassed(deadline.seconds) from None

        return await self.time_slices.run(steps, apart)


class Deadline:
    """Seconds from a request's arrival in which its answer is worth something."""

    def __init__(self, request: RequestContext, settings: Settings) -> None:
        self.seconds = timeout_s(request.header(b"x-timeout-ms"), settings)
        self._at = request.arrived_s + self.seconds

    def left_s(self) -> float:
        """Seconds that are left. May be asked on any thread.

        Raises:
            DeadlinePassed: None are.
        """
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlinePassed(self.seconds)
        return left


async def read_body(request: RequestContext, deadline: Deadline) -> bytes:
    """The whole body; its size is bounded where it comes in.

    Raises:
        UnsupportedEncoding: It is compressed.
        RequestTimeout: It was not there before the deadline.
    """
    encoding = (request.header(b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedEncoding(encoding)
    if (body := request.take_body()) is not None:
        return body
    try:
        async with asyncio.timeout(deadline.left_s()):
            return await request.read_body()
    except TimeoutError:
        raise RequestTimeout(f"The body was not there within {deadline.seconds:.3g} s.") from None
