"""Runs the service in a process of its own, as operators do, and looks at it from outside: metrics, memory, log."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.tools.client import Client, Reply, Request

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 120, 60  # patience, on a busy machine
POLL_S = 0.05
SPARE_FILES = 256
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SERVING = re.compile(r"serving https?://127\.0\.0\.1:([0-9]+)")  # the bundles are loaded


class Readings:
    """What /metrics said at one moment."""

    def __init__(self, page: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the series of this name that have these labels."""
        wanted = labels.items()
        return sum(s.value for s in self._samples if s.name == name and wanted <= s.labels.items())


class Service:
    """A service process that has loaded its bundles and answers.

    Args:
        module: What `python -m` runs: the service, or a program of this folder that is the service and a little more.
        arguments: For that program.
        settings: By field name, as in `Settings`; GAN_ variables of this process don't reach it. Unless they say
            otherwise it has one worker: memory and processor time are those of one process.

    Raises:
        RuntimeError: It ended, or was not ready in time; its log is in the message.
    """

    def __init__(self, module: str = "service", arguments: Sequence[str] = (), **settings: object) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GAN_")}
        settings = {"host": "127.0.0.1", "port": 0, "log_format": "json", "workers": 1} | settings
        environment |= {f"GAN_{name.upper()}": str(value) for name, value in settings.items()}
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 — closed by `stop`
        self._process = subprocess.Popen(  # noqa: S603 — our own modules
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )
        self.pid = self._process.pid
        try:
            self.wait_for_log('"serving http')
            self.port = int(_SERVING.findall(self.log())[0])
        except BaseException:
            self.stop()
            raise

    def log(self) -> str:
        """All that it has written to its log so far."""
        # Opened once more: a read through ours would move the place that the process writes at.
        return Path(f"/proc/self/fd/{self._log.fileno()}").read_text()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Return once the log has this text so many times.

        Raises:
            RuntimeError: The process ended, or it took too long.
        """
        give_up = time.monotonic() + START_S
        while self.log().count(text) < times:
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{text!r} is not in the log:\n{self.log()}")
            time.sleep(POLL_S)

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """The log's lines, parsed."""
        for line in self.log().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    async def get(self, target: str, headers: Mapping[str, str] | None = None) -> Reply:
        """One reply, over a connection of its own."""
        return await self.ask(Request("GET", target, headers=tuple((headers or {}).items())))

    async def ask(self, request: Request) -> Reply:
        """One reply, over a connection of its own."""
        return await Client(self.port, reuse=False).ask(request)

    async def metrics(self) -> Readings:
        """What /metrics says now."""
        return Readings((await self.get("/metrics")).body.decode())

    def rss_bytes(self) -> int:
        """Resident memory of the process."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE_BYTES

    def cpu_s(self) -> float:
        """Processor seconds that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S  # user and system

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self._process.wait(STOP_S)

    def stop(self) -> int:
        """End it in order if it runs, and forget its log. Returns the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        self._log.close()
        return code


def allow_connections(count: int) -> None:
    """Let this process, and services that it starts, have so many connections open beside everything else.

    Raises:
        ValueError: The system's hard limit is lower.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + SPARE_FILES), most))


@contextmanager
def running(module: str = "service", arguments: Sequence[str] = (), **settings: object) -> Iterator[Service]:
    """A service while the block lasts."""
    service = Service(module, arguments, **settings)
    try:
        yield service
    finally:
        service.stop()
