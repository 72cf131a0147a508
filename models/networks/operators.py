"""The closed table of operators that a graph's nodes may name: each is a few lines of torch with ONNX's semantics.

An operator takes tensors by position and attributes by name. What they are called and mean is as in the newest opset of
ONNX, with these differences, all of them the importer's work, so that a graph can be read and run without knowing more:
an operand that ONNX wants constant (a shape, axes, pads) is an attribute here; integers say exactly what happens, so
there is no `auto_pad`, no `output_shape` and no axis that is left out; the first axis of a value is its rows, and −1 in
the shape of `Reshape` stands for them; tensors are float32, int64 or bool, and each node has one output.

`OPERATORS` is read off the functions: their positional parameters are inputs (those with a default may be left out),
their keyword parameters are attributes, whose annotations are their types. `operands` are the attributes that ONNX has
as inputs, in its order after the tensors: what `models.inference.onnx_nets` writes them back as.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Ints = tuple[int, ...]
Floats = tuple[float, ...]
FRACTIONS = (float, Floats)  # kinds of attributes that are float32; the other numbers are int64
Attribute = int | float | str | Ints | Floats
Shape = tuple[int, ...]
Measure = Callable[..., Shape]
Kind = Literal["float", "int"]
Approximation = Literal["none", "tanh"]
PadMode = Literal["constant", "reflect", "edge"]
BlockMode = Literal["DCR", "CRD"]
ResizeMode = Literal["nearest", "linear", "cubic"]
Coordinates = Literal["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
Rounding = Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]

OPERATORS: dict[str, "Operator"] = {}
_MOST = 2**31  # an integer attribute's magnitude
_KINDS = {"float": torch.float32, "int": torch.int64}
_ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda x: (x - 0.5).ceil(),
    "round_prefer_ceil": lambda x: (x + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d}
_AVERAGES: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d}
_MAXIMA: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d}


class GraphError(ValueError):
    """A graph can't be what it says; the message names the node."""


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: ONNX's, but for `ExpandRows`.
        compute: Tensors and attributes → the result.
        least, most: How many inputs it takes.
        attributes: Its attributes' types and defaults; `inspect.Parameter.empty` where there must be one.
        operands: Attributes that are inputs in ONNX.
        measure: Shapes of the inputs and attributes → the shape of the result. torch's meta device knows it for the
            others; for these it would import 800 modules.
    """

    name: str
    compute: Callable[..., Tensor]
    least: int
    most: int
    attributes: Mapping[str, tuple[Any, Any]]
    operands: tuple[str, ...]
    measure: Measure | None

    def check(self, inputs: int, attributes: Mapping[str, Any]) -> None:
        """Refuse what the operator does not take.

        Raises:
            GraphError: Too few or too many inputs; an attribute that is missing, unknown or of another type.
        """
        if not self.least <= inputs <= self.most:
            raise GraphError(f"{inputs} inputs")
        if unknown := sorted(attributes.keys() - self.attributes.keys()):
            raise GraphError(f"no attribute {unknown[0]}")
        for name, (kind, default) in self.attributes.items():
            if name not in attributes:
                if default is inspect.Parameter.empty:
                    raise GraphError(f"{name} is missing")
            elif not _is_kind(attributes[name], kind):
                raise GraphError(f"{name} can't be {str(attributes[name])[:40]}")

    def infer(self, inputs: Sequence[Tensor], attributes: Mapping[str, Any]) -> Tensor:
        """The result as a tensor without numbers, from such inputs."""
        if self.measure is None:
            return self.compute(*inputs, **attributes).to("meta")
        if any(x.dtype != torch.float32 for x in inputs):
            raise GraphError("needs numbers of float32")
        return torch.empty(self.measure(*(tuple(x.shape) for x in inputs), **attributes), device="meta")


def _is_kind(value: object, kind: Any) -> bool:
    if options := [option for option in get_args(kind) if isinstance(option, str)]:  # a Literal
        return value in options
    if kind is int:
        return type(value) is int and abs(value) <= _MOST
    if kind is float:
        return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is tuple and all(_is_kind(one, get_args(kind)[0]) for one in value)


_Compute = TypeVar("_Compute", bound=Callable[..., Tensor])


def operator(
    name: str = "", operands: tuple[str, ...] = (), measure: Measure | None = None
) -> Callable[[_Compute], _Compute]:
    """Add a function to the table, under its name in capitals without underscores unless another is given."""

    def add(compute: _Compute) -> _Compute:
        parameters = inspect.signature(compute).parameters.values()
        inputs = [one for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        least = len([one for one in inputs if one.default is one.empty])
        most = 64 if any(one.kind is one.VAR_POSITIONAL for one in parameters) else len(inputs)
        attributes = {one.name: (one.annotation, one.default) for one in parameters if one.kind is one.KEYWORD_ONLY}
        called = name or "".join(part.capitalize() for part in compute.__name__.split("_"))
        OPERATORS[called] = Operator(
            called, compute, max(least, 1 if most == 64 else 0), most, attributes, operands, measure
        )
        return compute

    return add


def _elementwise(name: str, compute: Callable[[Tensor], Tensor]) -> None:
    OPERATORS[name] = Operator(name, compute, 1, 1, {}, (), None)


def _pairwise(name: str, compute: Callable[..., Tensor]) -> None:
    OPERATORS[name] = Operator(name, compute, 2, 2, {}, (), None)


for _name, _one in {
    "Abs": torch.abs, "Neg": torch.neg, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Erf": torch.erf, "Sin": torch.sin, "Cos": torch.cos, "Relu": torch.relu,
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Softplus": F.softplus, "Softsign": F.softsign,
    "HardSwish": F.hardswish,
}.items():  # fmt: skip
    _elementwise(_name, _one)
_TWO: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow, "Min": torch.minimum,
    "Max": torch.maximum, "MatMul": torch.matmul, "Equal": torch.eq, "Less": torch.lt, "Greater": torch.gt,
}  # fmt: skip
for _name, _two in _TWO.items():
    _pairwise(_name, _two)


@operator()
def div(x: Tensor, y: Tensor) -> Tensor:
    """x / y; of integers the quotient towards zero."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


