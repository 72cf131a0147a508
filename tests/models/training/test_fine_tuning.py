"""A run that begins with a bundle has its weights; classes may be added, and what else does not fit is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.__main__ import main
from models.bundle import Bundle, read_bundle, write_bundle
from models.data.dataset import Dataset, Split, divide
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec, LatentSpec
from models.training.fine_tuning import begin_with
from models.training.trainer import State, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread", "small_preset")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.report.page", lambda _: "")


def shapes(*names: str, size: int = 16) -> Dataset:
    """Random images with these labels, or without any."""
    labels = np.arange(60) % len(names) if names else None
    pixels = np.random.default_rng(0).integers(0, 255, (60, size, size, 1)).astype(np.uint8)
    return divide("shapes", Split(pixels, labels), names or None, seed=0)


def bundle_of(preset: str, folder: Path, *names: str) -> Bundle:
    """A bundle of a preset's nets with random weights, as the seed has them."""
    options = PRESETS[preset]
    image = ImageSpec(channels=1, height=16, width=16)
    share = (1 / len(names),) * len(names) if names else None
    latent = LatentSpec(dim=options.latent.dim, distribution="normal", label_frequencies=share)
    rng = torch.Generator().manual_seed(5)
    nets = [
        {name: torch.randn(tensor.shape, generator=rng) for name, tensor in net.state_dict().items()}
        for net in build_networks(options.network, image, latent, len(names))
    ]
    facts: dict[str, Any] = {
        "name": "old",
        "created": "2026-01-02T03:04:05Z",
        "network": options.network,
        "image": image,
        "latent": latent,
        "labels": names or None,
        "calibration": None,
        "training": {},
        "evaluation": {},
    }
    return write_bundle(folder, facts, nets[0], nets[1], np.zeros((16, 16, 1), np.uint8))


def nets(bundle: Bundle) -> dict[str, Tensor]:
    pairs = (("generator", bundle.generator), ("discriminator", bundle.discriminator))
    return {f"{kind}/{name}": tensor for kind, net in pairs for name, tensor in net.state_dict().items()}


def state_of(preset: str, dataset: Dataset, *, conditional: bool) -> State:
    options = PRESETS[preset].model_copy(update={"conditional": conditional, "batch_size": 4})
    return State(options, dataset, CPU)


@pytest.mark.parametrize("preset", ["small", "conv-ns"])
@pytest.mark.parametrize("names", [(), ("b", "a", "c")], ids=["unconditional", "conditional"])
def test_a_run_begins_with_every_weight_of_a_bundle(preset: str, names: tuple[str, ...], tmp_path: Path) -> None:
    """Both nets and G's average, to the last bit."""
    bundle = bundle_of(preset, tmp_path / "old", *names)
    state = state_of(preset, shapes(*names), conditional=bool(names))
    assert begin_with(state, bundle, names) == []
    there, here = nets(bundle), state.tensors()
    assert there
    for name, tensor in there.items():
        assert torch.equal(here[name], tensor), name
    for name, tensor in bundle.generator.state_dict().items():
        assert torch.equal(here[f"average/{name}"], tensor), name


@pytest.mark.parametrize("preset", ["small", "conv-ns"])
def test_classes_keep_their_weights_by_name_and_new_ones_begin_anew(preset: str, tmp_path: Path) -> None:
    """With a class more, and in another order, a known class is drawn and judged as it was."""
    bundle = bundle_of(preset, tmp_path / "old", "dog", "cat")
    state = state_of(preset, shapes("cat", "dog", "owl"), conditional=True)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    assert begin_with(state, bundle, ("cat", "dog", "owl")) == ["owl"]
    latents, dogs = torch.randn(5, state.latent.dim), torch.ones(5, dtype=torch.int64)
    images = state.generator(latents, dogs)
    torch.testing.assert_close(images, bundle.generator(latents, 0 * dogs))
    seen = state.discriminator(images, dogs)
    torch.testing.assert_close(seen, bundle.discriminator(images, 0 * dogs))
    assert torch.equal(state.tensors()["discriminator/class_head.bias"][2], before["discriminator/class_head.bias"][2])


def test_what_does_not_fit_is_named_by_its_tensor(tmp_path: Path, make_tiny: Callable[..., Bundle]) -> None:
    """Other families, images, and classes that are gone or that the bundle has none of."""
    conv, classes = bundle_of("conv-ns", tmp_path / "conv"), bundle_of("conv-ns", tmp_path / "cond", "a", "b", "c")
    tiny = make_tiny(tmp_path / "tiny", ImageSpec(channels=1, height=16, width=16), None, None)
    plain, labelled = shapes(), shapes("a", "b")
    for preset, bundle, dataset, words in (
        ("conv-ns", conv, shapes(size=32), "generator's stages.3.0.widen.weight is missing"),
        ("conv-ns", tiny, plain, "generator's start.weight is missing"),
        ("conv-ns", conv, labelled, "generator's embedding.weight is missing"),
        ("conv-ns", classes, plain, "generator's start.weight is"),
        ("conv-ns", classes, labelled, "embedding.weight has 3 classes, and the data 2"),
    ):
        state = state_of(preset, dataset, conditional=dataset.label_names is not None)
        with pytest.raises(TrainingError, match=r"--init: .* does not fit: its generator's") as caught:
            begin_with(state, bundle, dataset.label_names or ())
        assert words in str(caught.value)


def train(data: Path, out: Path, *more: str) -> int:
    return main(["train", "--preset", "small", "--data", str(data), "--out", str(out), "--device", "cpu", *more])


def test_fine_tuning_is_recorded_and_goes_on_without_the_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest names the bundle; --resume needs it again only where no step was saved."""
    data, run = tmp_path / "data.npz", tmp_path / "run"
    np.savez(data, images=shapes().train.images)
    bundle = bundle_of("small", tmp_path / "old")
    init = f"old@{bundle.version}"
    assert train(data, run, "--steps", "1", "--init", str(bundle.folder)) == 0
    assert f"Beginning with the weights of {init}." in capsys.readouterr().out
    assert train(data, run, "--steps", "2", "--resume") == 0
    assert read_bundle(run / "bundle").manifest.training["options"]["init"] == init  # type: ignore[call-overload, index]
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.unlink()
    capsys.readouterr()
    assert train(data, run, "--steps", "3", "--resume") == 1
    assert f"was to begin with {init}, and has no checkpoint yet: --init says" in capsys.readouterr().err


def test_a_run_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    """Its record does not name the options that came later."""
    data, run = tmp_path / "data.npz", tmp_path / "run"
    np.savez(data, images=shapes().train.images)
    assert train(data, run, "--steps", "1") == 0
    record = json.loads((run / "options.json").read_text())
    record["options"] = {name: value for name, value in record["options"].items() if name not in {"init", "augment"}}
    (run / "options.json").write_text(json.dumps(record))
    assert train(data, run, "--steps", "2", "--resume") == 0
