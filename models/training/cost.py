"""What a training step costs on this machine, measured: `train --dry-run` prints it."""

import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import nn

from models.training.trainer import State, train_step

WARM_STEPS = 3  # not counted: the optimisers allocate their buffers in the first
MOST_STEPS = 50
ENOUGH_S = 3.0


@dataclass(frozen=True)
class Cost:
    """Median seconds of a step, real images per second, and the peak of memory in bytes.

    The memory is the GPU's if there is one, else that of the whole process; None where the system doesn't tell.
    """

    step_s: float
    images_per_s: float
    memory_bytes: int | None


def measure_step(state: State) -> Cost:
    """Train a few steps and time them, on all ranks. The state moves, so a run should not start from it."""
    taken: list[float] = []

    def is_too_little() -> bool:
        count = len(taken)
        return count < MOST_STEPS + WARM_STEPS and (count <= WARM_STEPS or sum(taken) < ENOUGH_S)

    while state.ranks.any(flag=is_too_little()):
        started = time.perf_counter()
        train_step(state).tolist()  # waits for the device
        taken.append(time.perf_counter() - started)
    step_s = statistics.median(taken[WARM_STEPS:])
    options = state.options
    return Cost(step_s, options.batch_size * options.d_steps / step_s, _peak_bytes(state.device))


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # noqa: PLC0415 - POSIX alone has it
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def count_numbers(net: nn.Module) -> int:
    """Parameters of a net."""
    return sum(parameter.numel() for parameter in net.parameters())