@operator()
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, else y."""
    return torch.where(condition, x, y)


@operator()
def cast(x: Tensor, *, to: Kind) -> Tensor:
    """In another type; towards int64 the fraction is dropped."""
    return x.to(_KINDS[to])


@operator()
def constant(*, values: Floats, shape: Ints, to: Kind = "float") -> Tensor:
    """A few numbers that stand in the graph itself."""
    return torch.tensor(values, dtype=_KINDS[to], device="cpu").reshape(shape)


@operator()
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x, and alpha·x below zero."""
    return F.leaky_relu(x, alpha)


@operator()
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, and slope·x below zero."""
    return torch.where(x < 0, slope * x, x)


OPERATORS["PRelu"] = OPERATORS.pop("Prelu")


@operator()
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, and alpha·(eˣ − 1) below zero."""
    return F.elu(x, alpha)


@operator()
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """gamma times x, and gamma·alpha·(eˣ − 1) below zero."""
    return gamma * F.elu(x, alpha)


@operator()
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha·x + beta, within [0, 1]."""
    return (alpha * x + beta).clamp(0, 1)


@operator()
def gelu(x: Tensor, *, approximate: Approximation = "none") -> Tensor:
    """x·Φ(x), or its approximation by tanh."""
    return F.gelu(x, approximate=approximate)


@operator(operands=("min", "max"))
def clip(x: Tensor, *, min: float = -3.4028234663852886e38, max: float = 3.4028234663852886e38) -> Tensor:  # noqa: A002 - ONNX's names
    """x within [min, max]."""
    return x.clamp(min, max)


@operator()
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """eˣ, divided by its sum over an axis."""
    return F.softmax(x, axis)


@operator()
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - ONNX's names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """alpha·A·B + beta·C."""
    product = (a.T if transA else a) @ (b.T if transB else b)
    scaled = product if alpha == 1 else alpha * product
    return scaled if c is None else scaled + (c if beta == 1 else beta * c)


def _spread(name: str, given: Ints, axes: int, usual: int) -> Ints:
    """One number for each axis."""
    if given and len(given) != axes:
        raise GraphError(f"{name} are {len(given)} numbers, and there are {axes} axes")
    if any(number < 0 for number in given) or (usual and 0 in given):
        raise GraphError(f"{name} can't be {given}")
    return given or (usual,) * axes


def _axes_of(x: Shape, kernel: Ints, known: Mapping[int, object]) -> int:
    axes = len(x) - 2
    if axes not in known or len(kernel) != axes:
        raise GraphError(f"needs an input of {' or '.join(str(one + 2) for one in known)} axes, not {len(x)}")
    return axes


def _pad(x: Tensor, pads: Ints, value: float = 0.0) -> Tensor:
    """By ONNX's pads, (begins…, ends…) of the last axes."""
    half = len(pads) // 2
    sides = [side for axis in reversed(range(half)) for side in (pads[axis], pads[half + axis])]
    return F.pad(x, sides, value=value) if any(sides) else x


