"""Bounds the memory that all requests hold together, and takes it back from clients that have stalled."""

import math
import time
from collections.abc import Callable
from typing import Protocol

from service.errors import QueueFull

SMALL_BYTES = 2**16  # a request that holds no more is never refused: it is the size of a connection's own buffers
STALLED_AFTER_S = 10.0  # a client that has not sent or read for so long may be evicted


class Holder(Protocol):
    """A request that holds memory."""

    def evict(self) -> None:
        """Release the memory and end the connection to the client."""
        ...


class MemoryBudget:
    """Counts the bytes that all requests hold for their bodies, or for their replies.

    Args:
        max_bytes: A request that would exceed it is refused, unless it is small.
        clock: Monotonic, in seconds.

    Attributes:
        used_bytes: Held now. Requests add and subtract what they hold.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.used_bytes = 0
        self._max_bytes = max_bytes
        self._clock = clock
        self._waiting: dict[Holder, float] = {}  # since when each waits for its client; the longest first

    def check(self, more: int, total: int | None = None) -> None:
        """Check that there is room for `more` bytes; if not, evict those clients that have stalled longest.

        Args:
            more: Bytes that the request needs now.
            total: Bytes that the request would then hold in all, if it already holds some.

        Raises:
            QueueFull: There is no room and no client has stalled for long enough. Says when to try again.
        """
        if (total or more) <= SMALL_BYTES:
            return
        while self.used_bytes + more > self._max_bytes:
            longest = next(iter(self._waiting), None)
            waited_s = 0.0 if longest is None else self._clock() - self._waiting[longest]
            if longest is None or waited_s < STALLED_AFTER_S:
                # Either a client is active and will be done soon, or the longest stalled one will be evicted then.
                raise QueueFull(1 if waited_s < 1 else math.ceil(STALLED_AFTER_S - waited_s))
            self.stop_waiting_for_client(longest)
            longest.evict()

    def wait_for_client(self, holder: Holder) -> None:
        """Note that a request waits for its client to send or read. Called again whenever the client has done so."""
        self._waiting.pop(holder, None)
        self._waiting[holder] = self._clock()

    def stop_waiting_for_client(self, holder: Holder) -> None:
        """Note that a request no longer waits for its client."""
        self._waiting.pop(holder, None)
