"""What computes batches: G, D and E of a bundle, on a device, in tiles."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8, unit_levels
from models.inference.tiles import Tiles
from service.engine.batching.batch import BatchSlice, Rows
from service.engine.device import MAX_BATCH_ROWS, Device, DeviceErrors
from service.engine.payloads import (
    UNKNOWN_LABEL,
    DiscriminateSlices,
    Encodings,
    SamplePayload,
    SampleSlices,
    batch_images,
    batch_labels,
)


@dataclass(eq=False)
class SampleRunner:
    """G of a bundle: rows are uint8 (n, h, w, c). `draw` makes the net's inputs for a batch.

    `of_latents` runs batches in which clients gave latents, where `draw` knows seeds alone.
    """

    bundle: str
    version: str
    tiles: Tiles
    device: Device
    draw: Callable[[SampleSlices], Float32 | Int64]
    most_rows: int = MAX_BATCH_ROWS
    operation: str = "sample"
    of_latents: "SampleRunner | None" = None

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        return self.tiles.padded(rows)

    @DeviceErrors()
    def run(self, slices: SampleSlices) -> Rows:
        """Draw the latents and make the images."""
        if self.of_latents is not None and any(payload.latents is not None for payload, _, _ in slices):
            return self.of_latents.run(slices)
        drawn = self.device.send(self.draw(slices))
        images: UInt8 = self.device.fetch(self.tiles(drawn, _send_labels(slices, self.device)))
        return images


@dataclass(eq=False)
class DiscriminateRunner:
    """D of a bundle: rows are float32 (n, 1) logits; with classes (n, 2), the logit and the label that it is for."""

    bundle: str
    version: str
    tiles: Tiles
    device: Device
    most_rows: int = MAX_BATCH_ROWS
    operation: str = "discriminate"

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        return self.tiles.padded(rows)

    @DeviceErrors()
    def run(self, slices: DiscriminateSlices) -> Rows:
        """Judge the images."""
        images = unit_levels(self.device.send(batch_images(slices)))
        verdicts = self.tiles(images, _send_labels(slices, self.device))
        return self.device.fetch(verdicts[:, :2].to(torch.float32))


@dataclass(eq=False)
class EncodeRunner:
    """E of a bundle, and G of what E finds: rows are `Encodings` as bytes."""

    bundle: str
    version: str
    tiles: Tiles
    device: Device
    sample: SampleRunner
    dim: int
    most_rows: int = MAX_BATCH_ROWS
    operation: str = "encode"

    def padded(self, rows: int) -> int:
        """Rows that are really computed for this many."""
        return self.tiles.padded(rows)

    @DeviceErrors()
    def run(self, slices: DiscriminateSlices) -> Rows:
        """Find the latents, and the classes that nobody named; then draw what lies there."""
        images, given = batch_images(slices), batch_labels(slices)
        codes = self.device.fetch(self.tiles(unit_levels(self.device.send(images))).to(torch.float32))
        # An image that is too much for E's weights is no reason to fail those that share its batch.
        latents: Float32 = np.nan_to_num(codes[:, : self.dim])
        labels = None
        if given is not None:
            labels = np.where(given < 0, codes[:, self.dim :].argmax(axis=1), given)
        drawn = self.sample.run(_to_draw(slices, latents, labels))
        return Encodings(latents, np.full(len(images), UNKNOWN_LABEL) if labels is None else labels, drawn).rows()


def _to_draw(slices: DiscriminateSlices, latents: Float32, labels: Int64 | None) -> SampleSlices:
    """What G draws of a batch's latents; each has the noise of its place in its request, as where clients give them."""
    found, end = [], 0
    for _, start, stop in slices:
        begin, end = end, end + stop - start
        own = None if labels is None else labels[begin:end]
        found.append(BatchSlice(SamplePayload(0, start, own, 1.0, latents[begin:end]), 0, stop - start))
    return found


def _send_labels(slices: SampleSlices | DiscriminateSlices, device: Device) -> torch.Tensor | None:
    labels = batch_labels(slices)
    return None if labels is None else device.send(labels)