def _measure_conv(
    x: Shape, w: Shape, b: Shape | None = None, *, dilations: Ints = (), group: int = 1, pads: Ints = (),
    strides: Ints = (),
) -> Shape:  # fmt: skip
    axes = _axes_of(x, w[2:], _CONVOLUTIONS)
    dilations, strides = _spread("dilations", dilations, axes, 1), _spread("strides", strides, axes, 1)
    pads = _spread("pads", pads, 2 * axes, 0)
    if group < 1 or w[0] % group or x[1] != w[1] * group or b not in {None, (w[0],)}:
        raise GraphError(f"weights {w} do not fit {x}")
    spans = [(kernel - 1) * step + 1 for kernel, step in zip(w[2:], dilations, strict=True)]
    room = [x[2 + axis] + pads[axis] + pads[axes + axis] - spans[axis] for axis in range(axes)]
    if min(room) < 0:
        raise GraphError("the kernel is larger than its input")
    return x[0], w[0], *[left // stride + 1 for left, stride in zip(room, strides, strict=True)]


@operator(measure=_measure_conv)
def conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, dilations: Ints = (), group: int = 1, pads: Ints = (),
    strides: Ints = (),
) -> Tensor:  # fmt: skip
    """A convolution of one or two axes. w is (outputs, inputs / group, kernel…)."""
    axes = x.dim() - 2
    pads = _spread("pads", pads, 2 * axes, 0)
    even = pads[:axes] == pads[axes:]
    padding = pads[:axes] if even else (0,) * axes
    options = (_spread("strides", strides, axes, 1), padding, _spread("dilations", dilations, axes, 1), group)
    return _CONVOLUTIONS[axes](x if even else _pad(x, pads), w, b, *options)


def _measure_conv_transpose(
    x: Shape, w: Shape, b: Shape | None = None, *, dilations: Ints = (), group: int = 1,
    output_padding: Ints = (), pads: Ints = (), strides: Ints = (),
) -> Shape:  # fmt: skip
    axes = _axes_of(x, w[2:], _TRANSPOSED)
    dilations, strides = _spread("dilations", dilations, axes, 1), _spread("strides", strides, axes, 1)
    pads, more = _spread("pads", pads, 2 * axes, 0), _spread("output_padding", output_padding, axes, 0)
    if group < 1 or w[0] % group or x[1] != w[0] or b not in {None, (w[1] * group,)}:
        raise GraphError(f"weights {w} do not fit {x}")
    if any(extra >= max(stride, step) for extra, stride, step in zip(more, strides, dilations, strict=True)):
        raise GraphError(f"output_padding {more} is not less than the stride")
    sizes = [
        (x[2 + axis] - 1) * strides[axis]
        + (w[2 + axis] - 1) * dilations[axis]
        + 1
        + more[axis]
        - pads[axis]
        - pads[axes + axis]
        for axis in range(axes)
    ]
    if min(sizes) < 1:
        raise GraphError("pads leave nothing of the result")
    return x[0], w[1] * group, *sizes


