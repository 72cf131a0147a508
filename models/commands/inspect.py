"""Verify a bundle and say what is in it."""

import argparse
import json
from pathlib import Path

from models.bundle import read_bundle
from models.commands.arguments import Subparsers


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.set_defaults(run=run)
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true", help="the manifest and version as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest, once everything in it is true."""
    bundle = read_bundle(arguments.bundle)
    manifest = bundle.manifest.model_dump(mode="json")
    nets = {"generator": bundle.generator, "discriminator": bundle.discriminator}
    if arguments.json:
        print(json.dumps({"version": bundle.version, **manifest}))
        return 0
    print(f"{bundle.name}@{bundle.version}, created {manifest['created']}: every checksum, tensor and shape is right")
    for net, module in nets.items():
        count = sum(p.numel() for p in module.parameters())
        print(f"{net}: {count:,} parameters, {json.dumps(manifest['network'][net])}")
    for key in ("image", "latent", "labels", "calibration", "preparation", "training", "evaluation", "files"):
        print(f"{key}: {json.dumps(manifest[key])}")
    return 0
