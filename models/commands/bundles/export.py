"""Write one of a bundle's nets for other programs, once it is proven to agree."""

import argparse
from pathlib import Path

from models.commands.arguments import Subparsers, bundle_of
from models.exchange.onnx_file import ExportError, export_onnx
from models.training.run_folder import RunError


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    export = commands.add_parser("export", help="write a bundle's net for other programs, once it is proven to agree")
    export.set_defaults(run=run)
    export.add_argument("bundle", type=Path)
    export.add_argument("--format", required=True, choices=["onnx"])
    export.add_argument("--out", required=True, type=Path, metavar="FILE")
    export.add_argument(
        "--net", choices=["generator", "discriminator"], default="generator", help="(default generator)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the file, or say why not."""
    bundle = bundle_of(arguments)
    try:
        parity = export_onnx(bundle, arguments.out, arguments.net)
    except ExportError as error:
        raise RunError(str(error)) from None
    print(f"{arguments.out}: {arguments.net} of {bundle.name}@{bundle.version}; over {parity.rows} rows onnxruntime "
          f"and torch differ by {parity.largest_difference:.2g} {parity.unit} (allowed: {parity.allowed})")  # fmt: skip
    return 0
