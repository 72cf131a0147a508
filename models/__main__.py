"""The offline commands: train, evaluate, inspect, export, the paper's experiments. See `python -m models --help`."""

import argparse
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError

from models.bundle import NAME_PATTERN, Bundle, BundleError, read_bundle, record_evaluation
from models.data.dataset import listed
from models.data.load import DataError, Dataset, load_dataset
from models.evaluation import parzen as evaluation
from models.evaluation.features import load_features, untrained_features
from models.evaluation.metric_suite import MetricSuite, TooFewError, rows_wanted
from models.experiments import figures
from models.files import replace_file
from models.inference.noise import sampled_labels
from models.inference.pixels import UInt8, encode_png, grid, to_pixels
from models.spec import PRESETS, TrainingOptions
from models.training import trainer
from models.training.cost import measure_step
from models.training.health import Alarm, HealthError, HealthMonitor, Probe, row_of
from models.training.losses import LOSSES
from models.training.report import write_report
from models.training.run_folder import RunDir, RunError, environment
from models.training.tensorboard import TensorBoard

if TYPE_CHECKING:
    from models.experiments import toy

ALARMED = 4
INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended
GRID_IMAGES = 64
REPORT_EVERY = 50  # steps
DECIDES_SUMS = ("device", "instruction_set", "torch", "threads")  # beside the options, in the last bits


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 failed (one line on stderr), 2 wrong usage, 4 stopped by an alarm (one line on stderr), 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (HealthError, trainer.DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ALARMED
    except (DataError, RunError, BundleError, trainer.TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        said = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        print(f"error: {said or error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = "tensorboard" if error.name == "tensorboard" else "train"
        extra = "export" if (error.name or "").startswith("onnx") else extra
        print(f"error: {error.name} is not installed: the {extra} extra brings it", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gan-models", description="Train, score and look at generative adversarial nets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a preset on a data set; the product is RUN/bundle/")
    train.set_defaults(run=_train)
    train.add_argument("--preset", required=True, choices=PRESETS)
    _add_data(train)
    train.add_argument("--out", required=True, type=Path, metavar="RUN", help="the run's folder")
    train.add_argument("--name", type=_bundle_name, help="the bundle's name (default: DATA-PRESET)")
    train.add_argument("--steps", type=int, help="generator updates")
    train.add_argument("--checkpoint-every", type=int, default=1_000, metavar="N", help="steps (default 1000)")
    train.add_argument("--alarms", choices=["stop", "warn", "off"], default="stop", help="what a run that goes wrong "
                       "is met with: ended with exit code 4 (default), told so, or left alone")  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help="print the options and the cost of a step; train nothing")
    train.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard/ too (tensorboard extra)")
    train.add_argument("--resume", action="store_true", help="go on from RUN's newest checkpoint")
    train.add_argument("--override", action="store_true", help="resume also where options, data, torch version or "
                       "instruction set are others than before; RUN and the bundle record it")  # fmt: skip
    train.add_argument("--seed", type=int, help="fixes everything that is drawn (default 0)")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default auto)")
    train.add_argument("--batch-size", type=int, metavar="M", help="noise samples and images in a mini-batch")
    train.add_argument("--noise", choices=["normal", "uniform"], help="distribution of z, mean 0 and variance 1")
    train.add_argument("--update", choices=["alternating", "simultaneous"], help="Algorithm 1's turns, or both at once")
    train.add_argument("--d-steps", type=int, metavar="K", help="D's updates for each of G's, alternating only")
    train.add_argument(
        "--generator-loss",
        choices=LOSSES,
        help="−log D(G(z)), log(1 − D(G(z))), and those of D with it; models/training/losses.py",
    )
    labels = train.add_mutually_exclusive_group()
    labels.add_argument("--conditional", action="store_true", default=None, help="both nets see the label")
    labels.add_argument("--unconditional", action="store_false", dest="conditional", default=None,
                        help="labels are not used, also where there are some")  # fmt: skip
    train.add_argument("--selection", choices=trainer.SELECTIONS,
                       help="what chooses the weights on the validation images: the paper's log-likelihood, or the "
                       "Fréchet distance in a classifier's features")  # fmt: skip
    train.add_argument("--precision", choices=["float32", "bfloat16"],
                       help="of the products in training; bfloat16 is faster where the processor has it")  # fmt: skip
    train.add_argument("--algorithm1", action="store_true", help="the paper's Algorithm 1 instead of its code: "
                       "alternating updates with fresh noise, log(1 − D(G(z))), D's loss unscaled")  # fmt: skip

    evaluate = commands.add_parser("evaluate", help="score a bundle against a data set")
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("bundle", type=Path)
    _add_data(evaluate)
    evaluate.add_argument(
        "--seed", type=int, help="of the division of sets without a published one (default: training's)"
    )
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default auto)")
    evaluate.add_argument("--record", action="store_true", help="write the scores into the bundle's manifest")
    evaluate.add_argument("--time-limit", type=float, metavar="S",
                          help="begin no further figure after this many seconds, and name those left out")  # fmt: skip
    evaluate.add_argument("--neighbours", type=Path, metavar="PNG",
                          help="write a picture of samples beside their nearest training images")  # fmt: skip

    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true", help="the manifest and version as JSON")

    export = commands.add_parser("export", help="write a bundle's net for other programs, once it is proven to agree")
    export.set_defaults(run=_export)
    export.add_argument("bundle", type=Path)
    export.add_argument("--format", required=True, choices=["onnx"])
    export.add_argument("--out", required=True, type=Path, metavar="FILE")
    export.add_argument(
        "--net", choices=["generator", "discriminator"], default="generator", help="(default generator)"
    )
    _add_experiments(commands)
    return parser


def _add_experiments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    toy = commands.add_parser("toy", help="the paper's Figure 1: the game in one dimension, its numbers and pictures")
    toy.set_defaults(run=_toy)
    toy.add_argument("--out", required=True, type=Path, metavar="DIR", help="for toy.png, toy.gif and toy.json")
    toy.add_argument("--seed", type=_whole, default=0, help="fixes everything that is drawn (default 0)")
    toy.add_argument("--steps", type=_positive, default=2_000, help="generator updates (default 2000)")
    toy.add_argument(
        "--d-updates", type=_positive, default=1_500, help="of D while G is frozen, four times (default 1500)"
    )

    interpolate = commands.add_parser("interpolate", help="the paper's Figure 3: images on the way between seeds")
    interpolate.set_defaults(run=_interpolate)
    interpolate.add_argument("bundle", type=Path)
    interpolate.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    interpolate.add_argument("--seeds", type=_whole, nargs="+", default=[0, 1], metavar="S", help="(default 0 1)")
    interpolate.add_argument(
        "--steps", type=_positive, default=10, help="images from a seed to the next, both included (default 10)"
    )
    interpolate.add_argument(
        "--method", choices=["linear", "spherical", "both"], default="both", help="one strip, or one under the other"
    )
    interpolate.add_argument("--label", help="held all the way (default: each seed's own)")
    interpolate.add_argument("--scale", type=_positive, default=1, help="pixels are repeated so often (default 1)")

    neighbours = commands.add_parser(
        "neighbours", help="the paper's Figure 2: samples, and the nearest training images"
    )
    neighbours.set_defaults(run=_neighbours)
    neighbours.add_argument("bundle", type=Path)
    _add_data(neighbours)
    neighbours.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    neighbours.add_argument("--sample-seed", type=_whole, default=0, metavar="S", help="of the samples (default 0)")
    neighbours.add_argument("--rows", type=_positive, default=4, help="(default 4)")
    neighbours.add_argument("--columns", type=_positive, default=5, help="of samples (default 5)")
    neighbours.add_argument("--scale", type=_positive, default=1, help="pixels are repeated so often (default 1)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**53:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 … 2⁵³ − 1")
    return int(text)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        required=True,
        help="mnist, fashion-mnist, digits, a folder of images, an .npz, or an IDX file of images",
    )
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("GAN_DATA_DIR") or None,
                        help="where mnist/ and fashion-mnist/ lie (default: GAN_DATA_DIR, else data/)")  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="S", help="crop and resize images to S×S pixels")
    parser.add_argument("--skip-bad", action="store_true", help="leave out a folder's files that cannot be read")


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """How `--data` is read, for `load_dataset`."""
    return {"image_size": arguments.image_size, "skip_bad": arguments.skip_bad}


