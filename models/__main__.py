"""The offline commands: train, evaluate, inspect. `python -m models --help` lists them."""

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError

from models import evaluation, trainer
from models.bundle import NAME_PATTERN, BundleError, read_bundle, record_evaluation
from models.data import DataError, Dataset, load_dataset
from models.losses import LOSSES
from models.rundir import RunDir, RunError, environment
from models.sampler import to_pixels, to_uint8
from models.spec import PRESETS, TrainingOptions

INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended
GRID_IMAGES = 64
REPORT_EVERY = 50  # steps
DECIDES_SUMS = ("device", "instruction_set", "torch", "threads")  # beside the options, in the last bits


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (DataError, RunError, BundleError, trainer.TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {': '.join(str(part) for part in (error.filename, error.strerror) if part)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: the train extra brings it", file=sys.stderr)
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
        help="−log D(G(z)), log(1 − D(G(z))), and those of D with it; models/losses.py",
    )
    labels = train.add_mutually_exclusive_group()
    labels.add_argument("--conditional", action="store_true", default=None, help="both nets see the label")
    labels.add_argument("--unconditional", action="store_false", dest="conditional", default=None,
                        help="labels are not used, also where there are some")  # fmt: skip
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

    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true", help="the manifest and version as JSON")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="mnist, fashion-mnist, digits, a folder of images, or an .npz")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("GAN_DATA_DIR") or None,
                        help="where mnist/ and fashion-mnist/ lie (default: GAN_DATA_DIR, else data/)")  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="S", help="crop and resize a folder's images to S×S pixels")


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
    for field in ("steps", "seed", "batch_size", "update", "d_steps", "generator_loss", "conditional"):
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
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=options.seed, image_size=arguments.image_size)
    if dataset.label_names and not options.conditional and arguments.conditional is None:
        print(f"{options.preset} is unconditional: the labels of {dataset.name} are not used. --conditional uses them.")
    record, changes = _record(run, options, dataset, device)
    if changes and not arguments.override:
        differences = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in changes.items())
        raise RunError(f"the run was begun otherwise: {differences}. --override goes on all the same, and records it")
    state = trainer.State(options, dataset, device)
    found = run.newest_checkpoint() if arguments.resume else None
    if found is not None:
        state.load(*found)
        print(f"Going on from step {state.step} of {run.path}.")
    elif arguments.resume:
        print(f"No checkpoint in {run.path} yet: starting from the beginning.")
    if state.step >= options.steps and _is_published(run, state.step):
        print(f"Nothing to do: {run.bundle} is finished at step {state.step}.")
        return 0
    if changes:
        record["overrides"].append({"step": state.step, "changes": changes})
    run.begin(record)
    run.truncate_stats(state.step)
    _steps(state, dataset, run, arguments.checkpoint_every)
    if state.step < options.steps:
        print(f"Stopped at step {state.step} of {options.steps}; --resume goes on.")
        return INTERRUPTED
    if not state.best.step:  # a --steps below the first score ended the run
        trainer.keep_if_best(state, trainer.score(state, dataset))
    name = arguments.name or _default_name(dataset.name, options.preset)
    bundle = trainer.publish(state, dataset, run.bundle, name, record)
    print(f"{bundle.folder}: {bundle.name}@{bundle.version}, the weights of step {state.best.step}, "
          f"validation log-likelihood {state.best.score:.1f} nats.")  # fmt: skip
    return 0


def _run_folder(arguments: argparse.Namespace) -> RunDir:
    if arguments.checkpoint_every < 1:
        raise RunError("--checkpoint-every must be at least 1")
    if arguments.override and not arguments.resume:
        raise RunError("--override goes with --resume")
    run = RunDir(arguments.out)
    if run.is_used() and not arguments.resume:
        raise RunError(f"{run.path} is not empty: --resume goes on with that run, another --out begins a new one")
    return run


