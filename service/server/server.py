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
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from models.bundle import BundleError
from service.errors import ServiceError
from service.server import process_memory as memory
from service.server.listener import Acceptor, url
from service.server.protocol import HttpConnection
from service.server.signals import sighup_reloads
from service.settings import Settings
from service.worker_group import PROBES, WorkerGroup

if sys.platform == "win32":
    from asyncio import SelectorEventLoop as new_event_loop  # noqa: N813 - in uvloop it is a function
else:
    from uvloop import new_event_loop

OK, FAILED, BAD_BUNDLE, BY_SIGNAL = 0, 1, 3, 128
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that it is they who close
CANCELLED_S = 1.0  # what is cut short at the end has so long to say so
LINGER_S = 10.0  # a process that has failed for good ends itself, once probes and metrics have had time to say why

log = logging.getLogger(__name__)


def run(
    app: FastAPI, settings: Settings, listeners: list[socket.socket], worker_group: WorkerGroup | None = None
) -> int:
    """Serve until a signal or a failed start, and return the process' exit code.

    A worker among others has no listener; its connections come from its worker_group.
    """
    gc.freeze()  # what was imported stays, and nobody need look at it again
    server = Server(app, settings, worker_group)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve(listeners))
    if server.exit_code not in {FAILED, BAD_BUNDLE}:
        log.info("stopped")
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn, but it drains before it stops listening, and a failed start ends it.

    uvicorn raises a signal again once it has shut down, so that the process dies of it. Here signals are taken over
    before uvicorn notes them: a process that has drained in order ends with exit code 0.
    """

    def __init__(self, app: FastAPI, settings: Settings, worker_group: WorkerGroup | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpConnection,
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
        self._worker_group = worker_group or WorkerGroup()
        self._draining: asyncio.Task[None] | None = None
        self._chores: list[asyncio.Task[None]] = []
        self._acceptors: list[Acceptor] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self.has_to_reload = asyncio.Event()  # a signal came, and no reload has begun since

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these sockets until told to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept; the bundles are still being loaded."""
        if sighup_reloads():  # first, for the start may miss what changes from now on
            with contextlib.suppress(RuntimeError):  # signals are the main thread's
                self._loop.add_signal_handler(signal.SIGHUP, self.has_to_reload.set)
        await super().startup([])  # uvicorn would have the loop take connections; see Acceptor
        self._acceptors = [Acceptor(listener, self.take) for listener in sockets or []]
        for acceptor in self._acceptors:
            acceptor.start()
        chores = (self._watch(), self._keep_reloading(), memory.keep_giving_back())
        self._chores = [self._loop.create_task(chore) for chore in chores]
        await self._worker_group.join(self)
        addresses = [url(listener) for listener in sockets or []]
        self._app.state.starting.add_done_callback(lambda starting: self._started(starting, addresses))

    def reasons(self) -> dict[str, str | None]:
        """Why this process says no to each probe."""
        health = self._app.state.manager.health
        return {probe: health.own(probe) for probe in PROBES}

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end those there are once they have been answered."""
        for acceptor in self._acceptors:
            acceptor.stop()
        if self._connecting:  # uvicorn tells those that it knows of
            await asyncio.wait(self._connecting)
        await super().shutdown(sockets)
        if (
            self.force_exit
        ):  # then uvicorn leaves the lifespan to be cut short by the loop's end, which it calls an error
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), CANCELLED_S)
        # What it waits for no longer: requests, which answer that they were cut short, and connections.
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCELLED_S)
            await asyncio.sleep(0)  # their replies are written at the end of a step
        for connection in list(self.server_state.connections):
            cast("HttpConnection", connection).hang_up()
        await asyncio.sleep(0)

    def take(self, connection: socket.socket) -> None:
        """Serve this connection."""
        connection.settimeout(0)
        self._connecting.add(task := self._loop.create_task(self._connect(connection)))  # a loop alone does not keep it
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection)
        except OSError as error:  # it has gone already
            log.debug("a connection was lost: %s", error)
            connection.close()
            self._worker_group.connection_closed()

    def _make_protocol(self) -> HttpConnection:
        return HttpConnection(
            self.config, self.server_state, self.lifespan.state, when_closed=self._worker_group.connection_closed
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
        elif not self._worker_group.says_when_again:
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
            await self._app.state.manager.stop(delay_s)
        finally:
            await self._worker_group.leave()
            self._exit(math.ceil(over - time.monotonic()))

    async def _watch(self) -> None:
        """End a process that nothing can bring back: not everything that starts containers looks at /livez."""
        health = self._app.state.manager.health
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
        await self._app.state.manager.batcher.close()
        await self._worker_group.leave()
        self._exit(1)

    def _exit(self, timeout_s: int) -> None:
        """Stop listening, and give what is computed this long to be encoded and sent."""
        self.config.timeout_graceful_shutdown = max(1, timeout_s)
        self.should_exit = True

    async def _keep_reloading(self) -> None:
        """SIGHUP: take up what has changed in the folder of bundles, once for all signals that came meanwhile."""
        serving = self._app.state.manager
        await asyncio.wait([self._app.state.starting])
        while serving.is_started:  # else the start has failed, and the process ends
            await self.has_to_reload.wait()
            self.has_to_reload.clear()  # now: what changes from here on, the reload may miss
            try:
                await serving.reload()
            except (BundleError, ServiceError) as error:
                log.error("bundles not reloaded: %s", error)  # noqa: TRY400 - the reason is all there is to know
            except Exception:
                log.exception("bundles not reloaded")
            else:
                gc.unfreeze()  # the replaced ones are among it
                memory.settle()
                log.info("bundles: %s", " ".join(f"{bundle.name}@{bundle.version}" for bundle in serving.loaded()))
