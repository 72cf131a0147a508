"""Images per second of one process with one and with two threads, and of two processes with one thread each.

    torchrun --nproc-per-node 2 -m benchmarks.training.processes [--data mnist] [--presets P …] [--rounds 7]

They take turns within a round, so that what else the machine does meets all of them; ratios are of a round, by the
clock. While rank 0 trains alone, the others wait in a collective, which takes no processor time. The mini-batch is the
preset's in each of them.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.tools.report import finish, table
from benchmarks.training.step import CPU, WARM_STEPS, spread, steps_of, timed
from models.data.load import Dataset, load_dataset
from models.spec import PRESETS
from models.training.torchrun.ranks import Alone, joined
from models.training.trainer import State


def in_turns(preset: str, dataset: Dataset, ranks: Alone, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of rounds of steps, by who takes them; where this rank does not lead, only those of all together."""
    options = PRESETS[preset]
    alone, together = State(options, dataset, CPU), State(options, dataset, CPU, ranks)
    taken: dict[str, list[float]] = {}
    with threads(1):
        steps_of(together, WARM_STEPS)
        if ranks.leads:
            steps_of(alone, WARM_STEPS)
        for _ in range(rounds):
            for count in (1, ranks.size) if ranks.leads else ():
                with threads(count):
                    words = f"1 process, {count} thread{'s' if count > 1 else ''}"
                    taken.setdefault(words, []).append(timed(lambda: steps_of(alone, steps)).wall_s)
            ranks.any(flag=False)  # all begin at the same moment
            words = f"{ranks.size} processes, 1 thread each"
            taken.setdefault(words, []).append(timed(lambda: steps_of(together, steps)).wall_s)
    return taken


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for PyTorch, in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def rows(preset: str, taken: dict[str, list[float]], steps: int) -> list[dict[str, object]]:
    """Of the table: images/s, and their ratio to those of one thread."""
    yardstick, *_ = taken.values()
    images = steps * PRESETS[preset].batch_size * PRESETS[preset].d_steps
    return [
        {
            "preset": preset,
            "who": who,
            "images/s": spread([images / seconds for seconds in times]),
            "ratio": spread([b / a for a, b in zip(times, yardstick, strict=True)]),
        }
        for who, times in taken.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and measure."""
    made = argparse.ArgumentParser(description="What a second process brings.")
    made.add_argument("--data", default="mnist", help="as the train command takes it")
    made.add_argument("--data-dir", type=Path, default=os.environ.get("GAN_DATA_DIR") or None)
    made.add_argument("--presets", nargs="+", choices=PRESETS, default=["mlp-paper", "conv-ns"])
    made.add_argument("--rounds", type=int, default=7, help="whose median counts")
    made.add_argument("--steps", type=int, default=12, help="of each in a round")
    arguments = made.parse_args(argv)
    ranks = joined()
    if ranks.size == 1:
        made.error("torchrun starts this, with --nproc-per-node 2 or more")
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=0)
    found: list[dict[str, object]] = []
    for preset in arguments.presets:
        taken = in_turns(preset, dataset, ranks, arguments.rounds, arguments.steps)
        if ranks.leads:
            found += rows(preset, taken, arguments.steps)
    ranks.any(flag=False)  # nobody leaves before all are done
    ranks.end(0)
    if not ranks.leads:
        return 0
    table(found)
    return finish("processes", {"data": dataset.name, "torch": torch.__version__, "rows": found}, [])


if __name__ == "__main__":
    sys.exit(main())
