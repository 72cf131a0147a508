"""Latents drawn on the device itself, from the seed and index of each image."""

import logging
from typing import cast

import numpy as np
import torch
from torch import nn

from models.inference.fast_nets import FastGenerator
from models.inference.noise import Int64, Noise
from models.spec import LatentSpec
from service.engine.batching.batch import BatchSlice
from service.engine.device import Sampler
from service.engine.payloads import SamplePayload, SampleSlices
from service.engine.reference import WARMUP_SEED

TOLERANCE = 1e-5  # between the device's noise and the CPU's, whose last bits differ

log = logging.getLogger(__name__)


def device_sampler(latent: LatentSpec, generator: FastGenerator, latents: torch.Tensor) -> Sampler | None:
    """The generator of the device's own noise; None if that is not what a CPU drew, the first images' `latents`.

    None too where a net takes more noise than its latents.
    """
    if latent.noise:
        return None
    net = FromKeys(latent, generator).to(latents.device)
    keys = torch.from_numpy(image_keys([BatchSlice(SamplePayload(WARMUP_SEED, 0, None, 1.0), 0, len(latents))]))
    keys = keys.to(latents.device)
    if torch.allclose(net.latents(keys), latents, rtol=0, atol=TOLERANCE):
        return Sampler(net, net.levels, keys, image_keys)
    log.warning("noise is drawn on the CPU: %s draws another", latents.device)
    return None


def image_keys(slices: SampleSlices) -> Int64:
    """What each image's latents are drawn from, (n, 3): seed, index, and the bits of its truncation."""
    rows = [stop - start for _, start, stop in slices]
    keys = np.empty((sum(rows), 3), np.int64)
    keys[:, 0] = np.repeat([payload.seed for payload, _, _ in slices], rows)
    keys[:, 1] = np.concatenate([payload.first_index + np.arange(start, stop) for payload, start, stop in slices])
    truncations = np.asarray([payload.truncation for payload, _, _ in slices], np.float64)
    keys[:, 2] = np.repeat(truncations.view(np.int64), rows)
    return keys


class FromKeys(nn.Module):
    """G of `image_keys` instead of latents."""

    def __init__(self, latent: LatentSpec, generator: FastGenerator) -> None:
        super().__init__()
        self.noise = Noise(latent)
        self.generator = generator

    def forward(self, keys: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 3) → pixels."""
        return self.generator(self.latents(keys), labels)

    def levels(self, keys: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(n, 3) → uint8 (n, h, w, c)."""
        return self.generator.levels(self.latents(keys), labels)

    def latents(self, keys: torch.Tensor) -> torch.Tensor:
        """(n, 3) → (n, dim)."""
        truncations = keys[:, 2:].contiguous().view(torch.float64).float()
        return cast("torch.Tensor", self.noise(keys[:, 0], keys[:, 1]) * truncations)