def _record(
    run: RunDir, options: TrainingOptions, dataset: Dataset, device: torch.device
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What the run's folder and manifest will say of it, and what is otherwise than the folder says by now."""
    before = run.record() or {}
    threads = before.get("threads", torch.get_num_threads())
    if device.type == "cpu" and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # a sum's last bits depend on how it is divided
        print(f"Computing on {threads} threads, as the run was begun.")
    record = {
        "preset": options.preset,
        "options": options.model_dump(mode="json"),
        "data": {"name": dataset.name, "checksum": dataset.checksum},
        "overrides": before.get("overrides", []),
        **environment(device),
    }
    return record, _changes(before, record)


def _steps(state: trainer.State, dataset: Dataset, run: RunDir, checkpoint_every: int) -> None:
    """Train to the end or to the first signal; score, show and save on the way."""
    from models.display import TrainingDisplay  # noqa: PLC0415 — rich is an extra that `inspect` does without

    options = state.options
    labels = state.sample_labels(GRID_IMAGES)
    stop = _StopOnSignal()
    with stop, TrainingDisplay(options.steps, state.step) as display:
        every = (REPORT_EVERY, checkpoint_every)
        for report in trainer.train(state, options.steps, report_every=every, stopped=stop.is_set):
            row = asdict(report)
            done = state.step == options.steps
            if done or state.step % options.score_every == 0:
                choice = trainer.score(state, dataset)
                trainer.keep_if_best(state, choice)
                row |= {"validation_log_likelihood": choice.log_likelihood, "sigma": choice.sigma}
                images = trainer.generate(state.shown_generator, options.latent, GRID_IMAGES, labels)
                run.save_samples(state.step, to_uint8(images))
            run.append_stats(row)
            display.show(report, state.best)
            if done or stop.is_set() or state.step % checkpoint_every == 0:
                run.save_checkpoint(state.step, state.tensors(), state.facts())


def _is_published(run: RunDir, step: int) -> bool:
    """Whether the run's bundle is there, whole, and of this step: a kill may have come between the two writes."""
    try:
        return read_bundle(run.bundle).manifest.training.get("steps") == step
    except BundleError:
        return False


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What a resumed run would compute otherwise than it was begun, as [old, new]: options, data, what changes sums."""
    if not before:
        return {}
    old, new = (
        {**record.get("options", {}), **{key: record.get(key) for key in ("data", *DECIDES_SUMS)}}
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
    from models.display import show_scores  # noqa: PLC0415 — as above

    device = _device(arguments.device)
    bundle = read_bundle(arguments.bundle, device)
    dataset = _load_as_trained(arguments, bundle.manifest.training)
    image = trainer.image_spec(dataset)
    if image != bundle.manifest.image:
        raise DataError(f"{dataset.name} has images {image.shape}, {bundle.name} makes {bundle.manifest.image.shape}")
    splits = [to_pixels(split.images) for split in (dataset.train, dataset.validation, dataset.test)]
    rows: dict[str, Any] = {}
    for name, row in evaluation.parzen_table(lambda n, first: trainer.draw(bundle, n, first), *splits, seed=0):
        show_scores(name, row, heading=not rows)
        rows[name] = asdict(row)
    scores = {"parzen": rows, "data": {"name": dataset.name, "checksum": dataset.checksum}}
    if arguments.record:
        record_evaluation(bundle, scores)
    print(json.dumps({"bundle": bundle.name, "version": bundle.version, **scores}))
    return 0


def _load_as_trained(arguments: argparse.Namespace, training: dict[str, Any]) -> Dataset:
    """The data set, divided by the seed of the command line or else the bundle's: its test images were never seen."""
    seed = training.get("seed", 0) if arguments.seed is None else arguments.seed
    if not isinstance(seed, int) or seed < 0:
        raise RunError(f"the seed must be a whole number of 0 or more, not {seed!r}")
    return load_dataset(arguments.data, arguments.data_dir, seed=seed, image_size=arguments.image_size)


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


if __name__ == "__main__":
    sys.exit(main())
