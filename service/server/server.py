"""Runs the application under uvicorn: accepts connections, reloads and drains on signals, and gives the exit code."""

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import signal
import socket
import ssl
import sys
import time
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from models.bundle import BundleError
from service.http.layers.auth import Keys, KeyScope, has_files, read_keys
from service.machine.worker_group import PROBES, WorkerGroup
from service.server import process_memory as memory
from service.server.listener import STALLED_CLIENT_S, Acceptor, in_words
from service.server.protocol import HttpConnection
from service.server.signals import sighup_reloads
from service.server.tls import HANDSHAKE_S, read_tls
from service.server.write_burst import WriteBurst
from service.settings import Settings, SettingsError

if sys.platform == "win32":
    from asyncio import SelectorEventLoop as new_event_loop  # noqa: N813 - in uvloop it is a function
else:
    from uvloop import new_event_loop

OK, FAILED, BAD_BUNDLE, BY_SIGNAL = 0, 1, 3, 128
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that the proxy closes first
CANCEL_GRACE_S = 1.0  # time for cancelled requests to send their last reply
LINGER_S = 10.0  # a process that has failed for good ends itself after this, so that probes and metrics can show why

log = logging.getLogger(__name__)


def run(
    app: FastAPI,
    settings: Settings,
    listeners: list[socket.socket],
    worker_group: WorkerGroup | None = None,
    tls: ssl.SSLContext | None = None,
) -> int:
    """Serve until a signal or a failed start, and return the process' exit code.

    A worker among others has no listener; `worker_group` gives it connections.
    """
    gc.freeze()  # imported objects stay: exclude them from garbage collection
    server = Server(app, settings, worker_group, tls)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(server.serve(listeners))
    if server.exit_code not in {FAILED, BAD_BUNDLE}:
        log.info("stopped")
    return server.exit_code


