"""The bench of training: that both loops do the same work, and that a small version of it runs to its end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.training import step as training
from benchmarks.training.eager import LOG_EVERY, TINY, Eager, tiny_images
from models.data.dataset import Dataset, Split, divide
from models.spec import PRESETS
from models.training.trainer import State, derived_seed, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
STEPS = 6  # past a second update with a penalty


@pytest.fixture(scope="module")
def images() -> Dataset:
    """Random images of 16×16 pixels with two labels."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (200, 16, 16, 1), np.uint8), np.arange(200) % 2)
    return divide("random", split, ("even", "odd"), seed=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plain_loop_computes_the_very_weights_of_the_trainer(preset: str, images: Dataset) -> None:
    """Given the trainer's images and random numbers, every preset ends with equal bits: both do the same work."""
    options = PRESETS[preset].model_copy(update={"batch_size": 8, "ema_half_life_images": 0})
    state, plain = State(options, images, CPU), Eager(options, images, CPU)
    for step in range(STEPS):
        plain.rng.manual_seed(derived_seed(options.seed, "step", step))
        plain.step(*state.data.take(step * options.batch_size, options.batch_size))
        train_step(state)
    for ours, theirs in ((state.generator, plain.generator), (state.discriminator, plain.discriminator)):
        tensors = theirs.state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in ours.state_dict().items())


def test_the_plain_loop_sees_each_image_once_in_an_epoch() -> None:
    """Like the trainer's order, and unlike drawing images with replacement."""
    plain = Eager(TINY, tiny_images(), CPU)
    seen = [plain.batch()[0].flatten().tolist() for _ in range(len(plain.images))]
    assert sorted(seen) == sorted(plain.images.flatten(1).tolist())


def test_the_plain_loop_reads_its_losses_now_and_then() -> None:
    """A line every 50 steps: reading a number makes a device finish."""
    lines: list[str] = []
    Eager(TINY, tiny_images(), CPU).train(2 * LOG_EVERY + 1, lines.append)
    assert [line.split()[1] for line in lines] == ["50", "100"]


@pytest.mark.slow
def test_a_small_bench_says_how_each_loop_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of each kind, all rows in the JSON line; that Lightning or a compiler is missing is a word in a table."""

    def no_compiler(_: nn.Module) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    monkeypatch.setattr(training, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(training, "PRESETS", {"mlp-adam": TINY.model_copy(update={"ema_half_life_images": 100})})
    random = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", images=random.integers(0, 256, (40, 8, 8), np.uint8))
    training.main([
        "--data", str(tmp_path / "few.npz"), "--presets", "mlp-adam", "--rounds", "1", "--tiny-steps", "50",
    ])  # fmt: skip
    out = capsys.readouterr().out
    line: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert line["program"] == "training"
    names = [row["loop"] for row in line["beside_plain"]]
    assert names == [training.OURS, f"{training.OURS}, with the average of G", training.PLAIN, training.UNFUSED]
    assert all(len(row["ratio"]) == len(("low", "median", "high")) for row in line["beside_plain"])
    assert line["own_ms"]["Lightning"] == "not installed"
    assert "not installed" in out
    assert [(row["variant"], "ratio" in row) for row in line["variants"]] == [
        ("float32", True),
        ("float32, compiled", False),
        ("bfloat16", True),
        ("bfloat16, compiled", False),
    ]
    assert out.count("failed: no compiler") == 4


def test_what_failed_under_lightning_is_told_in_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench goes on without it."""
    python = tmp_path / "lightning" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named lightning' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(training, "ENVIRONMENTS", tmp_path)
    assert training.lightnings_own(1, 1) == "failed: No module named lightning"
