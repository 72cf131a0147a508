"""What computes batches: G and D of a bundle, on a device, in tiles."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8, unit_levels
from models.inference.tiles import Tiles
from service.engine.batching.batch import Rows
from service.engine.device import MAX_BATCH_ROWS, Device, DeviceErrors
from service.engine.payloads import DiscriminateSlices, SampleSlices, batch_images, batch_labels


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


def _send_labels(slices: SampleSlices | DiscriminateSlices, device: Device) -> torch.Tensor | None:
    labels = batch_labels(slices)
    return None if labels is None else device.send(labels)
