"""What D says of real images, generated ones, another data set, and noise."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from models.commands.arguments import Subparsers, add_data, bundle_of, load_as_trained
from models.data.load import load_dataset
from models.files import replace_file
from models.training.run_folder import RunError


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    verdicts = commands.add_parser("verdicts", help="what D says of real images, generated ones, others, and noise")
    verdicts.set_defaults(run=run)
    verdicts.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    add_data(verdicts)
    verdicts.add_argument("--other", metavar="DATA", help="another data set, of images of the same size")
    verdicts.add_argument("--out", required=True, type=Path, metavar="DIR", help="for verdicts.png and verdicts.json")


def run(arguments: argparse.Namespace) -> int:
    """Judge the sets, and draw how often D says what."""
    from models.experiments import verdicts  # noqa: PLC0415 — matplotlib is an extra that `inspect` does without

    other = None
    if arguments.other is not None:
        other = load_dataset(arguments.other, arguments.data_dir, seed=0)
    judged = []
    for folder in arguments.bundles:
        line = argparse.Namespace(**vars(arguments), bundle=folder, seed=None)
        bundle = bundle_of(line)
        dataset = load_as_trained(line, bundle)
        if other is not None and other.test.images.shape[1:] != dataset.test.images.shape[1:]:
            raise RunError(f"{other.name} has images of another size than {dataset.name}")
        judged.append(verdicts.judge(bundle, dataset, other))
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = json.dumps([asdict(one) for one in judged], indent=1, ensure_ascii=False)
    replace_file(arguments.out / "verdicts.json", (record + "\n").encode())
    replace_file(arguments.out / "verdicts.png", verdicts.chart(judged))
    for one in judged:
        for name, said in one.sets.items():
            low, middle, high = (said.quantiles[at] for at in ("0.05", "0.5", "0.95"))
            print(f"{one.bundle}, {name}: half above {middle:.2f}, nine of ten {low:.2f} … {high:.2f}")
    print(f"{arguments.out}: verdicts.json, verdicts.png")
    return 0
