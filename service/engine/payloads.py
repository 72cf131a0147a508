"""What requests ask of the nets, and what a batch of them comes to as arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.inference.noise import Float32, Int64, LatentRange, beside_noise, draw_latent_ranges
from models.inference.pixels import UInt8
from models.spec import LatentSpec
from service.engine.batching.batch import BatchSlice

UNKNOWN_LABEL = -1  # for D's class head to name


class SamplePayload(NamedTuple):
    """What G needs for one request: images first_index … of a seed, or of `latents`, one each, where they are given.

    `labels` has one for each of them, or is None.
    """

    seed: int
    first_index: int
    labels: Int64 | None
    truncation: float
    latents: Float32 | None = None


class DiscriminatePayload(NamedTuple):
    """What D or E needs for one request: uint8 (n, h, w, c) of the bundle's shape, and a label for each, or None.

    A bundle with classes needs labels; −1 is an unknown one, which the class head names.
    """

    images: UInt8
    labels: Int64 | None


class Encodings(NamedTuple):
    """Where images lie in latent space.

    Attributes:
        latents: float32 (n, dim).
        labels: (n,), those that were given and those that E found; −1 for a bundle without.
        images: What G makes of them, uint8 (n, h, w, c).
    """

    latents: Float32
    labels: Int64
    images: UInt8

    def rows(self) -> UInt8:
        """All of it as one array of bytes, a row for each image, as runners give it."""
        n = len(self.images)
        parts = self.latents.view(np.uint8), self.labels[:, None].view(np.uint8), self.images.reshape(n, -1)
        return np.concatenate(parts, axis=1)

    @classmethod
    def of_rows(cls, rows: UInt8, dim: int, shape: tuple[int, int, int]) -> "Encodings":
        """What `rows` made one array of; `shape` is an image's (h, w, c)."""
        latents, labels, images = np.split(rows, [4 * dim, 4 * dim + 8], axis=1)
        numbers: Float32 = np.ascontiguousarray(latents).view(np.float32)
        indices: Int64 = np.ascontiguousarray(labels).view(np.int64)[:, 0]
        return cls(numbers, indices, images.reshape(-1, *shape))


SampleSlices = Sequence[BatchSlice[SamplePayload]]
DiscriminateSlices = Sequence[BatchSlice[DiscriminatePayload]]


def batch_labels(slices: SampleSlices | DiscriminateSlices) -> Int64 | None:
    """The labels of a batch, in order; None for a bundle without."""
    labels = [payload.labels[start:stop] for payload, start, stop in slices if payload.labels is not None]
    return np.concatenate(labels) if labels else None


def batch_images(slices: DiscriminateSlices) -> UInt8:
    """The images of a batch, in order."""
    return np.concatenate([payload.images[start:stop] for payload, start, stop in slices])


def batch_latents(latent: LatentSpec, slices: SampleSlices) -> Float32:
    """The latents of a batch, in order: those that were given, and the others drawn from their seeds. All truncated.

    A net's further noise follows each; that of given latents is of their payload's seed and index too.
    """
    ranges = [_range(one) for one in slices]
    if all(payload.latents is None for payload, _, _ in slices):
        drawn = draw_latent_ranges(latent, ranges)
    else:
        drawn = np.concatenate([_latents(latent, one) for one in slices])
    return beside_noise(latent, _truncate(drawn, slices), ranges)


def _latents(latent: LatentSpec, one: BatchSlice[SamplePayload]) -> Float32:
    given = one.source.latents
    return draw_latent_ranges(latent, [_range(one)]) if given is None else given[one.start : one.stop]


def _range(one: BatchSlice[SamplePayload]) -> LatentRange:
    payload, start, stop = one
    return LatentRange(payload.seed, payload.first_index + start, stop - start)


def _truncate(latents: Float32, slices: SampleSlices) -> Float32:
    """Multiply each slice's latents, in place, by its truncation."""
    end = 0
    for payload, start, stop in slices:
        begin, end = end, end + stop - start
        if payload.truncation != 1:
            latents[begin:end] *= np.float32(payload.truncation)
    return latents
