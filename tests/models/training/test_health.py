"""Runs that go wrong are stopped by the right alarm, healthy ones by none, and monitoring changes nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.__main__ import main
from models.data.dataset import Split
from models.data.load import Dataset, load_dataset
from models.spec import PRESETS, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec, TrainingOptions
from models.training import trainer
from models.training.health import MIN_PROBES, HealthMonitor, Probe, TrainingHealth, row_of
from models.training.trainer import State

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "data"
SAMPLE = DATA / "mnist-2000.npz"
COURSES = json.loads((DATA / "health-courses.json").read_text())  # of real runs; docs/log.md says which
WELL = TrainingHealth(
    pairs_right=0.9, train_over_validation=0.5, r_v=0.1, diversity=0.8, g_gradient=1.0, d_gradient=1.0
)

SMALL = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(64, 64)),
    discriminator=MaxoutDiscriminatorSpec(units=(48, 48), pieces=2, keep_input=1.0, keep_hidden=1.0),
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(str(SAMPLE), None, seed=0)


def options_of(preset: str, **changes: Any) -> TrainingOptions:
    """A preset with small nets, so that a sick run's course takes seconds."""
    return TrainingOptions.model_validate(dict(PRESETS[preset]) | {"network": SMALL} | changes)


def faster(options: TrainingOptions, factor: float) -> TrainingOptions:
    """The same with both learning rates multiplied."""
    rates = {
        name: (spec := getattr(options, name)).model_copy(update={"lr": spec.lr * factor})
        for name in ("generator_optimiser", "discriminator_optimiser")
    }
    return options.model_copy(update=rates)


def few_images(dataset: Dataset, path: Path) -> Path:
    """64 of them, without labels."""
    np.savez(path, images=dataset.train.images[:64])
    return path


# --- Runs that go wrong on purpose -------------------------------------------------------------------------------


