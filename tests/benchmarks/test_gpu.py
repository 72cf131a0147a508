"""The program that measures GPUs runs; what it finds on a CPU says nothing."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.serving import gpu
from benchmarks.tools import wrk
from models.bundle import read_bundle

BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.mark.slow
def test_every_way_of_a_device_has_a_rate_and_what_it_could_be() -> None:
    """Images are counted that came back, noise and all."""
    bundle = read_bundle(BUNDLES / gpu.BUNDLE)
    for way in gpu.ways("cpu"):
        assert gpu.engine_rate("cpu", way, bundle, rows=64, seconds=0.1) > 64
        allowed = gpu.allowed_rate("cpu", way, bundle, rows=64, seconds=0.1)
        assert allowed["bus"] > allowed["arithmetic"] > 64


@pytest.mark.skipif(not wrk.is_there(), reason="wrk is not installed")
@pytest.mark.slow
def test_the_service_is_put_beside_itself_without_an_engine() -> None:
    """Both answer."""
    rates = gpu.http_rates("cpu", 1, 1, str(BUNDLES))
    assert [len(seen) for seen in rates.values()] == [1, 1]
    assert all(rate > 1 for seen in rates.values() for rate in seen)


@pytest.mark.slow
def test_requests_are_asked_twice_and_memory_is_read_after_each() -> None:
    """Where there is no device memory, none is added."""
    assert asyncio.run(gpu.memory_growth("cpu", str(BUNDLES), requests=8)) == {"allocated": 0, "reserved": 0}
