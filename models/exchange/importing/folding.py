"""Puts batch normalisation into the weights of the convolution before it, so that no time is spent on it later."""

from collections import Counter

import torch
from torch import Tensor

from models.exchange.importing.reading import Net
from models.spec import GraphNode

_PARAMETERS = slice(1, 5)  # scale, bias, mean, variance


def fold_normalisations(net: Net) -> None:
    """Fold each normalisation whose input nobody else reads, and which follows a convolution of known weights."""
    readers = Counter(name for node in net.nodes for name in node.inputs)
    by_output = {node.output: node for node in net.nodes}
    folded: dict[str, GraphNode] = {}
    gone: set[str] = set()
    for node in net.nodes:
        before = by_output.get(node.inputs[0]) if node.op == "BatchNormalization" else None
        if before is None or readers[before.output] != 1 or before.op not in {"Conv", "ConvTranspose"}:
            continue
        names = (*before.inputs[1:], *node.inputs[_PARAMETERS])
        if any(name not in net.weights or readers[name] != 1 for name in names):
            continue
        _fold(net.weights, before, node)
        bias = node.inputs[2]
        folded[before.output] = before.model_copy(update={"inputs": (*before.inputs[:2], bias), "output": node.output})
        gone |= {node.output, *before.inputs[2:], node.inputs[1], *node.inputs[3:5]}
    net.nodes[:] = [folded.get(node.output, node) for node in net.nodes if node.output not in gone]
    for name in gone:
        net.weights.pop(name, None)


def _fold(weights: dict[str, Tensor], convolution: GraphNode, node: GraphNode) -> None:
    """gain·(w∗x + b − mean) + bias, in float64."""
    scale, bias, mean, variance = (weights[name].double() for name in node.inputs[_PARAMETERS])
    gain = scale / torch.sqrt(variance + float(str(node.attributes.get("epsilon", 1e-5))))
    name = convolution.inputs[1]
    weight = weights[name].double()
    if convolution.op == "Conv":  # (outputs, …)
        wide = weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
    else:  # (inputs, outputs / group, …)
        groups = int(str(convolution.attributes.get("group", 1)))
        split = weight.reshape(groups, -1, *weight.shape[1:])
        wide = (split * gain.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)
    own = weights[convolution.inputs[2]].double() if len(convolution.inputs) > 2 else torch.zeros_like(mean)
    weights[name] = wide.float()
    weights[node.inputs[2]] = (bias + (own - mean) * gain).float()
