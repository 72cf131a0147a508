"""A run's samples as it went on: a row for each step, always of the same noise."""

import argparse
from pathlib import Path

from models.commands.arguments import Subparsers, positive, write_picture
from models.experiments import figures
from models.training.run_folder import RunDir, RunError


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    evolution = commands.add_parser("evolution", help="a run's samples as it went on: a row for each step")
    evolution.set_defaults(run=run)
    evolution.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    evolution.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    evolution.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="of those in RUN/samples (default: all, from the top)"
    )
    evolution.add_argument("--columns", type=positive, default=16, help="images of each step, at most 64 (default 16)")
    evolution.add_argument("--scale", type=positive, default=1, help="pixels are repeated so often (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Cut the rows out of the run's own pictures."""
    pictures = dict(RunDir(arguments.folder).samples())
    steps = arguments.steps or list(pictures)
    if missing := [step for step in steps if step not in pictures]:
        raise RunError(f"{arguments.folder / 'samples'}: no picture of step {missing[0]}")
    if not steps:
        raise RunError(f"{arguments.folder}: no run with samples")
    picture = figures.evolution([pictures[step] for step in steps], arguments.columns)
    write_picture(arguments.out, figures.png(picture, arguments.scale))
    print(f"{arguments.out}: from the top, after {', '.join(f'{step:,}' for step in steps)} steps")
    return 0
