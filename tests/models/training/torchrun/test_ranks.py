"""Two processes under torchrun compute what one does: gradients, losses step by step, and equal weights on both.

This file is also the program that they run.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.data.dataset import Dataset, Split, divide
from models.data.load import load_dataset
from models.spec import PRESETS, AdamSpec, SGDSpec
from models.training.torchrun.ranks import Alone, Ranks, RanksError, joined
from models.training.trainer import State, TrainingError, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[4]
CONVOLUTIONAL = ("conv-ns", "conv-hinge", "conv-r3")
FIGURES = ("d_loss", "g_loss", "d_real", "d_fake")


def shapes() -> Dataset:
    """Random images of 16×16 pixels with three labels."""
    labels = np.arange(300) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (300, 16, 16, 1)) + 50 * labels[:, None, None, None]
    return divide("shapes", Split(pixels.astype(np.uint8), labels), ("a", "b", "c"), seed=0)


@contextmanager
def double_precision() -> Iterator[None]:
    """What a step computes in float32 it computes in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(Tensor, "float", Tensor.double):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(preset: str, dataset: Dataset, ranks: Alone) -> dict[str, Tensor]:
    """Both nets' gradients in the first step, which has the penalties, in float64."""
    options = PRESETS[preset].model_copy(update={"precision": "float32", "ema_half_life_images": 0, "batch_size": 12})
    state = State(options, dataset, CPU, ranks)
    nets = {"generator": state.generator.double(), "discriminator": state.discriminator.double()}
    take = state.data.take

    def doubled(start: int, count: int) -> tuple[Tensor, Tensor | None]:
        pixels, labels = take(start, count)
        return pixels.double(), labels

    with double_precision(), mock.patch.object(state.data, "take", doubled):
        train_step(state)
    found = {f"{net}.{name}": p.grad for net, one in nets.items() for name, p in one.named_parameters()}
    return {f"gradients/{preset}/{name}": grad for name, grad in found.items() if grad is not None}


def course(preset: str, dataset: Dataset, steps: int, ranks: Alone) -> dict[str, Tensor]:
    """The figures of each step in float32, (steps, 4), and the weights in the end."""
    state = State(PRESETS[preset].model_copy(update={"precision": "float32"}), dataset, CPU, ranks)
    figures = [ranks.mean([train_step(state)])[0] for _ in range(steps)]
    weights = {f"weights/{preset}/{name}": tensor.clone() for name, tensor in state.tensors().items()}
    return {f"course/{preset}": torch.stack(figures), **weights}


def everything(ranks: Alone) -> dict[str, Tensor]:
    """All that is compared."""
    found = {name: one for preset in PRESETS for name, one in gradients(preset, shapes(), ranks).items()}
    found |= course("mlp-paper", load_dataset("digits", None, seed=0), 200, ranks)
    for preset in CONVOLUTIONAL:
        found |= course(preset, shapes(), 10, ranks)
    return found


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Found:  # noqa: ARG001
    """What one process computes, and what each of two ranks does."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return everything(Alone()), load_file(folder / "0.safetensors"), load_file(folder / "1.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_are_those_of_the_whole_batch(found: Found, preset: str) -> None:
    """Losses, penalties, class head, dropout: in float64 the mean over ranks differs by rounding only."""
    alone, *both = found
    names = [name for name in alone if name.startswith(f"gradients/{preset}/")]
    assert len(names) > 8
    largest = max(alone[name].abs().max().item() for name in names)
    assert largest > 1e-6
    for ranks in both:
        for name in names:
            assert (ranks[name] - alone[name]).abs().max() <= 1e-12 * max(1, largest), name


@pytest.mark.slow
def test_the_papers_run_has_the_losses_of_one_process(found: Found) -> None:
    """Over 200 steps of `mlp-paper`, dropout and momentum included, no figure differs by more than 1e-6."""
    alone, *both = found
    assert alone["course/mlp-paper"].shape == (200, 4)
    for ranks in both:
        assert (ranks["course/mlp-paper"] - alone["course/mlp-paper"]).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("preset", CONVOLUTIONAL)
def test_convolutions_stay_near_those_of_one_process(found: Found, preset: str) -> None:
    """Within 1e-4 over ten steps; in more, already another number of threads would lead them elsewhere."""
    alone, *both = found
    for ranks in both:
        assert (ranks[f"course/{preset}"] - alone[f"course/{preset}"]).abs().max() <= 1e-4


@pytest.mark.slow
def test_all_ranks_have_equal_weights(found: Found) -> None:
    """Nets, averages and optimisers, to the last bit, though nobody has sent them."""
    _, one, other = found
    names = [name for name in one if name.startswith("weights/")]
    assert {name.split("/")[1] for name in names} == {"mlp-paper", *CONVOLUTIONAL}
    assert any("/average/" in name for name in names)
    assert any("optimiser/" in name for name in names)
    for name in names:
        assert torch.equal(one[name], other[name]), name


def test_the_parts_of_the_ranks_are_the_whole() -> None:
    """Each row is of one rank, in order; one process has all of them."""
    rows = torch.arange(12)
    assert torch.equal(Alone().mine(rows), rows)
    assert Alone().part(24, 12) == (24, 12)
    ranks = [placed(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([rank.mine(rows) for rank in ranks]), rows)
    assert [rank.part(24, 12) for rank in ranks] == [(24, 4), (28, 4), (32, 4)]


def placed(rank: int, size: int) -> Alone:
    """A rank that knows its place, and nobody else."""
    place: Any = Alone()
    place.rank, place.size = rank, size
    one: Alone = place
    return one


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    """Three processes have no equal parts of a hundred images."""
    with pytest.raises(TrainingError, match="3 processes can't share mini-batches of 100 images: --batch-size"):
        State(PRESETS["mlp-paper"], shapes(), CPU, placed(1, 3))


VARIABLES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", None),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "two"),
        ("RANK", "2"),
        ("RANK", ""),
        ("LOCAL_RANK", "-1"),
    ],
)
def test_variables_that_cannot_be_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    """What torchrun never says ends the run with a line, before anybody waits for ranks that will not come."""
    said = VARIABLES | {"TORCHELASTIC_RUN_ID": "a"} | ({} if value is None else {name: value})
    for one, number in said.items():
        monkeypatch.setenv(one, number)
    if value is None:
        monkeypatch.delenv(name)
    with pytest.raises(
        RanksError, match=f"contradict one another: .*{name} is {'missing' if value is None else value}"
    ):
        joined()


def test_variables_mean_nothing_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other launchers set them for programs of theirs; one process of torchrun is alone too."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, number in VARIABLES.items():
        monkeypatch.setenv(name, number)
    assert joined().size == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert joined().size == 1


def test_the_optimisers_of_the_presets_are_all_among_those_compared() -> None:
    """Both kinds keep something of earlier gradients, which must be equal on all ranks."""
    kinds = {type(PRESETS[preset].generator_optimiser) for preset in ("mlp-paper", *CONVOLUTIONAL)}
    assert kinds == {SGDSpec, AdamSpec}


if __name__ == "__main__":
    here = joined()
    assert isinstance(here, Ranks)
    save_file(everything(here), Path(sys.argv[1]) / f"{here.rank}.safetensors")
    here.any(flag=False)  # until both are done
    here.end(0)
