"""What D says of each set of images: as the service says it, counted rightly, and drawn."""

import io
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from models.__main__ import main
from models.bundle import Bundle
from models.data.load import load_dataset
from models.experiments.verdicts import GENERATED, NOISE, REAL, SAMPLE_SEED, judge

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images, of which 30 are for the test."""
    path = tmp_path_factory.mktemp("data") / "some.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8))
    return path


@pytest.mark.parametrize("name", ["tiny", "cond"])
async def test_the_verdicts_are_those_of_the_service(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], data: Path, name: str
) -> None:
    """Of real and of generated images, sent without labels, /discriminate says what is counted."""
    bundle, dataset = tiny_bundles[name], load_dataset(str(data), None, seed=0)
    judged = judge(bundle, dataset, dataset)
    assert list(judged.sets) == [REAL, GENERATED, "some", NOISE]
    assert judged.sets["some"] == judged.sets[REAL] != judged.sets[NOISE]
    probabilities = []
    for kind, images in ((REAL, dataset.test.images), (GENERATED, bundle.draw(30, seed=SAMPLE_SEED))):
        body = io.BytesIO()
        np.save(body, images)
        headers = {"Content-Type": "application/x-npy"}
        reply = await client.post(f"/discriminate?bundle={name}", content=body.getvalue(), headers=headers)
        said = np.array([result["probability_real"] for result in reply.json()["results"]])
        counted = judged.sets[kind]
        assert counted.histogram == np.histogram(said, 20, (0, 1))[0].tolist()
        assert counted.images == sum(counted.histogram) == 30
        assert counted.quantiles["0.5"] == pytest.approx(np.median(said), abs=1e-4)
        assert counted.above_half == pytest.approx((said > 0.5).mean(), abs=1e-4)
        probabilities.append(said)
    pairs = np.subtract.outer(*probabilities)
    assert judged.auc == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    is_calibrated = bundle.manifest.calibration is not None
    assert (judged.calibration_error != judged.plain_error) == is_calibrated


def test_the_command_writes_numbers_and_a_picture(
    tiny_bundles: dict[str, Bundle], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A panel and a record for each bundle; without another set there are three."""
    folders = [str(tiny_bundles[name].folder) for name in ("tiny", "cond")]
    assert main(["verdicts", *folders, "--data", str(data), "--out", str(tmp_path / "new")]) == 0
    record = json.loads((tmp_path / "new" / "verdicts.json").read_text())
    assert [(one["bundle"], one["version"]) for one in record] == [
        (name, tiny_bundles[name].version) for name in ("tiny", "cond")
    ]
    assert all(list(one["sets"]) == [REAL, GENERATED, NOISE] for one in record)
    with Image.open(tmp_path / "new" / "verdicts.png") as picture:
        assert len(picture.convert("RGB").getcolors() or ()) > 4  # frames, and a line for each set
    assert "cond, noise: half above 0." in capsys.readouterr().out


def test_another_set_has_images_of_the_same_size(
    tiny_bundles: dict[str, Bundle], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says which does not, and nothing is written."""
    np.savez(tmp_path / "wide.npz", images=np.zeros((20, 8, 9, 1), np.uint8))
    command = ["verdicts", str(tiny_bundles["tiny"].folder), "--data", str(data), "--out", str(tmp_path / "new")]
    assert main([*command, "--other", str(tmp_path / "wide.npz")]) == 1
    assert "wide has images of another size than some" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
