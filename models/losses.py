"""Pure functions from logits to scalars, the paper's equation beside each.

D(x) = σ(logit), so −log D(x) = softplus(−logit) and −log(1 − D(x)) = softplus(logit): computed from the logit, neither
overflows nor loses its gradient where the sigmoid has rounded to 0 or 1.
"""

from collections.abc import Callable

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


GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nonsaturating": nonsaturating_generator_loss,
    "saturating": saturating_generator_loss,
}
