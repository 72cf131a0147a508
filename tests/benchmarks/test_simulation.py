"""The simulation of a worker: what a lone client costs, shared batches, large beside small, and replicas."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling.fit import costs_of, most_per_s, read_costs
from benchmarks.scaling.replicas import bursts, by_the_clock, misses, replicas_for, steady
from benchmarks.scaling.simulation import Costs, Line, Worker, simulate

COSTS = Costs(
    batch=Line(0.0008, 0.00003),
    tile_s=0.0002,
    read=Line(0.0001, 0),
    answer=Line(0.0002, 0.000004),
    client=Line(0.0005, 0),
)


def test_a_lone_request_takes_what_its_parts_take() -> None:
    """Read, computed, answered, and the client's own; a batch costs for itself, its tiles and its rows."""
    latencies = simulate(COSTS, np.array([0.0, 1.0]), np.array([1, 256]))
    np.testing.assert_allclose(latencies, [COSTS.alone_s(1), COSTS.alone_s(256)])
    assert COSTS.alone_s(1) == pytest.approx(0.0001 + 0.00103 + 0.000204 + 0.0005)
    assert COSTS.batch_s(256) == pytest.approx(0.0008 + 4 * 0.0002 + 256 * 0.00003)
    assert COSTS.batch_s(13) == pytest.approx(0.0008 + 2 * 0.0002 + 13 * 0.00003)  # 12 and 1


def test_what_comes_together_shares_a_batch() -> None:
    """The engine waits until the loop has read what it has in hand, and answers come one after the other."""
    worker = Worker(COSTS)
    latencies = worker.run([0.0] * 8, [1] * 8)
    assert worker.batches == [8]
    assert latencies.max() == pytest.approx(8 * 0.0001 + COSTS.batch_s(8) + 8 * 0.000204 + 0.0005)


def test_a_small_request_does_not_wait_for_a_queue_of_large_ones() -> None:
    """Half of each batch goes to those that need the fewest rows."""
    worker = Worker(COSTS)
    latencies = worker.run([0.0, 0.0, 0.0, 0.001], [4096, 4096, 4096, 1])
    assert worker.batches[0] == 512
    assert sum(worker.batches) == 3 * 4096 + 1
    assert latencies[3] < 3 * COSTS.batch_s(512)
    assert latencies[:3].max() > 10 * latencies[3]


def test_the_loop_goes_before_the_engine() -> None:
    """A request that comes while a batch runs delays it by its reading, as both have one processor."""
    alone = simulate(COSTS, np.array([0.0]), np.array([256]))
    beside = simulate(COSTS, np.array([0.0, 0.005]), np.array([256, 1]))
    assert beside[0] == pytest.approx(alone[0] + 0.0001)


def test_replicas_follow_load_and_pattern() -> None:
    """More of them where more comes at once, and fewer where a cache answers what was asked for before."""
    rng = np.random.default_rng(0)
    assert most_per_s(COSTS, {1: 1.0}) > 2000
    needed = [replicas_for(COSTS, pattern(rng, 4000, 2), 50) for pattern in (steady, bursts, by_the_clock)]
    assert all(needed)
    assert needed == sorted(needed, key=lambda count: count or 0)
    for pattern in (steady, bursts, by_the_clock):
        due = pattern(rng, 1000, 10)
        assert abs(len(due) - 10_000) < 400
        assert (np.diff(due) >= 0).all()
    passed_on = misses(rng, 5000)
    assert 0 < passed_on.mean() < 0.5


def test_a_fit_finds_what_the_costs_are() -> None:
    """From what lone requests of several sizes take; where a part would come out below nothing it is nothing."""
    alone = {
        count: {"batch": COSTS.batch_s(count), "loop": 0.0004 - 1e-9 * count, "encode": 4e-6 * count, "client": 0.0005}
        for count in (1, 2, 5, 11, 64, 79, 256)
    }
    found = costs_of(alone)
    assert found.tile_s == pytest.approx(COSTS.tile_s)
    np.testing.assert_allclose(found.batch, COSTS.batch)
    assert found.read.fixed_s == pytest.approx(0.0002, rel=1e-3)
    assert found.read.image_s == 0
    assert found.client.fixed_s == pytest.approx(0.0005)


def test_a_fit_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Numbers as names of JSON, and back."""
    (tmp_path / "costs.json").write_text(json.dumps(COSTS._asdict()))
    assert read_costs(tmp_path / "costs.json") == COSTS
