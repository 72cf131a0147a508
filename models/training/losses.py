"""The losses: pure functions from logits, and D's gradients, to scalars, each with its equation.

D(x) = σ(logit), so −log D(x) = softplus(−logit) and −log(1 − D(x)) = softplus(logit): computed from the logit, neither
overflows nor loses its gradient when the sigmoid rounds to 0 or 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−(1/m) Σ [log D(x) + log(1 − D(G(z)))]: what Algorithm 1 ascends, negated. Logits are (m,). ln 4 at D = ½."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """−(1/m) Σ log D(G(z)): the paper's advice for early training (§3), with strong gradients while D is sure."""
    return F.softplus(-fake_logits).mean()


def saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """(1/m) Σ log(1 − D(G(z))): the minimax game itself (equation 1, Algorithm 1)."""
    return -F.softplus(fake_logits).mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(1/m) Σ [max(0, 1 − d(x)) + max(0, 1 + d(G(z)))], d the logit (Lim & Ye 2017; Miyato et al. 2018, eq. 16)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """−(1/m) Σ d(G(z)) (Miyato et al. 2018, eq. 17)."""
    return -fake_logits.mean()


def relativistic_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(1/m) Σ softplus(−(d(x) − d(G(z)))) over pairs: −log of the chance that D finds the real one of two.

    Jolicoeur-Martineau 2019, eq. 8; Huang et al. 2024 (R3GAN), eq. 2. Row i of both is a pair. ln 2 if D can't tell.
    """
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(1/m) Σ softplus(−(d(G(z)) − d(x))): D's relativistic loss with its arguments swapped."""
    return F.softplus(real_logits - fake_logits).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """½·(1/m) Σ ‖∇_x d(x)‖²: R1 for real `images`, R2 for generated ones (Mescheder et al. 2018, §4.1).

    `logits` (m,) are computed from `images` (m, c, h, w), which require a gradient, each from its own image alone. The
    result can be differentiated by D's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum() / (2 * len(images))


class Loss(NamedTuple):
    """What both nets minimise: D's loss of (real_logits, fake_logits), and G's of (real_logits, fake_logits)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False  # whether G's loss depends on the real logits


LOSSES: dict[str, Loss] = {
    "nonsaturating": Loss(discriminator_loss, lambda _, fake: nonsaturating_generator_loss(fake)),
    "saturating": Loss(discriminator_loss, lambda _, fake: saturating_generator_loss(fake)),
    "hinge": Loss(hinge_discriminator_loss, lambda _, fake: hinge_generator_loss(fake)),
    "relativistic": Loss(relativistic_discriminator_loss, relativistic_generator_loss, paired=True),
}
