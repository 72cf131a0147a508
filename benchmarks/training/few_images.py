"""What augmentation and fine-tuning do with few images: the Fréchet distance of runs on 300, 1,000 and 5,000 images.

    python -m benchmarks.training.few_images --data mnist --data-dir DIR --out runs/few [--counts 300 1000 5000]
        [--augment none flip diffaugment ada] [--init BUNDLE] [--steps 500 1000 2000 4000] [--preset conv-ns]

Each run trains on the first so many images of a set, in the order of a fixed shuffle. At each number of steps its last
weights draw 10,000 images (as many as there are test images, if those are fewer), which are compared with all test
images in the features of a classifier that has learnt from the whole training split: so all figures of a table compare.
With `--init` there is a run more for each count, that begins with the bundle. Runs go on where they were, so a second
call with more steps, or after an interruption, does only what is missing. RESULTS.json in the folder has all figures.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tools.process import ROOT
from benchmarks.tools.report import table
from models.bundle import read_bundle
from models.data.load import Dataset, load_dataset
from models.evaluation.features import FeatureExtractor, load_features
from models.evaluation.scores import Moments, frechet_distance, moments
from models.files import replace_file

SAMPLES = 10_000
OF_TRAINING = 0.8  # of an .npz, which `train` divides
TUNED = "init"


def main(argv: Sequence[str] | None = None) -> int:
    """Train and score what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="conv-ns")
    parser.add_argument("--counts", type=int, nargs="+", default=[300, 1_000, 5_000])
    parser.add_argument("--augment", nargs="+", default=["none", "flip", "diffaugment", "ada"])
    parser.add_argument("--init", type=Path, metavar="BUNDLE")
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 1_000, 2_000, 4_000])
    arguments = parser.parse_args(argv)
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=0, image_size=arguments.image_size)
    judge = load_features(dataset)
    reference = moments(judge.embed(dataset.test.images).features)
    kinds = [*arguments.augment, *([TUNED] if arguments.init else [])]
    for count in arguments.counts:
        data = few(dataset, count, arguments.out / f"{count}.npz")
        for kind in kinds:
            run = arguments.out / f"{count}-{kind}"
            for steps in sorted(arguments.steps):
                if known(arguments.out, run, steps) is None:
                    train(arguments, data, run, kind, steps)
                    note(arguments.out, run, steps, score(run, judge, reference, len(dataset.test.images)))
    for count in arguments.counts:
        print(f"\n{count:,} images, by steps")
        runs = {kind: arguments.out / f"{count}-{kind}" for kind in kinds}
        table([{"": kind, **figures(arguments.out, run, arguments.steps)} for kind, run in runs.items()])
    return 0


def few(dataset: Dataset, count: int, path: Path) -> Path:
    """An .npz of which `train` takes so many images to train on, with labels where there are some."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = np.random.default_rng(0).permutation(len(dataset.train.images))[: round(count / OF_TRAINING)]
        arrays: dict[str, Any] = {"images": dataset.train.images[rows]}
        if dataset.train.labels is not None:
            arrays["labels"] = dataset.train.labels[rows]
        np.savez(path, **arrays)
    return path


def train(arguments: argparse.Namespace, data: Path, run: Path, kind: str, steps: int) -> None:
    """Go on to so many steps, in a process of its own, whatever the run's health."""
    command = [
        *(sys.executable, "-m", "models", "train", "--preset", arguments.preset, "--data", str(data)),
        *("--out", str(run), "--name", "few", "--steps", str(steps), "--score-every", str(min(arguments.steps))),
        *("--augment", "none" if kind == TUNED else kind, "--alarms", "warn", "--resume"),
        *(("--init", str(arguments.init)) if kind == TUNED else ()),
    ]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 - our own module


def score(run: Path, judge: FeatureExtractor, reference: Moments, most: int) -> float:
    """Fréchet distance of what the run's last weights draw."""
    images = read_bundle(run / "last" / "bundle").draw(min(SAMPLES, most))
    with torch.inference_mode():
        return frechet_distance(moments(judge.embed(images).features), reference)


def known(out: Path, run: Path, steps: int) -> float | None:
    """A figure that an earlier call has found."""
    found: float | None = results(out).get(run.name, {}).get(str(steps))
    return found


def note(out: Path, run: Path, steps: int, value: float) -> None:
    """Keep a figure."""
    found = results(out)
    found.setdefault(run.name, {})[str(steps)] = value
    replace_file(out / "RESULTS.json", json.dumps(found, indent=1).encode())


def results(out: Path) -> dict[str, dict[str, float]]:
    """By run and steps."""
    path = out / "RESULTS.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def figures(out: Path, run: Path, steps: Sequence[int]) -> dict[str, str]:
    """A row of the table."""
    found = {f"{step:,}": known(out, run, step) for step in sorted(steps)}
    return {step: "–" if value is None else f"{value:.1f}" for step, value in found.items()}


if __name__ == "__main__":
    sys.exit(main())
