"""Sends JSON messages, one a line, between the supervisor and one worker over a Unix socket."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, Self

LONGEST_LINE = 2**26  # bytes; the metrics of all workers come on one line
HEARTBEAT_S = 0.5  # interval at which a worker reports its state

Message = dict[str, Any]


def encoded(message: Message) -> bytes:
    """A message's line."""
    return json.dumps(message).encode() + b"\n"


class Channel:
    """One end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> Self:
        """Take over one end of a socket pair."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=LONGEST_LINE))

    def send(self, message: Message) -> None:
        """Send a message. It is dropped if the other end has closed."""
        if not self._writer.is_closing():
            self._writer.write(encoded(message))

    async def received(self) -> AsyncIterator[Message]:
        """Each message until the other end closes. An incomplete message of a killed sender is dropped."""
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                yield json.loads(line)

    def close(self) -> None:
        """Close this end."""
        self._writer.close()
