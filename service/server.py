"""Runs the application under uvicorn: listens, reloads and drains on signals, and says how it ended."""

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HEADER_VALUE_RE as NO_VALUE
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from models.bundle import BundleError
from service import memory
from service.crew import Crew
from service.errors import ServiceError
from service.exchange import CONNECTION, Connection, Header
from service.held import SMALL_BYTES
from service.listener import Acceptor, url
from service.settings import Settings
from service.signals import sighup_reloads
from service.supervisor import PROBES

if sys.platform == "win32":
    from asyncio import SelectorEventLoop as new_event_loop  # noqa: N813 - in uvloop it is a function
else:
    from uvloop import new_event_loop

OK, FAILED, BAD_BUNDLE, BY_SIGNAL = 0, 1, 3, 128
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that it is they who close
BURST = 8  # replies
LATE_BODY_S = 10.0  # a client that is refused may go on sending for so long, so that it gets to read why
LATE_BODY_AT_END_S = 1.0  # and for so long where the server is about to end
CANCELLED_S = 1.0  # what is cut short at the end has so long to say so
LINGER_S = 10.0  # a process that has failed for good ends itself, once probes and metrics have had time to say why

log = logging.getLogger(__name__)


def run(app: FastAPI, settings: Settings, listeners: list[socket.socket], crew: Crew | None = None) -> int:
    """Serve until a signal or a failed start, and return the process' exit code.

    A worker among others has no listener; its connections come from its crew.
    """
    gc.freeze()  # what was imported stays, and nobody need look at it again
    server = Server(app, settings, crew)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve(listeners))
    if server.exit_code not in {FAILED, BAD_BUNDLE}:
        log.info("stopped")
    return server.exit_code


class _Burst:
    """Replies that wait to be written together, at the latest at the end of a step of the loop.

    The kernel's half of a reply and ours, in turns, would drive each other out of a processor's caches. More than a few
    at a time would keep clients waiting who could send their next request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: list[_Joining] = []

    def add(self, one: "_Joining") -> None:
        """Have its `write_kept` called soon, after those of a burst that is full."""
        if len(self._waiting) >= BURST:
            self.write()
        if not self._waiting:
            self._loop.call_soon(self.write)
        self._waiting.append(one)

    def write(self) -> None:
        """Write them all."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.write_kept()


