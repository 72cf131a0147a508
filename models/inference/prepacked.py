"""A net as a device runs it fastest: layers laid out as kernels read them, and layers in bfloat16.

torch's own linear layer hands its weights to a library that copies them into such a layout for every batch anew. With
few rows that copy is much of the work: a batch of four of the paper's digits takes 1.8 times as long with it, one of
64 1.2 times (benchmarks/serving/pieces.py). What is computed is the same sum in another order: last bits differ.

In bfloat16 a layer's weights take half the memory, and its inputs, weights and outputs have 8 significant bits instead
of 24; sums are float32. All that is between the layers stays float32.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.inference.tiles import REFERENCE_TILE
from models.networks import Maxout

Net = TypeVar("Net", bound=nn.Module)

# Scripted, because a tracer can't see through the list of no numbers.
_SOURCE = """
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
"""


@cache
def _linear() -> Callable[..., Tensor]:
    linear: Callable[..., Tensor] = torch.jit.CompilationUnit(_SOURCE).linear
    return linear


class PackedLinear(nn.Module):
    """x·Wᵀ + b of a linear layer, by oneDNN. Takes over the layer's bias and a copy of its weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.bias = layer.bias
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), REFERENCE_TILE)  # noqa: SLF001 - torch has no public way to it
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) → (n, outputs)."""
        out: Tensor = _linear()(x, self.weight, self.bias)
        return out


class HalfLayer(nn.Module):
    """A layer in bfloat16 among others in float32: its inputs are rounded, and its outputs float32 again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # The nets' own layout is channels last: weights in another would be moved for every batch.
        rounded = copy.deepcopy(layer).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's hints know only tensors'
        self.layer = _fastest(rounded, half=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        out: Tensor = self.layer(x.to(torch.bfloat16))
        return out.to(x.dtype)


class PackedMaxout(nn.Module):
    """A maxout layer whose linear functions stand in another order: the k-th of every unit, then the next of each.

    So the largest are found for many units at once, in a sixth of the time.
    """

    def __init__(self, layer: Maxout, *, half: bool) -> None:
        super().__init__()
        self.units, self.pieces = layer.units, layer.pieces
        order = torch.arange(self.units * self.pieces).view(self.units, self.pieces).T.flatten()
        linear = nn.Linear(layer.linear.in_features, layer.linear.out_features, device="meta")
        linear.weight = nn.Parameter(layer.linear.weight.detach()[order], requires_grad=False)
        linear.bias = nn.Parameter(layer.linear.bias.detach()[order], requires_grad=False)
        self.linear = _fastest(linear, half=half)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) → (n, units)."""
        pieces: Tensor = self.linear(x)
        return pieces.view(-1, self.pieces, self.units).amax(dim=1)


def packed(net: Net, *, half: bool = False) -> Net:
    """The net with packed layers, linear ones where it is on a CPU whose torch can do so.

    With `half` its linear layers and its convolutions are in bfloat16. What is not replaced is shared with the net that
    was given, which stays as it was.
    """
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    twin = copy.deepcopy(net, shared)
    _replace_layers(twin, half=half)
    return twin


def _replace_layers(module: nn.Module, *, half: bool) -> None:
    for name, child in module.named_children():
        fastest = _fastest(child, half=half)
        setattr(module, name, fastest)
        if fastest is child and not isinstance(child, HalfLayer | PackedMaxout):
            _replace_layers(child, half=half)


def _fastest(layer: nn.Module, *, half: bool) -> nn.Module:
    """What takes a layer's place; itself where nothing does."""
    match layer:
        case Maxout():
            return PackedMaxout(layer, half=half)
        case nn.Linear() | nn.Conv2d() if half:
            return HalfLayer(layer)
        case nn.Linear() if _can_be_packed(layer.weight):
            return PackedLinear(layer)
    return layer


def _can_be_packed(weight: Tensor) -> bool:
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_kernels or weight.device.type != "cpu":
        return False
    has_half: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # noqa: SLF001 - as above
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and has_half)
