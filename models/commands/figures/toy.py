"""The paper's Figure 1: the game in one dimension, its numbers and pictures."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.commands.arguments import Subparsers, positive, whole
from models.files import replace_file

if TYPE_CHECKING:
    from models.experiments.toy import Stage


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    toy = commands.add_parser("toy", help="the paper's Figure 1: the game in one dimension, its numbers and pictures")
    toy.set_defaults(run=run)
    toy.add_argument("--out", required=True, type=Path, metavar="DIR", help="for toy.png, toy.gif and toy.json")
    toy.add_argument("--seed", type=whole, default=0, help="fixes everything that is drawn (default 0)")
    toy.add_argument("--steps", type=positive, default=2_000, help="generator updates (default 2000)")
    toy.add_argument(
        "--d-updates", type=positive, default=1_500, help="of D while G is frozen, four times (default 1500)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Play, draw, and see whether what the paper proves is so."""
    from models.experiments import toy, toy_plot  # noqa: PLC0415 — matplotlib is an extra that `inspect` does without

    arguments.out.mkdir(parents=True, exist_ok=True)
    options = toy.ToyOptions(seed=arguments.seed, steps=arguments.steps, d_updates=arguments.d_updates)
    result = toy.play(options, report=_show_stage)
    fresh = result.fresh
    print(f"fresh D: value {fresh.value:.4f}, largest gap to p_data/(p_data+p_g) {fresh.gap:.3f}, "
          f"largest distance from ½ {fresh.from_half:.3f}")  # fmt: skip
    replace_file(
        arguments.out / "toy.json", (json.dumps(result.record(), indent=1, ensure_ascii=False) + "\n").encode()
    )
    replace_file(arguments.out / "toy.png", toy_plot.panels(result))
    replace_file(arguments.out / "toy.gif", toy_plot.animation(result))
    print(f"{arguments.out}: toy.json, toy.png, toy.gif")
    failed = [claim for claim, holds in result.claims().items() if not holds]
    for claim in failed:
        print(f"error: not so: {claim}", file=sys.stderr)
    return 1 if failed else 0


def _show_stage(stage: "Stage") -> None:
    gaps = ", ".join(f"{gap:.3f} after {updates}" for updates, gap in stage.gaps)
    print(f"{stage.name}, G frozen after {stage.step:,} updates: "
          f"C(G) = {stage.value:.4f} = −log 4 + 2 · {stage.jsd:.4f}\n"
          f"  D's largest gap to p_data/(p_data+p_g): {gaps} updates of D", flush=True)  # fmt: skip
