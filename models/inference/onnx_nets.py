"""A bundle's nets as ONNX graphs: what onnxruntime runs on a CPU, and what `export` writes.

A graph computes what the net's module in `models.networks` computes, and tests/models/inference/test_fast_nets.py
compares both for every family. Latents or pixels go in, with labels where the net has classes; the number of rows is
free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import nn

from models.networks import (
    SLOPE,
    ConvDiscriminator,
    ConvGenerator,
    Discriminator,
    Encoder,
    Generator,
    GraphDiscriminator,
    GraphGenerator,
    GraphNet,
    Maxout,
    MaxoutDiscriminator,
    MLPGenerator,
    ResidualBlock,
)
from models.networks.operators import FRACTIONS, OPERATORS
from models.spec import GraphNode

OPSET, IR_VERSION = 20, 10  # of 2023, which onnxruntime reads from 1.17 on
MOST_WEIGHT_BYTES = 2**31 - 2**20  # protobuf writes nothing of 2 GiB or more, and the nodes need some of it
_GRAPH, _INITIALIZER, _RAW_DATA = 0x3A, 0x2A, 0x4A  # fields of ModelProto, GraphProto and TensorProto in onnx.proto
Axes = list[int | str]  # a free one has a name


class Output(NamedTuple):
    """A result of a graph: the value's name in it, its type and its shape."""

    value: str
    kind: int
    shape: Axes


def fits_graph(net: nn.Module) -> bool:
    """Whether a net is small enough to become a serialised graph."""
    return sum(weight.nbytes for weight in net.parameters()) <= MOST_WEIGHT_BYTES


def generator_graph(net: Generator, outputs: Sequence[str] = ("pixels", "levels")) -> bytes:
    """G as a serialised graph.

    Inputs are `latents` (n, dim) and, with classes, `labels` (n,), int64. Of the outputs, `pixels` are float32
    (n, c, h, w) in [0, 1], and `levels` are what `models.inference.pixels.grey_levels` makes of them.
    """
    graph = _Graph(net)
    if isinstance(net, GraphGenerator):
        pixels = _imported_generator(graph, net)
    else:
        pixels = _mlp_generator(graph, net) if isinstance(net, MLPGenerator) else _conv_generator(graph, net)
    found = {"pixels": Output(pixels, TensorProto.FLOAT, ["n", "c", "h", "w"])}
    if "levels" in outputs:
        rounded = graph.add("Round", graph.add("Mul", pixels, graph.constant(255.0)))
        levels = graph.add("Transpose", graph.add("Cast", rounded, to=TensorProto.UINT8), perm=[0, 2, 3, 1])
        found["levels"] = Output(levels, TensorProto.UINT8, ["n", "h", "w", "c"])
    return graph.finish("latents", ["n", "dim"], net.classes, {name: found[name] for name in outputs})


def discriminator_graph(net: Discriminator, output: str = "verdicts") -> bytes:
    """D as a serialised graph.

    Inputs are `pixels`, float32 (n, c, h, w) in [0, 1], and, with classes, `labels` (n,), int64, −1 where unknown. The
    output is `logits` (n,), or `verdicts`, as `models.inference.fast_nets.Verdicts` gives them.
    """
    graph = _Graph(net)
    if isinstance(net, MaxoutDiscriminator):
        logits, verdicts = _maxout_verdicts(graph, net)
    elif isinstance(net, GraphDiscriminator):
        values = {one.name: "pixels" for one in net.body.inputs if one.role == "image"}
        logits = verdicts = graph.reshape(_imported(graph, net, values), [-1, 1])
    else:
        logits, verdicts = _conv_verdicts(graph, net)
    found = {
        "logits": Output(graph.reshape(logits, [-1]), TensorProto.FLOAT, ["n"]),
        "verdicts": Output(verdicts, TensorProto.FLOAT, ["n", 2 + net.classes if net.classes else 1]),
    }
    return graph.finish("pixels", ["n", "c", "h", "w"], net.classes, {output: found[output]})


