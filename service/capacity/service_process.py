"""The operator's own service, with their settings, as a process of its own on a free port of this machine.

Changed are only what would keep us from asking (the address, keys and their limits) and from stopping at once. Where
the service has keys, this one has another one of its own, so that others on this machine get nothing from it.
"""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from service.capacity.client import HOST, Client, NoReply, Reply, Request
from service.settings import Settings, variable

START_S, STOP_S = 300, 60
POLL_S = 0.05
OK = 200
LOG_BYTES = 2**16  # of its end, to show where it fails
_KEYS = ("api_keys", "api_keys_file", "admin_keys", "admin_keys_file", "key_images_per_s", "key_images_in_flight")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class StartError(Exception):
    """The service did not start; the message has the end of its log, `code` is its exit code or 1."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class ServiceProcess:
    """A service that answers while the block lasts.

    Args:
        settings: Those that the flags and the environment give.
        flags: The flags, by field name.
        changes: Settings, by field name, that are to be others.
        module: What `python -m` runs.

    Raises:
        StartError: On entering.
    """

    def __init__(
        self, settings: Settings, flags: Mapping[str, str], changes: Mapping[str, object], module: str = "service"
    ) -> None:
        self.port = _free_port()
        self._module = module
        self._tls = _any_certificate() if settings.tls_cert_file else None
        self._key = secrets.token_urlsafe() if settings.api_keys or settings.api_keys_file else None
        values = {**flags, **changes, "host": HOST, "port": self.port, "drain_delay_s": 0}
        if self._key is not None:
            values |= dict.fromkeys(_KEYS, "") | {"api_keys": self._key}
        self._environment = os.environ | {variable(name): str(value) for name, value in values.items()}
        self._log = _Tail()

    async def __aenter__(self) -> Self:
        self._begin()
        try:
            is_ready = await self._gets_ready()
        except BaseException:
            self.stop()
            raise
        if not is_ready:
            self.stop()
            raise StartError(f"the service did not start:\n{self._log.text()}", abs(self._process.returncode) or 1)
        return self

    def _begin(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - this very service
            [sys.executable, "-m", self._module],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log.writer,
        )
        self._log.begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    async def _gets_ready(self) -> bool:
        give_up = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < give_up:
            with contextlib.suppress(NoReply):
                if (await self.ask(Request("GET", "/readyz"))).status == OK:
                    return True
            await asyncio.sleep(POLL_S)
        return False

    def stop(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.end()

    def client(self, max_connections: int) -> Client:
        """A client of it."""
        return Client(self.port, tls=self._tls, max_connections=max_connections)

    def request(self, count: int, number: int) -> Request:
        """A request for so many images that no other number's request asks for."""
        return Request("GET", f"/sample?count={count}&seed={number}", count, headers=self._headers)

    @property
    def _headers(self) -> tuple[tuple[str, str], ...]:
        return () if self._key is None else (("X-API-Key", self._key),)

    async def ask(self, request: Request) -> Reply:
        """One reply, over a connection of its own.

        Raises:
            NoReply: There is none.
        """
        return await Client(self.port, tls=self._tls, reuse=False).ask(request._replace(headers=self._headers))

    async def bundle_and_device(self) -> tuple[str, str]:
        """What it draws from, `name@version`, and on which device."""
        reply = await self.ask(self.request(1, 0))
        if reply.status != OK:
            raise StartError(f"the service does not draw: {reply.status} {reply.body.decode(errors='replace')}")
        page = (await self.ask(Request("GET", "/metrics"))).body.decode()
        infos = [dict(_LABEL.findall(line)) for line in page.splitlines() if line.startswith("gan_bundle_info{")]
        return reply.headers["x-bundle"], infos[0]["device"]


class _Tail:
    """Reads a log so that its writer never waits, and keeps its end."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        self._end = b""
        self._thread = threading.Thread(target=self._read, name="log", daemon=True)

    def begin(self) -> None:
        """Read, now that the writer is in another process."""
        os.close(self.writer)
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self._reader, LOG_BYTES):
            self._end = (self._end + part)[-LOG_BYTES:]

    def end(self) -> None:
        """Once its writers have ended."""
        self._thread.join()
        os.close(self._reader)

    def text(self) -> str:
        """The end of it."""
        return self._end.decode(errors="replace").strip()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as one:
        return int(one.getsockname()[1])


def _any_certificate() -> ssl.SSLContext:
    """For our own process on this machine, whose certificate is for another name."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
