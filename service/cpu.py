"""The processors that the service may use, and each worker's share of them."""

import contextlib
import math
import os
from pathlib import Path


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processors this process may use: by its affinity, or by the container's quota if that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()  # cgroup v2
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()  # cgroup v1: −1 for none
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return allowed
    if not quota.isdigit():  # max, or −1
        return allowed
    return max(1, min(allowed, math.ceil(int(quota) / int(period))))


def shares(workers: int) -> list[set[int]] | None:
    """Each worker's processors; None where they can't be divided evenly or are not the service's alone.

    Under a quota, which grants the time of a few out of many processors, workers should run on whichever are free.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    if cpu_limit() < len(allowed) or len(allowed) % workers:
        return None
    size = len(allowed) // workers
    return [set(allowed[start : start + size]) for start in range(0, len(allowed), size)]


def set_affinity(processors: set[int], pid: int) -> None:
    """Bind all threads of a process, and those that they start later, to these processors."""
    with contextlib.suppress(OSError):  # it has ended
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # this one has ended, or we may not: then it runs anywhere
                os.sched_setaffinity(int(thread.name), processors)
