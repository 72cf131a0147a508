"""Train a preset on a data set, or go on with a run; the product is RUN/bundle/."""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from models.bundle import BundleError, read_bundle
from models.commands.arguments import Subparsers, device_of, reading
from models.commands.signals import StopOnSignal
from models.commands.train_options import add_options, default_name, resolve
from models.data.dataset import listed
from models.data.load import Dataset, load_dataset
from models.spec import TrainingOptions
from models.training import trainer
from models.training.cost import measure_step
from models.training.health import Alarm, HealthError, HealthMonitor, Probe, row_of
from models.training.report import write_report
from models.training.run_folder import RunDir, RunError, environment
from models.training.tensorboard import TensorBoard

INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended
GRID_IMAGES = 64
REPORT_EVERY = 50  # steps
DECIDES_SUMS = ("device", "instruction_set", "torch", "threads")  # beside the options, in the last bits


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    train = commands.add_parser("train", help="train a preset on a data set; the product is RUN/bundle/")
    train.set_defaults(run=run)
    add_options(train)


def run(arguments: argparse.Namespace) -> int:
    """Check all that can be checked before anything is written; then train."""
    options, device, folder = resolve(arguments), device_of(arguments), _run_folder(arguments)
    dataset = _training_data(arguments, options, folder.record() if arguments.resume else None)
    record, changes = _record(arguments, folder, options, dataset, device)
    if changes and arguments.resume and not arguments.override:
        differences = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changes.items())
        raise RunError(f"the run was begun otherwise: {differences}. --override goes on all the same, and records it")
    state = trainer.State(options, dataset, device)
    if arguments.dry_run:
        return _dry_run(state, dataset, record)
    with folder.held():
        return _train_alone(arguments, state, dataset, folder, record, changes)


def _train_alone(
    arguments: argparse.Namespace,
    state: trainer.State,
    dataset: Dataset,
    run: RunDir,
    record: dict[str, Any],
    changes: dict[str, list[Any]],
) -> int:
    options, name = state.options, record["name"]
    found = run.newest_checkpoint() if arguments.resume else None
    if found is not None:
        state.load(*found)
        print(f"Going on from step {state.step} of {run.path}.", flush=True)
    elif arguments.resume:
        print(f"No checkpoint in {run.path} yet: starting from the beginning.", flush=True)
    if state.step >= options.steps and _is_published(run, name, state.step):
        print(f"Nothing to do: {run.bundle} is finished at step {state.step}.")
        return 0
    if changes:
        record["overrides"].append({"step": state.step, "changes": changes})
    run.begin(record)
    run.truncate_stats(state.step)
    with TensorBoard(run.path / "tensorboard", state.step) if arguments.tensorboard else nullcontext() as board:
        train_watched(state, dataset, run, arguments.checkpoint_every, arguments.alarms, board)
    if state.step < options.steps:
        print(f"Stopped at step {state.step} of {options.steps}; --resume goes on.")
        return INTERRUPTED
    if not state.best.step:  # a --steps below the first score ended the run
        trainer.keep_if_best(state, trainer.score(state, dataset))
    trainer.publish(state, dataset, run.last, name, record, rule="last")
    bundle = trainer.publish(state, dataset, run.bundle, name, record, rule="best")
    write_report(run)
    print(f"{bundle.folder}: {bundle.name}@{bundle.version}, the weights of step {state.best.step}, "
          f"validation {state.selection.short.format(state.best.score)}.")  # fmt: skip
    return 0


def _run_folder(arguments: argparse.Namespace) -> RunDir:
    if arguments.checkpoint_every < 1:
        raise RunError("--checkpoint-every must be at least 1")
    if arguments.override and not arguments.resume:
        raise RunError("--override goes with --resume")
    run = RunDir(arguments.out)
    if run.is_used() and not (arguments.resume or arguments.dry_run):
        raise RunError(f"{run.path} is not empty: --resume goes on with that run, another --out begins a new one")
    return run


def _record(
    arguments: argparse.Namespace, run: RunDir, options: TrainingOptions, dataset: Dataset, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What the run's folder and manifest will say of the run, and what has changed since it was begun."""
    before = run.record() or {}
    threads = before.get("threads", torch.get_num_threads())
    if device.type == "cpu":
        if threads != torch.get_num_threads():
            print(f"Computing on {threads} threads, as the run was begun.", flush=True)
        # A sum's last bits depend on how it is divided. The number is set even where it stays the same: drawing sets it
        # at every score, and MKL, which may use fewer threads until then, has to divide alike before and after.
        torch.set_num_threads(threads)
    name = arguments.name or before.get("name") or default_name(dataset.name, options.preset)
    record = {
        "name": name,
        "preset": options.preset,
        "options": options.model_dump(mode="json"),
        "data": {"name": dataset.name, "checksum": dataset.checksum},
        "preparation": None if dataset.preparation is None else asdict(dataset.preparation),
        "overrides": before.get("overrides", []),
        **environment(device),
    }
    return record, _changes({"name": name, **before} if before else {}, record)


def _training_data(arguments: argparse.Namespace, options: TrainingOptions, begun: dict[str, Any] | None) -> Dataset:
    """The data set, prepared as a run that goes on was begun."""
    prepared = (begun or {}).get("preparation") or {}
    asked = reading(arguments, prepared)
    if begun and not prepared:  # before there was a preparation, files' modes decided the colour
        asked["colour"] = "mode"
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=options.seed, **asked)
    said = arguments.conditional is not None or arguments.dry_run  # programs read a dry run's output too
    if dataset.label_names and not options.conditional and not said:
        print(f"{options.preset} is unconditional: the labels of {dataset.name} are not used. --conditional uses them.",
              flush=True)  # fmt: skip
    if options.conditional and dataset.label_names and dataset.train.labels is not None:
        seen = set(dataset.train.labels.tolist())
        unseen = [name for label, name in enumerate(dataset.label_names) if label not in seen]
        if unseen:
            print(f"warning: no training image of {listed(unseen)}: what is drawn for such a label means nothing",
                  file=sys.stderr, flush=True)  # fmt: skip
    return dataset