def _bundle_name(text: str) -> str:
    if not re.search(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit")
    return text


def _default_name(data: str, preset: str) -> str:
    """A valid bundle name from that of any folder or file."""
    plain = re.sub("[^a-z0-9._-]+", "-", data.lower())[: 63 - len(preset)]
    return f"{plain.rstrip('-')}-{preset}".lstrip(".-_")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RunError(f"device {name}: choose auto, cpu, cuda or cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {name}: {str(error).splitlines()[0]}") from None
    return device


def resolve(arguments: argparse.Namespace) -> TrainingOptions:
    """The preset's options with the command line's changes.

    Raises:
        RunError: They contradict one another, or a number is out of range.
    """
    options = PRESETS[arguments.preset].model_dump(mode="json")
    if arguments.algorithm1:
        options |= {"update": "alternating", "generator_loss": "saturating", "d_loss_scale": 1.0}
    given = ("steps", "seed", "batch_size", "update", "d_steps", "generator_loss", "conditional", "selection",
             "precision")  # fmt: skip
    for field in given:
        if getattr(arguments, field) is not None:
            options[field] = getattr(arguments, field)
    if arguments.noise is not None:
        options["latent"]["distribution"] = arguments.noise
    try:
        return TrainingOptions.model_validate_json(json.dumps(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{'.'.join(map(str, first['loc'])) or 'options'}: {first['msg']}") from None


def _train(arguments: argparse.Namespace) -> int:
    options, device, run = resolve(arguments), _device(arguments.device), _run_folder(arguments)
    dataset = _training_data(arguments, options)
    record, changes = _record(arguments, run, options, dataset, device)
    if changes and arguments.resume and not arguments.override:
        differences = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changes.items())
        raise RunError(f"the run was begun otherwise: {differences}. --override goes on all the same, and records it")
    state = trainer.State(options, dataset, device)
    if arguments.dry_run:
        return _dry_run(state, dataset, record)
    with run.held():
        return _train_alone(arguments, state, dataset, run, record, changes)


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
        _steps(state, dataset, run, arguments.checkpoint_every, arguments.alarms, board)
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
    """What the run's folder and manifest will say of it, and what is otherwise than the folder says by now."""
    before = run.record() or {}
    threads = before.get("threads", torch.get_num_threads())
    if device.type == "cpu":
        if threads != torch.get_num_threads():
            print(f"Computing on {threads} threads, as the run was begun.", flush=True)
        # A sum's last bits depend on how it is divided. The number is set even where it stays the same: drawing sets it
        # at every score, and MKL, which may use fewer threads until then, has to divide alike before and after.
        torch.set_num_threads(threads)
    name = arguments.name or before.get("name") or _default_name(dataset.name, options.preset)
    record = {
        "name": name,
        "preset": options.preset,
        "options": options.model_dump(mode="json"),
        "data": {"name": dataset.name, "checksum": dataset.checksum},
        "overrides": before.get("overrides", []),
        **environment(device),
    }
    return record, _changes({"name": name, **before} if before else {}, record)


def _training_data(arguments: argparse.Namespace, options: TrainingOptions) -> Dataset:
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=options.seed, **_reading(arguments))
    said = arguments.conditional is not None or arguments.dry_run  # whose output is for programs, too
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


def _steps(
    state: trainer.State,
    dataset: Dataset,
    run: RunDir,
    checkpoint_every: int,
    alarms: str,
    board: TensorBoard | None,
) -> None:
    """Train to the end, to the first signal or to an alarm; score, watch, show and save on the way."""
    from models.training.progress import TrainingDisplay  # noqa: PLC0415 — rich is an extra that `inspect` does without

    options = state.options
    stop = _StopOnSignal()
    probe, watch = Probe(state, dataset), HealthMonitor(options.batch_size * options.d_steps, run.stats())
    with stop, TrainingDisplay(options.steps, state.step) as display:
        every = (REPORT_EVERY, checkpoint_every)
        for report in trainer.train(state, options.steps, report_every=every, stopped=stop.is_set):
            row = asdict(report)
            raised: list[Alarm] = []
            if alarms != "off" and state.step % probe.every(REPORT_EVERY) == 0:
                vitals = probe.look()
                raised = watch.see(state.step, vitals)
                row |= row_of(vitals) | ({"alarms": [str(alarm) for alarm in raised]} if raised else {})
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
            display.show(report, state.best, state.selection, raised)
            if alarms == "stop" and raised and raised[0].stop:
                kept = run.go_back(watch.good_step)
                write_report(run)
                raise HealthError(_stopped(state.step, raised[0], kept))
            if done or stop.is_set() or state.step % checkpoint_every == 0:
                run.save_checkpoint(state.step, state.tensors(), state.facts(), watch.good_step)
            if is_scored:
                write_report(run)


def _stopped(step: int, alarm: Alarm, kept: int | None) -> str:
    if kept is None:
        return f"stopped at step {step}, before the first checkpoint: {alarm}"
    return (f"stopped at step {step}: {alarm}. The checkpoint of step {kept} is kept: --resume --steps {kept} makes a "
            "bundle of the best until then, --resume --alarms warn goes on in spite of it")  # fmt: skip


def _is_published(run: RunDir, name: str, step: int) -> bool:
    """Whether the run's bundle is there, whole, and of this step: a kill may have come between the two writes."""
    try:
        bundle = read_bundle(run.bundle)
        return (bundle.name, bundle.manifest.training.get("steps")) == (name, step)
    except BundleError:
        return False


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What a resumed run would do otherwise than before, as [old, new]: name, options, data, what alters sums."""
    if not before:
        return {}
    old, new = (
        {**record.get("options", {}), **{key: record.get(key) for key in ("name", "data", *DECIDES_SUMS)}}
        for record in (before, now)
    )
    keys = sorted((old.keys() | new.keys()) - {"steps"})
    return {key: [old.get(key), new.get(key)] for key in keys if old.get(key) != new.get(key)}


class _StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step is never cut; the second acts as usual."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.is_set = self._event.is_set

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self._event.set()
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _evaluate(arguments: argparse.Namespace) -> int:
    from models.training.progress import Status, show_figures, show_scores  # noqa: PLC0415 — as above

    deadline = math.inf if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    if arguments.neighbours is not None:
        _require_png(arguments.neighbours)  # not after minutes of scoring
    device = _device(arguments.device)
    bundle = read_bundle(arguments.bundle, device)
    dataset = _load_as_trained(arguments, bundle)
    scores: dict[str, Any] = {"data": {"name": dataset.name, "checksum": dataset.checksum}}
    skipped = []
    with Status() as status:
        judge = load_features(dataset, device, progress=lambda *at: status.show("training the feature net", *at))
        status.show("drawing and embedding images")
        control = untrained_features(dataset, device) if judge.kind == "trained" else None
        images, labels = _drawn(bundle, rows_wanted(dataset))
        if labels is not None and bundle.manifest.labels != dataset.label_names:
            labels = None
            skipped.append(f"accuracy: the labels of {bundle.name} are not those of {dataset.name}")
        try:
            suite = MetricSuite(dataset, images, labels, judge, control)
        except TooFewError as error:
            skipped.append(f"figures: {error}")
            skipped += ["neighbours: as the figures"] if arguments.neighbours is not None else []
        else:
            scored: dict[str, Any] = {}
            for group, compute in suite.groups():
                if time.monotonic() > deadline:
                    skipped.append(f"{group}: out of time")
                    continue
                status.show(f"scoring: {group}")
                found = compute()
                show_figures(found, heading=not scored)
                scored |= {figure.name: figure.facts() for figure in found}
            scores["suite"] = {**suite.facts(), "figures": scored}
            if arguments.neighbours is not None:
                replace_file(arguments.neighbours, encode_png(suite.nearest_pictures()))
        scores["parzen"], rest = _parzen(bundle, dataset, deadline, status.show, show_scores)
    scores["skipped"] = skipped + rest
    for reason in scores["skipped"]:
        print(f"not computed: {reason}")
    if arguments.record:
        record_evaluation(bundle, scores)
    print(json.dumps({"bundle": bundle.name, "version": bundle.version, **scores}))
    return 0


def _parzen(
    bundle: Bundle,
    dataset: Dataset,
    deadline: float,
    say: Callable[[str], None],
    show: Callable[..., None],
) -> tuple[dict[str, Any], list[str]]:
    """The rows of the Parzen table, as far as the time goes, and what is missing."""
    splits = [to_pixels(split.images) for split in (dataset.train, dataset.validation, dataset.test)]

    def draw(count: int, first_index: int) -> torch.Tensor:
        return to_pixels(bundle.draw(count, first_index=first_index), next(bundle.generator.parameters()).device)

    table = evaluation.parzen_table(draw, *splits, seed=0)
    rows: dict[str, Any] = {}
    while time.monotonic() <= deadline:
        say("scoring: Parzen windows")
        found = next(table, None)
        if found is None:
            return rows, []
        show(*found, heading=not rows)
        rows[found[0]] = asdict(found[1])
    return rows, [f"Parzen windows after {len(rows)} rows: out of time"]


def _drawn(bundle: Bundle, count: int) -> tuple[UInt8, torch.Tensor | None]:
    """The bundle's first images of seed 0, as a viewer gets them, and the labels that they were asked for."""
    labels = sampled_labels(bundle.manifest.latent, 0, 0, count)
    return bundle.draw(count), None if labels is None else torch.from_numpy(labels)


def _load_as_trained(arguments: argparse.Namespace, bundle: Bundle) -> Dataset:
    """The data set, divided by the seed of the command line or else the bundle's: its test images were never seen."""
    training: dict[str, Any] = bundle.manifest.training
    seed = training.get("seed", 0) if arguments.seed is None else arguments.seed
    if not isinstance(seed, int) or seed < 0:
        raise RunError(f"the seed must be a whole number of 0 or more, not {seed!r}")
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=seed, **_reading(arguments))
    image = trainer.image_spec(dataset)
    if image != bundle.manifest.image:
        raise DataError(f"{dataset.name} has images {image.shape}, {bundle.name} makes {bundle.manifest.image.shape}")
    if training.get("data", {}).get("checksum", dataset.checksum) != dataset.checksum:
        print("warning: this is not the data that the bundle was trained on, or not divided as it was then: "
              "test images may be among those that it learnt from", file=sys.stderr, flush=True)  # fmt: skip
    return dataset


