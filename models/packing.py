"""A net as a CPU runs it fastest: the weights of its linear layers laid out once, as the processor's kernels read them.

torch's own linear layer hands its weights to a library that copies them into such a layout for every batch anew. With
few rows that copy is much of the work: a batch of four of the paper's digits takes 1.8 times as long with it, one of
64 1.2 times (benchmarks/pieces.py). What is computed is the same sum in another order, so that last bits differ.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.sampler import REFERENCE_TILE

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


def packed(net: Net) -> Net:
    """The net with packed linear layers where it is on a CPU whose torch can do so, else the net as it is.

    The other layers are shared with the net that was given, which stays as it was.
    """
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    twin = copy.deepcopy(net, shared)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and _can_be_packed(child):
                setattr(module, name, PackedLinear(child))
    return twin


def _can_be_packed(layer: nn.Linear) -> bool:
    weight = layer.weight
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and weight.device.type == "cpu" and weight.dtype == torch.float32
