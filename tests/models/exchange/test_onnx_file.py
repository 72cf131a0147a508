"""ONNX files: they compute what the bundle computes, for any number of rows, or they are not written."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from models.__main__ import main
from models.bundle import Bundle, read_bundle
from models.exchange import onnx_file
from models.exchange.onnx_file import ExportError, check_onnx, export_onnx
from models.inference import onnx_nets
from models.inference.noise import draw_latents
from models.inference.pixels import to_pixels, to_uint8

pytestmark = pytest.mark.slow

EMBEDDED = Path(__file__).parents[3] / "bundles" / "mnist-mlp"


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_the_exported_generator_gives_the_bundles_images(
    tiny_bundles: dict[str, Bundle], exported: dict[str, Path], name: str, rows: int
) -> None:
    """Grey, in colour, with classes; any number of rows; uint8 images at most one level apart."""
    bundle = tiny_bundles[name]
    session = onnxruntime.InferenceSession(exported[name])
    given: dict[str, Any] = {"latents": draw_latents(bundle.manifest.latent, 5, 0, rows)}
    labels = None if bundle.manifest.labels is None else np.arange(rows) % 3
    if labels is not None:
        given["labels"] = labels
    (pixels,) = session.run(["pixels"], given)
    images = to_uint8(torch.from_numpy(pixels)).astype(int)
    assert np.abs(images - bundle.images(given["latents"], labels)).max() <= 1


@pytest.fixture(scope="module")
def exported(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bundles' generators as files."""
    folder = tmp_path_factory.mktemp("exported")
    for name, bundle in tiny_bundles.items():
        assert export_onnx(bundle, folder / f"{name}.onnx").holds
    return {name: folder / f"{name}.onnx" for name in tiny_bundles}


def test_the_file_says_what_it_is(tiny_bundles: dict[str, Bundle], exported: dict[str, Path]) -> None:
    """Name, version, latent and labels are in the metadata, the number of rows is free, and ONNX's checker agrees."""
    model = onnx.load(exported["cond"])
    onnx.checker.check_model(model, full_check=True)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    bundle = tiny_bundles["cond"]
    assert (facts["bundle"], facts["version"], facts["net"]) == (bundle.name, bundle.version, "generator")
    assert json.loads(facts["labels"]) == list(bundle.manifest.labels or ())
    assert json.loads(facts["latent"])["dim"] == 12
    shapes = {
        put.name: [d.dim_param or d.dim_value for d in put.type.tensor_type.shape.dim] for put in model.graph.input
    }
    assert shapes == {"latents": ["n", 12], "labels": ["n"]}


def test_the_command_exports_the_embedded_discriminator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """D's logits of the shipped digits, from a file that the command wrote and said to be proven."""
    out = tmp_path / "new" / "d.onnx"
    assert main(["export", str(EMBEDDED), "--format", "onnx", "--net", "discriminator", "--out", str(out)]) == 0
    assert "over 256 rows onnxruntime and torch differ by" in capsys.readouterr().out
    bundle = read_bundle(EMBEDDED)
    pixels = to_pixels(bundle.draw(9, seed=3))
    (logits,) = onnxruntime.InferenceSession(out).run(["logits"], {"pixels": pixels.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(logits, bundle.discriminator(pixels).numpy(), atol=1e-3)
    assert [path.name for path in out.parent.iterdir()] == ["d.onnx"]


def test_the_documented_lines_run_a_file_without_torch(tmp_path: Path) -> None:
    """docs/bundle-format.md, from the command to the images, where PyTorch can't be imported."""
    page = (EMBEDDED.parents[1] / "docs" / "bundle-format.md").read_text()
    lines = next(block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "onnxruntime" in block)
    assert main(["export", str(EMBEDDED), "--format", "onnx", "--out", str(tmp_path / "generator.onnx")]) == 0
    program = f"import sys\nsys.modules['torch'] = None\n{lines}\nprint(images.shape, images.dtype, images.mean())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, _, rest = done.stdout.partition(") ")
    assert shape == "(64, 1, 28, 28"
    kind, mean = rest.split()
    assert kind == "uint8"
    assert 25 < float(mean) < 42  # real digits have 33


def test_another_net_does_not_pass_the_check(tiny_bundles: dict[str, Bundle], exported: dict[str, Path]) -> None:
    """A weight that differs a little in the file is seen in the images; a file of another shape can't be run."""
    model = onnx.load(exported["tiny"])
    (bias,) = (one for one in model.graph.initializer if one.name.endswith("output.bias"))
    changed = onnx.numpy_helper.to_array(bias).copy()
    changed[13] += 0.5
    bias.CopyFrom(onnx.numpy_helper.from_array(changed, bias.name))
    parity = check_onnx(model.SerializeToString(), tiny_bundles["tiny"])
    assert parity.largest_difference > 1
    assert not parity.holds
    with pytest.raises(ExportError, match="onnxruntime can't run"):
        check_onnx(exported["cond"].read_bytes(), tiny_bundles["tiny"])


def test_a_failed_check_leaves_no_file(
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where nothing is close enough: exit code 1, the largest difference in one line, and no file or rest of one."""
    monkeypatch.setattr(onnx_file, "LARGEST_GREY_DIFFERENCE", -1)
    out = tmp_path / "g.onnx"
    assert main(["export", str(tiny_bundles["tiny"].folder), "--format", "onnx", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not written: onnxruntime differs from torch by 0 grey levels (allowed: -1)" in line
    assert not list(tmp_path.iterdir())


def test_a_net_that_no_file_holds_is_refused(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of ONNX end below 2 GiB. Here the bound is lower."""
    monkeypatch.setattr(onnx_nets, "MOST_WEIGHT_BYTES", 0)
    with pytest.raises(ExportError, match="generator has 2 GiB of weights or more"):
        export_onnx(tiny_bundles["tiny"], tmp_path / "g.onnx")


def test_nan_agrees_with_nothing() -> None:
    """A comparison with NaN is false, and the check takes it for a failure."""
    assert not onnx_file.Parity(1, float("nan"), "logit", 1e-3).holds
