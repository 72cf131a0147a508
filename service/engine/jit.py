"""A net as one call that does not return to the interpreter, so that it need not wait for a busy event loop.

Called layer by layer, a net releases the interpreter's lock at every step, and at every step waits until the busy event
loop releases it in turn: that can take twice as long and more (benchmarks/serving/pieces.py). Where there is no
compiler, nothing takes the place of torch.jit: what torch.export and torch.fx make runs layer by layer as well
(docs/log.md).

This file alone knows torch.jit, which is deprecated. Without it, nets are called layer by layer.
"""

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.inference.tiles import TILE_SIZES

log = logging.getLogger(__name__)

# By architecture and device: torch never frees what it has traced, so bundles that come and go share a graph.
_graphs: dict[tuple[str, str], Callable[..., torch.Tensor]] = {}
_tracing = threading.Lock()


def traced(
    net: nn.Module, example: torch.Tensor, labels: torch.Tensor | None, sizes: Sequence[int], architecture: str
) -> Callable[..., torch.Tensor]:
    """The net as one call, if that gives the net's bits for batches of all these sizes; else the net itself.

    Args:
        net: (n, …) inputs and (n,) labels or None → (n, …).
        example, labels: Some rows for it.
        sizes: Of batches that will be run.
        architecture: Equal for nets that differ in their weights only. They share a graph.
    """
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    names, weights = list(named), list(named.values())
    inputs = [given for given in (example, labels) if given is not None]
    key = (architecture, str(example.device))
    try:
        with _tracing:
            if key not in _graphs:
                _graphs[key] = _trace(net, [given[: TILE_SIZES[0]] for given in inputs], names, weights)
        graph = _graphs[key]
        reason = _difference(lambda rows: graph(*rows, *weights), net, inputs, sizes)
    except (AttributeError, RuntimeError) as error:
        reason = str(error)
    if reason is not None:
        log.warning("%s is called layer by layer: %s", architecture, reason)
        return net

    def call(rows: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return graph(rows, *weights) if labels is None else graph(rows, labels, *weights)

    return call


def _difference(
    call: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    net: nn.Module,
    inputs: Sequence[torch.Tensor],
    sizes: Sequence[int],
) -> str | None:
    """Why the call can't take the net's place; None where it gives the same bits in every size."""
    for size in sizes:
        rows = [given[torch.arange(size) % len(given)] for given in inputs]
        if not torch.equal(call(rows), net(*rows)):
            return f"its bits differ for {size} rows"
    return None


def _trace(
    net: nn.Module, inputs: Sequence[torch.Tensor], names: Sequence[str], weights: Sequence[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A graph of (inputs, then the net's parameters and buffers in the order of these names)."""
    # torch.func.functional_call refuses nets with scripted parts, so a copy gets the weights as plain attributes.
    twin = copy.deepcopy(net, {id(weight): weight for weight in weights})
    places = [(twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for module, attribute in places:
        delattr(module, attribute)

    def run(*given: torch.Tensor) -> torch.Tensor:
        for (module, attribute), weight in zip(places, given[len(inputs) :], strict=True):
            setattr(module, attribute, weight)
        out: torch.Tensor = twin(*given[: len(inputs)])
        return out

    with warnings.catch_warnings(), torch.no_grad():
        # Deprecated since torch 2.11, and as of November 2026 without a successor where there is no compiler.
        warnings.filterwarnings("ignore", r"`torch\.jit\.trace` is deprecated", DeprecationWarning)
        # What a trace may miss shows in the bits, which are compared.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        graph: Callable[..., torch.Tensor] = torch.jit.trace(run, (*inputs, *weights), check_trace=False)  # type: ignore[no-untyped-call]
    for module, attribute in places:
        setattr(module, attribute, None)  # the graph keeps the twin, and would keep these weights with it
    return graph
