"""A real Prometheus, where it is installed, that scrapes a service as fast as tests need it."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

EVERY = "500ms"  # scraped, and rules evaluated
Sample = tuple[dict[str, str], float]


class Prometheus:
    """Prometheus on a port of its own, with its data in `folder`.

    Args:
        folder: Empty.
        ports: Where services listen on this machine: the targets of the job `gan-service`.
        rules: Files of rules.
    """

    def __init__(self, folder: Path, ports: list[int], rules: list[Path]) -> None:
        self._configuration = folder / "prometheus.yml"
        self._data = folder / "data"
        self._log = folder / "prometheus.log"
        job = {
            "job_name": "gan-service",
            "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
        }
        configuration = {
            "global": {"scrape_interval": EVERY, "scrape_timeout": EVERY, "evaluation_interval": EVERY},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [job],
        }
        self._configuration.write_text(yaml.safe_dump(configuration))

    @contextmanager
    def running(self) -> "Iterator[Prometheus]":
        """Scrape while the block lasts."""
        command = ["prometheus", f"--config.file={self._configuration}", f"--storage.tsdb.path={self._data}"]
        with self._log.open("w") as log:
            process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stdout=log, stderr=log)
        try:
            self.wait_for(lambda: process.poll() is not None or "is ready to receive" in self._log.read_text())
            assert process.poll() is None, self._log.read_text()
            (port,) = re.findall(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', self._log.read_text())
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False) as self._client:
                yield self
        finally:
            process.terminate()
            process.wait(60)

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers; an error of the query fails the test with Prometheus' own words."""
        answer = self._client.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{answer['error']}: {parameters}"
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """The series of an expression now, or at a Unix time."""
        when = {} if at is None else {"time": str(at)}
        result = self.get("/query", query=expression, **when)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def scrape(self, seconds: float = 0) -> float:
        """Wait until every target was scraped so long after now; return when the first of them was."""
        until = time.time() + seconds
        found: list[float] = []

        def have_been_scraped() -> bool:
            found[:] = [value for _, value in self.query("min(timestamp(up) and up == 1)")]
            return any(value > until for value in found)

        self.wait_for(have_been_scraped)
        return found[0]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when something is the case; fail where it is not in a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="session")
def prometheus() -> type[Prometheus]:
    """For tests that need a real one; they are left out where it is not installed."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    return Prometheus