def _inspect(arguments: argparse.Namespace) -> int:
    bundle = read_bundle(arguments.bundle)
    manifest = bundle.manifest.model_dump(mode="json")
    nets = {"generator": bundle.generator, "discriminator": bundle.discriminator}
    if arguments.json:
        print(json.dumps({"version": bundle.version, **manifest}))
        return 0
    print(f"{bundle.name}@{bundle.version}, created {manifest['created']}: every checksum, tensor and shape is right")
    for net, module in nets.items():
        count = sum(p.numel() for p in module.parameters())
        print(f"{net}: {count:,} parameters, {json.dumps(manifest['network'][net])}")
    for key in ("image", "latent", "labels", "calibration", "training", "evaluation", "files"):
        print(f"{key}: {json.dumps(manifest[key])}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from models import export  # noqa: PLC0415 — an extra of its own

    bundle = read_bundle(arguments.bundle)
    try:
        parity = export.export_onnx(bundle, arguments.out, arguments.net)
    except export.ExportError as error:
        raise RunError(str(error)) from None
    print(f"{arguments.out}: {arguments.net} of {bundle.name}@{bundle.version}; over {parity.rows} rows onnxruntime "
          f"and torch differ by {parity.largest_difference:.2g} {parity.unit} (allowed: {parity.allowed})")  # fmt: skip
    return 0


def _toy(arguments: argparse.Namespace) -> int:
    from models.experiments import toy  # noqa: PLC0415 — matplotlib is an extra that `inspect` does without
    from models.experiments import toy_plot as toyplot  # noqa: PLC0415 — matplotlib is an extra that `inspect` does without

    arguments.out.mkdir(parents=True, exist_ok=True)
    options = toy.ToyOptions(seed=arguments.seed, steps=arguments.steps, d_updates=arguments.d_updates)
    result = toy.play(options, report=_show_stage)
    fresh = result.fresh
    print(f"fresh D: value {fresh.value:.4f}, largest gap to p_data/(p_data+p_g) {fresh.gap:.3f}, "
          f"largest distance from ½ {fresh.from_half:.3f}")  # fmt: skip
    replace_file(
        arguments.out / "toy.json", (json.dumps(result.record(), indent=1, ensure_ascii=False) + "\n").encode()
    )
    replace_file(arguments.out / "toy.png", toyplot.panels(result))
    replace_file(arguments.out / "toy.gif", toyplot.animation(result))
    print(f"{arguments.out}: toy.json, toy.png, toy.gif")
    failed = [claim for claim, holds in result.claims().items() if not holds]
    for claim in failed:
        print(f"error: not so: {claim}", file=sys.stderr)
    return 1 if failed else 0


def _show_stage(stage: "toy.Stage") -> None:
    gaps = ", ".join(f"{gap:.3f} after {updates}" for updates, gap in stage.gaps)
    print(f"{stage.name}, G frozen after {stage.step:,} updates: "
          f"C(G) = {stage.value:.4f} = −log 4 + 2 · {stage.jsd:.4f}\n"
          f"  D's largest gap to p_data/(p_data+p_g): {gaps} updates of D", flush=True)  # fmt: skip


def _interpolate(arguments: argparse.Namespace) -> int:
    bundle = read_bundle(arguments.bundle)
    methods: list[figures.Method] = ["linear", "spherical"] if arguments.method == "both" else [arguments.method]
    try:
        strips = [
            figures.interpolation(bundle, arguments.seeds, arguments.steps, method, arguments.label)
            for method in methods
        ]
    except ValueError as error:
        raise RunError(str(error)) from None
    picture = grid(np.concatenate(strips), columns=len(strips[0]))
    _write_picture(arguments.out, figures.png(picture, arguments.scale))
    ways = " above ".join(f"{method} way" for method in methods)
    print(f"{arguments.out}: {ways} through seeds {', '.join(map(str, arguments.seeds))}, {len(strips[0])} images each")
    return 0


def _neighbours(arguments: argparse.Namespace) -> int:
    bundle = read_bundle(arguments.bundle)
    dataset = _load_as_trained(argparse.Namespace(**vars(arguments), seed=None), bundle)
    picture, found = figures.neighbours(
        bundle, dataset.train.images, seed=arguments.sample_seed, rows=arguments.rows, columns=arguments.columns
    )
    _write_picture(arguments.out, figures.png(picture, arguments.scale))
    for one in found:
        print(f"sample {one.sample}: nearest is training image {one.training_image}, at distance {one.distance:.2f}")
    last = arguments.rows * arguments.columns - 1
    print(f"{arguments.out}: images 0 to {last} of seed {arguments.sample_seed}; in the last column, of "
          f"{len(dataset.train.images):,} training images the nearest to the sample on its left")  # fmt: skip
    return 0


def _require_png(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise RunError(f"{path}: pictures are written as PNG, so the name must end in .png")


def _write_picture(path: Path, content: bytes) -> None:
    _require_png(path)
    replace_file(path, content)


if __name__ == "__main__":
    sys.exit(main())
