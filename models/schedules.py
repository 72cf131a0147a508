"""How numbers move over a training run."""

import math


def half_cosine(share: float) -> float:
    """From 1 to 0 along half a cosine, while the share goes from 0 to 1."""
    return (1 + math.cos(math.pi * share)) / 2
