"""The offline commands: train, evaluate, export, import, generate, experiments …. See `python -m models --help`."""

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from models.bundle import BundleError
from models.commands import evaluate, train
from models.commands.bundles import card, export, generate, importing, inspect, sign
from models.commands.figures import classes, evolution, interpolate, neighbours, toy, verdicts
from models.commands.train import ALARMED, FAILED, INTERRUPTED
from models.data.load import DataError
from models.exchange.bulk.plan import BulkError
from models.signing import SigningError
from models.training.health import HealthError
from models.training.run_folder import RunError
from models.training.torchrun.ranks import RanksError
from models.training.trainer import DivergedError, TrainingError

COMMANDS = (
    *(train, evaluate, inspect, export, importing, generate, sign, card),
    *(toy, interpolate, neighbours, classes, evolution, verdicts),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0 done, 1 failed (one line on stderr), 2 wrong usage, 4 stopped by an alarm (one line on stderr), 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # a name or a sign that a terminal or a log can't show ends no run
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = command_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (HealthError, DivergedError) as error:
        return _failed(error, ALARMED)
    except (DataError, RunError, RanksError, BundleError, SigningError, TrainingError, BulkError) as error:
        return _failed(error)
    except OSError as error:
        return _failed(": ".join(str(part) for part in (error.filename, error.strerror) if part) or error)
    except ModuleNotFoundError as error:
        extra = "tensorboard" if error.name == "tensorboard" else "train"
        return _failed(f"{error.name} is not installed: the {extra} extra brings it")
    return code


def command_parser() -> argparse.ArgumentParser:
    """What the command line may say; `run` of what it parses is the command."""
    parser = argparse.ArgumentParser("gan-models", description="Train, score and look at generative adversarial nets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _failed(reason: object, code: int = FAILED) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
