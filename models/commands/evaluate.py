"""Score a bundle against a data set."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.bundle import Bundle, record_evaluation
from models.commands.arguments import Subparsers, add_data, bundle_of, device_of, load_as_trained, require_png
from models.data.load import Dataset
from models.evaluation.calibration import count_verdicts
from models.evaluation.classification_accuracy import classification_accuracy
from models.evaluation.features import load_features, untrained_features
from models.evaluation.metric_suite import MetricSuite, TooFewError, rows_wanted
from models.evaluation.parzen import parzen_table
from models.exchange.model_card import write_card
from models.files import replace_file
from models.inference.drawing import logits_beside
from models.inference.noise import sampled_labels
from models.inference.pixels import encode_png, to_pixels

Say = Callable[[str], None]  # a line of the table
Show = Callable[..., None]  # what is done at present, and how much of how much is done where that is known


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    evaluate = commands.add_parser("evaluate", help="score a bundle against a data set")
    evaluate.set_defaults(run=run)
    evaluate.add_argument("bundle", type=Path)
    add_data(evaluate)
    evaluate.add_argument(
        "--seed", type=int, help="of the division of sets without a published one (default: training's)"
    )
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default auto)")
    evaluate.add_argument("--json", action="store_true", help="one line of JSON on stdout, as where that is no "
                          "terminal; the table goes to stderr then")  # fmt: skip
    evaluate.add_argument("--record", action="store_true", help="write the scores into the bundle's manifest")
    evaluate.add_argument("--time-limit", type=float, metavar="S",
                          help="begin no further figure after this many seconds, and name those left out")  # fmt: skip
    evaluate.add_argument("--classification-accuracy", action="store_true", help="train a classifier on generated "
                          "images and one on real ones, and test both: is the generated set useful?")  # fmt: skip
    more_or_less = evaluate.add_mutually_exclusive_group()
    more_or_less.add_argument("--neighbours", type=Path, metavar="PNG",
                              help="write a picture of samples beside their nearest training images")  # fmt: skip
    more_or_less.add_argument("--verdicts-only", action="store_true",
                              help="count D's verdicts alone, in seconds; scores recorded before stay")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Compute as much as the time limit allows. The table is for people, wherever they look; a pipe gets JSON."""
    deadline = math.inf if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    if arguments.neighbours is not None:
        require_png(arguments.neighbours)  # not after minutes of scoring
    bundle = bundle_of(arguments, device_of(arguments))
    dataset = load_as_trained(arguments, bundle)
    wants_json = arguments.json or not sys.stdout.isatty()

    def say(line: str) -> None:
        print(line, file=sys.stderr if wants_json else sys.stdout, flush=True)

    if arguments.verdicts_only:
        scores, skipped = _verdicts(bundle, dataset)
    else:
        scores, skipped = _all_scores(arguments, bundle, dataset, deadline, say)
        scores["skipped"] = skipped
    if arguments.classification_accuracy:
        found, late = _classification_accuracy(arguments, bundle, dataset, deadline, say)
        scores |= found
        skipped += late
    for reason in skipped:
        say(f"not computed: {reason}")
    if arguments.record:
        record_evaluation(bundle, scores)
        write_card(bundle.folder)
    if wants_json:
        print(json.dumps({"bundle": bundle.name, "version": bundle.version, **scores}))
    return 0


