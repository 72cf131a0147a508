"""A traced net gives the bits of the net itself, or is not used."""

import pytest
import torch
from torch import nn

from models.inference.tiles import REFERENCE_TILE
from service.engine.jit import traced

ROWS = torch.arange(float(REFERENCE_TILE))[:, None]


class Fickle(nn.Module):
    """Decides by the number of rows what it does: a trace keeps one way only."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows * 2 if rows.shape[0] > 5 else rows * 3


class Doubling(nn.Module):
    """Has no weights."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return rows * 2


def test_a_net_that_a_trace_would_change_is_called_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    """One call without the interpreter is worth nothing if it gives other bits; the log says why it is not made."""
    net = Fickle()
    assert traced(net, ROWS, None, [4, REFERENCE_TILE], "fickle") is net
    assert "fickle is called layer by layer: its bits differ for" in caplog.text


def test_where_torch_has_no_tracer_any_more_nets_are_called_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is deprecated: a torch without it serves the same images, a little later."""
    monkeypatch.delattr(torch, "jit")
    net = Doubling()
    assert traced(net, ROWS, None, [1, REFERENCE_TILE], "doubling") is net
    assert "doubling is called layer by layer: " in caplog.text


def test_other_weights_of_one_architecture_share_a_graph() -> None:
    """The graph is made for the first; the second gives it its own weights."""
    rows = torch.randn(REFERENCE_TILE, 3)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        calls = [traced(net, rows, None, [5, REFERENCE_TILE], "two linear layers") for net in (first, second)]
        for net, call in zip((first, second), calls, strict=True):
            assert call is not net
            assert torch.equal(call(rows[:5], None), net(rows[:5]))
        assert not torch.equal(calls[0](rows, None), calls[1](rows, None))
