"""Generator and discriminator families, built from a `NetworkSpec`. One so far: the paper's multilayer perceptrons.

Every generator maps (latents (n, dim), labels (n,) or None) to pixels (n, c, h, w) in [0, 1]. Every discriminator maps
(pixels, labels or None) to logits (n,), before any sigmoid: D(x) = σ(logit). Nothing depends on a row's neighbours, and
nothing is drawn at random unless a generator of random numbers is handed in, so there is no training mode to forget.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.spec import ImageSpec, LatentSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, NetworkSpec


class MLPGenerator(nn.Module):
    """G of the paper's experiments: fully connected ReLU layers and a sigmoid output (Goodfellow et al. 2014, §5)."""

    def __init__(self, spec: MLPGeneratorSpec, image: ImageSpec, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.image_shape = image.shape
        self.classes = classes
        widths = (latent_dim + classes, *spec.hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], image.size)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, dim) noise and (n,) labels → (n, c, h, w) pixels in [0, 1]."""
        x = _beside(latents, labels, self.classes)
        for layer in self.layers:
            x = F.relu(layer(x))
        return torch.sigmoid(self.output(x)).view(-1, *self.image_shape)


class Maxout(nn.Module):
    """h_j(x) = max over k of (W_jk·x + b_jk): the largest of `pieces` linear functions (Goodfellow et al. 2013)."""

    def __init__(self, inputs: int, units: int, pieces: int) -> None:
        super().__init__()
        self.units, self.pieces = units, pieces
        self.linear = nn.Linear(inputs, units * pieces)  # row j·pieces + k holds W_jk

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) → (n, units)."""
        pieces: Tensor = self.linear(x)
        return pieces.view(-1, self.units, self.pieces).amax(dim=2)


class MaxoutDiscriminator(nn.Module):
    """D of the paper's experiments: maxout layers with dropout on every layer's input, and one logit."""

    def __init__(self, spec: MaxoutDiscriminatorSpec, image: ImageSpec, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.keep = (spec.keep_input, *[spec.keep_hidden] * len(spec.units))
        widths = (image.size + classes, *spec.units)
        self.layers = nn.ModuleList(Maxout(a, b, spec.pieces) for a, b in pairwise(widths))
        self.output = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor, labels: Tensor | None = None, dropout: torch.Generator | None = None) -> Tensor:
        """(n, c, h, w) pixels → (n,) logits. Units are dropped only where `dropout` is there to draw the masks."""
        x = _beside(images.flatten(1), labels, self.classes)
        for layer, keep in zip((*self.layers, self.output), self.keep, strict=True):
            x = layer(x if dropout is None else drop(x, keep, dropout))
        return x.squeeze(1)


def drop(x: Tensor, keep: float, rng: torch.Generator) -> Tensor:
    """Zero each number with probability 1 − keep and divide the rest by keep, so that the mean stays."""
    return x * torch.empty_like(x).bernoulli_(keep, generator=rng).div_(keep)


def build_networks(
    network: NetworkSpec, image: ImageSpec, latent: LatentSpec, classes: int = 0
) -> tuple[MLPGenerator, MaxoutDiscriminator]:
    """The two nets that the specs describe, on the meta device: shapes only, the caller brings the numbers.

    `classes` is the number of labels, 0 for nets without.
    """
    with torch.device("meta"):
        return (
            MLPGenerator(network.generator, image, latent.dim, classes),
            MaxoutDiscriminator(network.discriminator, image, classes),
        )


def _beside(x: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """x with the one-hot labels appended (conditional nets, Mirza & Osindero 2014), or x alone."""
    if (labels is None) != (classes == 0):
        raise ValueError("labels are needed by nets with classes, and by no others")
    return x if labels is None else torch.cat([x, F.one_hot(labels, classes).to(x.dtype)], dim=1)