def run_of(options: TrainingOptions, data: Path | str, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    # Large mini-batches and few steps take the least time.
    monkeypatch.setattr("models.commands.training.loop.REPORT_EVERY", 10)
    sick = {"preset": "sick", "score_every": 10**6, "batch_size": 500}
    monkeypatch.setitem(PRESETS, "sick", options.model_copy(update=sick))
    command = ["train", "--preset", "sick", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return main([*command, "--checkpoint-every", "20", *more])


@pytest.mark.slow
def test_a_discriminator_that_runs_ahead_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """k = 20 with the saturating loss: D tells all apart, G gets no gradient and never begins."""
    options = options_of(
        "mlp-paper", update="alternating", d_steps=20, generator_loss="saturating", d_loss_scale=1.0, steps=400
    )
    assert run_of(options, "digits", tmp_path / "run", monkeypatch) == 4
    told = capsys.readouterr().err
    assert "warning: step" in told
    assert "error: stopped at step" in told
    assert "out of step: D tells" in told.splitlines()[-1]


def test_rates_that_are_a_hundred_times_too_high_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are no numbers any more."""
    assert run_of(faster(options_of("mlp-paper", steps=400), 100), SAMPLE, tmp_path / "run", monkeypatch) == 4
    assert "error: training diverged by step" in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_are_learnt_by_heart_stop_the_run_and_the_last_good_state_is_kept(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """64 images: the alarm names memorising; resuming with fewer steps makes a bundle, with --alarms warn goes on."""
    data, out = few_images(digits, tmp_path / "few.npz"), tmp_path / "run"
    options = faster(options_of("mlp-adam", steps=600), 3)
    assert run_of(options, data, out, monkeypatch) == 4
    assert "memorising: D ranks a training image above" in capsys.readouterr().err.splitlines()[-1]
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert rows[-1]["alarms"][0].startswith("memorising")
    held = [row["step"] for row in rows if row["train_over_validation"] >= 0.75]
    kept = [int(path.stem[5:]) for path in (out / "checkpoints").iterdir()]
    assert max(kept) < rows[-1]["step"]
    assert run_of(options, data, out, monkeypatch, "--resume", "--steps", str(max(kept))) == 0
    assert (out / "bundle" / "manifest.json").exists()
    assert run_of(options, data, out, monkeypatch, "--resume", "--alarms", "warn", "--steps", str(held[-1] + 20)) == 0
    assert "warning" in capsys.readouterr().err


# --- Measured courses --------------------------------------------------------------------------------------------


def replayed(course: dict[str, Any]) -> tuple[int, str] | None:
    """Step and name of the first alarm that would have stopped the run."""
    monitor = HealthMonitor(course["images_per_step"])
    for step, pairs_right, train_over_validation, diversity in course["rows"]:
        now = replace(WELL, pairs_right=pairs_right, train_over_validation=train_over_validation, diversity=diversity)
        alarms = monitor.see(step, now)
        if alarms and alarms[0].stop:
            return step, alarms[0].name
    return None


@pytest.mark.parametrize("name", ["paper", "adam", "dig-paper", "dig-adam", "conv-ns", "conv-hinge", "conv-r3"])
def test_no_preset_trips_an_alarm(name: str) -> None:
    """The shipped presets as they ran on MNIST, and on the small digits: the paper's early lead of D is no alarm."""
    assert replayed(COURSES[name]) is None


@pytest.mark.parametrize(
    ("name", "alarm"),
    [
        ("few-adam", "memorising"),
        ("few-paper", "memorising"),
        ("k20-adam", "out of step"),
        ("k20-paper", "out of step"),
    ],
)
def test_full_size_runs_that_went_wrong_trip_theirs(name: str, alarm: str) -> None:
    """The paper's nets, with 64 images or with k = 20 and the saturating loss."""
    found = replayed(COURSES[name])
    assert found is not None
    assert found[1] == alarm


def test_a_collapse_is_told_from_a_start() -> None:
    """Images that are alike are how G begins; after they have differed, it is a collapse."""
    alike = replace(WELL, diversity=0.01)
    begins, collapses = HealthMonitor(100), HealthMonitor(100)
    for step in range(0, 2_000, 50):
        assert not begins.see(step, alike)
    collapses.see(0, WELL)
    alarms = [collapses.see(step, alike) for step in range(100, 1_300, 100)]
    assert [len(raised) for raised in alarms] == [0] * 5 + [1] * 7
    assert [raised[0].stop for raised in alarms[5:]] == [False] * 5 + [True] * 2
    assert alarms[-1][0].name == "collapse"
    assert collapses.good_step == 0
    assert not collapses.see(1_300, WELL)
    assert collapses.good_step == 1_300


def test_one_look_is_never_an_alarm() -> None:
    """However many images lie between two looks."""
    monitor = HealthMonitor(10**9)
    raised = [monitor.see(step, replace(WELL, train_over_validation=1.0)) for step in range(1, MIN_PROBES + 1)]
    assert [bool(alarms) for alarms in raised] == [False] * (MIN_PROBES - 1) + [True]


def test_health_without_numbers_raises_nothing() -> None:
    """A data set of equal images has no diversity to compare with."""
    monitor = HealthMonitor(10**9)
    nothing = TrainingHealth(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)
    assert not [alarm for step in range(20) for alarm in monitor.see(step, nothing)]
    assert set(row_of(nothing).values()) == {None}


@pytest.mark.parametrize("cut", [1, 20, 30])
def test_a_resumed_run_worries_on(cut: int) -> None:
    """The alarms after a resume are those of the uninterrupted run: their state is in stats.jsonl."""
    course = COURSES["few-paper"]
    looks = [
        (step, replace(WELL, pairs_right=right, train_over_validation=memory, diversity=diversity, r_v=math.nan))
        for step, right, memory, diversity in course["rows"]
    ]
    whole = HealthMonitor(100)
    expected = [whole.see(*look) for look in looks]
    rows = [json.loads(json.dumps({"step": step, **row_of(now)})) for step, now in looks[:cut]]
    resumed = HealthMonitor(100, [*rows, {"step": 10**6, "seconds": 1.0}])
    assert [resumed.see(*look) for look in looks[cut:]] == expected[cut:]
    assert resumed.good_step == whole.good_step


# --- Monitoring --------------------------------------------------------------------------------------------------


def test_monitoring_changes_no_bit(digits: Dataset) -> None:
    """Weights, optimisers and the step are the same after ten steps with and without a look at each."""
    states = [State(options_of("mlp-adam"), digits, torch.device("cpu")) for _ in range(2)]
    probe = Probe(states[1], digits)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for _ in range(10):
        for state in states:
            trainer.train_step(state)
        probe.look()
    assert torch.equal(torch.random.get_rng_state(), before)
    plain, monitored = (state.tensors() for state in states)
    assert plain.keys() == monitored.keys()
    assert all(torch.equal(plain[name], monitored[name]) for name in plain)
    assert all(module.training for module in states[1].generator.modules())


def test_health_is_what_it_says(digits: Dataset) -> None:
    """Against the definitions, written out in NumPy over the same images."""
    state = State(options_of("mlp-adam"), digits, torch.device("cpu"))
    for _ in range(20):
        trainer.train_step(state)
    probe = Probe(state, digits)
    now = probe.look()
    with torch.no_grad():
        fake = state.generator(probe.latents)
        d_train, d_validation, d_fake = (
            state.discriminator(images).double().numpy() for images in (probe.train, probe.validation, fake)
        )
    assert now.pairs_right == pytest.approx(np.mean(d_train[:, None] > d_fake), abs=1e-3)
    assert now.train_over_validation == pytest.approx(np.mean(d_train[:, None] > d_validation), abs=1e-3)
    assert now.r_v == pytest.approx((d_train.mean() - d_validation.mean()) / (d_train.mean() - d_fake.mean()), rel=1e-3)

    def distance(images: torch.Tensor) -> float:
        flat = images.flatten(1).double().numpy()
        pairs = [(a, b) for a in range(len(flat)) for b in range(a)]
        return float(np.mean([np.linalg.norm(flat[a] - flat[b]) for a, b in pairs]))

    assert now.diversity == pytest.approx(distance(fake) / distance(probe.train), rel=1e-4)
    norms = [np.linalg.norm(p.grad.numpy()) for p in state.generator.parameters() if p.grad is not None]
    assert now.g_gradient == pytest.approx(np.linalg.norm(norms), rel=1e-4)


def test_a_conditional_run_is_monitored_with_labels() -> None:
    """Labels go with the images that have them."""
    labelled = load_dataset("digits", None, seed=0)
    state = State(options_of("mlp-adam", conditional=True), labelled, torch.device("cpu"))
    trainer.train_step(state)
    assert 0 <= Probe(state, labelled).look().pairs_right <= 1


def test_few_images_are_enough(digits: Dataset) -> None:
    """A set of ten has one image to validate with."""
    images = digits.train.images[:8]
    tiny = replace(digits, train=Split(images, None), validation=Split(images[:1], None), test=Split(images[:1], None))
    state = State(options_of("mlp-adam"), tiny, torch.device("cpu"))
    assert Probe(state, tiny).look().diversity >= 0
    assert Probe(state, tiny).every(50) == 50
    small = State(options_of("mlp-adam", batch_size=8), tiny, torch.device("cpu"))
    assert Probe(small, tiny).every(50) == 650
