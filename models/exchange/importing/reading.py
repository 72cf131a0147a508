"""Makes a graph of the closed table's operators of an ONNX graph: folded, every shape known, or refused with the node.

Each value is followed for two and for three rows at once. A value is either known, because it follows from constants
and from the number of rows alone, or made, because it follows from the inputs; of a made one only the shapes are
computed. Where a made value's shapes do not differ in exactly one axis, by as much as the numbers of rows do, the graph
has a batch axis that is frozen or mixed, and the node is named. All that shapes are computed with (`Shape`, `Gather`,
`Concat`, …) is known, and so what is left are few nodes with whole numbers as attributes. Known floats become weights.

Nodes whose operator is a row of `OPERATORS` are taken as they are, but for the operands that become attributes. The
others that are read are rewritten in such rows: `_REWRITTEN`. `_FOLDED` are met in computations of shapes and of
constants only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from torch import Tensor, nn

from models.exchange.importing.parsing import (
    FLOATS,
    INTEGERS,
    Refused,
    attribute_of,
    named,
    opset_of,
    shortest,
    tensor_of,
)
from models.networks.operators import OPERATORS, GraphError
from models.spec import GraphBody, GraphInput, GraphNode

ROWS = (2, 3)
MOST_NUMBERS = 2**28  # of a constant, and of a value's row
INLINE = 4  # floats that stand in the graph itself
MOST_WHOLE = 4096  # numbers of a whole constant, which stand there too
_LEAST, _MOST = -(2**31), 2**31
_SQUEEZED = (
    "without axes it drops the batch axis of a single row, which freezes it; in PyTorch write x.squeeze(3).squeeze(2) "
    "or x.view(x.shape[0], -1) in place of x.squeeze()"
)
_PLAIN_MODULE = frozenset(dir(nn.Module())) | {"body", "classes", "is_half", "largest", "image_shape"}
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Known:
    """A value that does not depend on the inputs: for two and for three rows."""

    at: Pair

    @property
    def constant(self) -> Tensor | None:
        """The value, where it does not depend on the number of rows either."""
        one, other = self.at
        return one if one is other or (one.shape == other.shape and torch.equal(one, other)) else None


@dataclass(frozen=True)
class Made:
    """A value of the graph, by its name, without numbers: for two and for three rows."""

    name: str
    at: Pair

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Its shapes."""
        return [tuple(one.shape) for one in self.at]


Value = Known | Made
Attributes = dict[str, Any]


