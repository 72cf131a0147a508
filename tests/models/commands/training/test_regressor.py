"""`train --preset latent-regressor`: a bundle gets an encoder that learns, and keeps all else; or a reason why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.__main__ import main
from models.bundle import Bundle, read_bundle
from models.data.load import load_dataset
from models.evaluation.reconstruction import score_encoder
from models.inference.drawing import codes_of
from models.inference.noise import draw_labels, draw_latents
from models.spec import LATENT_REGRESSOR, EncoderSpec, ImageSpec
from models.training.latent_regression import LatentRegression

SMALL = EncoderSpec(width=4, hidden=32)
COLOUR = ImageSpec(channels=3, height=10, width=6)
NAMES = ("0", "1", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 RGB images of 6 × 10 pixels with three labels."""
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    images = np.random.default_rng(0).integers(0, 256, (80, 10, 6, 3), np.uint8)
    np.savez(path, images=images, labels=np.arange(80) % 3)
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = LATENT_REGRESSOR.model_copy(update={"encoder": SMALL, "batch_size": 16})
    for module in ("models.commands.training.regressor", "models.commands.training.options"):
        monkeypatch.setattr(f"{module}.LATENT_REGRESSOR", small)
    monkeypatch.setattr("models.evaluation.reconstruction.GENERATED", 100)


def regress(init: Path, data: Path, out: Path, *more: str) -> int:
    line = ["train", "--preset", "latent-regressor", "--init", str(init), "--data", str(data), "--out", str(out)]
    return main([*line, "--device", "cpu", *more])


@pytest.mark.parametrize("labels", [None, NAMES], ids=["without classes", "with classes"])
@pytest.mark.usefixtures("one_thread")
def test_a_bundle_gets_an_encoder(
    make_tiny: Callable[..., Bundle], data: Path, tmp_path: Path, labels: tuple[str, ...] | None
) -> None:
    """It is a new version of the same name, whose other nets are the same, with the scores of the test images."""
    before = make_tiny(tmp_path / "tiny", COLOUR, labels, None)
    assert regress(tmp_path / "tiny", data, tmp_path / "run", "--steps", "3", "--seed", "5") == 0
    after = read_bundle(tmp_path / "run" / "bundle")
    assert after.name == before.name
    assert after.version != before.version
    for one, other in ((after.generator, before.generator), (after.discriminator, before.discriminator)):
        assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())
    assert after.manifest.network.encoder == SMALL
    told: Any = after.manifest.training["encoder"]
    assert (told["init"], told["steps"], told["options"]["seed"]) == (f"tiny@{before.version}", 3, 5)
    dataset = load_dataset(str(data), None, seed=0)
    scores: Any = after.manifest.evaluation["encoder"]
    assert scores == score_encoder(after, dataset)
    assert (scores["rows"], scores["samples"], "label_accuracy" in scores) == (8, 100, labels is not None)
    assert main(["inspect", str(tmp_path / "run" / "bundle")]) == 0
    again = tmp_path / "again"
    assert regress(tmp_path / "tiny", data, again, "--steps", "3", "--seed", "5") == 0
    assert read_bundle(again / "bundle").version == after.version
    rows = [json.loads(line) for line in (again / "stats.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [3]


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.usefixtures("one_thread")
def test_an_encoder_learns(make_tiny: Callable[..., Bundle], tmp_path: Path, distribution: str) -> None:
    """Of images that it never saw it finds the classes, and latents that are nearer than the mean of all."""
    bundle = make_tiny(tmp_path / "tiny", COLOUR, NAMES, None)
    latent = bundle.manifest.latent.model_copy(update={"distribution": distribution})
    object.__setattr__(bundle, "manifest", bundle.manifest.model_copy(update={"latent": latent}))
    for weight in bundle.generator.parameters():
        weight.mul_(0.3)  # whose images are not all black and white
    options = LATENT_REGRESSOR.model_copy(update={"encoder": SMALL, "batch_size": 64, "steps": 300})
    training = LatentRegression(bundle, options)
    for _ in range(options.steps):
        training.train_step()
    z, classes = draw_latents(latent, 1, 0, 200), draw_labels((0.2, 0.3, 0.5), 1, 0, 200)
    found, labels = codes_of(training.encoder, bundle.images(z, classes))
    assert labels is not None
    assert np.square(found - z).mean() < 0.6
    assert (labels == classes).mean() > 0.6


def test_what_can_not_be_is_told(
    make_tiny: Callable[..., Bundle], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before anything is computed."""
    make_tiny(tmp_path / "tiny", ImageSpec(channels=1, height=8, width=8), None, None)

    def said(*line: str) -> str:
        assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--device", "cpu", *line]) == 1
        return capsys.readouterr().err

    regressor = "--preset", "latent-regressor"
    tiny = "--init", str(tmp_path / "tiny")
    assert "needs --init BUNDLE" in said(*regressor)
    assert "--d-steps is not for" in said(*regressor, *tiny, "--d-steps", "2")
    assert "--augment is not for" in said(*regressor, *tiny, "--augment", "flip")
    assert "--unconditional" in said(*regressor, *tiny, "--unconditional")
    assert "--steps: 0" in said(*regressor, *tiny, "--steps", "0")
    assert "images" in said(*regressor, *tiny)
    assert "manifest.json" in said(*regressor, "--init", str(tmp_path))
    assert not (tmp_path / "run").exists()
