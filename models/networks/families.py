"""The families that are trained here: the paper's perceptrons, and residual convolutions.

Every generator maps (latents (n, dim), labels (n,) or None) to pixels (n, c, h, w) in [0, 1]. Every discriminator maps
(pixels, labels or None) to logits (n,), before any sigmoid: D(x) = σ(logit). One with classes has a class head too,
whose scores come from the image alone. No result depends on other rows of the batch (there is no batch normalisation),
and dropout happens only where a generator of random numbers is handed in, so there is no training mode to forget.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.spec import (
    ConvDiscriminatorSpec,
    ConvGeneratorSpec,
    ImageSpec,
    MaxoutDiscriminatorSpec,
    MLPGeneratorSpec,
    ResidualSpec,
    stage_sizes,
)

SLOPE = 0.2  # of a leaky ReLU below zero

Dropout = Callable[[Tensor, float], Tensor]  # `drop` with random numbers of its own


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
            x = F.relu_(layer(x))  # in place, as the sigmoid below: half the memory
        return torch.sigmoid_(self.output(x)).view(-1, *self.image_shape)


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
        if classes:
            self.class_head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor, labels: Tensor | None = None, dropout: Dropout | None = None) -> Tensor:
        """(n, c, h, w) pixels → (n,) logits. Units are dropped only where `dropout` is there to do it."""
        x = _beside(images.flatten(1), labels, self.classes)
        for layer, keep in zip((*self.layers, self.output), self.keep, strict=True):
            x = layer(x if dropout is None else dropout(x, keep))
        return x.squeeze(1)

    def judge(
        self, images: Tensor, labels: Tensor, dropout: Dropout | None = None, *, detach: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `ConvDiscriminator.judge`. The class head reads the last hidden layer of a pass without a label."""
        x = F.pad(images.flatten(1), (0, self.classes))
        for layer in self.layers:
            x = layer(x)
        scores = self.class_head(x.detach() if detach else x)
        labels = _known(labels, scores)
        return self(images, labels, dropout), labels, scores


class ResidualBlock(nn.Module):
    """x + W₃·a(W₂∗a(W₁·x + b₁) + b₂): a 1×1, a grouped 3×3 and a 1×1 convolution, a the leaky ReLU."""

    def __init__(self, channels: int, spec: ResidualSpec) -> None:
        super().__init__()
        inner = channels * spec.expansion
        self.widen = nn.Conv2d(channels, inner, 1)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=inner // spec.group)
        self.narrow = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) → the same shape."""
        out: Tensor = self.narrow(_leaky(self.mix(_leaky(self.widen(x)))))
        return x + out


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)


class ConvGenerator(nn.Module):
    """G of residual stages. The first, smallest one is a linear map of noise and class; bilinear steps enlarge."""

    def __init__(self, spec: ConvGeneratorSpec, image: ImageSpec, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.sizes = stage_sizes(image.height)
        channels = spec.channels(len(self.sizes))
        if classes:
            self.embedding = _embedding(classes, spec.embedding)
        self.start = nn.Linear(latent_dim + bool(classes) * spec.embedding, channels[0] * self.sizes[0] ** 2)
        self.stages = nn.ModuleList(
            nn.Sequential(*[ResidualBlock(width, spec) for _ in range(spec.blocks)]) for width in channels
        )
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(channels))
        self.output = nn.Conv2d(channels[-1], image.channels, 3, padding=1)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, dim) noise and (n,) labels → (n, c, size, size) pixels in [0, 1]."""
        _check(labels, self.classes)
        x = latents if labels is None else torch.cat([latents, self.embedding(labels)], dim=1)
        x = self.start(x).view(x.shape[0], -1, self.sizes[0], self.sizes[0])
        x = self.stages[0](_channels_last(x))
        for size, step, stage in zip(self.sizes[1:], self.steps, self.stages[1:], strict=True):
            x = stage(F.interpolate(step(x), (size, size), mode="bilinear"))
        return torch.sigmoid(self.output(_leaky(x)))


