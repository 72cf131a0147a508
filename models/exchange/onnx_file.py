"""A bundle's net as an ONNX file, written only if onnxruntime computes with it what torch computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from models.bundle import Bundle
from models.files import replace_file
from models.inference.noise import draw_latents
from models.inference.onnx_nets import discriminator_graph, fits_graph, generator_graph
from models.inference.pixels import to_pixels, to_uint8

Net = Literal["generator", "discriminator"]
CHECKED_ROWS = 256
LARGEST_GREY_DIFFERENCE = 1  # of 255: what kinds of devices may differ by, too
LARGEST_LOGIT_DIFFERENCE = 1e-3
_INPUTS: dict[Net, str] = {"generator": "latents", "discriminator": "pixels"}
_OUTPUTS: dict[Net, str] = {"generator": "pixels", "discriminator": "logits"}


class ExportError(RuntimeError):
    """The net could not be exported, or the exported net computes something else; the message is one line."""


@dataclass(frozen=True)
class Parity:
    """How far onnxruntime is from torch on the checked rows: grey levels of uint8 images, or units of D's logit."""

    rows: int
    largest_difference: float
    unit: Literal["grey levels", "logit"]
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the two agree. NaN agrees with nothing."""
        return self.largest_difference <= self.allowed


def export_onnx(bundle: Bundle, path: Path, net: Net = "generator") -> Parity:
    """Write one net of a bundle (on the CPU) as an ONNX file, once it is proven.

    G maps `latents` (n, dim) to `pixels` (n, c, h, w) in [0, 1], D maps `pixels` to `logits` (n,). Nets of bundles with
    labels also take `labels` (n,), int64. n is free. The file's metadata hold the name, the version, the latent's
    specification and the labels. The file is checked in memory before it is written.

    Raises:
        ExportError: The net is too large for one file, or the check fails. Nothing is at `path` but what was before.
        OSError: The disk, likewise.
    """
    if not fits_graph(getattr(bundle, net)):
        raise ExportError(f"the {net} has 2 GiB of weights or more, which no ONNX file holds by itself")
    content = _with_metadata(_graph_of(bundle, net), bundle, net)
    parity = check_onnx(content, bundle, net)
    if not parity.holds:
        raise ExportError(
            f"{path}: not written: onnxruntime differs from torch by {parity.largest_difference:.3g} {parity.unit} "
            f"(allowed: {parity.allowed:g})"
        )
    replace_file(path, content)
    return parity


def check_onnx(content: bytes, bundle: Bundle, net: Net = "generator") -> Parity:
    """Compare an exported net with the bundle's: on many rows at once and on a single one, with every label in turn.

    G's inputs are latents of seed 0, D's are the images that G makes of them. What is compared are G's uint8 images, as
    they are served, and D's logits.

    Raises:
        ExportError: onnxruntime can't run it.
    """
    latents, labels = _examples(bundle, CHECKED_ROWS)
    with torch.inference_mode():
        pixels = bundle.generator(latents, labels)
        seen = to_pixels(to_uint8(pixels))
        expected = pixels if net == "generator" else bundle.discriminator(seen, labels)
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        given = {_INPUTS[net]: latents if net == "generator" else seen}
        if labels is not None:
            given["labels"] = labels
        together, alone = (
            session.run([_OUTPUTS[net]], {name: rows[:count].numpy() for name, rows in given.items()})[0]
            for count in (CHECKED_ROWS, 1)
        )
    except Exception as error:  # noqa: BLE001 - its errors have no common class
        raise ExportError(f"onnxruntime can't run the {net}: {_first_line(error)}") from None
    found = torch.from_numpy(np.concatenate([together, alone]))
    expected = torch.cat([expected, expected[:1]])
    if found.shape != expected.shape:
        raise ExportError(f"the exported {net} gives {tuple(found.shape)}, the bundle's {tuple(expected.shape)}")
    if net == "generator" and bool(found.isfinite().all()):
        levels = np.abs(to_uint8(found).astype(np.int16) - to_uint8(expected).astype(np.int16))
        return Parity(CHECKED_ROWS, float(levels.max()), "grey levels", LARGEST_GREY_DIFFERENCE)
    difference = float((found - expected).abs().max())
    if net == "generator":
        return Parity(CHECKED_ROWS, difference, "grey levels", LARGEST_GREY_DIFFERENCE)
    return Parity(CHECKED_ROWS, difference, "logit", LARGEST_LOGIT_DIFFERENCE)


def _examples(bundle: Bundle, rows: int) -> tuple[Tensor, Tensor | None]:
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 0, 0, rows))
    names = bundle.manifest.labels
    return latents, None if names is None else torch.arange(rows) % len(names)


def _graph_of(bundle: Bundle, net: Net) -> bytes:
    if net == "generator":
        return generator_graph(bundle.generator, ["pixels"])
    return discriminator_graph(bundle.discriminator, "logits")


def _with_metadata(graph: bytes, bundle: Bundle, net: Net) -> bytes:
    manifest = bundle.manifest
    metadata = {
        "bundle": bundle.name,
        "version": bundle.version,
        "net": net,
        "latent": manifest.latent.model_dump_json(),
        "labels": json.dumps(manifest.labels),
        "calibration": "null" if manifest.calibration is None else manifest.calibration.model_dump_json(),
    }
    model = onnx.load_from_string(graph)
    known = {
        "dim": manifest.latent.dim,
        "c": manifest.image.channels,
        "h": manifest.image.height,
        "w": manifest.image.width,
    }
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in known:
                axis.dim_value = known[axis.dim_param]
    onnx.helper.set_model_props(model, metadata)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