class Server(uvicorn.Server):
    """uvicorn, but it drains before it stops listening, and a failed start ends it.

    uvicorn raises a signal again after its shutdown, so that the process dies of it. Here signals are handled before
    uvicorn records them, so a process that has drained ends with exit code 0.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        worker_group: WorkerGroup | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
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
        self._tls = tls  # of new connections; None: they are plain
        self._draining: asyncio.Task[None] | None = None
        self._background_tasks: list[asyncio.Task[None]] = []
        self._acceptors: list[Acceptor] = []
        self._burst = WriteBurst()
        self._connecting: set[asyncio.Task[None]] = set()
        self.reload_requested = asyncio.Event()  # set by SIGHUP, cleared when a reload begins
        self.keys_requested = asyncio.Event()  # likewise, for the files of keys
        self.tls_requested = asyncio.Event()  # likewise, for the certificate

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on these sockets until told to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept; the bundles are still being loaded."""
        if sighup_reloads():  # before anything else: the start may miss changes from now on
            with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread, as in tests
                self._loop.add_signal_handler(signal.SIGHUP, self.request_reload)
        await super().startup([])  # no sockets for uvicorn: Acceptor accepts instead
        self._acceptors = [Acceptor(listener, self.take) for listener in sockets or []]
        for acceptor in self._acceptors:
            acceptor.start()
        for requested in (self.keys_requested, self.tls_requested):  # they may have changed before SIGHUP was heeded
            requested.set()
        chores = (self._watch(), self._keep_reloading(), self._keep_reading_keys(), self._keep_reading_tls())
        self._background_tasks = [self._loop.create_task(chore) for chore in (*chores, memory.keep_trimming_heap())]
        await self._worker_group.join(self)
        addresses = [in_words(listener, has_tls=self._tls is not None) for listener in sockets or []]
        self._app.state.starting.add_done_callback(lambda starting: self._started(starting, addresses))

    def request_reload(self) -> None:
        """Read the files of keys, the certificate and the folder of bundles again."""
        self.keys_requested.set()
        self.tls_requested.set()
        self.reload_requested.set()

    def reasons(self) -> dict[str, str | None]:
        """For each probe, why this process says no; None for yes."""
        health = self._app.state.manager.health
        return {probe: health.own(probe) for probe in PROBES}

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and end each connection once its requests have been answered."""
        for acceptor in self._acceptors:
            acceptor.stop()
        if self._connecting:  # so that uvicorn knows of them when it closes connections
            _, unfinished = await asyncio.wait(self._connecting, timeout=CANCEL_GRACE_S)
            for handshake in unfinished:
                handshake.cancel()
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn then skips the lifespan's end, and logs an error when the loop's end cancels it
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), CANCEL_GRACE_S)
        # uvicorn no longer waits for the rest: cancelled requests, which still send a reply, and connections.
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CANCEL_GRACE_S)
            await asyncio.sleep(0)  # replies are written at the end of a loop step
        for connection in list(self.server_state.connections):
            cast("HttpConnection", connection).hang_up()
        await asyncio.sleep(0)

    def take(self, connection: socket.socket) -> None:
        """Serve this connection."""
        connection.settimeout(0)
        task = self._loop.create_task(self._connect(connection))
        self._connecting.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection, **self._tls_options())
        except OSError as error:  # the client has left already, or does not speak TLS as we do
            log.debug("a connection was lost: %s", error)
            connection.close()
            self._worker_group.connection_closed()

    def _tls_options(self) -> dict[str, Any]:
        if self._tls is None:
            return {}
        return {"ssl": self._tls, "ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": STALLED_CLIENT_S}

    def _make_protocol(self) -> HttpConnection:
        return HttpConnection(
            self.config,
            self.server_state,
            self.lifespan.state,
            burst=self._burst,
            when_closed=self._worker_group.connection_closed,
        )

    def supervisor_lost(self) -> None:
        """Drain, because without the supervisor no client can connect."""
        if self._draining is None:
            log.error("the supervisor is gone")
            self._stop(signal.SIGTERM)

    def _started(self, starting: "asyncio.Task[None]", addresses: list[str]) -> None:
        if starting.cancelled():
            return
        error = starting.exception()
        if error is None:
            memory.freeze_startup_objects()
            serves = self._serves()
            self._worker_group.has_started(serves)
            if addresses:  # else the supervisor logs this
                log.info("serving %s", " ".join(addresses), extra={"fields": {**serves, **self._worker_group.size}})
            return
        self.exit_code = BAD_BUNDLE if isinstance(error, BundleError) else FAILED
        self.should_exit = True

    def _serves(self) -> dict[str, object]:
        """What is served, and where it is computed."""
        manager = self._app.state.manager
        return {"bundles": _names(manager.bundles), "device": manager.engine.name}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Handle a signal to stop. Python may call this between any two instructions of the main thread."""
        # In a new context: the interrupted one may be a request's, whose id must not get into our log lines.
        self._loop.call_soon_threadsafe(self._stop, signal.Signals(sig), context=contextvars.Context())

    def _stop(self, sig: signal.Signals) -> None:
        """Drain on the first signal; stop at once on another."""
        if self._draining is None:
            log.info("%s: draining", sig.name)
            # SIGINT comes from a terminal, where there is no load balancer to wait for.
            delay_s = 0.0 if sig == signal.SIGINT else self._settings.drain_delay_s
            self._draining = self._loop.create_task(self._drain(delay_s))
        elif not self._worker_group.reports_second_signal:
            self.stop_at_once(sig)

    def stop_at_once(self, number: int) -> None:
        """Cut the drain short, on a second signal to stop of this number."""
        log.warning("%s again: stopping at once", signal.Signals(number).name)
        self.exit_code = BY_SIGNAL + number
        if self._draining is not None:
            self._draining.cancel()
        self._draining = self._loop.create_task(self._end())
        self.force_exit = True  # uvicorn may already be waiting for slow clients

    async def _drain(self, delay_s: float) -> None:
        """Finish accepted work, while new requests are refused as `Draining`; then stop serving."""
        over = time.monotonic() + delay_s + self._settings.drain_timeout_s
        try:
            self._app.state.starting.cancel()
            await self._app.state.manager.stop(delay_s)
        finally:
            await self._worker_group.leave()
            self._exit(math.ceil(over - time.monotonic()))

    async def _watch(self) -> None:
        """End a process that has failed for good, because not every container platform checks /livez."""
        health = self._app.state.manager.health
        failing_since = None
        while True:
            await asyncio.sleep(LINGER_S / 10)
            reason = health.own("live")
            if self._draining is not None:  # it ends anyway, and its engine threads, which probes watch, end first
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
        """Fail what still waits for the engine, then stop serving."""
        await self._app.state.manager.batcher.close()
        await self._worker_group.leave()
        self._exit(1)

    def _exit(self, timeout_s: int) -> None:
        """Have uvicorn shut down; replies get `timeout_s` to be encoded and sent."""
        self.config.timeout_graceful_shutdown = max(1, timeout_s)
        self.should_exit = True

    async def _keep_reloading(self) -> None:
        """Reload changed bundles on SIGHUP; several signals during a reload lead to one more."""
        serving = self._app.state.manager
        await asyncio.wait([self._app.state.starting])
        while serving.bundles.is_started:  # false if the start failed: the process then ends
            await self.reload_requested.wait()
            self.reload_requested.clear()  # before the reload, which may miss changes from now on
            if await serving.bundles.reload_if_possible():
                gc.unfreeze()  # the replaced bundles are among the frozen objects
                memory.freeze_startup_objects()

    async def _keep_reading_keys(self) -> None:
        """Read the files of keys again on SIGHUP, without waiting for bundles; the old keys stay where one is bad."""
        keys: Keys = self._app.state.keys
        while has_files(self._settings):
            await self.keys_requested.wait()
            self.keys_requested.clear()
            try:
                changes = keys.replace_by(await asyncio.to_thread(read_keys, self._settings))
            except SettingsError as error:
                log.error("keys not read again, the old ones stay: %s", error)  # noqa: TRY400 - as above
                continue
            if changes:
                counts = {"clients": keys.count(KeyScope.USE), "administrators": keys.count(KeyScope.ADMIN)}
                log.info("keys have changed", extra={"fields": counts | changes})

    async def _keep_reading_tls(self) -> None:
        """Read the certificate and key again on SIGHUP, for new connections; the old ones stay where they are bad."""
        while self._tls is not None:
            await self.tls_requested.wait()
            self.tls_requested.clear()
            try:
                self._tls = await asyncio.to_thread(read_tls, self._settings)
            except SettingsError as error:
                log.error("certificate not read again, the old one stays: %s", error)  # noqa: TRY400 - as above
            else:
                log.info("certificate read", extra={"fields": {"file": str(self._settings.tls_cert_file)}})


def _names(bundles: Any) -> str:
    """What each name means, for the log."""
    return " ".join(f"{one.name}@{one.version}" for one in bundles.names())