def _all_scores(
    arguments: argparse.Namespace, bundle: Bundle, dataset: Dataset, deadline: float, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """The scores that the time limit allows, and why others are missing."""
    from models.training.progress import Status  # noqa: PLC0415 — rich is an extra that `inspect` does without

    scores: dict[str, Any] = {"data": _data(dataset)}
    with Status() as status:
        suite, skipped = _suite(bundle, dataset, device_of(arguments), status.show)
        if suite is not None:
            scores["suite"], late = _figures(suite, deadline, status.show, say)
            skipped += late
            if arguments.neighbours is not None:
                replace_file(arguments.neighbours, encode_png(suite.nearest_pictures()))
        elif arguments.neighbours is not None:
            skipped.append("neighbours: as the figures")
        if time.monotonic() <= deadline:
            status.show("judging images")
            verdicts, missing = _verdicts(bundle, dataset)
            scores |= verdicts
            skipped += missing
        else:
            skipped.append("verdicts: out of time")
        scores["parzen"], late = _parzen(bundle, dataset, deadline, status.show, say)
    return scores, skipped + late


def _data(dataset: Dataset) -> dict[str, str]:
    return {"name": dataset.name, "checksum": dataset.checksum}


def _verdicts(bundle: Bundle, dataset: Dataset) -> tuple[dict[str, Any], list[str]]:
    """How often D says what of the test images and of as many generated ones, or why that is missing."""
    if bundle.manifest.labels not in {None, dataset.label_names}:
        return {}, [f"verdicts: the labels of {bundle.name} are not those of {dataset.name}"]
    real = dataset.test
    generated = bundle.draw(len(real.images))
    logits = logits_beside(bundle.discriminator, bundle.manifest.latent, real.images, real.labels, generated)
    counts = count_verdicts(bundle.manifest.calibration, *logits)
    return {"verdicts": {"data": _data(dataset), "split": "test", **counts}}, []


def _classification_accuracy(
    arguments: argparse.Namespace, bundle: Bundle, dataset: Dataset, deadline: float, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """What a classifier learns from generated images, beside what it learns from real ones, or why that is missing."""
    from models.training.progress import Status  # noqa: PLC0415 — as above

    count = len(dataset.train.images)
    labels = sampled_labels(bundle.manifest.latent, 0, 0, count)
    if labels is None or bundle.manifest.labels != dataset.label_names:
        return {}, [f"classification accuracy: {bundle.name} has no labels, or not those of {dataset.name}"]
    if not len(dataset.test.images):
        return {}, [f"classification accuracy: {dataset.name} has no test images"]
    if time.monotonic() > deadline:
        return {}, ["classification accuracy: out of time"]
    with Status() as status:
        status.show("drawing images to learn from")
        images = bundle.draw(count)
        found = classification_accuracy(dataset, images, labels, device_of(arguments), show=status.show)
    say(f"classification accuracy: a classifier that learns from {found.images:,} generated images names "
        f"{found.generated:.2%} ± {found.standard_error:.2%} of the test images right; from as many real ones, "
        f"{found.real:.2%}. Worst off is {found.worst_class}: {found.worst_class_generated:.1%} and "
        f"{found.worst_class_real:.1%}")  # fmt: skip
    return {"classification_accuracy": {"data": _data(dataset), "split": "test", **asdict(found)}}, []


def _suite(bundle: Bundle, dataset: Dataset, device: torch.device, show: Show) -> tuple[MetricSuite | None, list[str]]:
    """The metric suite on the bundle's images, if there are data enough for it, and what it leaves out."""
    extractor = load_features(dataset, device, progress=lambda *at: show("training the feature net", *at))
    show("drawing and embedding images")
    control = untrained_features(dataset, device) if extractor.kind == "trained" else None
    count, skipped = rows_wanted(dataset), []
    labels = sampled_labels(bundle.manifest.latent, 0, 0, count)
    asked = None if labels is None else torch.from_numpy(labels)
    if asked is not None and bundle.manifest.labels != dataset.label_names:
        asked = None
        skipped.append(f"accuracy: the labels of {bundle.name} are not those of {dataset.name}")
    try:
        return MetricSuite(dataset, bundle.draw(count), asked, extractor, control), skipped
    except TooFewError as error:
        return None, [*skipped, f"figures: {error}"]


def _figures(suite: MetricSuite, deadline: float, show: Show, say: Say) -> tuple[dict[str, Any], list[str]]:
    """The suite's figures, as far as the time goes, and what is missing."""
    from models.training.progress import show_scores  # noqa: PLC0415 — as above

    scored: dict[str, Any] = {}
    skipped = []
    for group, compute in suite.groups():
        if time.monotonic() > deadline:
            skipped.append(f"{group}: out of time")
            continue
        show(f"scoring: {group}")
        found = compute()
        show_scores(found, say, heading=not scored)
        scored |= {score.name: score.record() for score in found}
    return {**suite.metadata(), "figures": scored}, skipped


def _parzen(
    bundle: Bundle, dataset: Dataset, deadline: float, show: Show, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """The rows of the Parzen table, as far as the time goes, and what is missing."""
    from models.training.progress import show_parzen  # noqa: PLC0415 — as above

    device = next(bundle.generator.parameters()).device
    splits = [to_pixels(split.images) for split in dataset.splits]
    windows = parzen_table(lambda n, first: to_pixels(bundle.draw(n, first_index=first), device), *splits, seed=0)
    rows: dict[str, Any] = {}
    while time.monotonic() <= deadline:
        show("scoring: Parzen windows")
        found = next(windows, None)
        if found is None:
            return rows, []
        show_parzen(*found, say, heading=not rows)
        rows[found[0]] = asdict(found[1])
    return rows, [f"Parzen windows after {len(rows)} rows: out of time"]
