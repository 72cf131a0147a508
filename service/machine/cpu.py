"""The processors that the service may use, and their division among workers."""

import contextlib
import math
import os
from pathlib import Path

from service.machine.cgroup import MOUNT, OWN_GROUPS, limit_folders


def cpu_limit(cgroup: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> int:
    """Number of processors that this process may use, by its affinity and by the CPU quota of its container or unit."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(folder) for folder in limit_folders("cpu", cgroup, own_groups)]
    return max(1, math.ceil(min(allowed, *quotas)))


def _quota(folder: Path) -> float:
    """Processors whose time a control group grants; inf where it has no quota."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no quota
            quota, period = (int(word) for file in files for word in (folder / file).read_text().split())
            return quota / period if quota > 0 else math.inf  # v1: −1 means no quota
    return math.inf


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
