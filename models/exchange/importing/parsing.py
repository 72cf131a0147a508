"""An ONNX file as a message, once nothing in it can surprise: one graph of plain nodes, with its numbers in the file.

No file but the one that is named is ever opened: what is parsed are bytes, numbers elsewhere are refused, and ONNX's
own checker, which would follow them, is not called.
"""

import math
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, defs, numpy_helper
from torch import Tensor

OLDEST_OPSET = 11
MOST_BYTES = 2**31 - 1  # protobuf reads no more
MOST_NODES = 20_000  # as they stand in the file; folding leaves few of them
MOST_AXES = 6
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
PLAIN = frozenset({
    AttributeProto.INT, AttributeProto.INTS, AttributeProto.FLOAT, AttributeProto.FLOATS, AttributeProto.STRING,
    AttributeProto.TENSOR,
})  # fmt: skip
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
INTEGERS = frozenset({TensorProto.INT64, TensorProto.INT32})
_ELSEWHERE = (
    (b"PK\x03\x04", "an archive, as PyTorch (.pt, .pth, .pt2, TorchScript) and Keras (.keras) write them"),
    (b"\x80", "a pickle"),
    (b"\x89HDF", "an HDF5 file, as Keras writes them"),
)
WAY_OUT = "export the net to ONNX where its code is: docs/import.md says how"


class Refused(ValueError):  # noqa: N818 - what the word for it is
    """The file is not imported; the message says in one line what was refused, and where."""


def parse(content: bytes) -> ModelProto:
    """The file's message.

    Raises:
        Refused: See the module.
    """
    for magic, kind in _ELSEWHERE:
        if content.startswith(magic):
            raise Refused(f"this is {kind}, not ONNX; {WAY_OUT}")
    if content[8:9] == b"{":
        raise Refused(f"this is a safetensors file, weights without a net; {WAY_OUT}")
    if len(content) > MOST_BYTES:
        raise Refused("the file is larger than 2 GiB")
    try:
        model = onnx.load_model_from_string(content)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise Refused(f"not an ONNX file ({_line(error)}); {WAY_OUT}") from None
    _check(model)
    return model


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that the file is written in.

    Raises:
        Refused: None, or one that is not known here.
    """
    found = [one.version for one in model.opset_import if one.domain in {"", "ai.onnx"}]
    newest = defs.onnx_opset_version()
    if len(found) != 1 or not OLDEST_OPSET <= found[0] <= newest:
        raise Refused(f"opset {found[0] if found else 'unknown'}; opsets {OLDEST_OPSET} to {newest} are read")
    return int(found[0])


def named(node: NodeProto) -> str:
    """A node, as messages call it."""
    name = node.name or (node.output[0] if node.output else "")
    return f"node {_shown(name)} ({_shown(node.op_type)})"


def tensor_of(proto: TensorProto, where: str) -> Tensor:
    """A tensor's numbers, as float32, int64 or bool.

    Raises:
        Refused: They are elsewhere, of another type, or not as many as the shape says.
    """
    if proto.data_location != TensorProto.DEFAULT or proto.external_data:
        raise Refused(f"{where}: its numbers are in another file (external data); save all in one")
    if proto.data_type not in FLOATS | INTEGERS | {TensorProto.BOOL}:
        raise Refused(f"{where}: numbers of type {_type_name(proto.data_type)}")
    if len(proto.dims) > MOST_AXES or any(size < 0 for size in proto.dims):
        raise Refused(f"{where}: shape {list(proto.dims)[:8]}")
    count = math.prod(proto.dims)
    stored = max(
        len(proto.raw_data),
        *(len(getattr(proto, kind)) for kind in ("float_data", "int32_data", "int64_data", "double_data")),
    )
    if count > stored:  # before an array of that size is made
        raise Refused(f"{where}: {count} numbers by its shape, and fewer in the file")
    try:
        array = numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise Refused(f"{where}: {_line(error)}") from None
    kind = "float32" if proto.data_type in FLOATS else "int64" if proto.data_type in INTEGERS else "bool"
    tensor = torch.from_numpy(array.astype(kind, copy=True)).reshape(tuple(proto.dims))
    if kind == "float32" and not torch.isfinite(tensor).all():
        raise Refused(f"{where} holds NaN or Inf")
    return tensor


def attribute_of(
    attribute: AttributeProto, where: str
) -> int | float | str | tuple[int, ...] | tuple[float, ...] | Tensor:
    """An attribute's value."""
    match attribute.type:
        case AttributeProto.INT:
            return int(attribute.i)
        case AttributeProto.FLOAT:
            return shortest(attribute.f)
        case AttributeProto.STRING:
            return attribute.s.decode("utf-8", "replace")
        case AttributeProto.INTS:
            return tuple(attribute.ints)
        case AttributeProto.FLOATS:
            return tuple(shortest(one) for one in attribute.floats)
    return tensor_of(attribute.t, where)


def shortest(number: float) -> float:
    """The number with the fewest decimals that is the same in float32."""
    return float(str(np.float32(number)))


def _check(model: ModelProto) -> None:
    graph = model.graph
    opset_of(model)
    if model.functions:
        raise Refused(f"local function {_shown(model.functions[0].name)}: only ONNX's own operators are read")
    if graph.sparse_initializer:
        raise Refused(f"sparse numbers: {_shown(graph.sparse_initializer[0].values.name)}")
    if len(graph.node) > MOST_NODES:
        raise Refused(f"{len(graph.node)} nodes; the limit is {MOST_NODES}")
    for place, node in enumerate(graph.node):
        # What is not UTF-8 comes as bytes.
        if not all(isinstance(text, str) for text in (node.name, node.op_type, node.domain, *node.input, *node.output)):
            raise Refused(f"node number {place}: a name that is not in UTF-8")
        for reason in _refusals(node):
            raise Refused(f"{named(node)}: {reason}")
    if not all(isinstance(one.name, str) for one in (*graph.input, *graph.output, *graph.initializer)):
        raise Refused("a name that is not in UTF-8")
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.DEFAULT or tensor.external_data:
            raise Refused(f"weights {_shown(tensor.name)}: in another file (external data); save all in one")


def _refusals(node: NodeProto) -> Iterator[str]:
    if node.domain not in {"", "ai.onnx"}:
        yield f"of the domain {_shown(node.domain)}; only ONNX's own operators are read"
    if node.op_type in CONTROL_FLOW:
        yield "control flow; export the net so that its steps are known"
    if node.op_type in RANDOM:
        yield "draws random numbers; make them an input of the net (--input NAME=noise), so that a seed decides them"
    for attribute in node.attribute:
        if attribute.type not in PLAIN:
            yield f"an attribute {_shown(attribute.name)} that holds a graph, a sparse tensor or a list of them"


def _type_name(number: int) -> str:
    return str(TensorProto.DataType.Name(number)).lower() if number in TensorProto.DataType.values() else str(number)


def _shown(text: str | bytes) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return "".join(character if character.isprintable() else " " for character in text[:120]) or "without a name"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
