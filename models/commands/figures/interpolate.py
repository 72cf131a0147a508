"""The paper's Figure 3: images on the way between seeds."""

import argparse
from pathlib import Path

import numpy as np

from models.commands.arguments import Subparsers, bundle_of, positive, whole, write_picture
from models.experiments import figures
from models.inference.noise import PathMethod
from models.inference.pixels import grid
from models.training.run_folder import RunError


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    interpolate = commands.add_parser("interpolate", help="the paper's Figure 3: images on the way between seeds")
    interpolate.set_defaults(run=run)
    interpolate.add_argument("bundle", type=Path)
    interpolate.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    interpolate.add_argument("--seeds", type=whole, nargs="+", default=[0, 1], metavar="S", help="(default 0 1)")
    interpolate.add_argument(
        "--steps", type=positive, default=10, help="images from a seed to the next, both included (default 10)"
    )
    interpolate.add_argument(
        "--method", choices=["linear", "spherical", "both"], default="both", help="one strip, or one under the other"
    )
    interpolate.add_argument("--label", help="held all the way (default: each seed's own)")
    interpolate.add_argument("--scale", type=positive, default=1, help="pixels are repeated so often (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Draw a strip for each method, one under the other."""
    bundle = bundle_of(arguments)
    methods: list[PathMethod] = ["linear", "spherical"] if arguments.method == "both" else [arguments.method]
    try:
        strips = [
            figures.interpolation(bundle, arguments.seeds, arguments.steps, method, arguments.label)
            for method in methods
        ]
    except ValueError as error:
        raise RunError(str(error)) from None
    picture = grid(np.concatenate(strips), columns=len(strips[0]))
    write_picture(arguments.out, figures.png(picture, arguments.scale))
    ways = " above ".join(f"{method} way" for method in methods)
    print(f"{arguments.out}: {ways} through seeds {', '.join(map(str, arguments.seeds))}, {len(strips[0])} images each")
    return 0
