"""Each operator of the table computes what onnxruntime computes, on random shapes and attributes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import defs
from torch import Tensor

from models.inference.onnx_nets import generator_graph
from models.networks import GraphGenerator
from models.networks.operators import OPERATORS, GraphError
from models.spec import GraphBody, GraphInput, GraphNode, ImageSpec, LatentSpec

pytestmark = pytest.mark.usefixtures("one_thread")
Draw = Callable[[st.SearchStrategy[Any]], Any]
Case = tuple[list[tuple[int, ...]], dict[str, Any]]  # shapes of the inputs, the first with its rows; attributes


def sizes(draw: Draw, least: int, most: int, low: int = 1, high: int = 5) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(low, high), min_size=least, max_size=most)))


def plain(draw: Draw) -> Case:
    return [(2, *sizes(draw, 1, 3))], {}


def pair(draw: Draw) -> Case:
    shape = sizes(draw, 1, 3)
    other = tuple(draw(st.sampled_from([1, size])) for size in shape)
    return [(2, *shape), (draw(st.sampled_from([1, 2])), *other)], {}


def with_numbers(**bounds: tuple[float, float]) -> Callable[[Draw], Case]:
    def make(draw: Draw) -> Case:
        numbers = {name: round(draw(st.floats(*bound)), 2) for name, bound in bounds.items()}
        return plain(draw)[0], numbers

    return make


def over_axes(draw: Draw) -> Case:
    shape = sizes(draw, 2, 3)
    axes = draw(st.lists(st.integers(1, len(shape)), min_size=1, max_size=len(shape), unique=True))
    return [(2, *shape)], {"axes": tuple(axes), "keepdims": draw(st.sampled_from([0, 1]))}


def convolution(draw: Draw) -> Case:
    axes, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    ins, outs = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    kernel = sizes(draw, axes, axes, 1, 3)
    attributes = {
        "group": group,
        "strides": sizes(draw, axes, axes, 1, 3),
        "dilations": sizes(draw, axes, axes, 1, 2),
        "pads": sizes(draw, 2 * axes, 2 * axes, 0, 2),
    }
    shapes = [(2, ins, *sizes(draw, axes, axes, 5, 8)), (outs, ins // group, *kernel), (outs,)]
    return shapes[: draw(st.sampled_from([2, 3]))], attributes


def transposed(draw: Draw) -> Case:
    (x, w, *_), attributes = convolution(draw)
    axes, group = len(x) - 2, attributes["group"]
    attributes["pads"] = sizes(draw, 2 * axes, 2 * axes, 0, 1)
    attributes["output_padding"] = tuple(draw(st.integers(0, stride - 1)) for stride in attributes["strides"])
    shapes = [x, (x[1], w[0] // group, *w[2:]), (w[0],)]
    return shapes[: draw(st.sampled_from([2, 3]))], attributes


def by_channel(parameters: int) -> Callable[[Draw], Case]:
    def make(draw: Draw) -> Case:
        shape = sizes(draw, 2, 3, 2, 5)
        return [(2, *shape), *[shape[:1]] * parameters], {"epsilon": 0.01}

    return make


def layer(draw: Draw) -> Case:
    shape = sizes(draw, 2, 3, 2, 5)
    axis = draw(st.integers(1, len(shape)))
    return [(2, *shape), *[shape[axis - 1 :]] * draw(st.sampled_from([1, 2]))], {"axis": axis, "epsilon": 0.01}


def pool(draw: Draw) -> Case:
    axes = draw(st.sampled_from([1, 2]))
    kernel = sizes(draw, axes, axes, 1, 3)
    half = tuple(draw(st.integers(0, size // 2)) for size in kernel)
    return [(2, 2, *sizes(draw, axes, axes, 4, 8))], {
        "kernel_shape": kernel,
        "strides": sizes(draw, axes, axes, 1, 3),
        "pads": half * 2,
        "ceil_mode": draw(st.sampled_from([0, 1])),
    }


def averages(draw: Draw) -> Case:
    shapes, attributes = pool(draw)
    # With ceil_mode onnxruntime's own releases differ in what they divide the last window by.
    return shapes, attributes | {"count_include_pad": draw(st.sampled_from([0, 1])), "ceil_mode": 0}


def gemm(draw: Draw) -> Case:
    m, k = sizes(draw, 2, 2)
    transposed_b = draw(st.sampled_from([0, 1]))
    given = {
        "transB": transposed_b,
        "alpha": draw(st.sampled_from([1.0, 0.5])),
        "beta": draw(st.sampled_from([1.0, 2.0])),
    }
    return [(2, m), (k, m) if transposed_b else (m, k), (k,)][: draw(st.sampled_from([2, 3]))], given


def matmul(draw: Draw) -> Case:
    a, b, c = sizes(draw, 3, 3)
    return draw(st.sampled_from([[(2, a, b), (b, c)], [(2, a, b), (2, b, c)], [(2, b), (b, c)]])), {}


def reshape(draw: Draw) -> Case:
    a, b, c = sizes(draw, 3, 3)
    return [(2, a, b, c)], {"shape": draw(st.sampled_from([(-1, a * b * c), (-1, c, b, a), (-1, a * b, c, 1)]))}


def transpose(draw: Draw) -> Case:
    shape = sizes(draw, 3, 3)
    return [(2, *shape)], {"perm": (0, *draw(st.permutations([1, 2, 3])))}


def concat(draw: Draw) -> Case:
    shape = sizes(draw, 2, 3)
    axis = draw(st.integers(1, len(shape)))
    others = [(2, *shape[: axis - 1], size, *shape[axis:]) for size in sizes(draw, 1, 3)]
    return [(2, *shape), *others], {"axis": axis}


def expand(draw: Draw) -> Case:
    a, b = sizes(draw, 2, 2)
    return [(2, 1, a)], {"shape": draw(st.sampled_from([(1, b, 1), (1, b, a), (b, 1, 1, a)[1:]]))}


def tile(draw: Draw) -> Case:
    return [(2, *sizes(draw, 2, 2))], {"repeats": (1, *sizes(draw, 2, 2, 1, 3))}


def cut(draw: Draw) -> Case:
    size = draw(st.integers(3, 6))
    bound = st.integers(-size - 1, size + 1)
    step = draw(st.sampled_from([-2, -1, 1, 2]))
    start, end = draw(bound), draw(bound)
    if len(range(*slice(start, end, step).indices(size))) == 0 or (step < 0 and end < -size):
        start, end = (0, size) if step > 0 else (size - 1, -size - 1)
    return [(2, size, 3)], {"starts": (start,), "ends": (end,), "axes": (1,), "steps": (step,)}


def pad(draw: Draw) -> Case:
    mode = draw(st.sampled_from(["constant", "reflect", "edge"]))
    pads = (0, *sizes(draw, 2, 2, 0, 2), 0, *sizes(draw, 2, 2, 0, 2))
    return [(2, *sizes(draw, 2, 2, 3, 5))], {"pads": pads, "mode": mode, "value": 0.5 if mode == "constant" else 0.0}


def resize(draw: Draw) -> Case:
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    height, width = sizes(draw, 2, 2, 2, 5)
    given: dict[str, Any] = {
        "mode": mode,
        "axes": (2, 3),
        "coordinate_transformation_mode": draw(
            st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
        ),
        "nearest_mode": draw(st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])),
    }
    if draw(st.booleans()):
        factor = draw(st.integers(1, 4))
        given |= {"sizes": (height * factor, width * factor), "scales": (float(factor), float(factor))}
    else:
        given["sizes"] = sizes(draw, 2, 2, 2, 9)
    return [(2, 2, height, width)], given


def blocks(draw: Draw) -> Case:
    b = draw(st.integers(1, 3))
    return [(2, b * b * 2, *sizes(draw, 2, 2))], {"blocksize": b, "mode": draw(st.sampled_from(["DCR", "CRD"]))}


def squares(draw: Draw) -> Case:
    b = draw(st.integers(1, 3))
    return [(2, 2, *(b * size for size in sizes(draw, 2, 2)))], {"blocksize": b}


def softmax(draw: Draw) -> Case:
    shape = sizes(draw, 1, 3)
    return [(2, *shape)], {"axis": draw(st.integers(1, len(shape)))}


def norm(draw: Draw) -> Case:
    shape = sizes(draw, 1, 3, 2, 4)
    return [(2, *shape)], {"axis": draw(st.integers(1, len(shape))), "p": draw(st.sampled_from([1, 2]))}


def prelu(draw: Draw) -> Case:
    shape = sizes(draw, 2, 3)
    return [(2, *shape), (shape[0], *[1] * (len(shape) - 1))], {}


CASES: dict[str, Callable[[Draw], Case]] = {
    **dict.fromkeys(
        ["Abs", "Neg", "Exp", "Erf", "Sin", "Cos", "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish"],
        plain,
    ),
    **dict.fromkeys(["Log", "Sqrt", "Reciprocal"], plain),
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Pow", "Min", "Max"], pair),
    **dict.fromkeys(["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"], over_axes),
    "LeakyRelu": with_numbers(alpha=(0, 1)),
    "Elu": with_numbers(alpha=(0.1, 2)),
    "Selu": with_numbers(alpha=(0.1, 2), gamma=(0.5, 2)),
    "HardSigmoid": with_numbers(alpha=(0.1, 1), beta=(0, 1)),
    "Clip": with_numbers(min=(-1, 0), max=(0, 1)),
    "Gelu": lambda draw: (plain(draw)[0], {"approximate": draw(st.sampled_from(["none", "tanh"]))}),
    "PRelu": prelu,
    "Softmax": softmax,
    "LpNormalization": norm,
    "Conv": convolution,
    "ConvTranspose": transposed,
    "BatchNormalization": by_channel(4),
    "InstanceNormalization": by_channel(2),
    "LayerNormalization": layer,
    "AveragePool": averages,
    "MaxPool": pool,
    "Gemm": gemm,
    "MatMul": matmul,
    "Reshape": reshape,
    "Transpose": transpose,
    "Concat": concat,
    "Expand": expand,
    "Tile": tile,
    "Slice": cut,
    "Pad": pad,
    "Resize": resize,
    "DepthToSpace": blocks,
    "SpaceToDepth": squares,
}
# Whose inputs or results are not float32, or have no rows: see the tests after the first.
OTHERS = {"Cast", "Constant", "ExpandRows", "Gather", "OneHot", "Equal", "Less", "Greater", "Where"}
POSITIVE = {"Log", "Sqrt", "Reciprocal", "Pow", "Div"}


def test_every_row_of_the_table_is_compared() -> None:
    """A new operator needs a case."""
    assert set(OPERATORS) == set(CASES) | OTHERS
    assert not set(CASES) & OTHERS


@pytest.mark.parametrize("op", sorted(CASES))
@settings(max_examples=10)
@given(data=st.data())
def test_an_operator_computes_what_onnxruntime_computes(op: str, data: st.DataObject) -> None:
    """As the node that is written for it, with the same inputs; and its shape is known before."""
    shapes, attributes = CASES[op](data.draw)
    try:
        OPERATORS[op].infer([torch.empty(shape, device="meta") for shape in shapes], attributes)
    except GraphError:
        return  # no such convolution, or a window that is larger than its input
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    if op in POSITIVE:
        arrays = [np.abs(array) + np.float32(0.1) for array in arrays]
    if op == "BatchNormalization":
        arrays[4] = np.abs(arrays[4])
    found, expected = both(op, arrays, attributes)
    inferred = OPERATORS[op].infer([torch.empty(shape, device="meta") for shape in shapes], attributes)
    assert tuple(inferred.shape) == tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def both(op: str, arrays: list[np.ndarray[Any, Any]], attributes: dict[str, Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """By torch, and by onnxruntime from the graph that a CPU gets. The first array are the latents, others weights."""
    rows, *weights = [torch.from_numpy(array) for array in arrays]
    flat = math.prod(rows.shape[1:])
    names = [f"w{place}" for place in range(len(weights))]
    body = GraphBody(
        inputs=(GraphInput(name="x", role="latent", shape=tuple(rows.shape[1:])),),
        weights={name: tuple(weight.shape) for name, weight in zip(names, weights, strict=True)},
        nodes=(GraphNode(op=op, inputs=("x", *names), output="y", attributes=attributes),),
    )
    return run_both(body, rows.reshape(len(rows), flat), dict(zip(names, weights, strict=True)))


def run_both(
    body: GraphBody, latents: Tensor, weights: dict[str, Tensor], labels: Tensor | None = None, classes: int = 0
) -> tuple[np.ndarray[Any, Any], Any]:
    """A graph by torch, and by onnxruntime as a CPU runs it, whatever its result is."""
    net = GraphGenerator.__new__(GraphGenerator)
    super(GraphGenerator, net).__init__(body, classes)
    kinds = dict.fromkeys(("latent", "onehot", "noise"), torch.float32) | {"label": torch.int64}
    with torch.no_grad():
        net.infer(kinds)
        net.load_state_dict(weights, assign=True)
        net.requires_grad_(requires_grad=False)
        found = net(latents, labels).numpy()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the graph says that it makes images, and some of these are of other ranks
    session = onnxruntime.InferenceSession(
        generator_graph(net, ["pixels"]), options, providers=["CPUExecutionProvider"]
    )
    fed = {"latents": latents.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    return found, session.run(None, fed)[0]


def test_operators_of_labels_compute_what_onnxruntime_computes() -> None:
    """Rows of a table, one-hot vectors, comparisons and choices: what conditional nets are made of."""
    node = GraphNode
    body = GraphBody(
        inputs=(GraphInput(name="x", role="latent", shape=(4,)), GraphInput(name="label", role="label", shape=())),
        weights={"table": (5, 4), "start": (1, 4)},
        nodes=(
            node(op="Gather", inputs=("table", "label"), output="row", attributes={"axis": 0}),
            node(op="OneHot", inputs=("label",), output="hot", attributes={"depth": 5, "values": (0.0, 2.0)}),
            node(op="Slice", inputs=("hot",), output="some", attributes=CUT),
            node(op="Constant", output="two", attributes={"values": (2,), "shape": (1,), "to": "int"}),
            node(op="Equal", inputs=("label", "two"), output="is_two"),
            node(op="Cast", inputs=("is_two",), output="weight", attributes={"to": "float"}),
            node(op="Reshape", inputs=("weight",), output="column", attributes={"shape": (-1, 1)}),
            node(op="Mul", inputs=("row", "column"), output="chosen"),
            node(op="Greater", inputs=("x", "some"), output="more"),
            node(op="Less", inputs=("chosen", "x"), output="less"),
            node(op="Where", inputs=("more", "x", "chosen"), output="first"),
            node(op="Where", inputs=("less", "first", "row"), output="second"),
            node(op="ExpandRows", inputs=("start", "x"), output="starts"),
            node(op="Add", inputs=("second", "starts"), output="y"),
        ),
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    weights = {"table": torch.randn(5, 4, generator=rng), "start": torch.randn(1, 4, generator=rng)}
    labels = torch.arange(10) % 5
    found, expected = run_both(body, torch.randn(10, 4, generator=rng), weights, labels, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_constant_of_any_rank_is_repeated_for_each_row() -> None:
    """As StyleGAN2's first value is."""
    body = GraphBody(
        inputs=(GraphInput(name="x", role="latent", shape=(2, 1, 1)),),
        weights={"start": (1, 2, 3, 4)},
        nodes=(
            GraphNode(op="ExpandRows", inputs=("start", "x"), output="starts"),
            GraphNode(op="Mul", inputs=("starts", "x"), output="y"),
        ),
    )
    rng = torch.Generator().manual_seed(0)
    weights = {"start": torch.randn(1, 2, 3, 4, generator=rng)}
    found, expected = run_both(body, torch.randn(5, 2, generator=rng), weights)
    np.testing.assert_allclose(found, expected)


