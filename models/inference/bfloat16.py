"""A net with layers in bfloat16: half the memory, and on processors and GPUs that have it, less time.

A layer's inputs, weights and outputs have 8 significant bits instead of 24. Sums, and everything between the layers,
stay float32.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.networks import GraphNet

Net = TypeVar("Net", bound=nn.Module)


class HalfLayer(nn.Module):
    """A layer in bfloat16 between others in float32: it rounds its inputs, and its outputs are float32 again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # The nets' own layout is channels last: weights in another would be moved for every batch.
        self.layer = copy.deepcopy(layer).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's hints know only tensors'

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        out: Tensor = self.layer(x.to(torch.bfloat16))
        return out.to(x.dtype)


def in_bfloat16(net: Net) -> Net:
    """The net with linear layers and convolutions in bfloat16. The given net stays as it was, and shares the rest."""
    twin = copy.deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})
    if isinstance(twin, GraphNet):
        twin.halve()
    _replace_layers(twin)
    return twin


def _replace_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | nn.Conv2d):
            setattr(module, name, HalfLayer(child))
        else:
            _replace_layers(child)
