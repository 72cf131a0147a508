"""Makes the service fail in each way that an alert is for, and reports which alerts somebody gets, and after how long.

    python -m benchmarks.faults.alerts [FAILURE ...] [--factor 60]

A Prometheus and an Alertmanager (Debian's packages) watch the service with the files of deploy/, and a receiver notes
what it is told. A time is counted from the failure: to the scrape that shows it, through the rule's own waiting, until
the alert fires, and until the receiver has it. What takes hours, growing memory and drift, is made `factor` times
faster, with the durations of these two rules divided by it.
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults.gated import HELD
from benchmarks.faults.swaps import make_versions
from benchmarks.tools.client import Client, Request
from benchmarks.tools.process import running
from benchmarks.tools.report import Check, finish, parser, table
from benchmarks.tools.watchers import Watchers, free_port, watching
from models.bundle import read_bundle

STEADY_S = 20  # some scrapes of a service that is well
UPLOADS, UPLOAD_BYTES, UPLOAD_S = 7, 30 * 2**20, 500


def steady(seconds: float = STEADY_S) -> None:
    """Let Prometheus see a service that is well."""
    time.sleep(seconds)


@contextmanager
def asking(port: int, target: str, at_once: int, per_s: float) -> Iterator[None]:
    """Ask for so much at once, so many times a second, whatever comes of it, while the block lasts."""
    stop = threading.Event()

    async def ask() -> None:
        async with Client(port) as client:
            while not stop.is_set():
                await asyncio.gather(
                    *(client.exchange(Request("GET", target)) for _ in range(at_once)), asyncio.sleep(1 / per_s)
                )

    thread = threading.Thread(target=lambda: asyncio.run(ask()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# Each failure is a block, with the service on a port, that begins when it happens: at the time that it gives.


@contextmanager
def down(port: int, bundles: Path) -> Iterator[float]:
    """The process is gone, and nobody starts it again."""
    with running(port=port, bundles=bundles) as service:
        steady()
        service.send(signal.SIGKILL)
        yield time.monotonic()


@contextmanager
def worker_killed(port: int, bundles: Path) -> Iterator[float]:
    """A worker is killed, so the service ends, and whoever runs it starts it again."""
    with running(port=port, bundles=bundles, workers=2) as service:
        steady()
        worker = Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()[-1]
        os.kill(int(worker), signal.SIGKILL)
        moment = time.monotonic()
        service.wait()
    with running(port=port, bundles=bundles, workers=2):
        yield moment


@contextmanager
def engine_stuck(port: int, bundles: Path) -> Iterator[float]:
    """A batch does not end, and clients go on asking."""
    one, other = (asking(port, "/sample", 1, per_s) for per_s in (2, 3))  # what comes later waits for the first's batch
    with running("benchmarks.faults.gated", port=port, bundles=bundles) as service, one, other:
        steady()
        service.send(signal.SIGUSR1)
        service.wait_for_log(HELD)
        yield time.monotonic()


@contextmanager
def queue_full(port: int, bundles: Path) -> Iterator[float]:
    """Crowds ask for more than a very short queue holds."""
    with running(port=port, bundles=bundles, max_count=4, max_queued_images=4):
        with asking(port, "/sample?count=4", 1, 2):
            steady(60)
        moment = time.monotonic()
        with asking(port, "/sample?count=4", 12, 2):
            yield moment


@contextmanager
def bundle_refused(port: int, bundles: Path) -> Iterator[float]:
    """A damaged bundle takes the place of the one that is served, and the service is told to look."""
    with tempfile.TemporaryDirectory() as name:
        first, _, damaged = make_versions(read_bundle(bundles / "mnist-mlp"), Path(name))
        served = Path(name) / "served"
        shutil.copytree(first, served / "first")
        with running(port=port, bundles=served) as service:
            steady()
            shutil.rmtree(served / "first")
            shutil.copytree(damaged, served / "damaged")
            service.send(signal.SIGHUP)
            yield time.monotonic()


@contextmanager
def memory_growing(port: int, bundles: Path) -> Iterator[float]:
    """Uploads come in so slowly that what is kept of them grows for minutes."""
    lines = "POST /discriminate HTTP/1.1", "Host: a", "Content-Type: image/png", f"Content-Length: {UPLOAD_BYTES}"
    head = "\r\n".join([*lines, "", ""])
    with running(port=port, bundles=bundles, deadline_s=2 * UPLOAD_S, max_deadline_s=2 * UPLOAD_S):
        steady()
        moment, stop = time.monotonic(), threading.Event()

        def upload() -> None:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head.encode())
                for _ in range(UPLOAD_S):
                    connection.sendall(os.urandom(UPLOAD_BYTES // UPLOAD_S))
                    if stop.wait(1):
                        return

        threads = [threading.Thread(target=upload) for _ in range(UPLOADS)]
        for thread in threads:
            thread.start()
        try:
            yield moment
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@contextmanager
def drift(port: int, bundles: Path) -> Iterator[float]:
    """The images that are drawn are others than before: truncated, as clients ask for them."""
    with running(port=port, bundles=bundles, scored_share=1):
        with asking(port, "/sample?count=16&format=npy&bundle=mnist-mlp", 1, 4):
            steady(100)
        with asking(port, "/sample?count=16&format=npy&bundle=mnist-mlp&truncation=0.2", 1, 4):
            yield time.monotonic()


class Failure(NamedTuple):
    """How it is made, the alerts that it leads to, the last one last, and how long that may take."""

    make: Callable[[int, Path], AbstractContextManager[float]]
    alerts: tuple[str, ...]
    within_s: float = 120


FAILURES = {
    "down": Failure(down, ("GanServiceDown",)),
    "worker-killed": Failure(worker_killed, ("GanServiceRestarted",)),
    "engine-stuck": Failure(engine_stuck, ("GanServiceEngineStuck",)),
    "queue-full": Failure(queue_full, ("GanServiceErrorBudgetBurn14x", "GanServiceRejecting"), 900),
    "bundle-refused": Failure(bundle_refused, ("GanServiceBundleRefused",)),
    "memory-growing": Failure(memory_growing, ("GanServiceMemoryGrowing",), UPLOAD_S),
    "drift": Failure(drift, ("GanServiceDrift",), 300),
}


def produce(name: str, bundles: Path, factor: float) -> Iterator[dict[str, object]]:
    """Let the service fail once; every alert that came of it, and those that did not."""
    failure, port = FAILURES[name], free_port()
    with watching(port, factor) as watchers, failure.make(port, bundles) as moment:
        for alert in failure.alerts:
            watchers.wait_for(alert, failure.within_s)
        for alert in dict.fromkeys([*failure.alerts, *watchers.notified]):
            yield {"failure": name, "alert": alert, **times(watchers, alert, moment)}


def times(watchers: Watchers, alert: str, moment: float) -> dict[str, object]:
    """Seconds from the failure until the alert fired, and until somebody was told."""
    seen = {"fires_s": watchers.firing, "told_s": watchers.notified}
    return {what: round(when[alert] - moment, 1) if alert in when else None for what, when in seen.items()}


def main() -> int:
    """Read the arguments, and let it fail in all these ways, one after the other."""
    made = parser("Let the service fail, and see who is told.")
    made.add_argument("failures", nargs="*", metavar="FAILURE", help=f"of {', '.join(FAILURES)}; none: all of them")
    made.add_argument("--factor", type=float, default=60, help="how much faster memory grows and images drift")
    arguments = made.parse_args()
    names = arguments.failures or list(FAILURES)
    rows = [row for name in names for row in produce(name, arguments.bundles, arguments.factor)]
    table(rows)
    told = {row["alert"] for row in rows if row["told_s"] is not None}
    wanted = [alert for name in names for alert in FAILURES[name].alerts]
    checks = [Check(f"somebody is told: {alert}", str(alert in told), alert in told) for alert in wanted]
    return finish("alerts", {"factor": arguments.factor, "alerts": rows}, checks)


if __name__ == "__main__":
    sys.exit(main())
