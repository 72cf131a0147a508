"""What clients notice when a replica, a node or a bundle fails behind Ray's proxy: nothing, or no more than must be."""

import os
import signal
import time
from pathlib import Path

from benchmarks.tools.ray_cluster import Cluster, Replica, is_there, wait_for
from benchmarks.tools.steady_load import CLIENTS, Load
from tests.conftest import GREY, write_tiny

SOME = 1000  # requests before and after


def other_than(cluster: Cluster, raylet: int) -> Replica:
    """The replica that is not on this node."""
    (found,) = (replica for replica in cluster.replicas() if replica.raylet != raylet)
    return found


def serve_from_both(cluster: Cluster, load: Load) -> None:
    """Return once some requests were answered, of which each replica has had a share."""
    wait_for(lambda: len(cluster.pages()) == 2)
    before = cluster.answered()
    load.wait_for(SOME)
    after = cluster.answered()
    shares = [after[server] - before.get(server, 0) for server in after]
    assert len(shares) == 2
    assert min(shares) > SOME / 10


def test_a_killed_replica_fails_nobody(cluster: Cluster) -> None:
    """kill -9 of one of two: requests that it had go to the other, and Ray starts it anew."""
    with Load().running() as load:
        serve_from_both(cluster, load)
        victim = cluster.replicas()[0]
        os.kill(victim.pid, signal.SIGKILL)
        load.wait_for(SOME)
        wait_for(lambda: victim.id not in {replica.id for replica in cluster.replicas()})
        cluster.wait_until_running(2)
        serve_from_both(cluster, load)
    assert set(load.outcomes) == {200}


def test_a_killed_node_fails_nobody(cluster: Cluster) -> None:
    """kill -9 of the raylet beside the head: its replica ends with it, and no request fails."""
    head, raylet = cluster.raylets
    with Load().running() as load:
        serve_from_both(cluster, load)
        victim = other_than(cluster, head)
        assert victim.raylet == raylet
        cluster.kill_node(raylet)
        wait_for(lambda: not is_there(victim.pid))
        load.wait_for(SOME)
    assert set(load.outcomes) == {200}


def test_a_frozen_replica_holds_no_more_than_it_had(cluster: Cluster) -> None:
    """SIGSTOP of one: what it was answering times out, nothing else does, and it is replaced within 30 s."""
    with Load().running() as load:
        serve_from_both(cluster, load)
        victim = cluster.replicas()[0]
        os.kill(victim.pid, signal.SIGSTOP)
        frozen = time.monotonic()
        wait_for(lambda: victim.id not in {replica.id for replica in cluster.replicas()})
        cluster.wait_until_running(2)
        replaced_s = time.monotonic() - frozen
        serve_from_both(cluster, load)
    failed = sum(load.outcomes.values()) - load.outcomes[200]
    print(f"frozen: {dict(load.outcomes)}, replaced after {replaced_s:.1f} s")
    assert failed <= CLIENTS


def test_bundles_are_swapped_in_place_under_load(cluster: Cluster, bundles: Path, tmp_path: Path) -> None:
    """A new version, then a damaged one: no request fails, no replica restarts, and the damaged one is refused."""
    place = bundles / "swapped"

    def turn(seed: int, *, is_damaged: bool = False) -> str:
        (tmp_path / f"{seed}").mkdir()
        bundle = write_tiny(tmp_path / f"{seed}" / "swapped", GREY, None, None, seed)
        if is_damaged:
            with (bundle.folder / "generator.safetensors").open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"gone")
        new = place.with_name(".new")
        new.symlink_to(bundle.folder)
        new.replace(place)
        return f"swapped@{bundle.version}"

    first = turn(1)
    cluster.bump()
    before = set(cluster.wait_until_running(2))
    wait_for(lambda: cluster.total("gan_bundle_swaps_total", bundle="swapped", result="loaded") == 2)
    with Load("/sample?seed={}&bundle=swapped").running() as load:
        load.wait_for(SOME)
        second = turn(2)
        cluster.bump()
        wait_for(lambda: cluster.total("gan_bundle_swaps_total", bundle="swapped", result="loaded") == 4)
        load.wait_for(SOME)
        turn(3, is_damaged=True)
        cluster.bump()
        wait_for(lambda: cluster.total("gan_bundle_swaps_total", bundle="swapped", result="refused") == 2)
        load.wait_for(SOME)
        assert {answer.bundle for answer in load.answers[-SOME // 2 :]} == {second}
    assert set(load.outcomes) == {200}
    assert {answer.bundle for answer in load.answers} == {first, second}
    assert set(cluster.wait_until_running(2)) == before
