"""A bundle's two nets as the engine calls them: (n, …) inputs and (n,) labels or None → one tensor of n rows."""

from collections.abc import Callable

import torch
from torch import nn

from models.bundle import Bundle


class Verdicts(nn.Module):
    """All that D says of images, in one tensor whose bits can be compared.

    (n, 1) logits without labels; with them (n, 2 + classes): the logit, the label that it is for, each class's score.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.discriminator = bundle.discriminator

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See the class."""
        if labels is None:
            logits: torch.Tensor = self.discriminator(images)
            return logits[:, None]
        logits, labels, scores = self.discriminator.judge(images, labels)
        return torch.cat([logits[:, None], labels[:, None].to(scores.dtype), scores], dim=1)


class Finished(nn.Module):
    """A net, then a function of what it gives, if there is one."""

    def __init__(self, net: Callable[..., torch.Tensor], finish: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        self.net = net
        self.finish = finish

    def forward(self, rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """See the class."""
        out = self.net(rows, labels)
        return out if self.finish is None else self.finish(out)
