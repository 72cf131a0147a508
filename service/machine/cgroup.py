"""Where the limits stand that containers, systemd and the like put on this process."""

import contextlib
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def limit_folders(controller: str, mount: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> list[Path]:
    """Folders of this process' control group and of those around it, of v2 and v1: the limits in all of them hold.

    A container sees its own group as the outermost one. Elsewhere, as in a unit of systemd, the group is further in.

    Args:
        controller: `cpu` or `memory`.
        mount: Where the groups are mounted.
        own_groups: Names the groups of this process, a line for each hierarchy, such as `0::/system.slice/gan.service`.
    """
    folders = [mount, mount / controller]
    with contextlib.suppress(OSError, ValueError):  # not Linux, or not understood
        for line in own_groups.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                outermost = mount / controller if controllers else mount  # v1 has a hierarchy for each controller
                own = outermost / group.strip("/")
                folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(outermost)]
    return folders