def _dry_run(state: trainer.State, dataset: Dataset, record: dict[str, Any]) -> int:
    """Say what the command would do, and what it would cost."""
    print(json.dumps(record, indent=1))
    for name, net in (("generator", state.generator), ("discriminator", state.discriminator)):
        print(f"{name}: {sum(parameter.numel() for parameter in net.parameters()):,} parameters")
    sizes = (len(split.images) for split in (dataset.train, dataset.validation, dataset.test))
    print("images: {:,} to train, {:,} to validate, {:,} to test, {}×{}×{}".format(*sizes, *state.image.shape))
    cost = measure_step(state)
    steps, mebibytes = state.options.steps, cost.memory_bytes / 2**20
    print(f"a step: {cost.step_s * 1000:.1f} ms, {cost.images_per_s:,.0f} images/s, {mebibytes:,.0f} MiB of memory")
    print(f"{steps:,} steps: {steps * cost.step_s / 3600:.2f} h, and the time of the scores")
    return 0


def train_watched(
    state: trainer.State,
    dataset: Dataset,
    run: RunDir,
    checkpoint_every: int,
    alarms: str,
    board: TensorBoard | None,
) -> None:
    """Train to the end, to the first signal or to an alarm; score, monitor, show and save on the way."""
    from models.training.progress import TrainingProgress  # noqa: PLC0415 — rich is an extra that `inspect` does without

    options = state.options
    stop = StopOnSignal()
    probe, monitor = Probe(state, dataset), HealthMonitor(options.batch_size * options.d_steps, run.stats())
    with stop, TrainingProgress(options.steps, state.step) as progress:
        every = (REPORT_EVERY, checkpoint_every)
        for report in trainer.train(state, options.steps, report_every=every, stopped=stop.is_set):
            row = asdict(report)
            raised: list[Alarm] = []
            if alarms != "off" and state.step % probe.every(REPORT_EVERY) == 0:
                health = probe.look()
                raised = monitor.see(state.step, health)
                row |= row_of(health) | ({"alarms": [str(alarm) for alarm in raised]} if raised else {})
            done = state.step == options.steps
            is_scored = done or state.step % options.score_every == 0
            if is_scored:
                scored = trainer.score(state, dataset)
                trainer.keep_if_best(state, scored)
                row |= scored.stats()
                images = trainer.draw(state, GRID_IMAGES)
                run.save_samples(state.step, images)
                if board is not None:
                    board.add_samples(state.step, images)
            run.append_stats(row)
            if board is not None:
                board.add_row(row)
            progress.show(report, state.best, state.selection, raised)
            if alarms == "stop" and raised and raised[0].stop:
                kept = run.go_back(monitor.good_step)
                write_report(run)
                raise HealthError(_stopped(state.step, raised[0], kept))
            if done or stop.is_set() or state.step % checkpoint_every == 0:
                run.save_checkpoint(state.step, state.tensors(), state.metadata(), monitor.good_step)
            if is_scored:
                write_report(run)


def _stopped(step: int, alarm: Alarm, kept: int | None) -> str:
    if kept is None:
        return f"stopped at step {step}, before the first checkpoint: {alarm}"
    return (f"stopped at step {step}: {alarm}. The checkpoint of step {kept} is kept: --resume --steps {kept} makes a "
            "bundle of the best until then, --resume --alarms warn goes on in spite of it")  # fmt: skip


def _is_published(run: RunDir, name: str, step: int) -> bool:
    """Whether the run's bundle is whole and of this step: a kill may have come between checkpoint and bundle."""
    try:
        bundle = read_bundle(run.bundle)
        return (bundle.name, bundle.manifest.training.get("steps")) == (name, step)
    except BundleError:
        return False


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What differs from the run before, as [old, new]: name, options, data, and what decides the last bits of sums."""
    if not before:
        return {}
    compared = ("name", "data", "preparation", *DECIDES_SUMS)
    old, new = ({**record.get("options", {}), **{key: record.get(key) for key in compared}} for record in (before, now))
    unknown = {"preparation"} if old["preparation"] is None else set()  # of a run that was begun before there was one
    keys = sorted((old.keys() | new.keys()) - {"steps"} - unknown)
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}
