"""A generator that was trained elsewhere becomes a bundle that makes its images, or is refused with its node named."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from models.__main__ import main
from models.bundle import BundleError, read_bundle
from models.exchange.importing.conversion import Options, import_onnx
from models.exchange.importing.parsing import Refused
from models.inference.noise import NOISE_STREAM, LatentRange, beside_noise, draw_latents

pytestmark = pytest.mark.usefixtures("one_thread")
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.default_rng(0)
Nodes = list[onnx.NodeProto]


def weight(name: str, *shape: int) -> onnx.TensorProto:
    numbers = RNG.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[1:])))
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def whole(name: str, *numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"my {op.lower()} {output}", **attributes)


def file_of(
    nodes: Nodes,
    weights: list[onnx.TensorProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    output: str = "image",
    opset: int = 17,
) -> bytes:
    """An ONNX file; the first axis of an input is free where it has a name."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    image = [helper.make_tensor_value_info(output, FLOAT, None)]
    graph = helper.make_graph(nodes, "net", given, image, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(made.SerializeToString())


Z: dict[str, tuple[int, list[int | str]]] = {"z": (FLOAT, ["n", 6, 1, 1])}


def dcgan(**more: Any) -> bytes:
    """A small DCGAN: 8×8 RGB, with the batch normalisation of one that is trained."""
    parameters = [weight("gain", 8), weight("offset", 8), weight("mean", 8)]
    variance = numpy_helper.from_array(np.full(8, 0.7, np.float32), "variance")
    nodes = [
        node("ConvTranspose", "z first", "a"),
        node("BatchNormalization", "a gain offset mean variance", "b"),
        node("Relu", "b", "c"),
        node("ConvTranspose", "c second", "d", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Tanh", "d", "image"),
    ]
    weights = [weight("first", 6, 8, 4, 4), *parameters, variance, weight("second", 8, 3, 4, 4)]
    return file_of(nodes, weights, Z, **more)


def conditional() -> bytes:
    """Of (z, class) by a table of classes, with shapes that are computed, noise, channels last, RGBA in 0 … 1."""
    nodes = [
        node("Gather", "table label", "e"),
        node("Concat", "z e", "both", axis=1),
        node("Gemm", "both dense", "f"),
        node("Shape", "z", "shape"),
        node("Gather", "shape zero", "rows"),
        node("Unsqueeze", "rows axis", "rows1"),
        node("Concat", "rows1 rest", "target", axis=0),
        node("Reshape", "f target", "g"),
        node("Mul", "noise strength", "h"),
        node("Add", "g h", "i"),
        node("Transpose", "i", "j", perm=[0, 2, 3, 1]),
        node("Sigmoid", "j", "image"),
    ]
    weights = [weight("table", 3, 4), weight("dense", 10, 4 * 5 * 7), weight("strength", 1, 4, 1, 1)]
    weights += [numpy_helper.from_array(np.array(0), "zero"), whole("axis", 0), whole("rest", 4, 5, 7)]
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "z": (FLOAT, ["n", 6]),
        "label": (INT64, ["n"]),
        "noise": (FLOAT, ["n", 1, 5, 7]),
    }
    return file_of(nodes, weights, inputs)


def test_a_dcgan_becomes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, in a process of its own: within a grey level of onnxruntime, without its batch normalisation."""
    (tmp_path / "net.onnx").write_bytes(dcgan())
    line = ["import", str(tmp_path / "net.onnx"), "--name", "faces", "--out", str(tmp_path / "faces")]
    assert main(line) == 0
    assert "8×8 RGB" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "faces" / "manifest.json").read_text())
    assert manifest["network"]["family"] == "graph"
    assert [one["op"] for one in manifest["network"]["nodes"]][:4] == ["ConvTranspose", "Relu", "ConvTranspose", "Tanh"]
    assert manifest["calibration"] is None
    bundle = read_bundle(tmp_path / "faces")
    session = onnxruntime.InferenceSession(dcgan_of(tmp_path), providers=["CPUExecutionProvider"])
    latents = draw_latents(bundle.manifest.latent, 7, 0, 20)
    (raw,) = session.run(None, {"z": latents.reshape(20, 6, 1, 1)})
    expected = np.round((raw.transpose(0, 2, 3, 1) + 1) / 2 * 255)
    assert np.abs(bundle.draw(20, seed=7) - expected).max() <= 1
    assert np.array_equal(bundle.draw(1, seed=7, first_index=5)[0], bundle.draw(20, seed=7)[5])
    assert main(line) == 2
    assert "--force" in capsys.readouterr().err
    with pytest.raises(BundleError, match="no discriminator"):
        bundle.discriminator  # noqa: B018


def dcgan_of(folder: Path) -> bytes:
    return (folder / "net.onnx").read_bytes()


def test_classes_noise_and_channels_last(tmp_path: Path) -> None:
    """Labels are as many as the table's rows, noise comes from a stream of its own, and truncation leaves it alone."""
    bundle = import_onnx(conditional(), "net.onnx", tmp_path / "b", Options("b", range="unit")).bundle
    manifest = bundle.manifest
    assert manifest.labels == ("0", "1", "2")
    assert (manifest.image.channels, manifest.image.height, manifest.image.width) == (4, 5, 7)
    assert (manifest.latent.dim, manifest.latent.noise) == (6, 35)
    session = onnxruntime.InferenceSession(conditional_again(), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "z"
    rows = beside_noise(manifest.latent, draw_latents(manifest.latent, 3, 0, 9), [LatentRange(3, 0, 9)])
    images = bundle.images(rows, np.arange(9) % 3)
    assert np.array_equal(images, bundle.draw(9, seed=3, labels=[0, 1, 2] * 3))
    assert len(np.unique(images.reshape(9, -1), axis=0)) == 9
    assert NOISE_STREAM == 2
    # The tenth image's noise is the same in a draw that begins there.
    later = beside_noise(manifest.latent, draw_latents(manifest.latent, 3, 8, 1), [LatentRange(3, 8, 1)])
    assert np.array_equal(later[0], rows[8])


def conditional_again() -> bytes:
    return conditional()


def test_a_discriminator_comes_along(tmp_path: Path) -> None:
    """Its sigmoid is left out: what is served is the logit."""
    nodes = [
        node("Conv", "x kernel", "a", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("LeakyRelu", "a", "b", alpha=0.2),
        node("Flatten", "b", "c"),
        node("Gemm", "c dense", "d"),
        node("Sigmoid", "d", "image"),
    ]
    weights = [weight("kernel", 4, 3, 4, 4), weight("dense", 64, 1)]
    judge = file_of(nodes, weights, {"x": (FLOAT, ["n", 3, 8, 8])})
    bundle = import_onnx(dcgan(), "net.onnx", tmp_path / "b", Options("b", discriminator=judge)).bundle
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(judge, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": (pixels * 2 - 1).numpy()})
    np.testing.assert_allclose(torch.sigmoid(bundle.discriminator(pixels)), expected[:, 0], atol=1e-5)


def frozen() -> bytes:
    nodes = [node("Reshape", "z shape", "a"), node("Gemm", "a dense", "b"), node("Reshape", "b image_shape", "image")]
    weights = [whole("shape", 1, 6), weight("dense", 6, 16), whole("image_shape", -1, 1, 4, 4)]
    return file_of(nodes, weights, Z)


def squeezed() -> bytes:
    nodes = [node("Squeeze", "z", "a"), node("Gemm", "a dense", "b"), node("Reshape", "b shape", "image")]
    return file_of(nodes, [weight("dense", 6, 16), whole("shape", -1, 1, 4, 4)], Z)


def with_node(extra: onnx.NodeProto, domain: str = "") -> bytes:
    model = onnx.load_from_string(dcgan())
    last = model.graph.node[-1]
    extra.domain = domain
    last.input[0] = extra.output[0]
    model.graph.node.insert(len(model.graph.node) - 1, extra)
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    return bytes(model.SerializeToString())


def external() -> bytes:
    model = onnx.load_from_string(dcgan())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return bytes(model.SerializeToString())


def spoiled(change: str) -> bytes:
    model = onnx.load_from_string(dcgan())
    graph = model.graph
    match change:
        case "nan":
            graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((6, 8, 4, 4), np.nan, np.float32), "first"))
        case "giant":
            graph.initializer[0].ClearField("raw_data")
            graph.initializer[0].dims[:] = [2**31, 2**31]
        case "circle":
            graph.node[0].input[0] = graph.node[2].output[0]
        case "batch":
            graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        case "sparse":
            graph.sparse_initializer.add().values.name = "odd"
        case "function":
            model.functions.add(name="mine", domain="")
        case "loud":
            graph.node[-1].op_type = "Exp"
    return bytes(model.SerializeToString())


REFUSED = {
    "frozen batch axis": (frozen, "my reshape.*batch axis"),
    "squeeze without axes": (squeezed, r"my squeeze.*squeeze\(3\)"),
    "declared batch axis": (lambda: spoiled("batch"), "'z'.*frozen at 1"),
    "other domain": (lambda: with_node(node("Inverse", "d", "x"), "com.microsoft"), "my inverse.*com.microsoft"),
    "unlisted": (lambda: with_node(node("Det", "d", "x")), "my det.*not in the table"),
    "random": (lambda: with_node(node("RandomNormalLike", "d", "x")), "my randomnormallike.*random"),
    "loop": (lambda: with_node(node("Loop", "d", "x")), "my loop.*control flow"),
    "external data": (external, "first.*external data"),
    "NaN": (lambda: spoiled("nan"), "first holds NaN"),
    "giant": (lambda: spoiled("giant"), "first.*fewer in the file"),
    "circle": (lambda: spoiled("circle"), "my convtranspose.*not there yet"),
    "sparse": (lambda: spoiled("sparse"), "sparse numbers: odd"),
    "function": (lambda: spoiled("function"), "local function mine"),
    "range": (lambda: spoiled("loud"), "lies in"),
    "old": (lambda: dcgan(opset=9), "opset 9"),
    "pickle": (lambda: b"\x80\x02}q", "a pickle.*docs/import.md"),
    "archive": (lambda: b"PK\x03\x04" + b"\0" * 60, "an archive.*docs/import.md"),
    "nothing": (lambda: b"", "opset"),
    "noise": (lambda: RNG.bytes(500), "ONNX"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_served_is_refused(case: str, tmp_path: Path) -> None:
    """In one line that names the node; and nothing is written."""
    make, reason = REFUSED[case]
    with pytest.raises(Refused, match=reason) as caught:
        import_onnx(make(), "net.onnx", tmp_path / "b", Options("b"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_refusal_and_a_bound_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The process that reads the file may die: of that the command says a line, and ends with 2."""
    (tmp_path / "net.onnx").write_bytes(dcgan())
    line = ["import", str(tmp_path / "net.onnx"), "--name", "x", "--out", str(tmp_path / "x")]
    for more, reason in (
        (["--memory", "1"], "--memory"),
        (["--labels", "a,b"], "--labels: the net takes none"),
        (["--output", "no"], "outputs are image"),
        (["--range", "unit"], "--range signed"),
    ):
        assert main([*line, *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert reason in said
        assert not (tmp_path / "x").exists()
