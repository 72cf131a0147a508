"""Pure functions from logits, and D's gradients, to scalars, the papers' equations beside each.

D(x) = σ(logit), so −log D(x) = softplus(−logit) and −log(1 − D(x)) = softplus(logit): computed from the logit, neither
overflows nor loses its gradient where the sigmoid has rounded to 0 or 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−(1/m) Σ [log D(x) + log(1 − D(G(z)))]: what Algorithm 1 ascends, negated. Logits are (m,). ln 4 where D = ½."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def nonsaturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """−(1/m) Σ log D(G(z)): the paper's advice for early training (§3), with strong gradients where D is sure."""
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
    """(1/m) Σ softplus(−(d(x) − d(G(z)))) over pairs: −log of the chance that the real one of two is known.

    Jolicoeur-Martineau 2019, eq. 8; Huang et al. 2024 (R3GAN), eq. 2. Row i of both is a pair. ln 2 where D can't tell.
    """
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_generator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(1/m) Σ softplus(−(d(G(z)) − d(x))): D's relativistic loss with the two changed round."""
    return F.softplus(real_logits - fake_logits).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """½·(1/m) Σ ‖∇_x d(x)‖²: R1 where `images` are real, R2 where they are generated (Mescheder et al. 2018, §4.1).

    `logits` (m,) come from `images` (m, c, h, w), which require a gradient; each row from its own image alone. The
    result can be differentiated by D's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum() / (2 * len(images))


class Loss(NamedTuple):
    """What both nets minimise: D's loss of (real_logits, fake_logits), and G's of (real_logits, fake_logits)."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    paired: bool = False  # G's loss looks at the real logits too


LOSSES: dict[str, Loss] = {
    "nonsaturating": Loss(discriminator_loss, lambda _, fake: nonsaturating_generator_loss(fake)),
    "saturating": Loss(discriminator_loss, lambda _, fake: saturating_generator_loss(fake)),
    "hinge": Loss(hinge_discriminator_loss, lambda _, fake: hinge_generator_loss(fake)),
    "relativistic": Loss(relativistic_discriminator_loss, relativistic_generator_loss, paired=True),
}
