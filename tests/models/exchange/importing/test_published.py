"""Generators that nobody here made: published ones, imported and served; and our own, exported and taken back."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.bundle import read_bundle
from models.exchange.importing.conversion import Options, import_onnx
from models.exchange.importing.parsing import Refused
from models.exchange.onnx_file import export_onnx
from service.app import create_app
from tests.models.exchange.importing.published import UNAVAILABLE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
HERE = Path(__file__).parent
EMBEDDED = Path(__file__).parents[4] / "bundles"
EYES = ("amber", "blue", "brown", "gray", "grayscale", "green", "hazel", "red")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published generators as ONNX files."""
    folder = tmp_path_factory.mktemp("published")
    line = [sys.executable, str(HERE / "published.py"), str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=250, check=False)
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "side", "labels"), [("faces", 64, ()), ("eyes", 128, EYES)])
async def test_a_published_generator_is_served(
    published: Path, tmp_path: Path, tiny_settings: Any, start: Any, name: str, side: int, labels: tuple[str, ...]
) -> None:
    """Within a grey level of onnxruntime, and an image is the same alone and in a crowd."""
    content = (published / f"{name}.onnx").read_bytes()
    made = import_onnx(content, f"{name}.onnx", tmp_path / name, Options(name, labels=labels))
    assert made.largest_difference <= 1
    bundle = read_bundle(tmp_path / name)
    assert bundle.manifest.image.shape == (3, side, side)
    wanted: dict[str, Any] = {"labels": labels[2]} if labels else {}
    async with start(create_app(tiny_settings(bundles=tmp_path, default_bundle=name))) as client:
        many, one = [
            np.load(io.BytesIO((await client.get("/sample", params={"format": "npy", "seed": 7, **more})).content))
            for more in ({"count": 12, **wanted}, {"first_index": 9, **wanted})
        ]
        assert (await client.get(f"/bundles/{name}")).json()["labels"] == (list(labels) or None)
    assert np.array_equal(many[9], one[0])
    assert np.array_equal(many, bundle.draw(12, seed=7, **wanted))
    assert many.std(axis=0).mean() > 10  # images differ from one another


def test_an_axis_that_squeeze_froze_is_refused(published: Path, tmp_path: Path) -> None:
    """As its package would export it: of a single row `squeeze()` drops the batch axis."""
    content = (published / "eyes-careless.onnx").read_bytes()
    with pytest.raises(Refused, match=r"node /Squeeze \(Squeeze\).*squeeze\(3\)"):
        import_onnx(content, "eyes.onnx", tmp_path / "eyes", Options("eyes", labels=EYES))


@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
def test_our_own_generators_come_back(name: str, tmp_path: Path) -> None:
    """Exported and imported, they make their images again."""
    bundle = read_bundle(EMBEDDED / name)
    export_onnx(bundle, tmp_path / "net.onnx")
    labels = bundle.manifest.labels or ()
    options = Options(name, range="unit", labels=labels)
    again = import_onnx((tmp_path / "net.onnx").read_bytes(), "net.onnx", tmp_path / "again", options).bundle
    wanted: dict[str, Any] = {"labels": list(range(len(labels))) * 2} if labels else {}
    found, expected = (one.draw(20, seed=7, **wanted).astype(int) for one in (again, bundle))
    assert np.abs(found - expected).max() <= 1
