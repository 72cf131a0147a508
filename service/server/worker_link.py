"""A worker's link to the supervisor: connections, the other workers' state, and questions (see supervisor.py)."""

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Coroutine, Mapping
from typing import Any

from service.errors import NotReady
from service.machine.worker_group import PROBES, Handler, Reasons, Server, WorkerGroup
from service.server.channel import HEARTBEAT_S, Channel, Message, encoded

MAX_RECEIVED = 64  # connections received in one step of the event loop

log = logging.getLogger(__name__)


class WorkerLink(WorkerGroup):
    """The other workers, reached through the supervisor.

    Args:
        messages, connections: Sockets to the supervisor.
        limits_file: As of the base class.
    """

    reports_second_signal = True

    def __init__(self, messages: socket.socket, connections: socket.socket, limits_file: int | None = None) -> None:
        super().__init__()
        self.limits_file = limits_file
        self._messages = messages
        self._connections = connections
        self._server: Server
        self._channel: Channel | None = None  # None until `join`
        self._others: Reasons = dict.fromkeys(PROBES, "the other workers are being started")
        self._handlers: dict[str, Handler] = {}
        self._questions: dict[int, asyncio.Future[list[Any]]] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()  # the event loop keeps only weak references to tasks
        self._closed = 0  # connections that have ended but were not reported to the supervisor yet
        self._has_all_connections = asyncio.Event()  # the supervisor has closed its end

    def reason(self, probe: str) -> str | None:
        """See the base class."""
        return self._others[probe]

    def has_started(self, serves: Mapping[str, object]) -> None:
        """See the base class. The supervisor hears first that this worker is ready, so that it gets connections."""
        self._send({"reasons": self._server.reasons()})
        self._send({"serves": dict(serves)})

    def cannot_start(self, reason: str) -> bool:
        """See the base class."""
        message = {"cannot_start": reason}
        if self._channel is None:
            with contextlib.suppress(OSError):  # the supervisor is gone
                self._messages.sendall(encoded(message))
        else:
            self._channel.send(message)
        return True

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """See the base class."""
        self._handlers |= handlers

    async def ask(self, what: str, *, within_s: float, **details: Any) -> list[Any]:
        """See the base class."""
        number = next(self._numbers)
        question = self._questions[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"ask": number, "what": {"name": what, **details}, "within_s": within_s})
            answers: list[Any] = await question
        finally:
            del self._questions[number]
        if None in answers:
            raise NotReady("another worker does not answer")
        return answers

    async def join(self, server: Server) -> None:
        """See the base class."""
        self._channel = await Channel.open(self._messages)
        self._server = server
        self._connections.settimeout(0)
        asyncio.get_running_loop().add_reader(self._connections, self._take_connections)
        self._spawn(self._listen(self._channel))
        self._spawn(self._send_heartbeats())

    async def leave(self) -> None:
        """See the base class."""
        self._send({"closing": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._has_all_connections.wait(), HEARTBEAT_S)

    def connection_closed(self) -> None:
        """See the base class. All connections that close in one step of the loop are reported together."""
        self._closed += 1
        if self._closed == 1:
            asyncio.get_running_loop().call_soon(self._report_closed)

    def _report_closed(self) -> None:
        closed, self._closed = self._closed, 0
        self._send({"closed": closed})

    def _send(self, message: Message) -> None:
        if self._channel is not None:
            self._channel.send(message)

    async def _send_heartbeats(self) -> None:
        while True:
            self._send({"reasons": self._server.reasons()})
            await asyncio.sleep(HEARTBEAT_S)

    async def _listen(self, channel: Channel) -> None:
        async for message in channel.received():
            match message:
                case {"others": others}:
                    self._others = others
                case {"again": number}:
                    self._server.stop_at_once(number)
                case {"ask": number, "what": what}:
                    self._spawn(self._answer(number, what))
                case {"answer": number, "value": value}:
                    self._answered(self._questions.get(number), value)
        self.reports_second_signal = False
        for question in self._questions.values():
            self._answered(question, [None])
        self._server.supervisor_lost()

    @staticmethod
    def _answered(question: "asyncio.Future[list[Any]] | None", value: list[Any]) -> None:
        if question is not None and not question.done():  # else the caller has stopped waiting
            question.set_result(value)

    async def _answer(self, number: int, what: dict[str, Any]) -> None:
        details = dict(what)
        value = await self._handlers[details.pop("name")](**details)
        self._send({"answer": number, "value": value})

    def _take_connections(self) -> None:
        try:
            sent, fds, *_ = socket.recv_fds(self._connections, MAX_RECEIVED, MAX_RECEIVED)
        except BlockingIOError:
            return
        if not sent:
            asyncio.get_running_loop().remove_reader(self._connections)
            self._has_all_connections.set()
        for _ in range(len(sent) - len(fds)):  # the kernel has closed these
            log.error("a connection was lost: no file descriptor was left")
            self.connection_closed()
        for fd in fds:
            self._server.take(socket.socket(fileno=fd))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
