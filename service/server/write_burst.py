"""Replies of several connections that are ready in one turn of the event loop are written one right after the other.

The kernel's half of a reply and ours, in turns, would drive each other out of a processor's caches: with two workers
that have a processor each, bursts bring 8 % more single images (docs/decisions/http-layer.md).
"""

import asyncio
from typing import Protocol

MAX_BURST = 8  # replies; more would keep clients waiting that could send their next request


class Writer(Protocol):
    """A connection with something to write."""

    def flush(self) -> None:
        """Write it now."""
        ...


class WriteBurst:
    """Calls `flush` of connections together: when there are `MAX_BURST`, or at the end of the event loop's turn."""

    def __init__(self) -> None:
        self._writers: list[Writer] = []

    def add(self, writer: Writer) -> None:
        """Have this one flushed with the others of its burst."""
        if len(self._writers) >= MAX_BURST:
            self.flush()
        if not self._writers:
            asyncio.get_running_loop().call_soon(self.flush)
        self._writers.append(writer)

    def flush(self) -> None:
        """Flush them all."""
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.flush()
