"""What the train command's line may say, and what becomes of it: the options of the run, and a name for its bundle."""

import argparse
import json
import re
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from models.bundle import NAME_PATTERN
from models.commands.arguments import add_data, positive
from models.spec import LATENT_REGRESSOR, PRESETS, AugmentName, TrainingOptions
from models.training.losses import LOSSES
from models.training.run_folder import RunError
from models.training.trainer import SELECTIONS

PRESET_WORDS = {
    "mlp-paper": ("perceptrons", "images of any shape, best under 40 pixels", "the experiment of 2014, to the letter"),
    "mlp-adam": ("perceptrons", "images of any shape, best under 40 pixels", "much further in the same time"),
    "conv-ns": ("convolutions", "square images, 16 to 128 pixels", "the first to try, for most images"),
    "conv-hinge": ("convolutions", "square images, 16 to 128 pixels", "where D runs ahead with conv-ns"),
    "conv-r3": ("convolutions", "square images, 16 to 128 pixels", "where conv-ns leaves kinds of images out"),
}
NEEDS = """\
All want some thousands of images; with a few hundred D soon knows them by heart, and the run stops and says so: then
--augment ada helps, and --init with a bundle of alike images. The convolutions train by class (--unconditional:
without). With the preset's steps, on one core of a processor of 2023:

  mlp-paper, mlp-adam      28×28: 25 minutes      64×64, RGB: 4 hours
  conv-…                   28×28: 30 minutes      64×64, RGB: 2 hours      128×128, RGB: 12 hours

and some minutes for the scores. --dry-run measures this machine.

--preset latent-regressor --init BUNDLE trains neither of the nets, but an encoder for a finished bundle, which finds
the latent of an image; RUN/bundle/ is that bundle with its encoder.
"""


def add_options(train: argparse.ArgumentParser) -> None:
    """Preset, data and folder; how the run goes; and what overrides the preset."""
    train.formatter_class = argparse.RawDescriptionHelpFormatter
    table = "\n".join(f"  {name:<12}{nets:<14}{words}; {use}" for name, (nets, words, use) in PRESET_WORDS.items())
    train.epilog = f"presets:\n{table}\n\n{NEEDS}"
    train.add_argument("--preset", required=True, choices=[*PRESETS, LATENT_REGRESSOR.preset],
                       help="nets and options: see below")  # fmt: skip
    add_data(train)
    train.add_argument("--out", required=True, type=Path, metavar="RUN", help="the run's folder")
    train.add_argument("--name", type=_bundle_name, help="the bundle's name (default: DATA-PRESET)")
    train.add_argument("--steps", type=int, help="generator updates")
    train.add_argument("--init", type=Path, metavar="BUNDLE", help="begin with a bundle's weights instead of random "
                       "ones: the same nets and images; classes may be added. Or the encoder's bundle")  # fmt: skip
    train.add_argument("--checkpoint-every", type=int, default=1_000, metavar="N",
                       help="steps between two checkpoints, beside those before each score (default 1000)")  # fmt: skip
    train.add_argument("--augment", choices=get_args(AugmentName), help="change images at random before D sees them, "
                       "where there are few of them (default none)")  # fmt: skip
    train.add_argument("--sample-every", type=positive, metavar="N", help="steps between two grids of samples, beside "
                       "those at each checkpoint (default: 50, 100, 200, then every 500)")  # fmt: skip
    train.add_argument("--score-every", type=int, metavar="N", help="steps between two scores on the validation "
                       "images; the bundle gets the weights with the best one (default 2500)")  # fmt: skip
    train.add_argument("--alarms", choices=["stop", "warn", "off"], default="stop", help="what a run that goes wrong "
                       "is met with: ended with exit code 4 (default), told so, or left alone")  # fmt: skip
    train.add_argument(
        "--dry-run", action="store_true", help="print what a run would be: data, nets, time and memory; train nothing"
    )
    train.add_argument("--json", action="store_true", help="with --dry-run: as one JSON object")
    train.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard/ too (tensorboard extra)")
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
        help="−log D(G(z)), log(1 − D(G(z))), and those of D with it; models/training/losses.py",
    )
    labels = train.add_mutually_exclusive_group()
    labels.add_argument("--conditional", action="store_true", default=None, help="both nets see the label")
    labels.add_argument("--unconditional", action="store_false", dest="conditional", default=None,
                        help="labels are not used, also where there are some")  # fmt: skip
    train.add_argument("--selection", choices=SELECTIONS,
                       help="what chooses the weights on the validation images: the paper's log-likelihood, or the "
                       "Fréchet distance in a classifier's features")  # fmt: skip
    train.add_argument("--precision", choices=["float32", "bfloat16"],
                       help="of the products in training; bfloat16 is faster where the processor has it")  # fmt: skip
    train.add_argument("--algorithm1", action="store_true", help="the paper's Algorithm 1 instead of its code: "
                       "alternating updates with fresh noise, log(1 − D(G(z))), D's loss unscaled")  # fmt: skip


def resolve(arguments: argparse.Namespace) -> TrainingOptions:
    """The preset's options with the command line's changes.

    Raises:
        RunError: They contradict one another, or a number is out of range.
    """
    options = PRESETS[arguments.preset].model_dump(mode="json")
    if arguments.algorithm1:
        options |= {"update": "alternating", "generator_loss": "saturating", "d_loss_scale": 1.0}
    given = ("steps", "score_every", "seed", "batch_size", "update", "d_steps", "generator_loss", "conditional",
             "selection", "precision", "augment")  # fmt: skip
    for field in given:
        if getattr(arguments, field) is not None:
            options[field] = getattr(arguments, field)
    if arguments.noise is not None:
        options["latent"]["distribution"] = arguments.noise
    try:
        return TrainingOptions.model_validate_json(json.dumps(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        option = f"--{place.replace('_', '-')}" if place in given else place or "options"
        raise RunError(f"{option}: {first['msg']}") from None


def _bundle_name(text: str) -> str:
    if not re.search(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"{text!r} must be 1 to 64 of a-z 0-9 . _ - and begin with a letter or digit")
    return text


def default_name(data: str, preset: str) -> str:
    """A valid bundle name from that of any folder or file."""
    plain = re.sub("[^a-z0-9._-]+", "-", data.lower())[: 63 - len(preset)]
    return f"{plain.rstrip('-')}-{preset}".lstrip(".-_")
