"""How many workers pay on this machine, for `GAN_WORKERS=auto`."""

import contextlib
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Self

from service.machine.cgroup import MOUNT, OWN_GROUPS, limit_folders
from service.machine.cpu import cpu_limit
from service.settings import Settings

MOST = 4
# A worker has 0.3 GiB at rest. Clients would have to fill nearly all bounds for bodies, replies and uploads at once to
# make it need more than this, beside its bundles.
WORKER_BYTES = 3 * 2**29
WEIGHT_COPIES = 3  # in the order in which the processor reads them, as they are in the file, and while they are read
GIB = 2**30


class Machine(NamedTuple):
    """What the number of workers depends on, beside the settings."""

    processors: int
    memory_bytes: float
    has_gpu: bool = False
    passes_connections: bool = True  # to other processes

    @classmethod
    def here(cls, device: str, processors: int | None = None) -> Self:
        """What this process may use of the machine, for a service on this device with so many processors at most."""
        return cls(
            min(cpu_limit(), processors or cpu_limit()), memory_limit(), has_gpu(device), hasattr(socket, "send_fds")
        )


class Choice(NamedTuple):
    """A number of workers, and in words what keeps it from being larger."""

    workers: int
    why: str


def choose_workers(settings: Settings, machine: Machine, weights_bytes: int = 0) -> Choice:
    """The number of workers for these settings.

    More than one pays where an interpreter is the limit, which is the case on CPUs: with one for each processor, small
    requests are answered up to twice as fast, and large ones no slower where there are several connections. But a
    client with a single connection has only one worker's share of the processors, so there are at most `MOST`. Each
    needs memory of its own, and a share of the queue that holds a largest request. On a GPU each would
    have a context and weights of its own, so one process has it all.

    Args:
        settings: All of them.
        machine: Where the service is to run.
        weights_bytes: Size of the weights that are kept in memory, of which every worker has its own.
    """
    if not machine.passes_connections:
        return Choice(1, "this system passes no connections to processes")
    if machine.has_gpu:
        return Choice(1, "a GPU is best used by one")
    each = WORKER_BYTES + WEIGHT_COPIES * weights_bytes
    processors = f"{machine.processors} processor{'s' * (machine.processors > 1)}"
    limits = (
        (machine.processors, f"one for each of {processors}" if machine.processors > 1 else "there is one processor"),
        (MOST, f"each has its share of {processors}, and a client with one connection has no more"),
        (machine.memory_bytes // each, f"each may need {each / GIB:.1f} GiB of {machine.memory_bytes / GIB:.1f} GiB"),
        (
            settings.max_queued_images // settings.max_count,
            "each has its share of GAN_MAX_QUEUED_IMAGES, which must hold GAN_MAX_COUNT",
        ),
    )
    workers, why = min(limits, key=lambda limit: limit[0])  # the first of those that are equal
    return Choice(max(1, int(workers)), why)


def memory_limit(cgroup: Path = MOUNT, own_groups: Path = OWN_GROUPS) -> float:
    """Bytes of memory for this process: the limit of its container or unit, or all there is; inf if nobody knows."""
    limits = [math.inf]
    for folder in limit_folders("memory", cgroup, own_groups):
        for file in ("memory.max", "memory.limit_in_bytes"):  # cgroup v2, v1
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                limits.append(int((folder / file).read_text()))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf, others not these names
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits)


def has_gpu(device: str, environment: Mapping[str, str] = os.environ, files: Path = Path("/dev")) -> bool:
    """Whether this device of the settings is a GPU, as far as can be told without torch.

    Importing torch takes seconds, and hundreds of megabytes that a supervisor has no use for. Where this is wrong, the
    number of workers is not the best one, and nothing else happens.
    """
    if device != "auto":
        return device.startswith("cuda")
    if environment.get("CUDA_VISIBLE_DEVICES") in {"", "-1"} or _torch_is_cpu_only():
        return False
    return any(True for pattern in ("nvidia[0-9]*", "dxg") for _ in files.glob(pattern))  # dxg: Windows' Linux


def _torch_is_cpu_only() -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return version("torch").endswith("+cpu")
    return False


def weights_bytes(bundles: Path, most: int) -> int:
    """Size of the weights of so many bundles in a folder, the largest; what can't be read counts nothing, for now."""
    sizes = Counter[Path]()
    with contextlib.suppress(OSError):
        for file in (*bundles.glob("*.safetensors"), *bundles.glob("*/*.safetensors")):  # it may be a bundle itself
            with contextlib.suppress(OSError):
                sizes[file.parent] += file.stat().st_size
    return sum(size for _, size in sizes.most_common(most))
