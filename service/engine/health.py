"""Whether the service is started, ready and alive."""

import math
from collections.abc import Callable

from service.engine.batching.batcher import Batcher
from service.engine.engine import Engine
from service.machine.worker_group import WorkerGroup

NOT_READY_AFTER_S = 8.0  # a batch that takes this long is stuck: traffic should go elsewhere
DEAD_AFTER_S = 30.0  # and after this long it will not come back: the process should be replaced


class Health:
    """Answers probes from what is known already: O(1), nothing computed, nothing awaited.

    Each method says None for yes, or in a few words why not.
    """

    def __init__(
        self,
        engine: Engine,
        batcher: Batcher,
        worker_group: WorkerGroup,
        *,
        is_started: Callable[[], bool],
        is_draining: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._batcher = batcher
        self._worker_group = worker_group
        self._is_started = is_started
        self._is_draining = is_draining
        self._clock = clock
        self._not_before: dict[float, float] = {}  # earliest time at which a batch can have run for so long

    def live(self) -> str | None:
        """Whether the process can go on. That it answers at all shows that its event loop does."""
        return self.own("live") or self._worker_group.reason("live")

    def ready(self) -> str | None:
        """Whether requests should come here now."""
        return self.own("ready") or self._worker_group.reason("ready")

    def started(self) -> str | None:
        """Whether every bundle is loaded and warm."""
        return self.own("started") or self._worker_group.reason("started")

    def own(self, probe: str) -> str | None:
        """What this process alone says, of several that are one service."""
        if probe == "live":
            return self._lost() or self._stuck(DEAD_AFTER_S)
        if probe == "ready":
            return "draining" if self._is_draining() else self.able()
        return None if self._is_started() else "the bundles are being loaded"

    def able(self) -> str | None:
        """Whether a request can be served, also one that comes during the drain delay."""
        if not self._is_started():
            return self.own("started")
        return self._lost() or self._stuck(NOT_READY_AFTER_S)

    def _lost(self) -> str | None:
        for thread in self._engine.threads:
            if not thread.is_alive:
                return "a thread of the engine has ended"
        return self._batcher.failure

    def _stuck(self, after_s: float) -> str | None:
        now = self._clock()
        if now < self._not_before.get(after_s, -math.inf):  # every request asks
            return None
        # However long the queue is, each batch ends: busy is not stuck. The threads are asked too, because the first
        # batches of a new bundle don't pass through the batcher.
        threads = self._engine.threads
        busy_s = max(self._batcher.busy_s(), *[thread.busy_s() for thread in threads])
        self._not_before[after_s] = now + after_s - busy_s
        return f"the engine has been in one batch for over {after_s:g} s" if busy_s > after_s else None
