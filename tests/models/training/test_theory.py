"""A net that learns D by the trainer's loss finds the optimum that the paper derives, for a pair of known densities."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.training.losses import discriminator_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def normal_density(x: Tensor, mean: float, deviation: float) -> Tensor:
    return torch.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))


def test_a_trained_discriminator_approaches_the_density_ratio() -> None:
    """D of N(0, 1) against N(1, 1½²): a small net that sees rows of each ends at p_data / (p_data + p_g), equation 2.

    The rows are the quantiles of each density, so that no luck of a draw is in the way.
    """
    rng = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.7, 0.7, generator=rng)
    quantiles = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000)[:, None]
    real, fake = quantiles, 1 + 1.5 * quantiles
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = discriminator_loss(net(real).squeeze(1), net(fake).squeeze(1))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]

    x = torch.linspace(-2.5, 4, 131)
    p_data, p_g = normal_density(x, 0, 1), normal_density(x, 1, 1.5)
    with torch.no_grad():
        learned = torch.sigmoid(net(x[:, None]).squeeze(1))
    assert (learned - p_data / (p_data + p_g)).abs().max() < 0.02
