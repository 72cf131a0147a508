"""The service respects affinity and quota, and divides processors that it has to itself."""

from pathlib import Path

import pytest

from service.machine import cpu as processors
from service.machine.cpu import cpu_limit, shares


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 64, id="no cgroup"),
        pytest.param({"cpu.max": "max 100000\n"}, 64, id="v2 without a limit"),
        pytest.param({"cpu.max": "150000 100000\n"}, 2, id="v2, one and a half"),
        pytest.param({"cpu.max": "1000 100000\n"}, 1, id="v2, a hundredth"),
        pytest.param({"cpu.max": "9900000 100000\n"}, 64, id="v2, more than there are"),
        pytest.param({"cpu.max": "nonsense"}, 64, id="v2, not understood"),
        pytest.param(
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64, id="v1 without a limit"
        ),
        pytest.param({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4, id="v1, four"),
        pytest.param({"cpu/cpu.cfs_quota_us": "400000\n"}, 64, id="v1, half of it missing"),
    ],
)
def test_the_containers_limit_counts_and_not_the_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    """The container's quota limits the processors on a large host; rounded up, and at least one."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cpu_limit(tmp_path) == expected


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is bound to three processors uses three, whatever the quota."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    (tmp_path / "cpu.max").write_text("800000 100000")
    assert cpu_limit(tmp_path) == 3


@pytest.mark.parametrize(
    ("allowed", "limit", "workers", "expected"),
    [
        pytest.param({0, 1}, 2, 2, [{0}, {1}], id="one each"),
        pytest.param({2, 3, 5, 7}, 4, 2, [{2, 3}, {5, 7}], id="neighbours stay together"),
        pytest.param({0, 1, 2}, 3, 2, None, id="not evenly"),
        pytest.param({0}, 1, 2, None, id="fewer than workers"),
        pytest.param(set(range(64)), 2, 2, None, id="a quota: whichever are free"),
    ],
)
def test_processors_are_divided_where_they_are_the_services_own(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], limit: int, workers: int, expected: list[set[int]] | None
) -> None:
    """Processors are divided evenly and without overlap, or not at all."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr(processors, "cpu_limit", lambda: limit)
    assert shares(workers) == expected


def test_nothing_is_divided_where_processes_cannot_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems other than Linux can't bind processes to processors."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert shares(2) is None
