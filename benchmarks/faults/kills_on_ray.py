"""What clients notice of replicas that are killed behind Ray's proxy, one after the other, under steady load.

    .venv-ray/bin/python -m benchmarks.faults.kills_on_ray    (`make test-ray` makes the environment)

Ray listens on every interface, so this enters a network namespace of its own first.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tools.ray_cluster import Cluster, enter_namespace, wait_for
from benchmarks.tools.steady_load import Load
from tests.conftest import GREY, write_tiny

BETWEEN = 500  # requests before each kill


def main() -> int:
    """Kill and count; 1 if any request has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=420.0, help="how long")
    options = parser.parse_args()
    enter_namespace([sys.executable, "-m", "benchmarks.faults.kills_on_ray", *sys.argv[1:]])
    folder = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))
    try:
        write_tiny(folder / "bundles" / "tiny", GREY, None, None)
        with Cluster(folder).running() as cluster:
            cluster.add_node(2)
            settings = {"GAN_BUNDLES": str(folder / "bundles"), "GAN_DEVICE": "cpu", "GAN_SCORED_SHARE": "0"}
            cluster.deploy(settings, num_replicas=2)
            cluster.wait_until_running(2)
            return kill_on(cluster, time.monotonic() + options.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def kill_on(cluster: Cluster, until: float) -> int:
    """Kill one of two replicas whenever both are there."""
    kills = 0
    with Load().running() as load:
        while time.monotonic() < until:
            wait_for(lambda: len(cluster.pages()) == 2)
            load.wait_for(BETWEEN)
            victim = cluster.replicas()[kills % 2].pid
            os.kill(victim, signal.SIGKILL)
            kills += 1
            wait_for(lambda pid=victim: pid not in {replica.pid for replica in cluster.replicas()})  # type: ignore[misc]
            cluster.wait_until_running(2)
            print(f"{kills} kills: {dict(load.outcomes)}", flush=True)
    return int(set(load.outcomes) != {200})


if __name__ == "__main__":
    sys.exit(main())
