"""Verify a bundle and say what is in it."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from models.bundle import Bundle
from models.commands.arguments import Subparsers, bundle_of
from models.networks import GraphNet
from models.training.report import duration

COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    inspect = commands.add_parser("inspect", help="verify a bundle and say what is in it")
    inspect.set_defaults(run=run)
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true",
                         help="the manifest and version as JSON, as where stdout is no terminal")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Say what the manifest says, once everything in it is true: a table on a terminal, else JSON."""
    bundle = bundle_of(arguments)
    if arguments.json or not sys.stdout.isatty():
        print(json.dumps({"version": bundle.version, **bundle.manifest.model_dump(mode="json", exclude_unset=True)}))
        return 0
    print(f"{bundle.name}@{bundle.version}: every checksum, tensor and shape is right")
    for name, value in _rows(bundle):
        print(f"{name:<22}{value}")
    return 0


def _rows(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """The lines of the table."""
    manifest = bundle.manifest
    training, image, latent = manifest.training, manifest.image, manifest.latent
    yield "created", f"{manifest.created:%Y-%m-%d %H:%M} UTC"
    yield "images", f"{image.width}×{image.height}, {COLOURS[image.channels]}"
    yield "latent", f"{latent.dim} numbers, {latent.distribution}, {latent.sampler}"
    yield "labels", ", ".join(manifest.labels) if manifest.labels else "none"
    yield "preparation", "not recorded" if manifest.preparation is None else _said(asdict(manifest.preparation))
    yield from _nets(bundle)
    if calibration := manifest.calibration:
        yield "calibration", _said(calibration.model_dump())
    else:
        yield "calibration", "none: D can't tell real images from samples, or was not asked yet"
    for name, value in training.items():
        if name == "wall_seconds" and isinstance(value, int | float):
            yield "training time", duration(value)
        elif name == "options":
            yield "options", "--json says them all"
        elif name != "name" and value not in ([], None):
            yield name.replace("_", " "), _said(value)
    for name, value in manifest.evaluation.items():
        yield from _scores(name, value)
    yield "signed by", ", ".join(manifest.signatures) or "nobody"
    for name, record in manifest.files.items():
        yield "file", f"{name}, {record.bytes:,} bytes, sha256 {record.sha256}"


def _nets(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """A line for each net."""
    network = bundle.manifest.network
    for name, net in (("generator", bundle.generator), ("discriminator", bundle.judge)):
        if net is None:
            yield name, "none"
        elif isinstance(net, GraphNet):
            yield name, f"{_parameters(net)}; a graph of {len(net.body.nodes)} nodes, which --json shows"
        else:
            yield name, f"{_parameters(net)}; {network.family}, {_said(getattr(network, name).model_dump())}"
    if bundle.encoder is not None and network.encoder is not None:
        yield "encoder", f"{_parameters(bundle.encoder)}; {_said(network.encoder.model_dump())}"


def _parameters(net: nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()):,} parameters"


def _scores(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Scores, a line each where they have names of their own."""
    figures = value.get("figures") if isinstance(value, Mapping) else None
    if not isinstance(figures, Mapping):
        yield name.replace("_", " "), _said(value)
        return
    yield name, _said({key: part for key, part in value.items() if key != "figures"})
    for figure, columns in figures.items():
        yield "", f"{figure}: {_said(columns)}"


def _said(value: Any) -> str:
    """JSON as a person writes it on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