class ConvDiscriminator(nn.Module):
    """D of residual stages. Means of 2×2 pixels lead from one to the next; the last becomes `width` features h.

    The logit is w·h + b, and with classes w·h + b + e_y·h: the projection of Miyato & Koyama 2018 (eq. 3). The class
    head is linear in h.
    """

    def __init__(self, spec: ConvDiscriminatorSpec, image: ImageSpec, classes: int) -> None:
        super().__init__()
        self.classes = classes
        sizes = stage_sizes(image.height)
        channels = spec.channels(len(sizes))[::-1]
        self.input = nn.Conv2d(image.channels, channels[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*[ResidualBlock(width, spec) for _ in range(spec.blocks)]) for width in channels
        )
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in pairwise(channels))
        self.gather = nn.Conv2d(channels[-1], channels[-1], sizes[0], groups=channels[-1], bias=False)
        self.features = nn.Linear(channels[-1], channels[-1])
        self.output = nn.Linear(channels[-1], 1)
        if classes:
            self.embedding = _embedding(classes, channels[-1])
            self.class_head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor, labels: Tensor | None = None, dropout: Dropout | None = None) -> Tensor:  # noqa: ARG002 — nothing is dropped here
        """(n, c, size, size) pixels → (n,) logits. Nothing is dropped."""
        _check(labels, self.classes)
        return self._logits(self._features(images), labels)

    def judge(
        self, images: Tensor, labels: Tensor, dropout: Dropout | None = None, *, detach: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All that D says of images, where it has classes. An unknown label, −1, becomes the likeliest one.

        With `detach` the scores' gradient ends at the class head, so that the layers below don't learn from it.

        Returns:
            Logits (n,); the labels that they are for (n,); the class head's scores (n, classes), before any softmax,
            from the images alone.
        """
        del dropout
        h = self._features(images)
        scores = self.class_head(h.detach() if detach else h)
        labels = _known(labels, scores)
        return self._logits(h, labels), labels, scores

    def _features(self, images: Tensor) -> Tensor:
        """(n, width), from pixels moved to [−1, 1]."""
        x = self.stages[0](_channels_last(self.input(images * 2 - 1)))
        for step, stage in zip(self.steps, self.stages[1:], strict=True):
            x = stage(step(F.avg_pool2d(x, 2, ceil_mode=True)))
        return _leaky(self.features(self.gather(x).flatten(1)))

    def _logits(self, h: Tensor, labels: Tensor | None) -> Tensor:
        logits: Tensor = self.output(h).squeeze(1)
        return logits if labels is None else logits + (self.embedding(labels) * h).sum(dim=1) / math.sqrt(h.shape[1])


def drop(x: Tensor, keep: float, rng: torch.Generator, rank: int = 0, ranks: int = 1) -> Tensor:
    """Zero each number with probability 1 − keep and divide the rest by keep, so that the mean stays.

    Where `ranks` processes share a batch and x is the rows of one of them, masks are drawn for the whole batch.
    """
    whole = x.new_empty((ranks * len(x), *x.shape[1:])).bernoulli_(keep, generator=rng)
    return x * whole[rank * len(x) :][: len(x)].div_(keep)


def fill_uniform(net: nn.Module, bound: float, rng: torch.Generator) -> None:
    """Draw weights uniform in ±bound, with biases of zero, as the paper's nets start."""
    for parameter in net.parameters():
        numbers = torch.zeros(parameter.shape)
        if parameter.dim() > 1:
            numbers.uniform_(-bound, bound, generator=rng)
        parameter.data.copy_(numbers)


def fill_fixup(net: nn.Module, rng: torch.Generator) -> None:
    """Draw weights that let residual nets without normalisation start well (Zhang et al. 2019, Fixup; as in R3GAN).

    Weights are normal and keep a signal's variance. A block's last convolution is zero, so that the block starts as
    the identity. Its other two are scaled by L^(−1/4), where L is the number of blocks. Biases are zero.
    """
    blocks = [module for module in net.modules() if isinstance(module, ResidualBlock)]
    scale = {id(layer): len(blocks) ** -0.25 for block in blocks for layer in (block.widen, block.mix)}
    scale |= {id(block.narrow): 0.0 for block in blocks}
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            inputs = math.prod(layer.weight.shape[1:])
            gain = math.sqrt(2 / (1 + SLOPE**2)) if id(layer) in scale else 1.0
            numbers = torch.randn(layer.weight.shape, generator=rng) * gain / math.sqrt(inputs)
            layer.weight.data.copy_(numbers * scale.get(id(layer), 1.0))
            if layer.bias is not None:
                layer.bias.data.zero_()
        elif isinstance(layer, nn.Embedding):
            layer.weight.data.copy_(torch.randn(layer.weight.shape, generator=rng))


def _embedding(classes: int, width: int) -> nn.Embedding:
    # Embedding's constructor fills its weights. On the meta device torch imports 800 modules for that: a second, 75 MB.
    made: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(classes, width), freeze=False)  # type: ignore[no-untyped-call]
    return made


def _channels_last(x: Tensor) -> Tensor:
    """In the layout in which convolutions are fastest. Later layers keep it."""
    return x.contiguous(memory_format=torch.channels_last)


def _known(labels: Tensor, scores: Tensor) -> Tensor:
    return torch.where(labels < 0, scores.argmax(dim=1), labels)


def _check(labels: Tensor | None, classes: int) -> None:
    if (labels is None) != (classes == 0):
        raise ValueError("labels are needed by nets with classes, and by no others")


def _beside(x: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """x with the one-hot labels appended (conditional nets, Mirza & Osindero 2014), or x alone."""
    _check(labels, classes)
    return x if labels is None else torch.cat([x, F.one_hot(labels, classes).to(x.dtype)], dim=1)
