"""What training costs beside the arithmetic, and what makes the arithmetic cheaper.

    python -m benchmarks.training.step [--data mnist] [--presets P …] [--rounds 9] [--without variants]

First the trainer, as `python -m models train` runs it with reports, stats.jsonl and health, takes turns with the plain
loop of `eager.py`, 50 steps each. Scores and checkpoints are left out, because a plain loop has none; the average of
G's weights has a row of its own. Then comes a tiny game, whose time is nearly all the loop's own, beside the same under
Lightning (`make bench-training` installs it). Then bfloat16 and `torch.compile`.

All of it runs on one thread. The tables have medians of rounds, and quartiles. Ratios are taken within a round: by
processor time, to which other programs on the same processor add little, and by the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from benchmarks.serving.contenders import ENVIRONMENTS
from benchmarks.tools.process import ROOT
from benchmarks.tools.report import Check, finish, table
from benchmarks.training.eager import TINY, Eager, tiny_images
from models.commands.signals import StopOnSignal
from models.commands.training.loop import REPORT_EVERY, TrainingLoop
from models.data.load import Dataset, load_dataset
from models.spec import PRESETS, TrainingOptions
from models.training import trainer
from models.training.progress import TrainingProgress
from models.training.run_folder import RunDir
from models.training.snapshots import Snapshots

CPU = torch.device("cpu")
NEVER = 10**9  # steps
OURS, PLAIN, UNFUSED = "ours", "plain loop", "plain loop, optimisers not fused"
LEAST_RATIO, MOST_OF_LIGHTNING = 0.97, 0.5
PARTS = ("plain", "tiny", "variants")
CHECKED = ("mlp-adam", "mlp-paper")
TINY_STEPS_PER_ROUND = 1_000
VARIANT_STEPS = 12  # a multiple of the penalties' four
WARM_STEPS = 8

Work = Callable[[], object]


class Taken(NamedTuple):
    """Seconds of one round, by the clock and of the processor."""

    wall_s: float
    cpu_s: float


class Spread(NamedTuple):
    """Quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}…{self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """The three quartiles."""
    return Spread(*(float(f"{value:.4g}") for value in np.percentile(values, [25, 50, 75])))


class Stopwatch:
    """A clock and the processor's, from now on."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()

    def taken(self) -> Taken:
        """Seconds since."""
        return Taken(time.perf_counter() - self.wall_s, time.process_time() - self.cpu_s)


def timed(work: Work) -> Taken:
    """Seconds of one call."""
    watch = Stopwatch()
    work()
    return watch.taken()


def in_turns(
    options: TrainingOptions, dataset: Dataset, others: Mapping[str, Work], rounds: int, round_steps: int = REPORT_EVERY
) -> dict[str, list[Taken]]:
    """Seconds of rounds of steps: of the command's own loop, and then of each of the others. The first round warms."""
    options = options.model_copy(update={"steps": (rounds + 2) * round_steps, "score_every": NEVER})
    state = trainer.State(options, dataset, CPU)
    taken: dict[str, list[Taken]] = {name: [] for name in (OURS, *others)}
    train = trainer.train

    def stepping_aside(*arguments: Any, **named: Any) -> Iterator[trainer.Report]:
        """The trainer's loop, which lets the others have their round after each of its own, reported and all."""
        watch = Stopwatch()
        for report in train(*arguments, **named):
            yield report
            if report.step % round_steps:
                continue
            taken[OURS].append(watch.taken())
            for name, work in others.items():
                taken[name].append(timed(work))
            if len(taken[OURS]) > rounds:
                return
            watch = Stopwatch()

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(trainer, "train", stepping_aside):
        run = RunDir(Path(folder))
        run.begin({})
        snapshots, progress = Snapshots(state, dataset, run, {"name": "none"}), TrainingProgress(options.steps, 0)
        cadence = {"checkpoint_every": NEVER, "sample_every": NEVER}
        TrainingLoop(snapshots, StopOnSignal(), progress, **cadence, alarms="warn").run()
    return {name: rows[1:] for name, rows in taken.items()}


def beside_plain(preset: str, dataset: Dataset, rounds: int) -> tuple[list[dict[str, object]], float]:
    """Rows of the table, and the ratio of our steps/s to the plain loop's, by processor time."""
    options = PRESETS[preset]
    without = options.model_copy(update={"ema_half_life_images": 0})
    plain, unfused = Eager(options, dataset, CPU), Eager(options, dataset, CPU, fused=False)
    logged: list[str] = []
    others: dict[str, Work] = {
        PLAIN: lambda: plain.train(REPORT_EVERY, logged.append),
        UNFUSED: lambda: unfused.train(REPORT_EVERY, logged.append),
    }
    taken = in_turns(without, dataset, others, rounds)
    rows = [row(preset, name, times, taken[PLAIN], REPORT_EVERY) for name, times in taken.items()]
    if options.ema_half_life_images:
        averaged = in_turns(options, dataset, {PLAIN: others[PLAIN]}, rounds)
        rows.insert(1, row(preset, f"{OURS}, with the average of G", averaged[OURS], averaged[PLAIN], REPORT_EVERY))
    return rows, ratio(taken[OURS], taken[PLAIN]).median


def row(preset: str, name: str, times: Sequence[Taken], yardstick: Sequence[Taken], steps: int) -> dict[str, object]:
    """A line of a table: milliseconds of the processor for a step, and the ratio of steps/s to the yardstick's."""
    return {
        "preset": preset,
        "loop": name,
        "ms/step": spread([1000 * one.cpu_s / steps for one in times]),
        "ratio": ratio(times, yardstick),
        "by the clock": spread([b.wall_s / a.wall_s for a, b in zip(times, yardstick, strict=True)]),
    }


def ratio(ours: Sequence[Taken], theirs: Sequence[Taken]) -> Spread:
    """Of steps/s, by processor time."""
    return spread([b.cpu_s / a.cpu_s for a, b in zip(ours, theirs, strict=True)])


def own_milliseconds(rounds: int, steps: int = TINY_STEPS_PER_ROUND) -> dict[str, Spread | str]:
    """What a step of the tiny game takes, and how much of it is the loop's own, ours and Lightning's."""
    dataset = tiny_images()
    bare, plain = Eager(TINY, dataset, CPU), Eager(TINY, dataset, CPU)
    logged: list[str] = []
    others: dict[str, Work] = {
        "bare": lambda: bare.bare(steps),
        PLAIN: lambda: plain.train(steps, logged.append),
    }
    taken = in_turns(TINY, dataset, others, rounds, steps)
    ms = {name: [1000 * one.cpu_s / steps for one in times] for name, times in taken.items()}
    seen: dict[str, Spread | str] = {"the arithmetic": spread(ms["bare"])}
    seen |= {name: spread(np.subtract(ms[name], ms["bare"]).tolist()) for name in (OURS, PLAIN)}
    return seen | {"Lightning": lightnings_own(rounds, steps)}


def lightnings_own(rounds: int, steps: int) -> Spread | str:
    """The same of Lightning, in its own environment; a word where that is not there."""
    python = ENVIRONMENTS / "lightning" / "bin" / "python"
    if not python.exists():
        return "not installed"
    command = [str(python), "-m", "benchmarks.peers.lightning_loop", str(rounds), str(steps)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        return f"failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}"
    seen = json.loads(done.stdout.splitlines()[-1])
    return spread(np.subtract(seen["loop_ms"], seen["bare_ms"]).tolist())


def variants(preset: str, dataset: Dataset, rounds: int) -> list[dict[str, object]]:
    """A step with each precision, and with both nets compiled: warm-up, milliseconds, ratio to float32."""
    states: dict[str, trainer.State] = {}
    warm_s: dict[str, str] = {}
    for precision in ("float32", "bfloat16"):
        for is_compiled in (False, True):
            name = f"{precision}, compiled" if is_compiled else precision
            changes = {"ema_half_life_images": 0, "precision": precision}
            state = trainer.State(PRESETS[preset].model_copy(update=changes), dataset, CPU)
            try:
                if is_compiled:
                    state.generator.compile()
                    state.discriminator.compile()
                warm_s[name] = f"{timed(lambda s=state: steps_of(s, WARM_STEPS)).wall_s:.1f}"  # type: ignore[misc]
            except RuntimeError as error:  # no compiler here, or what it can't compile
                warm_s[name] = f"failed: {str(error).splitlines()[0][:80]}"
                continue
            states[name] = state
    taken: dict[str, list[Taken]] = {name: [] for name in states}
    for _ in range(rounds):
        for name, state in states.items():
            taken[name].append(timed(lambda s=state: steps_of(s, VARIANT_STEPS)))  # type: ignore[misc]
    rows: list[dict[str, object]] = []
    for name, warm in warm_s.items():
        rows.append({"preset": preset, "variant": name, f"first {WARM_STEPS} steps, s": warm})
        if name in taken:
            rows[-1]["ms/step"] = spread([1000 * one.cpu_s / VARIANT_STEPS for one in taken[name]])
            rows[-1]["ratio"] = ratio(taken[name], taken["float32"])
    return rows


def steps_of(state: trainer.State, count: int) -> None:
    """So many steps."""
    for _ in range(count):
        trainer.train_step(state)


def measure(arguments: argparse.Namespace) -> int:
    """All parts that are wanted; returns the exit code."""
    parts = [part for part in PARTS if part not in arguments.without]
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=0)
    facts: dict[str, Any] = {"data": dataset.name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    checks: list[Check] = []
    if "plain" in parts:
        facts["beside_plain"] = []
        for preset in arguments.presets:
            rows, seen = beside_plain(preset, dataset, arguments.rounds)
            facts["beside_plain"] += rows
            if preset in CHECKED:
                wanted = f"{preset}: steps/s, without the average, >= {LEAST_RATIO} of the plain loop's"
                checks.append(Check(wanted, f"{seen:.3f}", seen >= LEAST_RATIO))
        table(facts["beside_plain"])
    if "tiny" in parts:
        own = own_milliseconds(arguments.rounds, arguments.tiny_steps)
        print()
        table([{"tiny game": name, "ms of a step": seen} for name, seen in own.items()])
        facts["own_ms"] = own
        ours, theirs = own[OURS], own["Lightning"]
        if isinstance(ours, Spread) and isinstance(theirs, Spread):
            share = ours.median / theirs.median
            wanted = f"the loop's own time <= {MOST_OF_LIGHTNING} of Lightning's"
            checks.append(Check(wanted, f"{share:.2f}", share <= MOST_OF_LIGHTNING))
    if "variants" in parts:
        facts["variants"] = [r for preset in arguments.presets for r in variants(preset, dataset, arguments.rounds)]
        print()
        table(facts["variants"])
    return finish("training", facts, checks)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and measure."""
    made = argparse.ArgumentParser(description="What training costs.")
    made.add_argument("--data", default="mnist", help="as the train command takes it")
    made.add_argument("--data-dir", type=Path, default=os.environ.get("GAN_DATA_DIR") or None)
    made.add_argument("--presets", nargs="+", choices=PRESETS, default=["mlp-adam", "mlp-paper", "conv-ns"])
    made.add_argument("--rounds", type=int, default=9, help="of each part, whose median counts")
    made.add_argument("--tiny-steps", type=int, default=TINY_STEPS_PER_ROUND, help="of the tiny game in a round")
    made.add_argument("--without", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    arguments = made.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # a warm-up is one from nothing
    # Each net is compiled anew for gradients of weights, of pixels, and for none; simultaneous updates go back twice.
    torch._dynamo.config.recompile_limit = 64  # noqa: SLF001
    torch._functorch.config.donated_buffer = False  # noqa: SLF001
    return measure(arguments)


if __name__ == "__main__":
    sys.exit(main())
