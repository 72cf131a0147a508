"""JSON messages between the supervisor and one worker, one a line, over a socket of their own."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Self

LONGEST_LINE = 2**26  # bytes: all metrics of all workers, on one line
HEARTBEAT_S = 0.5  # how often a worker says how it is

Message = dict[str, Any]


class Channel:
    """One end of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Self:
        """Take over one end of a socket pair."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=LONGEST_LINE))

    def send(self, message: Message) -> None:
        """Send a message. It is lost where the other end has closed."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def received(self) -> AsyncIterator[Message]:
        """Each message, until the other end closes. Half a message, of a sender that was killed, is dropped."""
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                yield json.loads(line)

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
