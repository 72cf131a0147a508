"""The paper's Figure 2: samples, and the nearest training images."""

import argparse
from pathlib import Path

from models.commands.arguments import Subparsers, add_data, bundle_of, load_as_trained, positive, whole, write_picture
from models.experiments import figures


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    neighbours = commands.add_parser(
        "neighbours", help="the paper's Figure 2: samples, and the nearest training images"
    )
    neighbours.set_defaults(run=run)
    neighbours.add_argument("bundle", type=Path)
    add_data(neighbours)
    neighbours.add_argument("--out", required=True, type=Path, metavar="FILE", help="a PNG")
    neighbours.add_argument("--sample-seed", type=whole, default=0, metavar="S", help="of the samples (default 0)")
    neighbours.add_argument("--rows", type=positive, default=4, help="(default 4)")
    neighbours.add_argument("--columns", type=positive, default=5, help="of samples (default 5)")
    neighbours.add_argument("--scale", type=positive, default=1, help="pixels are repeated so often (default 1)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the samples, and find their nearest images."""
    bundle = bundle_of(arguments)
    dataset = load_as_trained(argparse.Namespace(**vars(arguments), seed=None), bundle)
    picture, found = figures.neighbours(
        bundle, dataset.train.images, seed=arguments.sample_seed, rows=arguments.rows, columns=arguments.columns
    )
    write_picture(arguments.out, figures.png(picture, arguments.scale))
    for one in found:
        print(f"sample {one.sample}: nearest is training image {one.training_image}, at distance {one.distance:.2f}")
    last = arguments.rows * arguments.columns - 1
    print(f"{arguments.out}: images 0 to {last} of seed {arguments.sample_seed}; in the last column, of "
          f"{len(dataset.train.images):,} training images the nearest to the sample on its left")  # fmt: skip
    return 0
