"""What the tests on real Ray share: one cluster of two nodes, with a replica of the service on each."""

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.tools.ray_cluster import Cluster, wait_for
from tests.conftest import CALIBRATION, COLOUR, GREY, write_tiny


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """For Ray's files and the bundles. Its path is short, for Ray's sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="gr", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def bundles(folder: Path) -> Path:
    """The bundles of tests/conftest.py, in a folder that the replicas serve."""
    root = folder / "bundles"
    write_tiny(root / "tiny", GREY, None, None)
    write_tiny(root / "rgb", COLOUR, None, CALIBRATION)
    write_tiny(root / "cond", GREY, ("cat", "dog", "owl"), CALIBRATION)
    return root


@pytest.fixture(scope="session")
def started(folder: Path, bundles: Path) -> Iterator[Cluster]:
    """The cluster."""
    variables = {
        "GAN_BUNDLES": str(bundles),
        "GAN_DEFAULT_BUNDLE": "tiny",
        "GAN_DEVICE": "cpu",
        "GAN_SCORED_SHARE": "0",
    }
    with Cluster(folder).running() as cluster:
        cluster.add_node(1)
        with ThreadPoolExecutor() as beside:  # each takes some seconds
            second = beside.submit(cluster.add_node, 1)
            cluster.deploy(variables, num_replicas=2)
            second.result()
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """The cluster, with both nodes there and a replica on each, whatever the test before has ended."""
    while len(started.raylets) < 2:
        started.add_node(1)
    replicas = started.wait_until_running(2)
    assert len({replica.raylet for replica in replicas}) == 2
    wait_for(lambda: len(started.pages()) == 2)
    return started
