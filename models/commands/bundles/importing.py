"""Make a bundle of a generator that was trained elsewhere, in a process of its own."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from models.bundle import NAME_PATTERN
from models.commands.arguments import Subparsers, positive
from models.exchange.importing.conversion import Role
from models.exchange.model_card import write_card

REFUSED = 2
MEMORY_MIB, SECONDS = 8192, 900
CHANNELS = {1: "grey", 3: "RGB", 4: "RGBA"}
MOST_LABEL_BYTES = 1 << 20


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    parser = commands.add_parser("import", help="make a bundle of an ONNX generator that was trained elsewhere")
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE.onnx")
    parser.add_argument("--name", required=True, help="of the bundle")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="the bundle's folder")
    parser.add_argument("--latent", choices=["normal", "uniform"], default="normal",
                        help="what the net was trained on; uniform is −1 … 1 (default normal)")  # fmt: skip
    parser.add_argument("--range", choices=["signed", "unit"], default="signed",
                        help="of the output: −1 … 1 (signed, the default) or 0 … 1 (unit)")  # fmt: skip
    parser.add_argument("--labels", help="names of the classes, with commas between them, or a file with one a line")
    parser.add_argument("--input", action="append", default=[], type=_role, metavar="NAME=ROLE",
                        help="what an input is: latent, label, onehot or noise; guessed where sure")  # fmt: skip
    parser.add_argument("--output", metavar="NAME", help="which output is the image, if there are several")
    parser.add_argument("--discriminator", type=Path, metavar="D.onnx", help="the net that judges, if there is one")
    parser.add_argument("--force", action="store_true", help="replace what is at DIR")
    parser.add_argument("--memory", type=positive, default=MEMORY_MIB, metavar="MIB",
                        help=f"that the import may take (default {MEMORY_MIB})")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=SECONDS, help=f"that it may take (default {SECONDS})")


def run(arguments: argparse.Namespace) -> int:
    """Import the file, or say in one line what was refused, and where."""
    reason = _unusable(arguments)
    if reason is None:
        labels, reason = _labels(arguments.labels)
    if reason is not None:
        return _refuse(reason)
    answer = _in_own_process(arguments, labels)
    if "refused" in answer:
        return _refuse(f"{arguments.file}: {answer['refused']}")
    write_card(arguments.out)
    done = answer["done"]
    width, height, channels = done["image"]
    classes = f", {done['labels']} classes" if done["labels"] else ""
    if done["warning"]:
        print(f"warning: {done['warning']}", file=sys.stderr)
    print(f"{arguments.out}: {done['bundle']}, {width}×{height} {CHANNELS[channels]}{classes}, "
          f"{done['parameters']:,} parameters, {done['nodes']} nodes; over 256 images onnxruntime and the bundle "
          f"differ by {done['largest_difference']} grey levels at most")  # fmt: skip
    return 0


def _unusable(arguments: argparse.Namespace) -> str | None:
    """Why the line can't be carried out, if so."""
    if not re.fullmatch(NAME_PATTERN, arguments.name) or arguments.name.endswith(".discriminator"):
        return f"--name {arguments.name}: small letters, digits and ._- make a name, of at most 64"
    if arguments.out.exists() and not arguments.force:
        return f"{arguments.out}: is there already; --force replaces it"
    return None


def _in_own_process(arguments: argparse.Namespace, labels: tuple[str, ...]) -> dict[str, Any]:
    asked = {
        "file": str(arguments.file),
        "out": str(arguments.out),
        "discriminator": None if arguments.discriminator is None else str(arguments.discriminator),
        "memory_bytes": arguments.memory << 20,
        "seconds": arguments.seconds,
        "options": {
            **{name: getattr(arguments, name) for name in ("name", "latent", "range", "output")},
            "labels": labels,
            "roles": dict(arguments.input),
        },
    }
    command = [sys.executable, "-m", "models.exchange.importing.worker"]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=arguments.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"takes longer than {arguments.seconds} s (--seconds)"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        bounds = f"{arguments.memory} MiB (--memory) or {arguments.seconds} s (--seconds)"
        return {"refused": f"its process died (code {done.returncode}): more than {bounds}, or a fault in a library"}
    return answer


def _role(text: str) -> tuple[str, str]:
    name, equals, role = text.rpartition("=")
    if not equals or role not in get_args(Role):
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME={'|'.join(get_args(Role))}")
    return name, role


def _labels(text: str | None) -> tuple[tuple[str, ...], str | None]:
    """The names, or why there are none: a file's lines, else what stands between commas."""
    if text is None:
        return (), None
    path = Path(text)
    try:
        if not path.is_file():
            return tuple(part.strip() for part in text.split(",")), None
        if path.stat().st_size > MOST_LABEL_BYTES:
            return (), f"{path}: more than {MOST_LABEL_BYTES} bytes of labels"
        return tuple(line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()), None
    except UnicodeDecodeError:
        return (), f"{path}: not a text in UTF-8"
    except OSError:  # too long for a name, for one
        return tuple(part.strip() for part in text.split(",")), None


def _refuse(reason: str) -> int:
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return REFUSED
