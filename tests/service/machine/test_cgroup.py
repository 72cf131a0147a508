"""Limits hold wherever they stand: on this process' own control group, or on one around it."""

from pathlib import Path

import pytest

from service.machine.cpu import cpu_limit
from service.server.worker_count import memory_limit

UNIT = "system.slice/gan.service"


@pytest.mark.parametrize(
    ("own_groups", "cpu", "memory"),
    [
        pytest.param(f"0::/{UNIT}\n", f"{UNIT}/cpu.max", f"{UNIT}/memory.max", id="v2, its own"),
        pytest.param(f"0::/{UNIT}\n", "system.slice/cpu.max", "system.slice/memory.max", id="v2, one around it"),
        pytest.param("0::/\n", "cpu.max", "memory.max", id="v2, a container"),
        pytest.param("0::/../other\n", "cpu.max", "memory.max", id="v2, outside of what the container sees"),
        pytest.param(
            f"9:name=systemd:/\n4:memory:/{UNIT}\n1:cpu,cpuacct:/{UNIT}\n0::/\n",
            f"cpu/{UNIT}/cpu.cfs_quota_us",
            f"memory/{UNIT}/memory.limit_in_bytes",
            id="v1, its own",
        ),
        pytest.param(
            "4:memory:/docker/1f\n1:cpu,cpuacct:/docker/1f\n",
            "cpu/cpu.cfs_quota_us",
            "memory/memory.limit_in_bytes",
            id="v1, a container that knows its name outside",
        ),
        pytest.param("nonsense", "cpu.max", "memory.max", id="not understood"),
    ],
)
def test_limits_hold_wherever_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_groups: str, cpu: str, memory: str
) -> None:
    """A unit of systemd is limited as a container is, and so is what runs in a slice with limits."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    mount, groups = tmp_path / "mount", tmp_path / "own_groups"
    groups.write_text(own_groups)
    (mount / cpu).parent.mkdir(parents=True)
    (mount / cpu).write_text("50000" if cpu.endswith("_us") else "50000 100000")
    (mount / cpu).with_name("cpu.cfs_period_us").write_text("100000")
    (mount / memory).parent.mkdir(parents=True, exist_ok=True)
    (mount / memory).write_text("1048576\n")
    assert cpu_limit(mount, groups) == 1
    assert memory_limit(mount, groups) == 2**20


def test_limits_of_other_groups_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour's limits, and those of a group that is this process' own for another controller alone."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    groups = tmp_path / "own_groups"
    groups.write_text("3:pids:/here\n2:cpu:/there\n1:memory:/there\n")
    for name in ("cpu/here/cpu.cfs_quota_us", "cpu/here/cpu.cfs_period_us", "memory/here/memory.limit_in_bytes"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    assert cpu_limit(tmp_path, groups) == 8
    assert memory_limit(tmp_path, groups) > 1
