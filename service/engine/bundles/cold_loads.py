"""Requests that wait for a bundle which is not in memory: one is loaded at a time, whoever asks for it."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from service.engine.bundles.index import Key
from service.engine.engine import Loaded
from service.errors import NotReady

MOST_WAITERS = 32
REST, MOST_REST_S = 4.0, 1.0  # before the next load: so many times as long as the last one took, and at most

Outcome = Loaded | str | None


class ColdLoads:
    """Loads for requests, in the order in which they were first asked for.

    Args:
        load: Loads a version. Returns it, or why it can't be loaded for now; None where names mean something else by
            now, so that the request should look again.
        lock: Held while one is loaded.

    Attributes:
        served: Requests that did not have to wait. Where there are any while a bundle is loaded, the next load waits a
            little: a client who asks for one version after another would slow them all down.
    """

    def __init__(self, load: Callable[[Key], Awaitable[Outcome]], lock: asyncio.Lock) -> None:
        self.served = 0
        self._load = load
        self._lock = lock
        self._loads: dict[Key, asyncio.Task[Outcome]] = {}
        self._waiters = Counter[Key]()
        self._load_s = 1.0  # how long the last one took
        self._not_before = 0.0  # when the next one may begin, by the monotonic clock

    async def wait(self, key: Key) -> Loaded | None:
        """Wait for a version; as `load` says it. Whoever stops waiting is cancelled.

        Raises:
            NotReady: Too many requests wait, or it can't be loaded for now.
        """
        if self._waiters.total() >= MOST_WAITERS:
            raise NotReady(f"{MOST_WAITERS} requests wait for bundles to be loaded", self._retry_after_s())
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = asyncio.create_task(self._run(key), name=f"load {key}")
        self._waiters[key] += 1
        try:
            await asyncio.wait([load])  # unlike awaiting it, this lets the load go on when a waiter is cancelled
        finally:
            self._waiters[key] -= 1
        outcome = load.result()
        if isinstance(outcome, str):
            raise NotReady(outcome, self._retry_after_s())
        return outcome

    async def _run(self, key: Key) -> Outcome:
        try:
            async with self._lock:
                await asyncio.sleep(self._not_before - time.monotonic())
                if not self._waiters[key]:  # all have left
                    return None
                started, served = time.monotonic(), self.served
                outcome = await self._load(key)
                self._load_s = time.monotonic() - started
                if self.served > served:
                    self._not_before = time.monotonic() + min(MOST_REST_S, REST * self._load_s)
                return outcome
        finally:
            del self._loads[key]
            self._waiters += Counter()  # forgets those at zero

    def _retry_after_s(self) -> int:
        return max(1, math.ceil(self._load_s * len(self._loads)))