def encoder_graph(net: Encoder) -> bytes:
    """E as a serialised graph: `pixels`, float32 (n, c, h, w) in [0, 1] → `codes`, as the module gives them."""
    graph, x = _Graph(net), "pixels"
    for step in net.steps:
        x = graph.leaky(graph.convolution(x, step, strides=[2, 2]))
    hidden = graph.leaky(graph.linear(graph.add("Flatten", x), net.hidden))
    codes = Output(graph.linear(hidden, net.output), TensorProto.FLOAT, ["n", net.dim + net.classes])
    return graph.finish("pixels", ["n", "c", "h", "w"], 0, {"codes": codes})


class _Graph:
    """The nodes of a graph in the order in which they run, and the constants that they read. Values go by name."""

    def __init__(self, net: nn.Module) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[bytes | memoryview] = []  # parts of a graph that has nothing else
        self._constants = 0
        before = "weights." if isinstance(net, GraphNet) else ""  # a stranger's names may be those of our values
        self._names = {id(weight): before + name for name, weight in net.named_parameters()}

    def finish(self, source: str, shape: Axes, classes: int, outputs: Mapping[str, Output]) -> bytes:
        """The graph as bytes. `source` is the input beside the labels."""
        inputs = [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)]
        if classes:
            inputs.append(helper.make_tensor_value_info("labels", TensorProto.INT64, ["n"]))
        given = [helper.make_tensor_value_info(name, kind, axes) for name, (_, kind, axes) in outputs.items()]
        named = [helper.make_node("Identity", [value], [name], name) for name, (value, _, _) in outputs.items()]
        graph: GraphProto = helper.make_graph([*self.nodes, *named], "net", inputs, given)
        opset = helper.make_opsetid("", OPSET)
        model: ModelProto = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
        # Readers merge two graphs of one model, so the weights can follow. By protobuf they would be copied five times,
        # in calls that each hold up the event loop for longer than a request takes.
        return b"".join([model.SerializeToString(deterministic=True), *_field(_GRAPH, self.constants)])

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The result of one more node."""
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, numbers: torch.Tensor | NDArray[np.float32] | Sequence[int] | float) -> str:
        """Numbers, as float32 or int64; a weight of the net under its own name."""
        array = numbers.detach().cpu().numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers)
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        array = np.ascontiguousarray(array.astype(kind, copy=False))
        name = self._names.get(id(numbers), f"constant_{self._constants}")
        data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        head = TensorProto(name=name, data_type=data_type, dims=array.shape).SerializeToString(deterministic=True)
        content = _field(_RAW_DATA, [array.reshape(-1).view(np.uint8).data])
        self.constants += _field(_INITIALIZER, [head, *content])
        self._constants += 1
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        return self.add("Reshape", x, self.constant(shape))

    def linear(self, x: str, layer: nn.Module, order: torch.Tensor | None = None) -> str:
        """A linear layer's outputs, in another order of them if one is given."""
        given = [cast("nn.Linear", layer).weight, cast("nn.Linear", layer).bias]
        ordered = given if order is None else [numbers[order] for numbers in given]
        return self.add("Gemm", x, *map(self.constant, ordered), transB=1)

    def convolution(self, x: str, layer: nn.Module, **more: Sequence[int]) -> str:
        conv = cast("nn.Conv2d", layer)
        given = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
        pads = [int(side) for side in conv.padding] * 2
        return self.add("Conv", x, *map(self.constant, given), group=conv.groups, pads=pads, **more)

    def leaky(self, x: str) -> str:
        return self.add("LeakyRelu", x, alpha=SLOPE)

    def enlarge(self, x: str, before: int, after: int) -> str:
        """Squares of a side to squares of another, bilinear."""
        if after % before:
            return self.add("Resize", x, "", "", self.constant([after, after]), axes=[2, 3], mode="linear")
        ratio = after // before  # onnxruntime has a faster kernel for whole ones
        return self.add("Resize", x, "", self.constant(np.array([1, 1, ratio, ratio], np.float32)), mode="linear")

    def stage(self, x: str, blocks: nn.Module) -> str:
        for block in cast("Iterable[ResidualBlock]", blocks.children()):
            inner = self.leaky(self.convolution(x, block.widen))
            inner = self.leaky(self.convolution(inner, block.mix))
            x = self.add("Add", x, self.convolution(inner, block.narrow))
        return x

    def one_hot(self, labels: str, classes: int) -> str:
        return self.add("OneHot", labels, self.constant([classes]), self.constant(np.array([0, 1], np.float32)))

    def likeliest_where_unknown(self, scores: str) -> str:
        """The labels of the input; where one is −1, that of the highest score."""
        likeliest = self.add("ArgMax", scores, axis=1, keepdims=0)
        return self.add("Where", self.add("Less", "labels", self.constant([0])), likeliest, "labels")

    def verdicts(self, logits: str, labels: str, scores: str) -> str:
        column = self.reshape(self.add("Cast", labels, to=TensorProto.FLOAT), [-1, 1])
        return self.add("Concat", logits, column, scores, axis=1)


