"""A small TCP proxy in front of several processes: new connections go to those whose /readyz says yes, in turn.

It stands for an operator's load balancer: it looks at connections and not at requests, and learns with a delay that a
process wants no more of them.
"""

import asyncio
import contextlib
from collections import Counter
from types import TracebackType
from typing import Self

from benchmarks.tools.client import HOST, Client, NoReply, Request

CHECK_EVERY_S = 0.25
CHUNK_BYTES = 2**16


class Proxy:
    """Listens on `port` while its block lasts."""

    def __init__(self) -> None:
        self.port = 0
        self._ready: dict[int, bool] = {}  # by the port of each process behind it
        self._open = Counter[int]()  # connections, by the port that they lead to
        self._turn = 0
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._checks = asyncio.create_task(self._check())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for task in [self._checks, *self._connections]:
            task.cancel()
        await asyncio.gather(self._checks, *self._connections, return_exceptions=True)

    async def add(self, port: int) -> None:
        """One more process; it gets connections once it is ready."""
        self._ready[port] = await _is_ready(port)

    def remove(self, port: int) -> None:
        """A process that is gone."""
        del self._ready[port]

    async def left(self, port: int) -> None:
        """Return once a process has no connection and gets none any more."""
        while self._ready[port] or self._open[port]:  # noqa: ASYNC110 - what it waits for is polled anyway
            await asyncio.sleep(CHECK_EVERY_S)

    async def _check(self) -> None:
        while True:
            for port in list(self._ready):
                ready = await _is_ready(port)
                if port in self._ready:
                    self._ready[port] = ready
            await asyncio.sleep(CHECK_EVERY_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._join(reader, writer)
        finally:
            writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = [port for port, is_ready in self._ready.items() if is_ready]
        if not ready:
            return
        self._turn += 1
        port = ready[self._turn % len(ready)]
        self._open[port] += 1
        try:
            await self._connect(port, reader, writer)
        finally:
            self._open[port] -= 1

    async def _connect(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection(HOST, port)
        except OSError:
            return
        ways = [asyncio.create_task(_copy(reader, their_writer)), asyncio.create_task(_copy(their_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            their_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


async def _is_ready(port: int) -> bool:
    try:
        reply = await Client(port, reuse=False).ask(Request("GET", "/readyz"))
    except NoReply:
        return False
    return reply.status == 200
