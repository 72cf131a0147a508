"""A plain PyTorch training loop of the same nets: what the trainer's speed is measured against.

What anybody would write, written well: float images on the device, a permutation for each epoch, losses, schedules and
fused optimisers as the options say, `zero_grad`, `backward`, `step`, D without gradients in G's turn, and losses that
are read every 50 steps. It has none of what the trainer adds: random numbers that follow from seed and step, means over
all steps, checks for NaN and Inf, health, an average of G's weights, files.

TINY is a game so small that nearly all of a step's time is the loop's own.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.data.dataset import Dataset, Split, divide
from models.networks import build_networks, drop
from models.spec import (
    AdamSpec,
    LatentSpec,
    MaxoutDiscriminatorSpec,
    MLPGeneratorSpec,
    MLPSpec,
    SGDSpec,
    TrainingOptions,
)
from models.training.losses import LOSSES, gradient_penalty
from models.training.trainer import Optimiser, image_spec, initialise

LOG_EVERY = 50  # steps

TINY = TrainingOptions(
    preset="tiny",
    network=MLPSpec(
        family="mlp",
        generator=MLPGeneratorSpec(hidden=(8,)),
        discriminator=MaxoutDiscriminatorSpec(units=(8,), pieces=2),
    ),
    latent=LatentSpec(dim=8, distribution="normal"),
    steps=10**9,
    batch_size=1,
    update="alternating",
    generator_loss="nonsaturating",
    generator_optimiser=AdamSpec(lr=1e-4),
    discriminator_optimiser=AdamSpec(lr=1e-4),
    score_every=10**9,
)


def tiny_images() -> Dataset:
    """Grey noise of 8×8 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (1_000, 8, 8, 1), np.uint8)
    return divide("noise", Split(images, None), None, seed=0)


