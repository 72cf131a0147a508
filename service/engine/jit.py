"""A net as one call that does not come back to the interpreter, so that it need not wait for a busy event loop."""

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.inference.tiles import TILE_SIZES

log = logging.getLogger(__name__)

# By architecture and kind of call: torch never frees what it has traced, so bundles that come and go share a graph.
_graphs: dict[tuple[str, ...], Callable[..., torch.Tensor]] = {}
_tracing = threading.Lock()


def traced(
    net: nn.Module, example: torch.Tensor, labels: torch.Tensor | None, expected: torch.Tensor, architecture: str
) -> Callable[..., torch.Tensor]:
    """The net as one call that does not come back to the interpreter in between, where that gives the same bits.

    Called layer by layer, a net lets go of the interpreter's lock at every step, and waits at every step until the busy
    event loop lets go of it in turn: that takes twice as long and more (benchmarks/serving/pieces.py).
    `expected` is what the net gives for the example, all in one batch.
    """
    rows = [given for given in (example, labels) if given is not None]
    few = [given[: TILE_SIZES[0]] for given in rows]
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    names, weights = list(named), list(named.values())
    key = (type(net).__name__, architecture, str(example.device))
    reason = "its bits differ"
    try:
        with _tracing:
            if key not in _graphs:
                _graphs[key] = _graph(net, few, names, weights)
        graph = _graphs[key]
        same = torch.equal(graph(*few, *weights), net(*few)) and torch.equal(graph(*rows, *weights), expected)
    except (AttributeError, RuntimeError) as error:
        same, reason = False, str(error)
    if not same:
        log.warning("%s is called layer by layer: %s", type(net).__name__, reason)
        return net

    def call(rows: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        return graph(rows, *weights) if labels is None else graph(rows, labels, *weights)

    return call


def _graph(
    net: nn.Module, rows: Sequence[torch.Tensor], names: Sequence[str], weights: Sequence[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """What the net does with (rows, then its parameters and buffers in the order of these names)."""
    twin = copy.deepcopy(net, {id(weight): weight for weight in weights})
    places = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = twin.get_submodule(owner)
        places.append((module._parameters if leaf in module._parameters else module._buffers, leaf))  # noqa: SLF001 - torch's own way to put weights in from outside refuses to be traced

    def run(*given: torch.Tensor) -> torch.Tensor:
        for (where, leaf), weight in zip(places, given[len(rows) :], strict=True):
            where[leaf] = weight  # type: ignore[assignment]  # a buffer or a parameter, as it was
        out: torch.Tensor = twin(*given[: len(rows)])
        return out

    with warnings.catch_warnings(), torch.no_grad():
        # What is to come after `trace` needs a compiler at hand; what a trace may miss shows in the bits.
        warnings.simplefilter("ignore")
        graph: Callable[..., torch.Tensor] = torch.jit.trace(run, (*rows, *weights), check_trace=False)  # type: ignore[no-untyped-call]
    for where, leaf in places:
        where[leaf] = None  # the graph keeps the twin
    return graph
