"""Runs a Prometheus and an Alertmanager with the files of deploy/, and receives what they send."""

import contextlib
import http.server
import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.tools.process import ROOT

PROGRAMS = {"prometheus": ["prometheus"], "alertmanager": ["prometheus-alertmanager", "alertmanager"]}  # Debian's first
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SCALED = {"GanServiceMemoryGrowing", "GanServiceDrift", "gan-service-drift"}  # alerts and groups that take hours


class Watchers:
    """Both of them, and a receiver of notifications.

    Attributes:
        firing: When each alert was first seen to fire in Prometheus, by the monotonic clock.
        notified: When the receiver was first told of each.
    """

    def __init__(self, prometheus_port: int) -> None:
        self._alerts = f"http://127.0.0.1:{prometheus_port}/api/v1/alerts"
        self.firing: dict[str, float] = {}
        self.notified: dict[str, float] = {}

    def look(self) -> None:
        """Ask Prometheus what fires."""
        with contextlib.suppress(OSError), urllib.request.urlopen(self._alerts, timeout=2) as reply:  # noqa: S310
            for alert in json.load(reply)["data"]["alerts"]:
                if alert["state"] == "firing":
                    self.firing.setdefault(alert["labels"]["alertname"], time.monotonic())

    def tell(self, notification: dict[str, Any]) -> None:
        """Take what Alertmanager sends."""
        for alert in notification["alerts"]:
            if alert["status"] == "firing":
                self.notified.setdefault(alert["labels"]["alertname"], time.monotonic())

    def wait_for(self, alert: str, within_s: float) -> bool:
        """Whether the receiver is told of an alert in time."""
        give_up = time.monotonic() + within_s
        while alert not in self.notified and time.monotonic() < give_up:
            self.look()
            time.sleep(0.2)
        return alert in self.notified


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def faster(expression: str, factor: float) -> str:
    """An expression or a duration with all its durations divided; of no less than a second."""
    return re.sub(
        r"\b(\d+)([smhd])\b",
        lambda found: f"{max(1, round(int(found[1]) * SECONDS[found[2]] / factor))}s",
        expression,
    )


def write_rules(path: Path, factor: float) -> None:
    """The rules, those of SCALED with their durations divided."""
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    for group in rules["groups"]:
        if group["name"] in SCALED:
            group["interval"] = faster(group["interval"], factor)
        for rule in group["rules"]:
            if {group["name"], rule.get("alert")} & SCALED:
                rule |= {key: faster(rule[key], factor) for key in ("expr", "for") if key in rule}
    path.write_text(yaml.safe_dump(rules))


def write_settings(folder: Path, service: int, alertmanager: int, receiver: int) -> None:
    """Both programs' files, with the addresses of this machine and one receiver for all."""
    settings = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{service}"]}]
    settings["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{alertmanager}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    settings = yaml.safe_load((ROOT / "deploy/alertmanager/alertmanager.yml").read_text())
    for one in settings["receivers"]:
        one["webhook_configs"] = [{"url": f"http://127.0.0.1:{receiver}/", "send_resolved": False}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(settings))


@contextmanager
def receiving(watchers: Watchers) -> Iterator[int]:
    """A port at which Alertmanager can tell the watchers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            watchers.tell(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def program(name: str) -> str:
    """The path of one of the programs.

    Raises:
        RuntimeError: It is not installed.
    """
    for candidate in PROGRAMS[name]:
        if path := shutil.which(candidate):
            return path
    raise RuntimeError(f"{name} is not installed; Debian has {PROGRAMS[name][0]}")


@contextmanager
def watching(service: int, factor: float) -> Iterator[Watchers]:
    """Have the service on a port watched while the block lasts."""
    prometheus, alertmanager = free_port(), free_port()
    watchers = Watchers(prometheus)
    with receiving(watchers) as receiver, tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as programs:
        folder = Path(name)
        write_settings(folder, service, alertmanager, receiver)
        write_rules(folder / "rules.yml", factor)
        flags = {
            "prometheus": [f"--web.listen-address=127.0.0.1:{prometheus}", f"--storage.tsdb.path={folder / 'data'}"],
            "alertmanager": [
                f"--web.listen-address=127.0.0.1:{alertmanager}",
                f"--storage.path={folder / 'alerts'}",
                "--cluster.listen-address=",
            ],
        }
        for one, arguments in flags.items():
            command = [program(one), f"--config.file={folder / one}.yml", *arguments]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
            programs.callback(process.wait)
            programs.callback(process.terminate)
        yield watchers
