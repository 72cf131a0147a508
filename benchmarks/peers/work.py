"""What every peer computes, so that peers differ only in how they serve.

The weights and random numbers are the service's, and Pillow is used as people use it. A batch is many requests: their
noise is drawn in one go, and one forward pass makes all images. Batches are not padded to proven sizes as the service's
are, so a pixel may be one grey level off.

Peers read their options from the environment, which reaches the processes that their frameworks start.
"""

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from models.bundle import read_bundle
from models.inference.fast_nets import Verdicts
from models.inference.noise import LatentRange, draw_latent_ranges, sampled_labels
from models.inference.onnx_nets import discriminator_graph, generator_graph
from models.inference.pixels import UInt8, grid, to_pixels, to_uint8

HOST = "127.0.0.1"
MAX_REQUESTS = 64  # in a batch
MAX_WAIT_S = 0.002  # for a batch to fill
ROWS_AT_ONCE = 512  # more in one forward pass is no faster, and takes memory
WARM_ROWS = (1, 64, ROWS_AT_ONCE)
MEDIA_TYPES = {"png": "image/png", "json": "application/json", "npy": "application/x-npy"}


def port() -> int:
    """Where to listen."""
    return int(os.environ["PEER_PORT"])


def workers() -> int:
    """Processes that hold the nets, where the framework has such."""
    return int(os.environ.get("PEER_WORKERS", "1"))


class Ask(BaseModel):
    """The part of the service's POST /sample that the bench uses."""

    model_config = ConfigDict(frozen=True)

    count: int = Field(1, ge=1, le=4096)
    seed: int = Field(ge=0, lt=2**53)
    format: Literal["png", "json", "npy"] = "png"


class Nets:
    """The bundle's nets, warm, as torch runs them. Of a bundle with labels, images have those that their seed draws."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("PEER_THREADS", "1")))
        self._bundle = read_bundle(os.environ["PEER_BUNDLE"])
        self._prepare()
        for rows in WARM_ROWS:
            self.judge([self.sample([Ask(count=rows, seed=0)])[0]])

    def _prepare(self) -> None:
        self._generator, self._verdicts = self._bundle.generator, Verdicts(self._bundle.discriminator)

    @torch.inference_mode()
    def sample(self, asked: Sequence[Ask]) -> list[UInt8]:
        """The images of each request, (count, h, w, c)."""
        latent = self._bundle.manifest.latent
        latents = draw_latent_ranges(latent, [LatentRange(ask.seed, 0, ask.count) for ask in asked])
        drawn = (sampled_labels(latent, ask.seed, 0, ask.count) for ask in asked)
        known = [labels for labels in drawn if labels is not None]
        labels = np.concatenate(known) if known else None
        return _split(self._in_parts(self._draw, latents, labels), [ask.count for ask in asked])

    def _draw(self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> UInt8:
        given = None if labels is None else torch.from_numpy(labels)
        return to_uint8(self._generator(torch.from_numpy(latents), given))

    @torch.inference_mode()
    def judge(self, asked: Sequence[UInt8]) -> list[NDArray[np.float32]]:
        """The logit of each image of each request, by the likeliest label where there are labels."""
        images = np.concatenate(asked)
        unknown = None if self._bundle.manifest.labels is None else np.full(len(images), -1)
        return _split(self._in_parts(self._judge, images, unknown), [len(images) for images in asked])

    def _judge(self, images: UInt8, labels: NDArray[np.int64] | None) -> NDArray[np.float32]:
        given = None if labels is None else torch.from_numpy(labels)
        logits: NDArray[np.float32] = self._verdicts(to_pixels(images), given)[:, 0].numpy()
        return logits

    def _in_parts(
        self, work: Callable[..., NDArray[Any]], rows: NDArray[Any], labels: NDArray[np.int64] | None
    ) -> list[NDArray[Any]]:
        cuts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(rows), ROWS_AT_ONCE)]
        return [work(rows[cut], None if labels is None else labels[cut]) for cut in cuts]

    def verdicts(self, logits: NDArray[np.float32]) -> bytes:
        """The reply to /discriminate: JSON, as the service's."""
        calibration = self._bundle.manifest.calibration
        scale, offset = (calibration.scale, calibration.offset) if calibration else (1.0, 0.0)
        probabilities = 1 / (1 + np.exp(-(scale * logits.astype(np.float64) + offset)))
        results = [
            {"probability_real": p, "logit": logit}
            for p, logit in zip(probabilities.tolist(), logits.tolist(), strict=True)
        ]
        return json.dumps({"results": results}).encode()


class OnnxNets(Nets):
    """The same by onnxruntime, with the graphs that the service runs."""

    def _prepare(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("PEER_THREADS", "1"))
        graphs = generator_graph(self._bundle.generator, ["pixels"]), discriminator_graph(self._bundle.discriminator)
        self._sessions = [
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]) for graph in graphs
        ]

    def _draw(self, latents: NDArray[np.float32], labels: NDArray[np.int64] | None) -> UInt8:
        given = {"latents": latents} if labels is None else {"latents": latents, "labels": labels}
        (pixels,) = self._sessions[0].run(["pixels"], given)
        images: UInt8 = (255 * pixels).round().astype(np.uint8).transpose(0, 2, 3, 1)
        return images

    def _judge(self, images: UInt8, labels: NDArray[np.int64] | None) -> NDArray[np.float32]:
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
        given = {"pixels": pixels} if labels is None else {"pixels": pixels, "labels": labels}
        (verdicts,) = self._sessions[1].run(["verdicts"], given)
        logits: NDArray[np.float32] = verdicts[:, 0]
        return logits


def _split(parts: Sequence[NDArray[Any]], lengths: Sequence[int]) -> list[NDArray[Any]]:
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return np.split(whole, np.cumsum(lengths)[:-1])


def encode(images: UInt8, ask: Ask) -> bytes:
    """The reply to /sample, in the format that was asked for."""
    if ask.format == "npy":
        out = io.BytesIO()
        np.save(out, images, allow_pickle=False)
        return out.getvalue()
    if ask.format == "json":
        return json.dumps({"images": [base64.b64encode(png(image)).decode() for image in images]}).encode()
    return png(grid(images, round(len(images) ** 0.5)) if len(images) > 1 else images[0])


def png(image: UInt8) -> bytes:
    """One grey image (h, w, 1) as a file."""
    out = io.BytesIO()
    Image.fromarray(image[..., 0]).save(out, "png", compress_level=1)
    return out.getvalue()


def decode(body: bytes) -> UInt8:
    """What was uploaded to /discriminate, a PNG or an array, as (n, h, w, 1)."""
    if body.startswith(b"\x93NUMPY"):
        array: UInt8 = np.load(io.BytesIO(body), allow_pickle=False)
        return array
    with Image.open(io.BytesIO(body)) as picture:
        return np.asarray(picture.convert("L"), np.uint8)[np.newaxis, ..., np.newaxis]
