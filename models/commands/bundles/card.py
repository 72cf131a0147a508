"""Write a bundle's model card."""

import argparse
from pathlib import Path

from models.commands.arguments import Subparsers
from models.exchange.model_card import CARD, write_card


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    card = commands.add_parser("card", help="write a bundle's model card, README.md, from its manifest")
    card.set_defaults(run=run)
    card.add_argument("bundle", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Write it, unless there is one that somebody has made their own."""
    path = write_card(arguments.bundle)
    print(f"{arguments.bundle / CARD}: kept, as it is somebody's own" if path is None else path)
    return 0
