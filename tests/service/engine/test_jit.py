"""A traced net gives the bits of the net itself, or is not used."""

import pytest
import torch
from torch import nn

from models.inference.tiles import REFERENCE_TILE
from service.engine.jit import traced


class Fickle(nn.Module):
    """Decides by its numbers what it does: a trace keeps one way only."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows * 2 if rows[-1, 0] > 10 else rows * 3


def test_a_net_that_a_trace_would_change_is_called_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    """One call without the interpreter is worth nothing if it gives other bits; the log says why it is not made."""
    rows = torch.arange(float(REFERENCE_TILE))[:, None]
    net = Fickle()
    assert traced(net, rows, None, net(rows), "fickle") is net
    assert "Fickle is called layer by layer: its bits differ" in caplog.text


def test_other_weights_of_one_architecture_share_a_graph() -> None:
    """The graph is made for the first; the second gives it its own weights."""
    rows = torch.randn(REFERENCE_TILE, 3)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        calls = [traced(net, rows, None, net(rows), "two linear layers") for net in (first, second)]
        for net, call in zip((first, second), calls, strict=True):
            assert call is not net
            assert torch.equal(call(rows[:5], None), net(rows[:5]))
        assert not torch.equal(calls[0](rows, None), calls[1](rows, None))
