"""The processors that the service may use, and their division among workers."""

import contextlib
import math
import os
from pathlib import Path


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of processors that this process may use, by its affinity and the container's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()  # cgroup v2
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()  # cgroup v1; −1 means no quota
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return allowed
    if not quota.isdigit():  # "max" or −1: no quota
        return allowed
    return max(1, min(allowed, math.ceil(int(quota) / int(period))))


def shares(workers: int) -> list[set[int]] | None:
    """The processors of each worker; None if they can't be divided evenly, or if a CPU quota applies.

    A quota grants the time of a few out of many processors, so workers should run on whichever are free.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    if cpu_limit() < len(allowed) or len(allowed) % workers:
        return None
    size = len(allowed) // workers
    return [set(allowed[start : start + size]) for start in range(0, len(allowed), size)]


def set_affinity(processors: set[int], pid: int) -> None:
    """Bind all threads of a process, and threads that they start later, to these processors."""
    with contextlib.suppress(OSError):  # the process has ended
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with contextlib.suppress(OSError):  # the thread has ended, or this is not permitted: it then runs anywhere
                os.sched_setaffinity(int(thread.name), processors)