def test_a_gather_stays_within_its_table() -> None:
    """A GPU that is asked for a place that does not exist would compute nothing ever after."""
    table = torch.arange(6.0).reshape(3, 2)
    found = OPERATORS["Gather"].compute(table, torch.tensor([2, -1, 7, -9]), axis=0)
    assert found.tolist() == [[4, 5], [4, 5], [4, 5], [0, 1]]


CUT: dict[str, Any] = {"starts": (1,), "ends": (5,), "axes": (1,), "steps": (1,)}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("Python", {}, "no such operator"),
    ("Relu", {"alpha": 1.0}, "no attribute alpha"),
    ("LeakyRelu", {"alpha": "x"}, "alpha can't be"),
    ("Reshape", {}, "shape is missing"),
    ("Reshape", {"shape": (-1, 5)}, "shape"),
    ("Tile", {"repeats": (2**31, 2**31)}, "Tile"),
    ("Tile", {"repeats": (1, 2**30)}, "numbers a row"),
    ("Pad", {"pads": (0, 0, 0, 2**30)}, "numbers a row"),
    ("DepthToSpace", {"blocksize": 0}, "DepthToSpace"),
]


@pytest.mark.parametrize(("op", "attributes", "reason"), BAD, ids=[f"{op} {attributes}" for op, attributes, _ in BAD])
def test_a_node_that_can_not_be_run_is_refused_by_its_name(op: str, attributes: dict[str, Any], reason: str) -> None:
    """Before anything is computed, and whatever it would have taken."""
    body = GraphBody(
        inputs=(GraphInput(name="x", role="latent", shape=(4,)),),
        weights={},
        nodes=(GraphNode(op=op, name="odd one", inputs=("x",), output="y", attributes=attributes),),
    )
    with pytest.raises(GraphError, match=reason) as caught:
        GraphGenerator(body, ImageSpec(channels=1, height=2, width=2), LatentSpec(dim=4, distribution="normal"), 0)
    assert "odd one" in str(caught.value)


def test_what_onnx_calls_them_is_what_they_are_called() -> None:
    """All but one are operators of ONNX by the same name, so that a manifest can be read with its documentation."""
    for name in OPERATORS.keys() - {"ExpandRows"}:
        assert defs.get_schema(name)