class Eager:
    """Both nets, their optimisers and the images. One turn of D for each of G's, and gammas and betas that stay.

    Args:
        fused: Whether the optimisers are PyTorch's fused ones, as the trainer's are, or what it takes when not told.

    Attributes:
        backward: What is done with a loss; a framework may want to do that itself.
    """

    backward: Callable[[Tensor], object] = staticmethod(Tensor.backward)

    def __init__(self, options: TrainingOptions, dataset: Dataset, device: torch.device, *, fused: bool = True) -> None:
        self.options = options
        self.device = device
        self.rng = torch.Generator(device).manual_seed(options.seed)
        self.dropout = partial(drop, rng=self.rng)
        levels = torch.from_numpy(dataset.train.images).to(device).permute(0, 3, 1, 2).contiguous()
        self.images = levels.float().div_(255)
        labels = dataset.train.labels if options.conditional else None
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)
        classes = 0 if labels is None else len(dataset.label_names or ())
        nets = build_networks(options.network, image_spec(dataset), options.latent, classes)
        self.generator, self.discriminator = nets
        for net in nets:
            net.to_empty(device=device)
        initialise(self.generator, self.discriminator, options, levels.double().mean(dim=0).div_(255).float())
        self.g_optimiser = _optimiser(self.generator, options.generator_optimiser, fused=fused)
        self.d_optimiser = _optimiser(self.discriminator, options.discriminator_optimiser, fused=fused)
        self.low = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
        self.done = 0  # steps
        self._order = torch.empty(0, dtype=torch.int64)

    def train(self, steps: int, log: Callable[[str], object] = print) -> None:
        """So many more steps."""
        for _ in range(steps):
            d_loss, g_loss = self.step(*self.batch())
            if self.done % LOG_EVERY == 0:
                log(f"step {self.done}  D loss {d_loss.item():.3f}  G loss {g_loss.item():.3f}")

    def bare(self, steps: int) -> None:
        """The arithmetic of so many steps alone: always the same images, no order, no schedule, no log."""
        batch = self.batch()
        for _ in range(steps):
            self.alternate(*batch)

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """The next images and labels; what is left over at an epoch's end is too few for a batch."""
        m = self.options.batch_size
        if len(self._order) < m:
            self._order = torch.randperm(len(self.images), generator=self.rng, device=self.device)
        rows, self._order = self._order[:m], self._order[m:]
        return self.images[rows], None if self.labels is None else self.labels[rows]

    def step(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One update of each net; returns D's loss and G's."""
        self.schedule()
        losses = (self.alternate if self.options.update == "alternating" else self.move_both)(x, labels)
        self.done += 1
        return losses

    def alternate(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """A step down D's loss, then one down G's with fresh noise."""
        generator, discriminator, loss = self.generator, self.discriminator, LOSSES[self.options.generator_loss]
        penalty = self.options.penalty
        penalised = penalty is not None and self.done % penalty.every == 0
        with self.low:
            with torch.no_grad():
                fake = generator(self.noise(), labels)
            fake = fake.float().requires_grad_(penalised)
            real_logits, class_loss = self.judge(x.requires_grad_(penalised), labels)
            fake_logits = discriminator(fake, labels, self.dropout).float()
            d_loss = loss.discriminator(real_logits, fake_logits) * self.options.d_loss_scale
            total = d_loss + class_loss
            if penalised and penalty is not None:
                weight = penalty.gamma * penalty.every
                total = total + weight * gradient_penalty(real_logits, x) if penalty.r1 else total
                total = total + weight * gradient_penalty(fake_logits, fake) if penalty.r2 else total
        self.d_optimiser.zero_grad()
        self.backward(total)
        self.d_optimiser.step()

        discriminator.requires_grad_(requires_grad=False)
        with self.low:
            with torch.no_grad():
                rivals = discriminator(x, labels, self.dropout).float() if loss.paired else real_logits
            fake_logits = discriminator(generator(self.noise(), labels), labels, self.dropout).float()
            g_loss = loss.generator(rivals, fake_logits)
        self.g_optimiser.zero_grad()
        self.backward(g_loss)
        self.g_optimiser.step()
        discriminator.requires_grad_(requires_grad=True)
        return d_loss.detach(), g_loss.detach()

    def move_both(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One forward pass, both gradients from it, then both nets move."""
        generator, discriminator, loss = self.generator, self.discriminator, LOSSES[self.options.generator_loss]
        self.g_optimiser.zero_grad()
        self.d_optimiser.zero_grad()
        with self.low:
            real_logits, class_loss = self.judge(x, labels)
            fake_logits = discriminator(generator(self.noise(), labels), labels, self.dropout).float()
            d_loss = loss.discriminator(real_logits, fake_logits) * self.options.d_loss_scale
            g_loss = loss.generator(real_logits, fake_logits)
        torch.autograd.backward(g_loss, inputs=list(generator.parameters()), retain_graph=True)
        torch.autograd.backward(d_loss + class_loss, inputs=list(discriminator.parameters()))
        self.g_optimiser.step()
        self.d_optimiser.step()
        return d_loss.detach(), g_loss.detach()

    def judge(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """D's logits of real images, and the class head's loss where there are labels."""
        if labels is None:
            return self.discriminator(x, None, self.dropout).float(), 0.0
        weight = self.options.class_loss
        logits, _, scores = self.discriminator.judge(x, labels, self.dropout, detach=weight == 0)
        return logits.float(), F.cross_entropy(scores.float(), labels) * (weight or 1.0)

    def noise(self) -> Tensor:
        """z for one batch."""
        shape = (self.options.batch_size, self.options.latent.dim)
        if self.options.latent.distribution == "normal":
            return torch.randn(shape, generator=self.rng, device=self.device)
        return torch.rand(shape, generator=self.rng, device=self.device).mul_(2).sub_(1).mul_(math.sqrt(3))

    def schedule(self) -> None:
        """Rates and momentum of the step to come."""
        options = self.options
        seen = self.done * options.batch_size
        for optimiser, spec in (
            (self.g_optimiser, options.generator_optimiser),
            (self.d_optimiser, options.discriminator_optimiser),
        ):
            group = optimiser.param_groups[0]
            if isinstance(spec, SGDSpec):
                share = min(seen // len(self.images) / spec.momentum_epochs, 1.0) if spec.momentum_epochs else 0.0
                group["momentum"] = spec.momentum + share * (spec.final_momentum - spec.momentum)
                group["lr"] = max(spec.lr / spec.decay**self.done, spec.min_lr)
            elif spec.final_lr is not None:
                share = min(seen / options.burn_in_images, 1.0) if options.burn_in_images else 1.0
                group["lr"] = spec.final_lr + (spec.lr - spec.final_lr) * (1 + math.cos(math.pi * share)) / 2


def _optimiser(net: torch.nn.Module, spec: SGDSpec | AdamSpec, *, fused: bool) -> Optimiser:
    if isinstance(spec, AdamSpec):
        return torch.optim.Adam(net.parameters(), lr=spec.lr, betas=(spec.beta1, spec.beta2), fused=fused or None)
    return torch.optim.SGD(net.parameters(), lr=spec.lr, momentum=spec.momentum, fused=fused or None)
