"""Memory that requests hold: bounded for all of them together, and taken back from clients that stand in the way."""

import math
import time
from collections.abc import Callable
from typing import Protocol

from service.errors import QueueFull

SMALL_BYTES = 2**16  # as much as a server's buffers for one connection: never refused, for connections are counted too
PATIENCE_S = 10.0  # a client that neither sends nor takes for so long makes room for others


class Holder(Protocol):
    """A request that holds memory."""

    def give_up(self) -> None:
        """Hold nothing any more, and end the connection to the client."""
        ...


class MemoryBudget:
    """Bytes that requests hold, of what comes in or of what goes out.

    Args:
        most: Bytes. A request that needs more than there is room for is refused, unless it is small.
        clock: Seconds, rising.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = 0
        self._most = most
        self._clock = clock
        self._waiting: dict[Holder, float] = {}  # since when we wait for their clients, the longest first

    def check(self, more: int, total: int | None = None) -> None:
        """Return where there is room for so many more bytes; clients that others have waited for too long make some.

        `total` is what the request would hold then, where that is more.

        Raises:
            QueueFull: There is none, with the seconds after which there may be.
        """
        if (total or more) <= SMALL_BYTES or self.now + more <= self._most:
            return
        longest = next(iter(self._waiting), None)
        waited_s = 0.0 if longest is None else self._clock() - self._waiting[longest]
        if longest is None or waited_s < PATIENCE_S:
            # What moves will soon be over; what does not is ended when our patience is.
            raise QueueFull(1 if waited_s < 1 else math.ceil(PATIENCE_S - waited_s))
        self.client_moved(longest)
        longest.give_up()

    def wait_for_client(self, holder: Holder) -> None:
        """From now on it is up to this request's client, to send or to take; called again whenever it has done so."""
        self._waiting.pop(holder, None)
        self._waiting[holder] = self._clock()

    def client_moved(self, holder: Holder) -> None:
        """We wait for it no more."""
        self._waiting.pop(holder, None)