def _field(tag: int, content: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """A field of a protobuf message whose content is bytes, as parts to be joined."""
    size, head = sum(len(part) for part in content), bytearray([tag])
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return [bytes([*head, size]), *content]


def _mlp_generator(graph: _Graph, net: MLPGenerator) -> str:
    x = "latents"
    if net.classes:
        x = graph.add("Concat", x, graph.one_hot("labels", net.classes), axis=1)
    for layer in net.layers:
        x = graph.add("Relu", graph.linear(x, layer))
    x = graph.add("Sigmoid", graph.linear(x, net.output))
    return graph.reshape(x, [-1, *net.image_shape])


def _conv_generator(graph: _Graph, net: ConvGenerator) -> str:
    x, side = "latents", net.sizes[0]
    if net.classes:
        x = graph.add("Concat", x, graph.add("Gather", graph.constant(net.embedding.weight), "labels"), axis=1)
    x = graph.linear(x, net.start)
    x = graph.stage(graph.reshape(x, [-1, net.start.out_features // side**2, side, side]), net.stages[0])
    for before, size, step, stage in zip(net.sizes[:-1], net.sizes[1:], net.steps, list(net.stages)[1:], strict=True):
        x = graph.convolution(x, step)
        x = graph.stage(graph.enlarge(x, before, size), stage)
    return graph.add("Sigmoid", graph.convolution(graph.leaky(x), net.output))


def _maxout_verdicts(graph: _Graph, net: MaxoutDiscriminator) -> tuple[str, str]:
    """Logits (n, 1) and verdicts. As in `MaxoutDiscriminator.judge`, scores come from a pass without a label."""
    image = graph.add("Flatten", "pixels")
    if not net.classes:
        logits = _maxout_logits(graph, net, image)
        return logits, logits
    nothing = graph.add("Mul", graph.one_hot("labels", net.classes), graph.constant(0.0))
    hidden = _hidden(graph, net, graph.add("Concat", image, nothing, axis=1))
    scores = graph.linear(hidden, net.class_head)
    labels = graph.likeliest_where_unknown(scores)
    logits = _maxout_logits(graph, net, graph.add("Concat", image, graph.one_hot(labels, net.classes), axis=1))
    return logits, graph.verdicts(logits, labels, scores)


def _maxout_logits(graph: _Graph, net: MaxoutDiscriminator, x: str) -> str:
    return graph.linear(_hidden(graph, net, x), net.output)


def _hidden(graph: _Graph, net: MaxoutDiscriminator, x: str) -> str:
    """The maxout layers, their linear functions in another order: the first of every unit, the second of every unit, ….

    The maxima of many units are then found at once.
    """
    for layer in cast("Iterable[Maxout]", net.layers):
        order = torch.arange(layer.units * layer.pieces).view(layer.units, layer.pieces).T.flatten()
        pieces = graph.linear(x, layer.linear, order)
        pieces = graph.reshape(pieces, [-1, layer.pieces, layer.units])
        x = graph.add("ReduceMax", pieces, graph.constant([1]), keepdims=0)
    return x


def _conv_verdicts(graph: _Graph, net: ConvDiscriminator) -> tuple[str, str]:
    """Logits (n, 1) and verdicts."""
    x = graph.add("Sub", graph.add("Mul", "pixels", graph.constant(2.0)), graph.constant(1.0))
    x = graph.stage(graph.convolution(x, net.input), net.stages[0])
    for step, stage in zip(net.steps, list(net.stages)[1:], strict=True):
        x = graph.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
        x = graph.stage(graph.convolution(x, step), stage)
    x = graph.add("Flatten", graph.convolution(x, net.gather))
    h = graph.leaky(graph.linear(x, net.features))
    logits = graph.linear(h, net.output)
    if not net.classes:
        return logits, logits
    scores = graph.linear(h, net.class_head)
    labels = graph.likeliest_where_unknown(scores)
    embedded = graph.add("Gather", graph.constant(net.embedding.weight), labels)
    projected = graph.add("ReduceSum", graph.add("Mul", embedded, h), graph.constant([1]), keepdims=1)
    root = graph.constant(math.sqrt(net.features.out_features))
    logits = graph.add("Add", logits, graph.add("Div", projected, root))
    return logits, graph.verdicts(logits, labels, scores)


def _imported_generator(graph: _Graph, net: GraphGenerator) -> str:
    """The inputs of a graph are parts of the latents, or made of the labels."""
    body, values, start = net.body, {}, 0
    for role in ("latent", "noise"):
        for one in body.inputs:
            if one.role == role:
                stop = start + math.prod(one.shape)
                part = graph.add("Slice", "latents", *[graph.constant([number]) for number in (start, stop, 1)])
                values[one.name] = graph.reshape(part, [-1, *one.shape])
                start = stop
    for one in body.inputs:
        if one.role == "label":
            values[one.name] = graph.reshape("labels", [-1, *one.shape])
        elif one.role == "onehot":
            values[one.name] = graph.reshape(graph.one_hot("labels", net.classes), [-1, *one.shape])
    return _imported(graph, net, values)


def _imported(graph: _Graph, net: GraphNet, values: dict[str, str]) -> str:
    """The result of a graph's nodes, as the operators that they were read from."""
    weights = dict(net.named_parameters())
    for node in net.body.nodes:
        for name in node.inputs:
            if name not in values:
                values[name] = graph.constant(weights[name])
        values[node.output] = _node(graph, node, [values[name] for name in node.inputs])
    return values[net.body.nodes[-1].output]


def _node(graph: _Graph, node: GraphNode, inputs: list[str]) -> str:
    """One node. Operands become inputs again, in ONNX's order."""
    given: dict[str, Any] = dict(node.attributes)
    match node.op:
        case "Constant":
            kind = np.int64 if given.get("to") == "int" else np.float32
            return graph.constant(np.array(given["values"], kind).reshape(given["shape"]))
        case "Cast":
            return graph.add("Cast", *inputs, to=TensorProto.INT64 if given["to"] == "int" else TensorProto.FLOAT)
        case "ExpandRows":
            rows = graph.add("Shape", inputs[1], start=0, end=1)
            row = graph.add("Shape", inputs[0], start=1)
            return graph.add("Expand", inputs[0], graph.add("Concat", rows, row, axis=0))
        case "Resize":
            return _resize(graph, inputs[0], given)
        case "Pad" if given.get("mode", "constant") != "constant":
            given.pop("value", None)
    operator = OPERATORS[node.op]
    operands = [
        graph.constant(
            np.asarray(given.pop(name), np.float32 if operator.attributes[name][0] in FRACTIONS else np.int64)
        )
        if name in given
        else ""
        for name in operator.operands
    ]
    while operands and not operands[-1]:
        operands.pop()
    return graph.add(node.op, *inputs, *operands, **given)


def _resize(graph: _Graph, x: str, given: dict[str, Any]) -> str:
    """By scales where there are some: onnxruntime then takes them as they stand."""
    sizes, scales = given.pop("sizes"), given.pop("scales", ())
    if scales:
        return graph.add("Resize", x, "", graph.constant(np.array(scales, np.float32)), **given)
    return graph.add("Resize", x, "", "", graph.constant(sizes), **given)
