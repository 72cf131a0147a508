"""A net as a device runs it fastest: prepacked, that is with weights laid out as kernels read them, or in bfloat16.

torch's own linear layer hands its weights to a library that copies them into such a layout for every batch anew. With
few rows that copy is much of the work: a batch of four of the paper's digits takes 1.8 times as long with it, one of
64 1.2 times (benchmarks/serving/pieces.py). The sums are the same in another order, so the last bits differ.

In bfloat16 a layer's weights take half the memory, and its inputs, weights and outputs have 8 significant bits instead
of 24. Sums, and everything between the layers, stay float32.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.inference.tiles import REFERENCE_TILE
from models.networks import Maxout

Net = TypeVar("Net", bound=nn.Module)

# Scripted, because a tracer can't record the empty list.
_SOURCE = """
def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
"""


class Kernels(NamedTuple):
    """What oneDNN has for a linear layer: `prepack` lays weights out for batches of so many rows, for `_linear`."""

    prepack: Callable[[Tensor, int], Tensor]
    have_bfloat16: bool


@cache
def _linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = torch.jit.CompilationUnit(_SOURCE).linear
    return linear


@cache
def find_kernels() -> Kernels | None:
    """The kernels, for which torch has private names only; None where it has others by now, or none on this machine.

    Then torch's own linear layer serves. They are tried once, for the names might come to mean something else.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        ops = torch.ops.mkldnn
        prepack, _ = ops._reorder_linear_weight, ops._linear_pointwise  # noqa: SLF001 - see above
        kernels = Kernels(prepack, bool(ops._is_mkldnn_bf16_supported()))  # noqa: SLF001 - see above
        weight, rows = (torch.arange(4.0 * n, device="cpu").view(n, 4) for n in (3, 2))
        with torch.autocast("cpu", enabled=False):
            same = torch.equal(_linear()(rows, prepack(weight, 2), None), F.linear(rows, weight))  # of whole numbers
    except (AttributeError, RuntimeError, TypeError):
        return None
    return kernels if same else None


class PrepackedLinear(nn.Module):
    """x·Wᵀ + b of a linear layer, by oneDNN. Takes over the layer's bias and a copy of its weights."""

    def __init__(self, layer: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.bias = layer.bias
        self.weight: Tensor
        self.register_buffer("weight", kernels.prepack(layer.weight.detach(), REFERENCE_TILE), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) → (n, outputs)."""
        return _linear()(x, self.weight, self.bias)


class HalfLayer(nn.Module):
    """A layer in bfloat16 between others in float32: it rounds its inputs, and its outputs are float32 again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # The nets' own layout is channels last: weights in another would be moved for every batch.
        rounded = copy.deepcopy(layer).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's hints know only tensors'
        self.layer = _fastest(rounded, half=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        out: Tensor = self.layer(x.to(torch.bfloat16))
        return out.to(x.dtype)


class PrepackedMaxout(nn.Module):
    """A maxout layer with its linear functions in another order: the first of every unit, the second of every unit, ….

    The maxima of many units are then found at once, in a sixth of the time.
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


def prepacked(net: Net, *, half: bool = False) -> Net:
    """The net with prepacked layers, linear ones where it is on a CPU whose torch can do so.

    With `half` linear layers and convolutions are in bfloat16. The given net stays as it was, and what is not replaced
    is shared with it.
    """
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    twin = copy.deepcopy(net, shared)
    _replace_layers(twin, half=half)
    return twin


def _replace_layers(module: nn.Module, *, half: bool) -> None:
    for name, child in module.named_children():
        fastest = _fastest(child, half=half)
        setattr(module, name, fastest)
        if fastest is child and not isinstance(child, HalfLayer | PrepackedMaxout):
            _replace_layers(child, half=half)


def _fastest(layer: nn.Module, *, half: bool) -> nn.Module:
    """What takes a layer's place; itself where nothing does."""
    match layer:
        case Maxout():
            return PrepackedMaxout(layer, half=half)
        case nn.Linear() | nn.Conv2d() if half:
            return HalfLayer(layer)
        case nn.Linear() if (kernels := _kernels_for(layer.weight)) is not None:
            return PrepackedLinear(layer, kernels)
    return layer


def _kernels_for(weight: Tensor) -> Kernels | None:
    kernels = find_kernels() if weight.device.type == "cpu" else None
    if kernels is None or weight.dtype == torch.float32:
        return kernels
    return kernels if weight.dtype == torch.bfloat16 and kernels.have_bfloat16 else None
