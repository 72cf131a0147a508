"""What Ray Serve's proxy costs beside the plain service, and what more replicas bring.

    .venv-ray/bin/python -m benchmarks.serving.on_ray    (needs wrk; `make test-ray` makes the environment)

Ray listens on every interface, so this enters a network namespace of its own first.
"""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.tools import wrk
from benchmarks.tools.client import Request
from benchmarks.tools.process import running
from benchmarks.tools.ray_cluster import HTTP_PORT, ROOT, Cluster, enter_namespace, wait_for

SINGLE = "/sample?seed=1"
MANY = "/sample?seed=1&count=256&format=npy"
FULL_BATCH = "/sample?seed=1&count=512&format=npy"  # so that no two requests share one
LOADS = ((SINGLE, 1), (SINGLE, 16), (MANY, 1), (MANY, 16))
MOST_RATIO = {SINGLE: 4.0, MANY: 1.2}
LEAST_OF_IDEAL = 0.9
SETTINGS = {"GAN_BUNDLES": str(ROOT / "bundles"), "GAN_DEVICE": "cpu", "GAN_SCORED_SHARE": "0"}


def rate(port: int, target: str, connections: int, seconds: float) -> float:
    """Requests that were answered in a second."""
    seen = wrk.measure(port, Request("GET", target), connections, seconds, 0)
    assert not seen.failed
    return seen.per_s


def overhead(cluster: Cluster, seconds: float) -> bool:
    """The plain service beside one replica, turn by turn. Whether every ratio is as small as is wanted."""
    good = True
    with running(device="cpu", processors=1, scored_share=0) as service:
        for target, connections in LOADS:
            plain = rate(service.port, target, connections, seconds)
            behind = rate(HTTP_PORT, target, connections, seconds)
            good &= plain / behind <= MOST_RATIO[target]
            print(
                f"{target:42} {connections:3} connections: plain {plain:7.0f}/s, Ray {behind:7.0f}/s, "
                f"{plain / behind:.2f} times",
                flush=True,
            )
    cluster.answered()
    return good


def _has_pages(cluster: Cluster, count: int) -> bool:
    return len(cluster.pages()) == count


def scaling(cluster: Cluster, import_path: str, sizes: tuple[int, ...], seconds: float) -> list[float]:
    """The rate with each number of replicas, of requests that fill a batch each."""
    rates = []
    for size in sizes:
        cluster.deploy(SETTINGS, import_path=import_path, num_replicas=size)
        cluster.wait_until_running(size)
        wait_for(partial(_has_pages, cluster, size))
        rates.append(rate(HTTP_PORT, FULL_BATCH, 4 * size, seconds))
        print(
            f"{import_path}: {size} replicas {rates[-1]:.1f}/s, {rates[-1] / rates[0] / size:.2f} of ideal", flush=True
        )
    return rates


def main() -> int:
    """Measure; 1 where an expectation is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--only", choices=("overhead", "sleeping", "computing"))
    options = parser.parse_args()
    enter_namespace([sys.executable, "-m", "benchmarks.serving.on_ray", *sys.argv[1:]])
    folder = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))
    good = True
    try:
        with Cluster(folder).running() as cluster:
            cluster.add_node(4)
            if options.only in {None, "overhead"}:
                cluster.deploy(SETTINGS, num_replicas=1)
                cluster.wait_until_running(1)
                wait_for(lambda: len(cluster.pages()) == 1)
                good &= overhead(cluster, options.seconds)
            if options.only in {None, "sleeping"}:
                rates = scaling(cluster, "benchmarks.serving.sleeping_replica:app", (1, 2, 4), options.seconds)
                good &= rates[2] >= LEAST_OF_IDEAL * 4 * rates[0]
            if options.only in {None, "computing"}:
                scaling(cluster, "service.ray:app", (1, 2), options.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return not good


if __name__ == "__main__":
    sys.exit(main())
