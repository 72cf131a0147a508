"""Samples by class: a row of images for each label."""

import argparse
from pathlib import Path

from models.commands.arguments import Subparsers, bundle_of, positive, whole, write_picture
from models.experiments import figures
from models.training.run_folder import RunError


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    classes = commands.add_parser("classes", help="samples by class: a row of images for each label")
    classes.set_defaults(run=run)
    classes.add_argument("bundle", type=Path)
    classes.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    classes.add_argument("--sample-seed", type=whole, default=0, metavar="S", help="of the samples (default 0)")
    classes.add_argument("--columns", type=positive, default=20, help="images of each class (default 20)")
    classes.add_argument("--scale", type=positive, default=1, help="pixels are repeated so often (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the first images of the seed, as each class."""
    bundle = bundle_of(arguments)
    if bundle.manifest.labels is None:
        raise RunError(f"{bundle.name} has no labels")
    picture = figures.by_class(bundle, seed=arguments.sample_seed, columns=arguments.columns)
    write_picture(arguments.out, figures.png(picture, arguments.scale))
    print(f"{arguments.out}: images 0 to {arguments.columns - 1} of seed {arguments.sample_seed} with each label, from "
          f"the top {', '.join(bundle.manifest.labels)}")  # fmt: skip
    return 0
