"""Real Ray on this machine: nodes as `ray start` starts them, in a network namespace that has nothing but `lo`."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "ray"
RAY = Path(sys.executable).with_name("ray")
GCS_PORT, DASHBOARD_PORT, HTTP_PORT = 6379, 8265, 8000
URL = f"http://127.0.0.1:{HTTP_PORT}"
START_S = 150.0
INSIDE = "IN_NAMESPACE_OF_RAY"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
Json = dict[str, Any]


class Replica(NamedTuple):
    """A replica: its id, its process, and that of its node's raylet."""

    id: str
    pid: int
    raylet: int


class Cluster:
    """Nodes of one Ray cluster, and the application that is deployed on it.

    Args:
        folder: For everything that Ray writes; its path must be short, for Ray's sockets lie in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        haproxy = folder / "h"  # short, as the paths of sockets have to be
        haproxy.mkdir()
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("GAN_", "RAY_"))}
        self._environment = plain | {
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            **dict(line.split("=", 1) for line in shlex.split((DEPLOY / "node.env").read_text(), comments=True)),
            "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        }
        self.raylets: list[int] = []  # of the nodes, the head's first
        self.config: Json = {}

    @contextmanager
    def running(self) -> "Iterator[Cluster]":
        """The cluster, until the block ends."""
        try:
            yield self
        finally:
            self.stop()

    def add_node(self, cpus: int) -> None:
        """Start a node with so many processors to give away; the first is the head."""
        place = f"--address=127.0.0.1:{GCS_PORT}"
        if not self.raylets:
            place = f"--head --port={GCS_PORT} --dashboard-port={DASHBOARD_PORT} --temp-dir={self.folder / 'ray'}"
        self.run(
            *f"start {place} --node-ip-address=127.0.0.1 --num-cpus={cpus} --disable-usage-stats".split(),
            f"--object-store-memory={100 * 2**20}",
        )
        found = (pid for pid, title in processes() if title.partition(" ")[0].endswith("/raylet") and self.owns(pid))
        self.raylets += [pid for pid in found if pid not in self.raylets and is_there(pid)]

    def kill_node(self, raylet: int) -> None:
        """End a node as a machine ends that loses its power: by its raylet, without which the rest ends itself."""
        self.raylets.remove(raylet)
        os.kill(raylet, signal.SIGKILL)

    def run(self, *arguments: str) -> str:
        """Call the command `ray`."""
        done = subprocess.run(  # noqa: S603 - our own arguments
            [RAY, *arguments], env=self._environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self, variables: Mapping[str, str], import_path: str | None = None, **options: Any) -> None:
        """Deploy deploy/ray/gan-service.yaml with these variables, program, and options of the deployment."""
        config = yaml.safe_load((DEPLOY / "gan-service.yaml").read_text())
        config["proxy_location"] = "HeadOnly"  # all nodes have the same address here, and so the same port
        (application,) = config["applications"]
        (deployment,) = application["deployments"]
        application["runtime_env"]["env_vars"] |= variables
        application["import_path"] = import_path or application["import_path"]
        if "num_replicas" in options:
            del deployment["autoscaling_config"]
        deployment |= options
        self.config = config
        call("PUT", "/api/serve/applications/", config)

    def bump(self) -> None:
        """Deploy the same again with another user_config."""
        user_config = self.config["applications"][0]["deployments"][0]["user_config"]
        user_config["revision"] += 1
        call("PUT", "/api/serve/applications/", self.config)

    def status(self) -> Json:
        """What Ray says of the application."""
        application: Json = call("GET", "/api/serve/applications/")["applications"].get("gan-service", {})
        return application

    def replicas(self) -> list[Replica]:
        """Those that run."""
        deployments = self.status().get("deployments", {}).values()
        raylets = {node_of(raylet): raylet for raylet in self.raylets}
        return [
            Replica(one["replica_id"], one["pid"], raylets.get(one["node_id"], 0))
            for deployment in deployments
            for one in deployment["replicas"]
            if one["state"] == "RUNNING"
        ]

    def wait_until_running(self, replicas: int) -> list[Replica]:
        """Return those that run once there are so many and Ray says that the application runs."""

        def runs() -> bool:
            status = self.status()
            assert status.get("status") != "DEPLOY_FAILED", status
            return status.get("status") == "RUNNING" and len(self.replicas()) == replicas

        wait_for(runs)
        return self.replicas()

    def pages(self) -> dict[str, str]:
        """What each replica answers to /metrics, by its address, at which HAProxy finds it."""
        (configuration,) = self.folder.glob("h/*/haproxy.cfg")
        addresses = re.findall(
            r"^    server SERVE_REPLICA\S+ (\S+:\d+) check", configuration.read_text(), flags=re.MULTILINE
        )
        pages = {}
        for address in addresses:
            with contextlib.suppress(OSError):  # it has ended, or is frozen
                pages[address] = fetch(f"http://{address}/metrics", timeout_s=3).decode()
        return pages

    def answered(self) -> dict[str, float]:
        """How many requests for images each replica has answered, by its address."""
        pages = self.pages().items()
        return {address: total_of(page, "gan_requests_total", route="/sample") for address, page in pages}

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric of all replicas."""
        return sum(total_of(page, name, **labels) for page in self.pages().values())

    def stop(self) -> None:
        """End all nodes, and what is left of them."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            mine = [pid for pid, _ in processes() if self.owns(pid)]
            for pid in mine:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal_number)
            deadline = time.monotonic() + 5
            while any(map(is_there, mine)) and time.monotonic() < deadline:
                time.sleep(0.05)

    def owns(self, pid: int) -> bool:
        """Whether a process was started by this cluster: its HOME says so."""
        with contextlib.suppress(OSError):
            return f"HOME={self.folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def logs(self) -> str:
        """The ends of the replicas' logs, for tests that fail."""
        files = sorted((self.folder / "ray").glob("session_2*/logs/serve/replica*"))
        return "\n".join(f"== {file.name}\n{file.read_text()[-4000:]}" for file in files)