@operator(measure=_measure_conv_transpose)
def conv_transpose(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, dilations: Ints = (), group: int = 1,
    output_padding: Ints = (), pads: Ints = (), strides: Ints = (),
) -> Tensor:  # fmt: skip
    """A transposed convolution of one or two axes. w is (inputs, outputs / group, kernel…); pads are cut off."""
    axes = x.dim() - 2
    pads = _spread("pads", pads, 2 * axes, 0)
    even = pads[:axes] == pads[axes:]
    padding = pads[:axes] if even else (0,) * axes
    strides, dilations = _spread("strides", strides, axes, 1), _spread("dilations", dilations, axes, 1)
    more = _spread("output_padding", output_padding, axes, 0)
    out = _TRANSPOSED[axes](x, w, b, strides, padding, more, group, dilations)
    return out if even else _pad(out, tuple(-side for side in pads))


def _measure_normalised(x: Shape, *parameters: Shape, epsilon: float = 1e-5) -> Shape:
    del epsilon
    if len(x) < 2 or any(shape != x[1:2] for shape in parameters):
        raise GraphError(f"has other numbers than one for each of the channels of {x}")
    return x


def _by_channel(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.reshape(-1, *[1] * (x.dim() - 2))


@operator(measure=_measure_normalised)
def batch_normalization(
    x: Tensor, scale: Tensor, b: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """By the means and variances of training, so that a row does not depend on others."""
    gain = scale * torch.rsqrt(var + epsilon)
    return x * _by_channel(gain, x) + _by_channel(b - mean * gain, x)


@operator(measure=_measure_normalised)
def instance_normalization(x: Tensor, scale: Tensor, b: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """By the means and variances of each channel of each row."""
    axes = tuple(range(2, x.dim()))
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) * torch.rsqrt(var + epsilon) * _by_channel(scale, x) + _by_channel(b, x)


@operator()
def layer_normalization(
    x: Tensor, scale: Tensor, b: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5
) -> Tensor:
    """By the mean and variance over the axes from this one on."""
    axes = tuple(range(axis % x.dim(), x.dim()))
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    out = (x - mean) * torch.rsqrt(var + epsilon) * scale
    return out if b is None else out + b


@operator()
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x, divided by its norm along an axis."""
    if p not in {1, 2}:
        raise GraphError(f"there is no norm of p {p}")
    return torch.div(x, torch.linalg.vector_norm(x, p, axis, keepdim=True))


def _measure_pool(
    x: Shape, *, kernel_shape: Ints, strides: Ints = (), pads: Ints = (), ceil_mode: int = 0, count_include_pad: int = 0
) -> Shape:
    del count_include_pad
    axes = _axes_of(x, kernel_shape, _AVERAGES)
    _spread("kernel_shape", kernel_shape, axes, 1)
    strides, pads = _spread("strides", strides, axes, 1), _spread("pads", pads, 2 * axes, 0)
    if pads[:axes] != pads[axes:] or any(
        2 * pad > kernel for pad, kernel in zip(pads[:axes], kernel_shape, strict=True)
    ):
        raise GraphError(f"pads {pads} are not the same on both sides, or more than half of the kernel")
    sizes = []
    for axis in range(axes):
        room, stride = x[2 + axis] + 2 * pads[axis] - kernel_shape[axis], strides[axis]
        size = (-(-room // stride) if ceil_mode else room // stride) + 1
        # The last window has to begin within the input or the pads before it.
        sizes.append(size - (ceil_mode and (size - 1) * stride >= x[2 + axis] + pads[axis]))
    if min(sizes) < 1:
        raise GraphError("the kernel is larger than its input")
    return *x[:2], *sizes


@operator(measure=_measure_pool)
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    strides: Ints = (),
    pads: Ints = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    """Means of windows."""
    axes = x.dim() - 2
    strides, pads = _spread("strides", strides, axes, 1), _spread("pads", pads, 2 * axes, 0)
    return _AVERAGES[axes](x, kernel_shape, strides, pads[:axes], bool(ceil_mode), bool(count_include_pad))


@operator(measure=_measure_pool)
def max_pool(x: Tensor, *, kernel_shape: Ints, strides: Ints = (), pads: Ints = (), ceil_mode: int = 0) -> Tensor:
    """The largest of windows."""
    axes = x.dim() - 2
    strides, pads = _spread("strides", strides, axes, 1), _spread("pads", pads, 2 * axes, 0)
    return _MAXIMA[axes](x, kernel_shape, strides, pads[:axes], ceil_mode=bool(ceil_mode))


@operator(operands=("axes",))
def reduce_mean(x: Tensor, *, axes: Ints, keepdims: int = 1) -> Tensor:
    """Means over axes."""
    return x.mean(axes, keepdim=bool(keepdims))


@operator(operands=("axes",))
def reduce_sum(x: Tensor, *, axes: Ints, keepdims: int = 1) -> Tensor:
    """Sums over axes."""
    return x.sum(axes, keepdim=bool(keepdims))


@operator(operands=("axes",))
def reduce_max(x: Tensor, *, axes: Ints, keepdims: int = 1) -> Tensor:
    """The largest over axes."""
    return x.amax(axes, keepdim=bool(keepdims))


@operator(operands=("axes",))
def reduce_min(x: Tensor, *, axes: Ints, keepdims: int = 1) -> Tensor:
    """The least over axes."""
    return x.amin(axes, keepdim=bool(keepdims))


@operator(operands=("shape",))
def reshape(x: Tensor, *, shape: Ints) -> Tensor:
    """The same numbers in another shape; −1 is what is left, and mostly the rows."""
    return x.reshape(shape)


@operator()
def transpose(x: Tensor, *, perm: Ints) -> Tensor:
    """Axes in another order."""
    return x.permute(perm)


@operator()
def concat(*xs: Tensor, axis: int) -> Tensor:
    """One after the other along an axis."""
    return torch.cat(xs, axis)


@operator(operands=("shape",))
def expand(x: Tensor, *, shape: Ints) -> Tensor:
    """Repeated along axes of length one; a 1 in the shape leaves an axis as it is."""
    return x.expand(torch.broadcast_shapes(x.shape, shape))  # type: ignore[no-untyped-call]


@operator()
def expand_rows(x: Tensor, like: Tensor) -> Tensor:
    """(1, …) once for each row of another value."""
    if x.shape[0] != 1:
        raise GraphError(f"{tuple(x.shape)} is not one row")
    return x.expand(like.shape[0], *x.shape[1:])


@operator(operands=("repeats",))
def tile(x: Tensor, *, repeats: Ints) -> Tensor:
    """Repeated so many times along each axis."""
    if len(repeats) != x.dim():
        raise GraphError(f"repeats are {len(repeats)} numbers, and there are {x.dim()} axes")
    return x.repeat(repeats)


@operator("Slice", operands=("starts", "ends", "axes", "steps"))
def slice_(x: Tensor, *, starts: Ints, ends: Ints, axes: Ints, steps: Ints) -> Tensor:
    """A range of an axis; a negative step goes backwards."""
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step == 0:
            raise GraphError("a step of 0")
        size = x.shape[axis]
        if step > 0:
            first, last, _ = slice(start, end, step).indices(size)
            x = x[(slice(None),) * (axis % x.dim()) + (slice(first, last, step),)]
        else:  # below −size the end is before the first number
            first = min(start + size if start < 0 else start, size - 1)
            last = max(end + size if end < 0 else end, -1)
            x = x.index_select(axis, torch.arange(first, last, step, device=x.device))
    return x


@operator(operands=("pads", "value"))
def pad(x: Tensor, *, pads: Ints, value: float = 0.0, mode: PadMode = "constant") -> Tensor:
    """More numbers at the ends of each axis, or fewer where pads are negative."""
    if len(pads) != 2 * x.dim():
        raise GraphError(f"pads are {len(pads)} numbers, and there are {x.dim()} axes")
    if mode == "constant":
        return _pad(x, pads, value)
    for axis, (before, after) in enumerate(zip(pads[: x.dim()], pads[x.dim() :], strict=True)):
        size = x.shape[axis]
        if before or after:
            if mode == "reflect" and max(before, after) >= size:
                raise GraphError(f"pads of {max(before, after)} mirror more than there is")
            place = torch.arange(-before, size + after, device=x.device)
            place = place.abs() if mode == "reflect" else place
            place = (size - 1 - (size - 1 - place).abs()) if mode == "reflect" else place.clamp(0, size - 1)
            x = x.index_select(axis, place)
    return x


@operator()
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """The numbers at these places of an axis; negative ones count from its end."""
    axis, size = axis % x.dim(), x.shape[axis]
    # A GPU that is asked for a place that does not exist computes nothing ever after.
    places = indices.clamp(-size, size - 1)
    places = torch.where(places < 0, places + size, places)
    return x.index_select(axis, places.flatten()).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator(operands=("depth", "values"))
def one_hot(indices: Tensor, *, depth: int, values: Floats = (0.0, 1.0), axis: int = -1) -> Tensor:
    """values[1] at the index, and values[0] elsewhere, along a new axis."""
    if not 1 <= depth <= 65536 or len(values) != 2:
        raise GraphError(f"depth {depth}, values {values}")
    place = torch.arange(depth, device=indices.device)
    hot = (indices.unsqueeze(-1) % depth == place).to(torch.float32) * (values[1] - values[0]) + values[0]
    return hot.movedim(-1, axis)


@operator()
def depth_to_space(x: Tensor, *, blocksize: int, mode: BlockMode = "DCR") -> Tensor:
    """Blocks of channels become squares of pixels."""
    n, c, h, w = x.shape
    b = blocksize
    if b < 1 or c % b**2:
        raise GraphError(f"{c} channels are not blocks of {b}×{b}")
    if mode == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


@operator()
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    """Squares of pixels become blocks of channels."""
    n, c, h, w = x.shape
    b = blocksize
    if b < 1 or h % b or w % b:
        raise GraphError(f"{w}×{h} pixels are not squares of {b}×{b}")
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


@operator(operands=("scales", "sizes"))
def resize(
    x: Tensor,
    *,
    axes: Ints,
    sizes: Ints,
    scales: Floats = (),
    mode: ResizeMode = "nearest",
    coordinate_transformation_mode: Coordinates = "half_pixel",
    nearest_mode: Rounding = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
) -> Tensor:
    """To `sizes` along axes, one after the other. `scales` say where a place comes from, where sizes alone do not."""
    if len(sizes) != len(axes) or len(scales) not in {0, len(axes)}:
        raise GraphError(f"{len(axes)} axes, {len(sizes)} sizes, {len(scales)} scales")
    for place, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        before = x.shape[axis]
        scale = scales[place] if scales else size / before
        if size < 1 or scale <= 0:
            raise GraphError(f"a size of {size}, a scale of {scale}")
        source = _sources(size, before, scale, coordinate_transformation_mode, x.device)
        if mode == "nearest":
            x = x.index_select(axis, _ROUND[nearest_mode](source).clamp(0, before - 1).long())
        else:
            x = _interpolated(x, axis, source, mode, cubic_coeff_a)
    return x


def _sources(size: int, before: int, scale: float, kind: str, device: torch.device) -> Tensor:
    """Where in an axis of length `before` each place of the new one comes from."""
    place = torch.arange(size, dtype=torch.float32, device=device)
    scales = torch.full_like(place, scale)  # by a plain number a GPU would not divide: it takes the reciprocal
    if kind == "asymmetric":
        return place / scales
    if kind == "align_corners":
        return place * (before - 1) / torch.full_like(place, max(size - 1, 1))
    if kind == "pytorch_half_pixel" and size == 1:
        return place * 0
    return (place + 0.5) / scales - 0.5


def _interpolated(x: Tensor, axis: int, source: Tensor, mode: str, a: float) -> Tensor:
    """By a line between two neighbours, or a cubic through four; outside, the last one stands for the others."""
    size = x.shape[axis]
    source = source.clamp(0, size - 1) if mode == "linear" else source
    base = source.floor()
    t = source - base
    taps = {0: 1 - t, 1: t} if mode == "linear" else _cubic(t, a)
    shape = [-1 if one == axis % x.dim() else 1 for one in range(x.dim())]
    parts = [
        x.index_select(axis, (base.long() + offset).clamp(0, size - 1)) * weight.reshape(shape)
        for offset, weight in taps.items()
    ]
    return torch.stack(parts).sum(0) if len(parts) > 2 else parts[0] + parts[1]


def _cubic(t: Tensor, a: float) -> dict[int, Tensor]:
    """Weights of the four neighbours (Keys 1981)."""

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}