@dataclass
class Net:
    """What has been read: the inputs, the nodes and the weights."""

    inputs: list[GraphInput] = field(default_factory=list)
    nodes: list[GraphNode] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def body(self) -> GraphBody:
        """As a manifest has it."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        return GraphBody(inputs=tuple(self.inputs), weights=shapes, nodes=tuple(self.nodes))


class Reader:
    """Reads the nodes that one output needs.

    Args:
        model: Parsed. What its inputs are is said by `add_input`.
    """

    def __init__(self, model: ModelProto) -> None:
        self.graph: GraphProto = model.graph
        self.opset = opset_of(model)
        self.net = Net()
        self.values: dict[str, Value] = {}
        self._names: set[str] = set(_PLAIN_MODULE)
        self._interned: dict[int, tuple[Tensor, str]] = {}
        self.node = NodeProto()
        self._rows_of = ""

    def add_input(self, name: str, one: GraphInput, *, is_whole: bool = False) -> Made:
        """An input of the net, and the value that it is in the ONNX graph."""
        self.net.inputs.append(one)
        self._names.add(one.name)
        kind = torch.int64 if is_whole else torch.float32
        made = Made(one.name, self.pair(lambda rows: torch.empty(rows, *one.shape, dtype=kind, device="meta")))
        self.values[name] = made
        self._rows_of = self._rows_of or one.name
        return made

    def name_of(self, text: str) -> str:
        """A name of the graph for a value, like one that it had elsewhere."""
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in text[-100:]).strip("_") or "value"
        plain = plain if not plain[0].isdigit() else f"_{plain}"
        name, number = plain, 2
        while name in self._names:
            name, number = f"{plain}_{number}", number + 1
        self._names.add(name)
        return name

    def read(self, output: str) -> Value:
        """Read all that an output needs.

        Raises:
            Refused: Something can't be read; the node is named.
        """
        wanted = self._needed(output)
        for tensor in self.graph.initializer:
            if tensor.name in wanted and tensor.name not in self.values:
                self.values[tensor.name] = self.same(tensor_of(tensor, f"weights {tensor.name[:120]}"))
        for node in self.graph.node:
            if wanted.isdisjoint(node.output):
                continue
            self.node = node
            try:
                self._read(node)
            except (
                GraphError,
                RuntimeError,
                IndexError,
                TypeError,
                ValueError,
                KeyError,
                OverflowError,
                NotImplementedError,
            ) as error:
                reason = str(error).partition("\n")[0][:300]
                raise Refused(
                    reason if isinstance(error, Refused) and reason.startswith("node ") else f"{named(node)}: {reason}"
                ) from None
        if output not in self.values:
            raise Refused(f"the graph has no output {output[:120]!r}")
        return self.values[output]

    def _needed(self, output: str) -> set[str]:
        """The values that lead to an output."""
        wanted = {output}
        for node in reversed(self.graph.node):
            if not wanted.isdisjoint(node.output):
                wanted.update(node.input)
        return wanted

    def _read(self, node: NodeProto) -> None:
        inputs = [self._input(name) if name else None for name in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        attributes: Attributes = {one.name: attribute_of(one, named(node)) for one in node.attribute}
        rewrite = _REWRITTEN.get(node.op_type)
        if rewrite is not None:
            found = rewrite(self, inputs, attributes)
        elif node.op_type in OPERATORS and node.op_type not in _OURS:
            found = self.plain(node.op_type, inputs, attributes)
        elif node.op_type in _FOLDED:
            found = self._fold(node.op_type, inputs)
        else:
            raise Refused("this operator is not in the table of those that are served")
        results = found if isinstance(found, list) else [found]
        if any(name for name in node.output[len(results) :]):
            raise Refused("more than one of its outputs is used, or it is in training mode")
        self.values |= {name: value for name, value in zip(node.output, results, strict=False) if name}

    def _input(self, name: str) -> Value:
        if name not in self.values:
            raise Refused(f"it reads {name[:120]!r}, which is not there yet")
        return self.values[name]

    def plain(self, op: str, inputs: Sequence[Value | None], attributes: Attributes) -> Value:
        """A node whose operator is a row of the table. Operands become attributes."""
        row = OPERATORS[op]
        given = dict(attributes)
        tensors = list(inputs) if row.most == 64 else list(inputs[: row.most])
        for name, value in zip(row.operands, inputs[row.most :], strict=False):
            if value is not None:
                given[name] = self.operand(name, value, is_list=row.attributes[name][0] not in {int, float})
        if any(value is None for value in tensors):
            raise Refused("an input is left out")
        return self.emit(op, cast("list[Value]", tensors), given)

    def operand(self, name: str, value: Value, *, is_list: bool = True) -> Any:
        """The numbers of a constant."""
        tensor = value.constant if isinstance(value, Known) else None
        if tensor is None or tensor.numel() > MOST_WHOLE:
            raise Refused(f"{name} depend on the inputs or the number of rows")
        numbers = tuple(tensor.flatten().tolist())
        return numbers if is_list else numbers[0]

    def whole(self, name: str, value: Value) -> list[tuple[int, ...]]:
        """Whole numbers that may depend on the number of rows, for two and for three."""
        if not isinstance(value, Known) or value.at[0].numel() > MOST_WHOLE:
            raise Refused(f"{name} depends on the inputs")
        return [tuple(min(max(int(number), _LEAST), _MOST) for number in one.flatten().tolist()) for one in value.at]

    def emit(self, op: str, inputs: Sequence[Value], attributes: Attributes) -> Value:
        """The result of one operator of the table: computed where all inputs are known, else one more node."""
        row = OPERATORS[op]
        given = {name: _clamped(value) for name, value in attributes.items()}
        row.check(len(inputs), given)
        metas = self.pair(lambda rows: row.infer([_meta(one.at[rows == ROWS[1]]) for one in inputs], given))
        if max(one.numel() for one in metas) > MOST_NUMBERS:
            raise Refused(f"it makes {metas[0].numel()} numbers")
        if all(isinstance(one, Known) for one in inputs):
            if all(cast("Known", one).constant is not None for one in inputs):
                return self.same(row.compute(*(one.at[0] for one in inputs), **given))
            return Known(self.pair(lambda rows: row.compute(*(one.at[rows == ROWS[1]] for one in inputs), **given)))
        names = tuple(one.name if isinstance(one, Made) else self._intern(one) for one in inputs)
        return self._add(op, names, given, metas)

    def _add(self, op: str, inputs: tuple[str, ...], attributes: Attributes, metas: Pair) -> Made:
        """One more node, whose batch axis is sound."""
        _check_rows([tuple(one.shape) for one in metas])
        name = self.name_of(self.node.output[0] if self.node.output else op)
        called = "".join(c if c.isprintable() else " " for c in self.node.name)[:200]
        self.net.nodes.append(GraphNode(op=op, name=called, inputs=inputs, attributes=attributes, output=name))
        return Made(name, metas)

    def _intern(self, value: Known) -> str:
        """The name of a known value that a node reads."""
        tensor = value.constant
        if tensor is None:
            return self._rows(value)
        if id(tensor) in self._interned:
            return self._interned[id(tensor)][1]
        name = self.name_of(next((one for one in self.node.input if self.values.get(one) is value), "constant"))
        if tensor.dtype == torch.float32 and tensor.numel() > INLINE:
            self.net.weights[name] = tensor.contiguous()
        elif tensor.dtype in {torch.float32, torch.int64} and 0 < tensor.numel() <= MOST_WHOLE:
            is_whole = tensor.dtype == torch.int64
            numbers = tuple(one if is_whole else shortest(one) for one in tensor.flatten().tolist())
            shown: Attributes = {"values": numbers, "shape": tuple(tensor.shape), **({"to": "int"} if is_whole else {})}
            self.net.nodes.append(GraphNode(op="Constant", attributes=shown, output=name))
        else:
            raise Refused(f"a constant of {tensor.numel()} numbers of {tensor.dtype}")
        self._interned[id(tensor)] = tensor, name  # the tensor is kept, so that its id stays its own
        return name

    def _rows(self, value: Known) -> str:
        """A constant that is repeated for each row."""
        one, other = value.at
        if not one.dim() or (len(one), len(other)) != ROWS or not torch.equal(one[:1].expand_as(other), other):
            raise Refused("a constant depends on the number of rows")
        first = self._intern(self.same(one[:1].clone()))
        return self._add(
            "ExpandRows", (first, self._rows_of), {}, self.pair(lambda rows: _meta(value.at[rows == ROWS[1]]))
        ).name

    def _fold(self, op: str, inputs: Sequence[Value | None]) -> Value:
        if not all(isinstance(one, Known) for one in inputs):
            raise Refused("this operator is read in computations of shapes only")
        known = cast("Sequence[Known]", inputs)
        found = Known(self.pair(lambda rows: _FOLDED[op](*(one.at[rows == ROWS[1]] for one in known))))
        return found if found.constant is None else self.same(found.at[0])

    def same(self, tensor: Tensor) -> Known:
        """A constant."""
        return Known((tensor, tensor))

    def pair(self, make: Callable[[int], Tensor]) -> Pair:
        """What is made for two and for three rows."""
        return make(ROWS[0]), make(ROWS[1])

    def reshaped(self, x: Value, targets: Sequence[Sequence[int]]) -> Value:
        """A value in a shape that is given for two and for three rows, without −1 or 0."""
        if isinstance(x, Known):
            found = Known(self.pair(lambda rows: x.at[rows == ROWS[1]].reshape(tuple(targets[rows == ROWS[1]]))))
            return found if x.constant is None or found.constant is None else self.same(found.at[0])
        for one, target in zip(x.at, targets, strict=True):
            if one.numel() != math.prod(target):
                raise Refused(f"the batch axis is frozen: {tuple(one.shape)} can't become {tuple(target)}")
        if [tuple(target) for target in targets] == x.shapes:
            return x
        axis = _check_rows([tuple(target) for target in targets])
        shape = tuple(-1 if place == axis else size for place, size in enumerate(targets[0]))
        return self.emit("Reshape", [x], {"shape": shape})


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _check_rows(shapes: Sequence[tuple[int, ...]]) -> int:
    """The axis that has the rows.

    Raises:
        Refused: No axis grows with the rows, or more than one.
    """
    two, three = shapes
    differ = [axis for axis in range(min(len(two), len(three))) if two[axis] != three[axis]]
    if len(two) != len(three) or len(differ) != 1 or two[differ[0]] * ROWS[1] != three[differ[0]] * ROWS[0]:
        raise Refused(f"the batch axis is frozen or mixed: of two rows it makes {two}, of three {three}")
    return differ[0]


def _clamped(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_clamped(one) for one in value)
    return min(max(value, _LEAST), _MOST) if type(value) is int else value


# What nodes are rewritten as: (reader, inputs, attributes) → the results.
Inputs = Sequence[Value | None]


def _given(inputs: Inputs, place: int) -> Value:
    value = inputs[place] if place < len(inputs) else None
    if value is None:
        raise Refused(f"its input {place} is missing")
    return value


def _first(inputs: Inputs) -> Value:
    return _given(inputs, 0)


def _list(reader: Reader, inputs: Inputs, place: int, attributes: Attributes, name: str) -> tuple[int, ...] | None:
    """Whole numbers that are an attribute in older opsets, and an input in newer ones."""
    if name in attributes:
        return tuple(attributes[name])
    value = inputs[place] if len(inputs) > place else None
    if value is None:
        return None
    two, three = reader.whole(name, value)
    if two != three:
        raise Refused(f"{name} depend on the number of rows")
    return two


def _constant(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del inputs
    (name, value), *more = attributes.items() or [("", None)]
    if more or name not in {"value", "value_float", "value_floats", "value_int", "value_ints"}:
        raise Refused(f"{name or 'its value'} can't be read")
    kind = torch.int64 if "int" in name else torch.float32
    return reader.same(value if isinstance(value, Tensor) else torch.tensor(value, dtype=kind))


def _shape(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x = _first(inputs)
    start, end = attributes.get("start", 0), attributes.get("end")
    found = Known(reader.pair(lambda rows: torch.tensor(x.at[rows == ROWS[1]].shape[start:end], dtype=torch.int64)))
    return found if found.constant is None else reader.same(found.at[0])


def _size(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    x = _first(inputs)
    return Known(reader.pair(lambda rows: torch.tensor(x.at[rows == ROWS[1]].numel())))


def _constant_of_shape(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    shapes = reader.whole("the shape", _first(inputs))
    value = attributes.get("value", torch.zeros(1))
    if max(math.prod(shape) for shape in shapes) > MOST_NUMBERS or min([0, *shapes[0]]) < 0:
        raise Refused(f"a constant of shape {shapes[0]}")
    if shapes[0] == shapes[1]:
        return reader.same(value.reshape(()).expand(shapes[0]).clone())
    return Known(reader.pair(lambda rows: value.reshape(()).expand(shapes[rows == ROWS[1]])))


def _range(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    start, limit, delta = (reader.operand("the range", _given(inputs, place), is_list=False) for place in range(3))
    if not delta or abs((limit - start) / delta) > MOST_WHOLE:
        raise Refused("a range that is too long")
    return reader.same(torch.arange(start, limit, delta))


def _itself(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    if len(inputs) > 2 and inputs[2] is not None and reader.operand("training_mode", inputs[2], is_list=False):
        raise Refused("in training mode")
    return _first(inputs)


def _cast(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, to = _first(inputs), attributes.get("to")
    if to == TensorProto.BOOL and isinstance(x, Known):
        return Known(reader.pair(lambda rows: x.at[rows == ROWS[1]].bool()))
    if to not in FLOATS | INTEGERS:
        raise Refused(f"towards the type {to}")
    kind = torch.float32 if to in FLOATS else torch.int64
    if x.at[0].dtype == kind:
        return x
    return reader.emit("Cast", [x], {"to": "float" if to in FLOATS else "int"})


def _reshape(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, targets = _first(inputs), []
    wanted = reader.whole("its shape", _given(inputs, 1))
    for shape, target in zip([tuple(one.shape) for one in x.at], wanted, strict=True):
        sizes = [
            shape[axis] if size == 0 and not attributes.get("allowzero") else size for axis, size in enumerate(target)
        ]
        if -1 in sizes:
            rest = -math.prod(sizes)
            numbers = math.prod(shape)
            if sizes.count(-1) > 1 or rest < 1 or numbers % rest:
                raise Refused(f"the batch axis is frozen: {shape} can't become {tuple(target)}")
            sizes[sizes.index(-1)] = numbers // rest
        targets.append(sizes)
    return reader.reshaped(x, targets)


def _flatten(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, axis = _first(inputs), attributes.get("axis", 1)
    return reader.reshaped(x, [[math.prod(one.shape[:axis]), math.prod(one.shape[axis:])] for one in x.at])


def _squeeze(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, axes = _first(inputs), _list(reader, inputs, 1, attributes, "axes")
    if axes is None and isinstance(x, Made):
        raise Refused(_SQUEEZED)
    dropped = None if axes is None else {axis % x.at[0].dim() for axis in axes}
    if dropped and any(one.shape[axis] != 1 for axis in dropped for one in x.at):
        raise Refused(f"the batch axis is frozen: {tuple(x.at[0].shape)} has no axes {axes} of length 1")
    return reader.reshaped(
        x,
        [
            [size for axis, size in enumerate(one.shape) if (size != 1 if dropped is None else axis not in dropped)]
            for one in x.at
        ],
    )


def _unsqueeze(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, axes = _first(inputs), _list(reader, inputs, 1, attributes, "axes") or ()
    targets = []
    for one in x.at:
        rank = one.dim() + len(axes)
        added, sizes = {axis % rank for axis in axes}, iter(one.shape)
        targets.append([1 if axis in added else next(sizes) for axis in range(rank)])
    return reader.reshaped(x, targets)


def _expand(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    x, shapes = _first(inputs), reader.whole("its shape", _given(inputs, 1))
    found = [np.broadcast_shapes(tuple(one.shape), shape) for one, shape in zip(x.at, shapes, strict=True)]
    if max(math.prod(shape) for shape in found) > MOST_NUMBERS:
        raise Refused(f"it makes a value of shape {tuple(found[0])}")
    if isinstance(x, Known):
        wide = Known(reader.pair(lambda rows: x.at[rows == ROWS[1]].expand(found[rows == ROWS[1]])))
        return wide if wide.constant is None else reader.same(wide.at[0].contiguous())
    if [tuple(shape) for shape in found] == x.shapes:
        return x
    axis = _check_rows([tuple(shape) for shape in found])
    shape = tuple(1 if place == axis else size for place, size in enumerate(found[0]))
    return reader.emit("Expand", [x], {"shape": shape})


def _tile(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    x, repeats = _first(inputs), reader.whole("repeats", _given(inputs, 1))
    if repeats[0] == repeats[1]:
        return reader.emit("Tile", [x], {"repeats": repeats[0]})
    if isinstance(x, Made) or max(map(math.prod, repeats)) * x.at[0].numel() > MOST_NUMBERS:
        raise Refused("repeats depend on the number of rows")
    return Known(reader.pair(lambda rows: x.at[rows == ROWS[1]].repeat(repeats[rows == ROWS[1]])))


def _split(reader: Reader, inputs: Inputs, attributes: Attributes) -> list[Value]:
    x = _first(inputs)
    axis = attributes.get("axis", 0) % x.at[0].dim()
    size, parts = x.at[0].shape[axis], _list(reader, inputs, 1, attributes, "split")
    if parts is None:
        count = attributes.get("num_outputs", len(reader.node.output))
        most = -(-size // max(count, 1))
        parts = tuple(max(0, min(most, size - start * most)) for start in range(count))
    if len(parts) > 64:
        raise Refused(f"{len(parts)} parts")
    found, start = [], 0
    for part in parts:
        cut = {"starts": (start,), "ends": (start + part,), "axes": (axis,), "steps": (1,)}
        found.append(reader.emit("Slice", [x], cut))
        start += part
    return found


def _slice(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    x = _first(inputs)
    starts, ends = (reader.whole(name, _given(inputs, place)) for place, name in ((1, "starts"), (2, "ends")))
    if starts[0] != starts[1] or ends[0] != ends[1]:
        raise Refused("what it cuts out depends on the number of rows")
    axes = _list(reader, inputs, 3, {}, "axes") or tuple(range(len(starts[0])))
    steps = _list(reader, inputs, 4, {}, "steps") or (1,) * len(axes)
    return reader.emit("Slice", [x], {"starts": starts[0], "ends": ends[0], "axes": axes, "steps": steps})


def _reduce(op: str) -> Callable[[Reader, Inputs, Attributes], Value]:
    def rewrite(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
        x, axes = _first(inputs), _list(reader, inputs, 1, attributes, "axes")
        if not axes:
            if attributes.get("noop_with_empty_axes"):
                return x
            axes = tuple(range(x.at[0].dim()))
        return reader.emit(op, [x], {"axes": axes, "keepdims": attributes.get("keepdims", 1)})

    return rewrite


def _sum_of_squares(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x = _first(inputs)
    return _reduce("ReduceSum")(reader, [reader.emit("Mul", [x, x], {}), *inputs[1:]], attributes)


def _norm(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    return reader.emit("Sqrt", [_sum_of_squares(reader, inputs, attributes)], {})


def _global(op: str) -> Callable[[Reader, Inputs, Attributes], Value]:
    def rewrite(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
        del attributes
        x = _first(inputs)
        return reader.emit(op, [x], {"axes": tuple(range(2, x.at[0].dim()))})

    return rewrite


def _chain(op: str) -> Callable[[Reader, Inputs, Attributes], Value]:
    def rewrite(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
        del attributes
        found = _first(inputs)
        for place in range(1, len(inputs)):
            found = reader.emit(op, [found, _given(inputs, place)], {})
        return found

    return rewrite


def _mish(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    del attributes
    x = _first(inputs)
    return reader.emit("Mul", [x, reader.emit("Tanh", [reader.emit("Softplus", [x], {})], {})], {})


def _softmax(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x = _first(inputs)
    axis = attributes.get("axis", -1 if reader.opset >= 13 else 1) % x.at[0].dim()
    if reader.opset < 13 and axis != x.at[0].dim() - 1:
        raise Refused("over several axes at once, as before opset 13")
    return reader.emit("Softmax", [x], {"axis": axis})


def _batch_normalization(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    if attributes.get("training_mode"):
        raise Refused("in training mode, where a row depends on the others; call eval() before exporting")
    return reader.plain("BatchNormalization", inputs, {"epsilon": attributes.get("epsilon", 1e-5)})


def _layer_normalization(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    given = {name: value for name, value in attributes.items() if name in {"axis", "epsilon"}}
    return reader.plain("LayerNormalization", inputs, given)


def _group_normalization(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, scale, bias = (_given(inputs, place) for place in range(3))
    groups, rank = attributes["num_groups"], x.at[0].dim()
    channels = x.at[0].shape[1]
    if reader.opset < 21 or groups < 1 or channels % groups:
        raise Refused("groups that don't fit, or of before opset 21")
    flat = reader.reshaped(x, [[one.shape[0], groups, one.numel() // one.shape[0] // groups] for one in x.at])
    ones, zeros = reader.same(torch.ones(groups)), reader.same(torch.zeros(groups))
    even = reader.emit("InstanceNormalization", [flat, ones, zeros], {"epsilon": attributes.get("epsilon", 1e-5)})
    even = reader.reshaped(even, [list(one.shape) for one in x.at])
    wide = [[channels, *[1] * (rank - 2)]] * 2
    return reader.emit(
        "Add", [reader.emit("Mul", [even, reader.reshaped(scale, wide)], {}), reader.reshaped(bias, wide)], {}
    )


def _convolution(op: str) -> Callable[[Reader, Inputs, Attributes], Value]:
    def rewrite(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
        x, w = _first(inputs), _given(inputs, 1)
        given = {
            name: value
            for name, value in attributes.items()
            if name not in {"kernel_shape", "auto_pad", "output_shape"}
        }
        kernel = tuple(w.at[0].shape[2:])
        given |= _pads(op, x, kernel, attributes)
        return reader.plain(op, inputs, given)

    return rewrite


def _pool(op: str) -> Callable[[Reader, Inputs, Attributes], Value]:
    def rewrite(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
        x, given = _first(inputs), dict(attributes)
        if any(step != 1 for step in given.pop("dilations", ())) or given.pop("storage_order", 0):
            raise Refused("with dilations or another storage order")
        given.pop("auto_pad", None)
        return reader.plain(op, inputs, given | _pads(op, x, attributes["kernel_shape"], attributes))

    return rewrite


def _pads(op: str, x: Value, kernel: tuple[int, ...], attributes: Attributes) -> Attributes:
    """The pads that `auto_pad` and `output_shape` come to."""
    kind, wanted = attributes.get("auto_pad", "NOTSET"), attributes.get("output_shape")
    if kind == "VALID":
        return {"pads": (0,) * (2 * len(kernel))}
    if kind == "NOTSET" and not wanted:
        return {}
    sizes, axes = x.at[0].shape[2:], range(len(kernel))
    strides = attributes.get("strides", (1,) * len(kernel))
    steps, more = attributes.get("dilations", (1,) * len(kernel)), attributes.get("output_padding", (0,) * len(kernel))
    spans = [(kernel[axis] - 1) * steps[axis] + 1 for axis in axes]
    if op == "ConvTranspose":
        goals = wanted or [sizes[axis] * strides[axis] for axis in axes]
        total = [strides[axis] * (sizes[axis] - 1) + more[axis] + spans[axis] - goals[axis] for axis in axes]
    else:
        total = [
            max((-(-sizes[axis] // strides[axis]) - 1) * strides[axis] + spans[axis] - sizes[axis], 0) for axis in axes
        ]
    if min(total) < 0:
        raise Refused(f"an output_shape of {wanted} is more than there is")
    half = [side // 2 for side in total]
    rest = [side - less for side, less in zip(total, half, strict=True)]
    # An odd one is at the end with SAME_UPPER; of transposed convolutions, whose pads are cut off, too.
    return {"pads": (*rest, *half) if kind == "SAME_LOWER" or (wanted and kind == "NOTSET") else (*half, *rest)}


def _pad(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, pads = _first(inputs), _list(reader, inputs, 1, {}, "pads") or ()
    axes = _list(reader, inputs, 3, {}, "axes")
    rank = x.at[0].dim()
    chosen = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    if len(pads) != 2 * len(chosen):
        raise Refused(f"{len(pads)} pads")
    whole = [0] * (2 * rank)
    for place, axis in enumerate(chosen):
        whole[axis], whole[rank + axis] = pads[place], pads[len(chosen) + place]
    given: Attributes = {"pads": tuple(whole), "mode": attributes.get("mode", "constant")}
    if len(inputs) > 2 and inputs[2] is not None:
        given["value"] = float(reader.operand("value", inputs[2], is_list=False))
    return reader.emit("Pad", [x], given)


def _resize(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x, rank = _first(inputs), _first(inputs).at[0].dim()
    odd = {"antialias", "exclude_outside", "keep_aspect_ratio_policy", "extrapolation_value"} & attributes.keys()
    if any(attributes[name] not in {0, "stretch"} for name in odd):
        raise Refused(f"with {min(odd)}")
    axes = tuple(axis % rank for axis in attributes.get("axes", range(rank)))
    by_scale, by_size = (inputs[place] if len(inputs) > place else None for place in (2, 3))
    scales: tuple[float, ...] = ()
    if by_scale is not None and by_scale.at[0].numel():
        scales = reader.operand("scales", by_scale)
        sizes = [
            tuple(math.floor(one.shape[axis] * scale) for axis, scale in zip(axes, scales, strict=True)) for one in x.at
        ]
    elif by_size is not None:
        sizes = reader.whole("sizes", by_size)
    else:
        raise Refused("neither sizes nor scales")
    kept = [
        place
        for place, axis in enumerate(axes)
        if any(one.shape[axis] != size[place] for one, size in zip(x.at, sizes, strict=True))
        or (scales and scales[place] != 1)
    ]
    if any(sizes[0][place] != sizes[1][place] for place in kept):
        raise Refused("it resizes the batch axis")
    given = {
        name: value
        for name, value in attributes.items()
        if name in {"mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a"}
    }
    given |= {"axes": tuple(axes[place] for place in kept), "sizes": tuple(sizes[0][place] for place in kept)}
    if scales:
        given["scales"] = tuple(scales[place] for place in kept)
    return reader.emit("Resize", [x], given) if kept else x


def _one_hot(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    indices, depth, values = (_given(inputs, place) for place in range(3))
    given = {"depth": int(reader.operand("depth", depth, is_list=False)), "axis": attributes.get("axis", -1)}
    given["values"] = tuple(float(one) for one in reader.operand("values", values))
    return reader.emit("OneHot", [indices], given)


def _transpose(reader: Reader, inputs: Inputs, attributes: Attributes) -> Value:
    x = _first(inputs)
    return reader.emit("Transpose", [x], {"perm": attributes.get("perm", tuple(reversed(range(x.at[0].dim()))))})


_OURS = frozenset({"ExpandRows"})  # no operator of ONNX
_REWRITTEN: Mapping[str, Callable[[Reader, Inputs, Attributes], Value | list[Value]]] = {
    "Constant": _constant, "Shape": _shape, "Size": _size, "ConstantOfShape": _constant_of_shape, "Range": _range,
    "Identity": _itself, "Dropout": _itself, "Cast": _cast, "Reshape": _reshape, "Flatten": _flatten,
    "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand, "Tile": _tile, "Split": _split, "Slice": _slice,
    "ReduceMean": _reduce("ReduceMean"), "ReduceSum": _reduce("ReduceSum"), "ReduceMax": _reduce("ReduceMax"),
    "ReduceMin": _reduce("ReduceMin"), "ReduceSumSquare": _sum_of_squares, "ReduceL2": _norm,
    "GlobalAveragePool": _global("ReduceMean"), "GlobalMaxPool": _global("ReduceMax"), "Sum": _chain("Add"),
    "Min": _chain("Min"), "Max": _chain("Max"), "Mish": _mish, "Softmax": _softmax,
    "BatchNormalization": _batch_normalization, "LayerNormalization": _layer_normalization,
    "GroupNormalization": _group_normalization, "Conv": _convolution("Conv"),
    "ConvTranspose": _convolution("ConvTranspose"), "AveragePool": _pool("AveragePool"), "MaxPool": _pool("MaxPool"),
    "Pad": _pad, "Resize": _resize, "OneHot": _one_hot, "Transpose": _transpose,
}  # fmt: skip
_FOLDED: Mapping[str, Callable[..., Tensor]] = {
    "Floor": torch.floor, "Ceil": torch.ceil, "Not": torch.logical_not, "And": torch.logical_and,
    "Or": torch.logical_or, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge, "Mod": torch.remainder,
    "Sign": torch.sign,
}  # fmt: skip