def fetch(url: str, body: bytes | None = None, method: str = "GET", timeout_s: float = 60) -> bytes:
    """The body of a reply."""
    request = urllib.request.Request(  # noqa: S310 - our own URLs
        url, body, {"Content-Type": "application/json"}, method=method
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s) as reply:
            return bytes(reply.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from None


def call(method: str, path: str, body: Json | None = None) -> Json:
    """What the API of Ray's dashboard answers."""
    data = None if body is None else json.dumps(body).encode()
    answer: Json = json.loads(fetch(f"http://127.0.0.1:{DASHBOARD_PORT}{path}", data, method) or b"{}")
    return answer


def total_of(page: str, name: str, **labels: str) -> float:
    """The sum over the samples of this name that have these labels."""
    samples = (sample for metric in text_string_to_metric_families(page) for sample in metric.samples)
    return float(sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items()))


def enter_namespace(command: list[str]) -> None:
    """Have this process be in a network namespace that has nothing but `lo`: start it again there, unless it is."""
    if os.environ.get(INSIDE) is None:
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.environ[INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", *as_root, *command])  # noqa: S606, S607 - our own arguments
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # as `ip link set lo up`
        found = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        name, flags = struct.unpack("16sh14x", found)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | IFF_UP))


def processes() -> Iterator[tuple[int, str]]:
    """Every process and its command line."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and (title := title_of(int(place.name))):
            yield int(place.name), title


def title_of(pid: int) -> str:
    """A process' command line; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def node_of(raylet: int) -> str:
    """The id of a raylet's node."""
    found = re.search(r"--node[_-]id=([0-9a-f]{56})", title_of(raylet))
    return found[1] if found else ""


def is_there(pid: int) -> bool:
    """Whether a process runs, rather than being no more than an entry that nobody has read."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(condition: Callable[[], bool], within_s: float = START_S) -> None:
    """Return when something is the case that announces itself to nobody."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
