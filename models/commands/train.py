"""Train a preset on a data set, or go on with a run; the product is RUN/bundle/.

Under torchrun several processes train together: rank 0 does all that one process does, the others help with the steps.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch

from models.bundle import MAX_MANIFEST_BYTES, Bundle, BundleError, read_bundle
from models.commands.arguments import Subparsers, reading
from models.commands.signals import Interrupted, StopOnSignal
from models.commands.training.continuing import (
    WORLD_SIZE,
    changes_since,
    needing_a_word,
    numbered_as_begun,
    require_continuable,
    world_size,
)
from models.commands.training.dry_run import dry_run
from models.commands.training.followers import follow, own_device, recruit
from models.commands.training.loop import TrainingLoop
from models.commands.training.options import add_options, default_name, resolve
from models.commands.training.regressor import regress
from models.data.dataset import listed, printable
from models.data.load import DataError, Dataset, load_dataset
from models.data.summary import SPLIT_NAMES, lines, summary
from models.exchange.model_card import write_card
from models.files import remove_folder
from models.spec import LATENT_REGRESSOR, TrainingOptions
from models.training import publishing, trainer
from models.training.cost import count_numbers
from models.training.fine_tuning import begin_with
from models.training.health import HealthError
from models.training.run_folder import RunDir, RunError, environment
from models.training.snapshots import Snapshots
from models.training.tensorboard import TensorBoard
from models.training.torchrun.ranks import Alone, Ranks, joined

ACKNOWLEDGED = "Stopping, with the work saved. Once more ends at once, without saving."
FAILED, ALARMED = 1, 4
INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    train = commands.add_parser("train", help="train a preset on a data set; the product is RUN/bundle/")
    train.set_defaults(run=run)
    add_options(train)


def run(arguments: argparse.Namespace) -> int:
    """Train, as the leader of all ranks or as one of its followers."""
    if arguments.preset == LATENT_REGRESSOR.preset:
        return regress(arguments, _run_folder(arguments))
    ranks = joined()
    if isinstance(ranks, Ranks) and not ranks.leads:
        return follow(arguments, ranks)
    try:
        code = _lead(arguments, ranks)
    except BaseException as error:
        ranks.end(_code_of(error))
        raise
    ranks.end(code)
    return code


def _code_of(error: BaseException) -> int:
    """The exit code that the error will end this process with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return ALARMED if isinstance(error, HealthError | trainer.DivergedError) else FAILED


def _lead(arguments: argparse.Namespace, ranks: Alone) -> int:
    """Check all that can be checked before anything is written; then train."""
    options, device, folder = resolve(arguments), own_device(arguments, ranks), _run_folder(arguments)
    first = None if arguments.init is None else read_bundle(arguments.init)
    options = options.model_copy(update={"init": _beginning(first, arguments, folder)})
    dataset = _training_data(arguments, options, folder)
    record, changes = _record(arguments, folder, options, dataset, device, ranks)
    state = trainer.State(options, dataset, device, ranks)
    if arguments.resume and needing_a_word(changes):
        require_continuable(folder, state, dataset, needing_a_word(changes), override=arguments.override)
    if first is not None and not (arguments.resume and folder.newest_checkpoint()):
        _begin_with(first, state, dataset, arguments)
    if arguments.dry_run:
        recruit(arguments, state, dataset, record)
        dry_run(state, summary(dataset), as_json=arguments.json)
        return 0
    print("\n  ".join(lines(summary(dataset))), flush=True)
    with folder.held():
        return _train_alone(arguments, state, dataset, folder, record, changes)


def _beginning(first: Bundle | None, arguments: argparse.Namespace, run: RunDir) -> str | None:
    """What the run's options say of the weights that it begins with. One that goes on need not be told again."""
    if first is not None:
        return f"{first.name}@{first.version}"
    begun: dict[str, Any] = (run.record() or {}) if arguments.resume else {}
    named: str | None = begun.get("options", {}).get("init")
    return named


