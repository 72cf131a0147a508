"""What D sees of images: changed alike in both turns, differentiable, by the whole batch's draws; ADA's controller."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from models.__main__ import main
from models.data.dataset import Dataset, Split, divide
from models.spec import PRESETS, AugmentName, TrainingOptions
from models.training import augmentation
from models.training.augmentation import MOST, RISE_IMAGES, TARGET, Augmentation, Draws
from models.training.health import HealthMonitor, TrainingHealth
from models.training.run_folder import RunDir
from models.training.torchrun.ranks import Alone
from models.training.trainer import State, train_step

pytestmark = pytest.mark.usefixtures("one_thread", "small_preset")

CPU = torch.device("cpu")
KINDS: tuple[AugmentName, ...] = ("flip", "diffaugment", "ada")


def of(kind: AugmentName, p: float = 0.7) -> Augmentation:
    found = Augmentation(kind, CPU)
    found.p = torch.tensor(p)
    return found


def seen(kind: AugmentName, images: Tensor, seed: int = 0, p: float = 0.7) -> Tensor:
    return of(kind, p)(images, torch.Generator().manual_seed(seed), Alone())


def pictures(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def ramps(count: int = 100) -> Dataset:
    """Images of 8×8 that are bright on the left and dark on the right, at random heights."""
    rows = np.random.default_rng(0).integers(100, 255, (count, 8, 1, 1)) * np.linspace(1, 0, 8)[:, None]
    return divide("ramps", Split(rows.astype(np.uint8), None), None, seed=0)


def options_of(kind: AugmentName, preset: str = "small", **changes: Any) -> TrainingOptions:
    return PRESETS[preset].model_copy(update={"augment": kind, "batch_size": 4, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 1, 8, 8), (64, 3, 9, 6)], ids=["grey", "colour"])
def test_images_are_changed_and_keep_their_shape(kind: AugmentName, shape: tuple[int, ...]) -> None:
    """Not all of them by `flip` and `ada`; and the same numbers change them in the same way."""
    images = pictures(*shape)
    changed = seen(kind, images)
    assert changed.shape == images.shape
    assert changed.isfinite().all()
    assert torch.equal(changed, seen(kind, images))
    differs = ((changed - images).abs().amax(dim=(1, 2, 3)) > 1e-3).double().mean()
    assert 0.1 < differs <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_have_the_gradients_of_finite_differences(kind: AugmentName) -> None:
    """By every pixel, in float64: what G learns through."""
    draws = Draws(
        torch.rand((3, 19), dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        torch.randn((3, 7), dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    for channels in (1, 3):
        images = pictures(3, channels, 5, 4).double().requires_grad_()
        assert torch.autograd.gradcheck(partial(of(kind).changed, draws=draws), (images,))


def test_nothing_happens_without_and_where_p_is_0() -> None:
    """No random number is drawn for `none`, so its runs are those of earlier releases; ADA begins with real images."""
    images, rng = pictures(4, 1, 8, 8), torch.Generator().manual_seed(0)
    before = rng.get_state()
    assert Augmentation("none", CPU)(images, rng, Alone()) is images
    assert torch.equal(rng.get_state(), before)
    torch.testing.assert_close(seen("ada", images, p=0.0), images, rtol=0, atol=1e-5)


def test_a_quarter_is_mirrored() -> None:
    """Well under half, so that D knows which way round images are."""
    images = pictures(1, 1, 4, 4).repeat(4000, 1, 1, 1)
    changed = seen("flip", images)
    mirrored = (changed == images.flip(3)).all(dim=3).all(dim=2).squeeze(1)
    assert torch.equal(changed[~mirrored], images[~mirrored])
    assert mirrored.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_shifts_are_whole_and_come_with_black() -> None:
    """DiffAugment's: by up to an eighth of 16 pixels to each side, all of them about as often."""
    images = torch.zeros(2000, 1, 16, 16)
    images[:, :, 8, 8] = 1
    uniform = torch.rand((2000, 19), generator=torch.Generator().manual_seed(0))
    places = augmentation.shifted(images, uniform).flatten(1).argmax(dim=1)
    rows, columns = places // 16, places % 16
    for found in (rows, columns):
        counts = torch.bincount(found, minlength=16)
        assert counts.nonzero().flatten().tolist() == [6, 7, 8, 9, 10]
        assert counts[6:11].min() > 300
    dark = augmentation.cut_out(torch.ones(500, 1, 16, 16), uniform[:500]) == 0
    assert dark.flatten(1).sum(dim=1).max() == 64
    assert dark.any(dim=0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_see_what_one_process_does(kind: AugmentName) -> None:
    """Each changes its rows as the whole batch's numbers say, and moves p by all ranks' logits."""
    images = pictures(6, 1, 8, 8)
    whole = seen(kind, images)
    for rank in range(2):
        place: Any = Alone()
        place.rank, place.size = rank, 2
        mine = of(kind)(place.mine(images), torch.Generator().manual_seed(0), place)
        assert torch.equal(mine, place.mine(whole))


# --- ADA's controller ----------------------------------------------------------------------------------------------


def test_p_rises_while_d_is_too_sure_and_falls_again() -> None:
    """By so much for every image; from 0 to no more than the bound."""
    ada, ranks = Augmentation("ada", CPU), Alone()
    sure, unsure = torch.ones(100), torch.tensor([1.0, -1.0]).repeat(50)
    for _ in range(10):
        ada.see(sure, -sure, ranks, paired=False)
    assert ada.p.item() == pytest.approx(1000 / RISE_IMAGES)
    assert 0 < ada.r_t.item() < 1
    for _ in range(20):
        ada.see(unsure, -sure, ranks, paired=False)
    assert ada.p.item() == 0
    for _ in range(2000):
        ada.see(sure, -sure, ranks, paired=False)
    assert ada.p.item() == pytest.approx(MOST)
    assert ada.r_t.item() > TARGET


def test_a_relativistic_d_is_judged_by_differences() -> None:
    """Whatever it adds to all of its logits."""
    for offset in (-50.0, 0.0, 50.0):
        ada = Augmentation("ada", CPU)
        ada.see(torch.ones(10) + offset, -torch.ones(10) + offset, Alone(), paired=True)
        assert ada.p > 0


@pytest.mark.parametrize("preset", ["small", "conv-r3", "mlp-paper"])
def test_d_sees_changed_images_in_both_turns(preset: str) -> None:
    """Real and generated ones alike: whatever enters D has come through the augmentation; nothing else has."""
    size = 16 if preset.startswith("conv") else 8
    pixels = np.random.default_rng(0).integers(0, 255, (40, size, size, 1)).astype(np.uint8)
    dataset = divide("random", Split(pixels, None), None, seed=0)
    state = State(options_of("diffaugment", preset, conditional=False, precision="float32"), dataset, CPU)
    made: list[Tensor] = []
    judged: list[Tensor] = []
    changed, forward = state.augmentation.changed, state.discriminator.forward

    def note(images: Tensor, draws: Draws) -> Tensor:
        made.append(changed(images, draws))
        return made[-1]

    def judge(images: Tensor, *rest: Any) -> Tensor:
        judged.append(images)
        return forward(images, *rest)

    with (
        mock.patch.object(state.augmentation, "changed", note),
        mock.patch.object(state.discriminator, "forward", judge),
    ):
        train_step(state)
    assert len(made) == (2 if preset == "mlp-paper" else 3)  # real, generated, and generated in G's turn
    for images in judged:
        assert any(torch.equal(images, one) for one in made)


@pytest.mark.parametrize("preset", ["small", "conv-ns"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: AugmentName, preset: str, tmp_path: Path) -> None:
    """To the last bit, p included, through a file."""
    size = 16 if preset.startswith("conv") else 8
    pixels = np.random.default_rng(0).integers(0, 255, (40, size, size, 1)).astype(np.uint8)
    dataset = divide("random", Split(pixels, np.arange(40) % 2), ("a", "b"), seed=0)
    straight, first, second = (State(options_of(kind, preset), dataset, CPU) for _ in range(3))
    for _ in range(5):
        train_step(straight)
    for _ in range(2):
        train_step(first)
    folder = RunDir(tmp_path)
    folder.begin({})
    folder.save_checkpoint(first.step, first.tensors(), first.metadata())
    found = folder.newest_checkpoint()
    assert found is not None
    second.load(*found)
    for _ in range(3):
        train_step(second)
    assert ("augmentation/p" in straight.tensors()) is (kind == "ada")
    for name, tensor in straight.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_into_the_samples(kind: AugmentName) -> None:
    """Trained on images that are bright on the left, G draws them so, though D saw mirrored, cut and turned ones."""
    dataset = ramps()
    state = State(options_of(kind, batch_size=32), dataset, CPU)
    state.augmentation.p = torch.tensor(MOST / 2)
    for _ in range(250):
        train_step(state)
    latents = torch.randn(200, state.latent.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = state.ema_generator(latents)
    left, right = drawn[..., :4].mean(dim=(1, 2, 3)), drawn[..., 4:].mean(dim=(1, 2, 3))
    assert (left > right + 0.1).double().mean() > 0.95
    real = torch.from_numpy(dataset.train.images).double().mean() / 255
    assert drawn.mean().item() == pytest.approx(real.item(), abs=0.1)


# --- The run -------------------------------------------------------------------------------------------------------


def test_the_alarm_says_what_there_is_to_do() -> None:
    """A run that memorises is led to `--augment`; one that has it already, to what is left."""
    sick = TrainingHealth(0.9, 0.9, 0.9, 0.8, 1.0, 1.0)
    told = {}
    for kind in ("none", *KINDS):
        monitor = HealthMonitor(10**6, augment=kind)
        for step in range(1, 6):
            alarms = monitor.see(step, sick)
        told[kind] = alarms[0].text
    assert "by heart: --augment ada (--resume --override takes it up), --init" in told["none"]
    assert "--augment ada" in told["flip"]
    assert "in spite of --augment ada: --init" in told["ada"]
    assert "in spite of --augment diffaugment" in told["diffaugment"]


def test_a_run_that_memorises_can_take_augmentation_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume --augment ada --override goes on, with p from 0, and stats.jsonl has its course."""
    monkeypatch.setattr("models.training.report.page", lambda _: "")
    data, run = tmp_path / "data.npz", tmp_path / "run"
    np.savez(data, images=ramps().train.images)
    command = ["train", "--preset", "small", "--data", str(data), "--out", str(run), "--device", "cpu"]
    assert main([*command, "--steps", "2"]) == 0
    more = ["--resume", "--augment", "ada", "--steps", "60"]
    assert main([*command, *more]) == 1
    assert main([*command, *more, "--override"]) == 0
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert "augment_p" not in rows[0]
    assert all(0 <= row["augment_p"] <= MOST for row in rows if row["step"] > 2 and "d_loss" in row)