class _Joining:
    """A transport that keeps what is written within a step of the loop, for what comes next and for others' bursts.

    So a reply's head goes out with its body: one system call instead of two, each of which takes as long as a PNG.

    Args:
        transport: The one that writes, and does all else.
        burst: Of its loop.
        linger: Called before it closes; whether it is to be left open, but for writing.
    """

    def __init__(self, transport: asyncio.Transport, burst: _Burst, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._burst = burst
        self._linger = linger
        self._kept: list[bytes] = []
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def write(self, data: bytes) -> None:
        """Write, at the latest at the end of this step."""
        if not self._kept:
            self._burst.add(self)
        self._kept.append(data)
        if len(data) > SMALL_BYTES:
            self.write_kept()

    def write_kept(self) -> None:
        """Write what was kept."""
        kept, self._kept = self._kept, []
        if kept and not self.is_closing():  # the client may have left since
            self._transport.writelines(kept)

    def close(self) -> None:
        """Close once all is written."""
        self.write_kept()
        if self._linger():
            self.is_closing = lambda: True
        else:
            self._transport.close()


class _Connection(Connection):
    """One of uvicorn's, and what uvicorn keeps of the request that is being answered on it."""

    cycle: RequestResponseCycle

    def __init__(self, client: asyncio.Transport) -> None:
        self._client = client

    def hang_up(self) -> None:
        """See `Connection`."""
        self._client.abort()

    def take_body(self) -> bytes | None:
        """See `Connection`."""
        cycle = self.cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def reply(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """See `Connection`. What uvicorn does with two messages, for the commonest of cases."""
        cycle = self.cycle
        is_common = cycle.keep_alive and not (cycle.response_started or cycle.disconnected or cycle.flow.write_paused)
        if not is_common or (b"connection", b"close") in headers or NO_VALUE.search(b"".join([v for _, v in headers])):
            return False
        lines = [b"%b: %b\r\n" % header for header in (*cycle.default_headers, *headers)]
        cycle.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        cycle.on_response()
        return True


class Protocol(HttpToolsProtocol):
    """uvicorn's, but its requests' scopes have their `Connection`.

    Args:
        uvicorns: What uvicorn's own takes.
        burst: Where replies wait to be written.
        when_closed: Called at the connection's end.
    """

    def __init__(self, *uvicorns: Any, burst: _Burst, when_closed: Callable[[], None]) -> None:
        super().__init__(*uvicorns)
        self._burst = burst
        self._when_closed = when_closed

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Called by the transport."""
        self._socket = transport
        super().connection_made(cast("asyncio.Transport", _Joining(transport, self._burst, self._linger)))
        self._end: asyncio.TimerHandle | None = None  # of one that was answered and is still sending
        self._late_body_s = LATE_BODY_S
        # One for all requests: they are answered one after the other.
        self._connection = _Connection(transport)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        self._connection.has_whole_body = False
        self.scope["extensions"] = {CONNECTION: self._connection}  # type: ignore[dict-item]  # uvicorn knows dicts only

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._connection.cycle = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        super().on_message_complete()
        self._connection.has_whole_body = True
        if not self.pipeline:  # uvicorn stops reading at a large body, and would not see the client leave
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        if self._end is None:
            super().data_received(data)
        if self._is_answered_early():
            # Nobody wants it. As much of it as comes, a hundred times, would keep all others waiting.
            self.flow.pause_reading()
            self.loop.call_soon(self._read_on)

    def shutdown(self) -> None:
        """Called by the server at its end: a client that was answered has had the time to read that."""
        self._late_body_s = 0.0
        super().shutdown()
        self._late_body_s = min(LATE_BODY_S, LATE_BODY_AT_END_S)

    def hang_up(self) -> None:
        """End the connection at once, whatever the client has yet to take or to send."""
        self._socket.abort()

    def _is_answered_early(self) -> bool:
        cycle = self.cycle
        if self._connection.has_whole_body or cycle is None or cycle.scope is not self.scope:
            return False
        return cycle.response_complete

    def _read_on(self) -> None:
        if not self._socket.is_closing():
            self.flow.resume_reading()

    def _linger(self) -> bool:
        """Whether the client is still sending: where that finds the connection closed, it can't read its reply."""
        if not (self._late_body_s and self._is_answered_early()) or self._end is not None or self._socket.is_closing():
            return False
        self._end = self.loop.call_later(self._late_body_s, self._socket.close)
        self._socket.write_eof()
        self.flow.resume_reading()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport."""
        super().connection_lost(exc)
        if self._end is not None:
            self._end.cancel()
        self._connection.end()
        self._when_closed()


class Server(uvicorn.Server):
    """uvicorn, but it drains before it stops listening, and a failed start ends it.

    uvicorn raises a signal again once it has shut down, so that the process dies of it. Here signals are taken over
    before uvicorn notes them: a process that has drained in order ends with exit code 0.
    """

    def __init__(self, app: FastAPI, settings: Settings, crew: Crew | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self.exit_code = OK
        self._app = app
        self._settings = settings
        self._crew = crew or Crew()
        self._draining: asyncio.Task[None] | None = None
        self._chores: list[asyncio.Task[None]] = []
        self._acceptors: list[Acceptor] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._reloads: set[asyncio.Task[None]] = set()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these sockets until told to stop."""
        self._loop = asyncio.get_running_loop()
        self._burst = _Burst(self._loop)
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept; the bundles are still being loaded."""
        await super().startup([])  # uvicorn would have the loop take connections; see Acceptor
        self._acceptors = [Acceptor(listener, self.take) for listener in sockets or []]
        for acceptor in self._acceptors:
            acceptor.start()
        if sighup_reloads():
            with contextlib.suppress(RuntimeError):  # signals are the main thread's
                self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._chores = [self._loop.create_task(chore) for chore in (self._watch(), memory.keep_giving_back())]
        await self._crew.join(self)
        addresses = [url(listener) for listener in sockets or []]
        self._app.state.starting.add_done_callback(lambda starting: self._started(starting, addresses))

    def reasons(self) -> dict[str, str | None]:
        """Why this process says no to each probe."""
        health = self._app.state.serving.health
        return {probe: health.own(probe) for probe in PROBES}

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end those there are once they have been answered."""
        for acceptor in self._acceptors:
            acceptor.stop()
        if self._connecting:  # uvicorn tells those that it knows of
            await asyncio.wait(self._connecting)
        await super().shutdown(sockets)
        # What it waits for no longer: requests, which answer that they were cut short, and connections.
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCELLED_S)
            await asyncio.sleep(0)  # their replies are written at the end of a step
        for connection in list(self.server_state.connections):
            cast("Protocol", connection).hang_up()
        await asyncio.sleep(0)

    def take(self, connection: socket.socket) -> None:
        """Serve this connection."""
        connection.settimeout(0)
        self._keep(self._connect(connection), self._connecting)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError as error:  # it has gone already
            log.debug("a connection was lost: %s", error)
            connection.close()
            self._crew.connection_closed()

    def _make_protocol(self) -> Protocol:
        return Protocol(
            self.config,
            self.server_state,
            self.lifespan.state,
            self._loop,
            burst=self._burst,
            when_closed=self._crew.connection_closed,
        )

    def be_alone(self) -> None:
        """The supervisor is gone, and nobody can reach us any more."""
        if self._draining is None:
            log.error("the supervisor is gone")
            self._stop(signal.SIGTERM)

    def _started(self, starting: "asyncio.Task[None]", addresses: list[str]) -> None:
        if starting.cancelled():
            return
        error = starting.exception()
        if error is None:
            memory.settle()
            if addresses:  # else the supervisor says so
                log.info("serving %s", " ".join(addresses))
            return
        self.exit_code = BAD_BUNDLE if isinstance(error, BundleError) else FAILED
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Called by Python's signal handling, between any two steps of the main thread."""
        # In a context of its own: the interrupted one may be a request's, which has nothing to do with this.
        self._loop.call_soon_threadsafe(self._stop, signal.Signals(sig), context=contextvars.Context())

    def _stop(self, sig: signal.Signals) -> None:
        """The first signal drains; another one stops at once."""
        if self._draining is None:
            log.info("%s: draining", sig.name)
            # Someone at a terminal waits for no load balancer.
            delay_s = 0.0 if sig == signal.SIGINT else self._settings.drain_delay_s
            self._draining = self._loop.create_task(self._drain(delay_s))
        elif not self._crew.says_when_again:
            self.stop_at_once(sig)

    def stop_at_once(self, number: int) -> None:
        """Tell those who still wait that it is over, at the second signal to stop, whose number this is."""
        log.warning("%s again: stopping at once", signal.Signals(number).name)
        self.exit_code = BY_SIGNAL + number
        if self._draining is not None:
            self._draining.cancel()
        self._draining = self._loop.create_task(self._end())
        self.force_exit = True  # uvicorn may be waiting for slow clients already

    async def _drain(self, delay_s: float) -> None:
        """Finish what was accepted, while new requests are still answered: that this is no place for them any more."""
        over = time.monotonic() + delay_s + self._settings.drain_timeout_s
        try:
            self._app.state.starting.cancel()
            await self._app.state.serving.stop(delay_s)
        finally:
            await self._crew.leave()
            self._exit(math.ceil(over - time.monotonic()))

    async def _watch(self) -> None:
        """End a process that nothing can bring back: not everything that starts containers looks at /livez."""
        health = self._app.state.serving.health
        failing_since = None
        while True:
            await asyncio.sleep(LINGER_S / 10)
            reason = health.own("live")
            if self._draining is not None:  # the end is near anyway, and the engine's threads end before it
                return
            if reason is None:
                failing_since = None
                continue
            failing_since = failing_since or time.monotonic()
            if time.monotonic() - failing_since >= LINGER_S:
                log.critical("%s: ending the process", reason)
                self.exit_code = FAILED
                await self._end()
                return

    async def _end(self) -> None:
        """Tell those who still wait that it is over."""
        await self._app.state.serving.batcher.close()
        await self._crew.leave()
        self._exit(1)

    def _exit(self, timeout_s: int) -> None:
        """Stop listening, and give what is computed this long to be encoded and sent."""
        self.config.timeout_graceful_shutdown = max(1, timeout_s)
        self.should_exit = True

    def _reload(self) -> None:
        """SIGHUP: take up what has changed in the folder of bundles, unless it is being read anyway."""
        if not self._app.state.starting.done():
            return
        self._keep(self._reload_bundles(), self._reloads)

    def _keep(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        """Do it; a loop alone does not keep its tasks alive."""
        tasks.add(task := self._loop.create_task(work))
        task.add_done_callback(tasks.discard)

    async def _reload_bundles(self) -> None:
        serving = self._app.state.serving
        try:
            for reason in await serving.reload():
                log.error("bundle refused: %s", reason)
        except (BundleError, ServiceError) as error:
            log.error("bundles not reloaded: %s", error)  # noqa: TRY400 - the reason is all there is to know
        else:
            gc.unfreeze()  # the replaced ones are among it
            memory.settle()
            log.info("bundles: %s", " ".join(f"{bundle.name}@{bundle.version}" for bundle in serving.loaded()))