def _begin_with(first: Bundle, state: trainer.State, dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Fine-tune a bundle, and say which classes are new to it."""
    new = begin_with(state, first, dataset.label_names or ())
    classes = f", with {len(new)} new classes: {_listed(new)}" if new else ""
    _say(arguments, f"Beginning with the weights of {first.name}@{first.version}{classes}.")


def _train_alone(
    arguments: argparse.Namespace,
    state: trainer.State,
    dataset: Dataset,
    run: RunDir,
    record: dict[str, Any],
    changes: dict[str, list[Any]],
) -> int:
    from models.training.progress import TrainingProgress  # noqa: PLC0415 — rich is an extra that `inspect` does without

    options, name = state.options, record["name"]
    found = run.newest_checkpoint() if arguments.resume else None
    if found is not None:
        state.load(*found)
        print(f"Going on from step {state.step} of {run.path}{_by_how_many(changes)}.", flush=True)
    elif options.init and arguments.init is None:
        raise RunError(f"{run.path} was to begin with {options.init}, and has no checkpoint yet: --init says where "
                       "that bundle is")  # fmt: skip
    elif arguments.resume:
        print(f"No checkpoint in {run.path} yet: starting from the beginning.", flush=True)
    if state.step >= options.steps and _is_published(run, name, state.step):
        print(f"Nothing to do: {run.bundle} is finished at step {state.step}.")
        remove_folder(run.preview)  # a kill may have come before that
        return 0
    recruit(arguments, state, dataset, record)
    if changes:
        record["overrides"].append({"step": state.step, "changes": changes})
    run.save_data(summary(dataset))  # first: a record without it is an earlier release's
    run.begin(record)
    run.truncate_stats(state.step)
    print(_first_line(state, dataset, run), flush=True)
    stop = StopOnSignal(ACKNOWLEDGED)
    state.ranks.watch(stop)
    with (
        stop,
        TrainingProgress(options.steps, state.step) as progress,
        TensorBoard(run.path / "tensorboard", state.step) if arguments.tensorboard else nullcontext() as board,
    ):
        snapshots = Snapshots(state, dataset, run, record, board)
        loop = TrainingLoop(
            *(snapshots, stop, progress),
            checkpoint_every=arguments.checkpoint_every,
            sample_every=arguments.sample_every,
            alarms=arguments.alarms,
        )
        try:
            loop.run()
            show = loop.shown("finishing")
            publishing.publish(state, dataset, run.last, name, record, rule="last", show=show)
            bundle = publishing.publish(state, dataset, run.bundle, name, record, rule="best", show=show)
            for folder in (run.last, run.bundle):
                write_card(folder)
            snapshots.end()
        except Interrupted:
            snapshots.report(must=True)
            bundle = None
    if bundle is None:
        print(f"Stopped at step {state.step} of {options.steps}; --resume goes on.")
        return INTERRUPTED
    print(f"{bundle.folder}: {bundle.name}@{bundle.version}, the weights of step {state.best.step}, "
          f"validation {state.selection.short.format(state.best.score)}.")  # fmt: skip
    return 0


def _by_how_many(changes: Mapping[str, Sequence[Any]]) -> str:
    """What is said where another number of processes goes on with a run."""
    if WORLD_SIZE not in changes:
        return ""
    before, now = (f"{count} process{'es' if count > 1 else ''}" for count in changes[WORLD_SIZE])
    return f" by {now}, after {before}: sums will differ in their last bits from those of {before}"


def _first_line(state: trainer.State, dataset: Dataset, run: RunDir) -> str:
    """What is about to be done, for whoever looks at the log hours later."""
    options, image = state.options, state.image
    kind = "grey" if image.channels == 1 else "RGB"
    generator, discriminator = (count_numbers(net) for net in (state.generator, state.discriminator))
    return (
        f"Training {options.preset} on {dataset.name}: {len(dataset.train.images):,} images of "
        f"{image.width}×{image.height}, {kind}, {f'{state.classes} classes' if state.classes else 'no classes'}; "
        f"{generator:,} parameters in G, {discriminator:,} in D; "
        f"{options.steps:,} steps of {options.batch_size} images, from step {state.step:,}; {state.device}"
        f"{f', {state.ranks.size} processes' if state.ranks.size > 1 else ''}; {run.path}"
    )


def _run_folder(arguments: argparse.Namespace) -> RunDir:
    if arguments.checkpoint_every < 1:
        raise RunError("--checkpoint-every must be at least 1")
    if arguments.override and not arguments.resume:
        raise RunError("--override goes with --resume")
    if arguments.json and not arguments.dry_run:
        raise RunError("--json goes with --dry-run")
    run = RunDir(arguments.out)
    if run.is_used() and not (arguments.resume or arguments.dry_run):
        raise RunError(f"{run.path} is not empty: --resume goes on with that run, another --out begins a new one")
    return run


def _record(
    arguments: argparse.Namespace,
    run: RunDir,
    options: TrainingOptions,
    dataset: Dataset,
    device: torch.device,
    ranks: Alone,
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What the run's folder and manifest will say of the run, and what has changed since it was begun."""
    before = run.record() or {}
    threads = torch.get_num_threads()
    if world_size(before) == ranks.size:
        threads = before.get("threads", threads)
    if device.type == "cpu":
        if threads != torch.get_num_threads():
            _say(arguments, f"Computing on {threads} threads, as the run was begun.")
        # A sum's last bits depend on how it is divided. The number is set even where it stays the same: drawing sets it
        # at every score, and MKL, which may use fewer threads until then, has to divide alike before and after.
        torch.set_num_threads(threads)
    name = arguments.name or before.get("name") or default_name(dataset.name, options.preset)
    record = {
        "name": name,
        "preset": options.preset,
        "options": options.model_dump(mode="json"),
        "data": {"name": dataset.name, "checksum": dataset.checksum},
        "images": {
            **{name: len(split.images) for name, split in zip(SPLIT_NAMES, dataset.splits, strict=True)},
            **trainer.image_spec(dataset).model_dump(),
            "classes": len(dataset.label_names or ()),
        },
        "preparation": None if dataset.preparation is None else asdict(dataset.preparation),
        "overrides": before.get("overrides", []),
        WORLD_SIZE: ranks.size,
        **environment(device),
    }
    return record, changes_since({"name": name, **before} if before else {}, record)


def _training_data(arguments: argparse.Namespace, options: TrainingOptions, run: RunDir) -> Dataset:
    """The data set, prepared and with its labels in the order as a run that goes on was begun."""
    begun = run.record() if arguments.resume else None
    prepared = (begun or {}).get("preparation") or {}
    asked = reading(arguments, prepared)
    if begun and not prepared:  # before there was a preparation, files' modes decided the colour
        asked["colour"] = "mode"
    read = load_dataset(arguments.data, arguments.data_dir, seed=options.seed, **asked)
    dataset = numbered_as_begun(read, run) if arguments.resume else read
    if dataset is not read:
        _say(arguments, f"The labels stand as when the run was begun: {_listed(dataset.label_names or ())}.")
    said = arguments.conditional is not None or arguments.dry_run  # programs read a dry run's output too
    if dataset.label_names and not options.conditional and not said:
        print(f"{options.preset} is unconditional: the labels of {dataset.name} are not used. --conditional uses them.",
              flush=True)  # fmt: skip
    if options.conditional and dataset.label_names and dataset.train.labels is not None:
        _require_room_for(dataset.label_names)
        seen = set(dataset.train.labels.tolist())
        unseen = [name for label, name in enumerate(dataset.label_names) if label not in seen]
        if unseen:
            print(f"warning: no training image of {_listed(unseen)}: what is drawn for such a label means nothing",
                  file=sys.stderr, flush=True)  # fmt: skip
    return dataset


def _listed(label_names: Sequence[str]) -> str:
    return listed([printable(name) for name in label_names])


def _say(arguments: argparse.Namespace, line: str) -> None:
    """Print a line, where programs don't read what is printed."""
    print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def _require_room_for(label_names: Sequence[str]) -> None:
    """See that a manifest can hold the classes, now and not after hours: their names, and a frequency of each."""
    size = sum(len(json.dumps(name)) + 32 for name in label_names)
    if size > MAX_MANIFEST_BYTES * 0.9:
        raise DataError(f"{len(label_names):,} classes with names of this length are more than a bundle's manifest "
                        f"holds, which is {MAX_MANIFEST_BYTES / 2**20:.0f} MiB: make them fewer, or shorten the names, "
                        "or train with --unconditional")  # fmt: skip


def _is_published(run: RunDir, name: str, step: int) -> bool:
    """Whether the run's bundle is whole and of this step: a kill may have come between checkpoint and bundle."""
    try:
        bundle = read_bundle(run.bundle)
        return (bundle.name, bundle.manifest.training.get("steps")) == (name, step)
    except BundleError:
        return False
