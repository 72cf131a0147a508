"""One worker of several: how it hears of the others, asks them, and gets its connections (see supervisor.py)."""

import asyncio
import contextlib
import itertools
import json
import logging
import socket
from collections.abc import Mapping
from typing import Any

from service.errors import NotReady
from service.server.supervisor import BEAT_S, LONGEST_LINE, Message
from service.worker_group import PROBES, Handler, Reasons, Server, WorkerGroup

AT_ONCE = 64  # connections that are taken up in one go

log = logging.getLogger(__name__)


class WorkerLink(WorkerGroup):
    """One of several workers.

    Args:
        messages, door: Sockets to the supervisor.
    """

    says_when_again = True

    def __init__(self, messages: socket.socket, door: socket.socket) -> None:
        self._messages = messages
        self._door = door
        self._server: Server
        self._writer: asyncio.StreamWriter | None = None  # before it has joined
        self._others: Reasons = dict.fromkeys(PROBES, "the other workers are being started")
        self._handlers: dict[str, Handler] = {}
        self._asked: dict[int, asyncio.Future[list[Any]]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = 0  # connections, since that was last said
        self._door_closed = asyncio.Event()

    def reason(self, probe: str) -> str | None:
        """See the base."""
        return self._others[probe]

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """See the base."""
        self._handlers |= handlers

    async def ask(self, what: str, *, within_s: float, **details: Any) -> list[Any]:
        """See the base."""
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"ask": number, "what": {"name": what, **details}, "within_s": within_s})
            answers: list[Any] = await future
        finally:
            del self._asked[number]
        if None in answers:
            raise NotReady("another worker does not answer")
        return answers

    async def join(self, server: Server) -> None:
        """See the base."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._messages, limit=LONGEST_LINE)
        self._server = server
        self._door.settimeout(0)
        asyncio.get_running_loop().add_reader(self._door, self._take_connections)
        self._keep(self._hear(reader))
        self._keep(self._beat())

    async def leave(self) -> None:
        """See the base."""
        self._send({"closing": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._door_closed.wait(), BEAT_S)

    def connection_closed(self) -> None:
        """See the base; the supervisor hears of it at the end of this step."""
        self._closed += 1
        if self._closed == 1:
            asyncio.get_running_loop().call_soon(self._say_closed)

    def _say_closed(self) -> None:
        closed, self._closed = self._closed, 0
        self._send({"closed": closed})

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def _beat(self) -> None:
        while True:
            self._send({"reasons": self._server.reasons()})
            await asyncio.sleep(BEAT_S)

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while (line := await reader.readline()).endswith(b"\n"):  # the last one may be cut where its sender was
                match json.loads(line):
                    case {"others": others}:
                        self._others = others
                    case {"again": number}:
                        self._server.stop_at_once(number)
                    case {"ask": number, "what": what}:
                        self._keep(self._answer(number, what))
                    case {"answer": number, "value": value}:
                        if (asked := self._asked.get(number)) is not None and not asked.done():
                            asked.set_result(value)
        self.says_when_again = False
        for asked in self._asked.values():
            if not asked.done():
                asked.set_result([None])
        self._server.be_alone()

    async def _answer(self, number: int, what: dict[str, Any]) -> None:
        details = dict(what)
        value = await self._handlers[details.pop("name")](**details)
        self._send({"answer": number, "value": value})

    def _take_connections(self) -> None:
        try:
            sent, fds, *_ = socket.recv_fds(self._door, AT_ONCE, AT_ONCE)
        except BlockingIOError:
            return
        if not sent:
            asyncio.get_running_loop().remove_reader(self._door)
            self._door_closed.set()
        for _ in range(len(sent) - len(fds)):  # the kernel has closed them
            log.error("a connection was lost: no file number was left")
            self.connection_closed()
        for fd in fds:
            self._server.take(socket.socket(fileno=fd))

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
