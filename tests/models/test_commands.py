"""The offline commands as a person uses them: end to end on small data, interrupted, resumed, and given nonsense."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from models.__main__ import command_parser, main
from models.bundle import NAME_PATTERN, read_bundle
from models.commands import train as train_command
from models.commands.signals import Interrupted, StopOnSignal
from models.commands.training.options import PRESET_WORDS, default_name, resolve
from models.data.load import load_dataset
from models.images.preparation import Preparation
from models.spec import (
    PRESETS,
    AdamSpec,
    LatentSpec,
    MaxoutDiscriminatorSpec,
    MLPGeneratorSpec,
    MLPSpec,
    TrainingOptions,
)
from models.training import publishing, trainer
from models.training.progress import PLAIN_EVERY_S, TrainingProgress
from models.training.run_folder import RunDir
from models.training.snapshots import Snapshots
from models.training.trainer import SELECTIONS, Best, Report, State
from service.engine.bundles.index import find_folders

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
COMMANDS = (
    *("train", "evaluate", "inspect", "export", "generate", "keygen", "sign", "card"),
    *("toy", "interpolate", "neighbours", "classes", "evolution", "verdicts"),
)

QUICK = TrainingOptions(
    preset="quick",
    network=MLPSpec(
        family="mlp",
        generator=MLPGeneratorSpec(hidden=(16,)),
        discriminator=MaxoutDiscriminatorSpec(units=(8,), pieces=2),
    ),
    latent=LatentSpec(dim=4, distribution="normal"),
    steps=60,
    batch_size=8,
    update="alternating",
    generator_loss="nonsaturating",
    generator_optimiser=AdamSpec(lr=1e-3),
    discriminator_optimiser=AdamSpec(lr=1e-3),
    ema_half_life_images=100,
    score_every=25,
)

# Its checkpoints are larger than a run's report.
WIDE = TrainingOptions.model_validate(
    {
        **dict(QUICK),
        "preset": "wide",
        "network": MLPSpec(
            family="mlp",
            generator=MLPGeneratorSpec(hidden=(256,)),
            discriminator=MaxoutDiscriminatorSpec(units=(8,), pieces=2),
        ),
    }
)

# The same commands in a process of their own, with the quick preset beside the real ones.
PROGRAM = f"""
import sys, torch
from models.spec import PRESETS, TrainingOptions
from models.__main__ import main
torch.set_num_threads(1)
PRESETS["quick"] = TrainingOptions.model_validate_json({QUICK.model_dump_json()!r})
PRESETS["classes"] = PRESETS["quick"].model_copy(update={{"preset": "classes", "conditional": True}})
PRESETS["wide"] = TrainingOptions.model_validate_json({WIDE.model_dump_json()!r})
"""


@pytest.fixture(autouse=True)
def _keyboard() -> Iterator[None]:
    """Ctrl-C as a terminal has it: jobs that a shell runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _quick_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "quick", QUICK)
    monkeypatch.setitem(PRESETS, "wide", WIDE)
    monkeypatch.setitem(PRESETS, "classes", QUICK.model_copy(update={"preset": "classes", "conditional": True}))


@pytest.fixture(autouse=True)
def _quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it does not matter how good the features are."""
    monkeypatch.setattr("models.evaluation.features.LEAST_UPDATES", 5)


@pytest.fixture
def real_report() -> None:
    """For tests that are about the report."""


@pytest.fixture(autouse=True)
def _blank_reports(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Most runs here take less time than the charts of their report, which has tests of its own."""
    if "real_report" not in request.fixturenames:
        monkeypatch.setattr("models.training.report.page", lambda _: "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 RGB images of 10 × 6 pixels with three labels."""
    path = tmp_path_factory.mktemp("data") / "Colours (small).npz"
    random = np.random.default_rng(0)
    labels = np.arange(80) % 3
    images = random.integers(0, 100, (80, 10, 6, 3)) + 50 * labels[:, None, None, None]
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="module")
def _recorded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "quick", QUICK)
        assert train(data, out, "--steps", "3") == 0
    return out


@pytest.fixture
def short_run(_recorded: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of three steps."""
    return Path(shutil.copytree(_recorded, tmp_path / "short"))


def train(data: Path | str, out: Path, *more: str, preset: str = "quick") -> int:
    return main(["train", "--preset", preset, "--data", str(data), "--out", str(out), "--device", "cpu", *more])


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()]


def computed(out: Path) -> list[dict[str, Any]]:
    """The rows of stats.jsonl without those figures that the clock gives."""
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row.keys() - {"seconds", "images_per_s"}} for row in rows]


def weights_of(out: Path) -> list[dict[str, Any]]:
    """What the manifest says of both weight files: equal where every bit is."""
    files = read_bundle(out / "bundle").manifest.files
    return [files[f"{net}.safetensors"].model_dump() for net in ("generator", "discriminator")]


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# --- The whole way -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("real_report")
def test_training_leaves_the_whole_record_of_a_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options, statistics, pictures, the newest two checkpoints and a bundle, from RGB images that are not square."""
    out = tmp_path / "new" / "run"
    assert train(data, out, "--checkpoint-every", "20", "--seed", "5", preset="classes") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("bundle", "checkpoints", "data.json", "last", "options.json", "report.html", "samples", "stats.jsonl")
    ]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "real.png",
        *(f"step-{step:06d}.png" for step in (0, 20, 25, 40, 50, 60)),
    ]
    options = json.loads((out / "options.json").read_bytes())
    assert TrainingOptions.model_validate_json(json.dumps(options["options"])).seed == 5
    assert steps_of(out) == [20, 25, 40, 50, 60]
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert all(row["seconds"] >= 0 and row["images_per_s"] > 0 for row in rows)
    assert [row["step"] for row in rows if "validation_log_likelihood" in row] == [25, 50, 60]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        *("step-000050.safetensors", "step-000060.safetensors")
    ]
    with Image.open(out / "samples" / "step-000060.png") as picture:
        assert (picture.size, picture.mode) == ((8 * 6, 8 * 10), "RGB")
    bundle = read_bundle(out / "bundle")
    assert bundle.name == "colours-small-classes"
    assert bundle.manifest.image.shape == (3, 10, 6)
    assert bundle.manifest.labels == ("0", "1", "2")
    assert bundle.manifest.training["seed"] == 5
    assert f"{bundle.name}@{bundle.version}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_paper_preset_trains_on_the_digits_that_ship_with_scikit_learn(tmp_path: Path) -> None:
    """A first try without a download, in a process of its own: 8 × 8 grey digits through the paper's nets."""
    command = [sys.executable, "-m", "models", "train", "--preset", "mlp-paper", "--data", "digits", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "run" / "bundle")
    assert bundle.name == "digits-mlp-paper"
    assert bundle.manifest.image.shape == (1, 8, 8)
    assert bundle.manifest.labels is None


@pytest.mark.slow
def test_tensorboard_has_the_numbers_of_the_stats(data: Path, tmp_path: Path) -> None:
    """Every scalar at its step and the grids, read back by TensorBoard; after a resume too, and no weight differs."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(data, tmp_path / "plain") == 0
    assert train(data, tmp_path / "run", "--tensorboard", "--steps", "40") == 0
    assert train(data, tmp_path / "run", "--tensorboard", "--resume") == 0
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), {"images": 0})  # all of them
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    read = {event.step: event.value for event in events.Scalars("d_loss")}
    assert read == pytest.approx({row["step"]: row["d_loss"] for row in rows})
    assert [event.step for event in events.Scalars("validation_log_likelihood")] == [25, 40, 50, 60]
    assert [event.step for event in events.Images("samples")] == [0, 25, 40, 50, 60]


def test_evaluate_prints_a_table_and_one_line_of_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pipe gets the JSON and nothing else, a person the table; --record keeps the version and writes the scores."""
    assert train(data, tmp_path / "run", preset="classes") == 0
    bundle = read_bundle(tmp_path / "run" / "bundle")
    capsys.readouterr()
    assert main(["evaluate", str(bundle.folder), "--data", str(data), "--device", "cpu", "--record"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    lines = lines[next(place for place, line in enumerate(lines) if line.startswith("score ")) :]
    lines = [line for line in lines if not line.startswith("scoring: ")]
    rows = ["generator", "training images", "k-means centroids", "uniform noise"]
    assert [line[:22].strip() for line in lines[-4:]] == rows
    scores = json.loads(out)
    assert scores["skipped"] == []
    figures = scores["suite"]["figures"]
    assert [line.split()[0] for line in lines[1 : 1 + len(figures)]] == list(figures)
    assert {"frechet", "kernel", "coverage", "accuracy_worst_class", "copying", "recall_control"} <= set(figures)
    assert all(math.isfinite(figure["value"]) for figure in figures.values())
    assert scores["suite"]["features"]["kind"] == "trained"
    assert scores["suite"]["control"]["kind"] == "untrained"
    assert (scores["bundle"], scores["version"]) == (bundle.name, bundle.version)
    assert list(scores["parzen"]) == rows
    again = read_bundle(bundle.folder)
    assert again.version == bundle.version
    assert again.manifest.evaluation["parzen"] == scores["parzen"]
    assert again.manifest.evaluation["suite"] == scores["suite"]
    assert "validation_parzen" in again.manifest.evaluation  # from training: recording adds
    assert again.manifest.evaluation["verdicts"] == scores["verdicts"]


def test_verdicts_are_counted_by_training_and_again_on_test_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First on the validation images; --verdicts-only --record puts the test images' there and leaves the rest."""
    assert train(data, tmp_path / "run", "--steps", "5", preset="classes") == 0
    bundle = read_bundle(tmp_path / "run" / "bundle")
    first: Any = bundle.manifest.evaluation["verdicts"]
    assert first["split"] == "validation"
    capsys.readouterr()
    assert main(["evaluate", str(bundle.folder), "--data", str(data), "--verdicts-only", "--record"]) == 0
    said = json.loads(capsys.readouterr().out)
    again = read_bundle(bundle.folder)
    assert again.version == bundle.version
    assert again.manifest.evaluation == {**bundle.manifest.evaluation, "verdicts": said["verdicts"]}
    assert said["verdicts"]["split"] == "test"
    assert said["verdicts"]["data"] == first["data"]
    for verdicts in (first, said["verdicts"]):
        assert [len(verdicts[name]) for name in ("real", "generated")] == [20, 20]
        assert sum(verdicts["real"]) == sum(verdicts["generated"]) == 8


def test_evaluate_stops_in_time_and_says_what_is_missing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No figure is begun after the limit; each one left out is named, in the table and for programs."""
    assert train(data, tmp_path / "run", "--steps", "5") == 0
    capsys.readouterr()
    command = ["evaluate", str(tmp_path / "run" / "bundle"), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--time-limit", "0"]) == 0
    out, err = capsys.readouterr()
    skipped = json.loads(out)["skipped"]
    assert [line for line in err.splitlines() if ":" in line and line.startswith("not")] == [
        f"not computed: {reason}" for reason in skipped
    ]
    assert [reason.partition(":")[0] for reason in skipped] == [
        *("distances", "overlap", "classes", "memorisation", "memorisation in pixels", "control"),
        "verdicts",
        "Parzen windows after 0 rows",
    ]


def test_evaluate_draws_samples_beside_their_nearest_training_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve columns of three rows: the sample, the nearest by pixels, the nearest by features."""
    assert train(data, tmp_path / "run", "--steps", "5") == 0
    command = ["evaluate", str(tmp_path / "run" / "bundle"), "--data", str(data), "--device", "cpu"]
    assert main([*command, "--time-limit", "0", "--neighbours", str(tmp_path / "new" / "near.png")]) == 0
    with Image.open(tmp_path / "new" / "near.png") as picture:
        assert (picture.size, picture.mode) == ((12 * 6, 3 * 10), "RGB")
    capsys.readouterr()
    assert main([*command, "--neighbours", str(tmp_path / "near.txt")]) == 1
    assert "the name must end in .png" in only_error(capsys)  # before anything is scored


def test_a_set_too_small_for_the_figures_still_gets_its_log_likelihood(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 images leave two for the test: the figures are left out with the reason."""
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8))
    assert train(tmp_path / "few.npz", tmp_path / "run", "--steps", "2") == 0
    command = ["evaluate", str(tmp_path / "run" / "bundle"), "--data", str(tmp_path / "few.npz")]
    assert main([*command, "--neighbours", str(tmp_path / "near.png")]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "suite" not in scores
    assert scores["skipped"] == [
        "figures: they need 6 test images and 30 training images; few has 2 and 16",
        "neighbours: as the figures",
    ]
    assert len(scores["parzen"]) == 4


def test_a_set_too_small_for_the_frechet_distance_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not at the first score, after thousands of steps; one image more is enough."""
    images = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", images=images[:19])
    assert train(tmp_path / "few.npz", tmp_path / "run", "--selection", "frechet") == 1
    assert only_error(capsys) == (
        "error: few is too small for the Fréchet distance: 20 images are the least; --selection parzen takes fewer"
    )
    assert not (tmp_path / "run").exists()
    np.savez(tmp_path / "few.npz", images=images)
    assert train(tmp_path / "few.npz", tmp_path / "run", "--selection", "frechet", "--steps", "2") == 0


def test_a_bundle_is_not_asked_for_the_labels_of_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its classes mean something else there: all else is scored, and a warning says that the data are others."""
    assert train(data, tmp_path / "run", "--steps", "5", preset="classes") == 0
    with np.load(data) as arrays:
        np.savez(tmp_path / "other.npz", images=arrays["images"], labels=arrays["labels"] % 2)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run" / "bundle"), "--data", str(tmp_path / "other.npz")]) == 0
    out, err = capsys.readouterr()
    scores = json.loads(out.splitlines()[-1])
    assert scores["skipped"] == [
        f"{part}: the labels of colours-small-classes are not those of other" for part in ("accuracy", "verdicts")
    ]
    assert "verdicts" not in scores
    assert "classifier_score" in scores["suite"]["figures"]
    assert "accuracy" not in scores["suite"]["figures"]
    assert "warning: this is not the data that the bundle was trained on" in err
    assert main(["evaluate", str(tmp_path / "run" / "bundle"), "--data", str(data), "--time-limit", "0"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_run_can_be_chosen_by_the_frechet_distance_and_keeps_its_last_weights(data: Path, tmp_path: Path) -> None:
    """bundle/ has the weights of the lowest score in stats.jsonl, last/bundle/ those of the last step; both say so."""
    assert train(data, tmp_path, "--selection", "frechet", preset="classes") == 0
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    scored = {row["step"]: row["validation_frechet"] for row in rows if "validation_frechet" in row}
    assert list(scored) == [25, 50, 60]
    best, last = (read_bundle(tmp_path / name).manifest for name in ("bundle", "last/bundle"))
    lowest = min(scored, key=lambda step: scored[step])
    assert best.training["selection"] == {"rule": "lowest validation Fréchet distance", "step": lowest}
    assert last.training["selection"] == {"rule": "last step", "step": 60}
    found: Any = best.evaluation["validation_frechet"]
    assert found["frechet"] == scored[lowest]
    assert len(found["features_sha256"]) == 64
    newest = RunDir(tmp_path).newest_checkpoint()
    assert newest is not None
    shown = read_bundle(tmp_path / "last" / "bundle").generator.state_dict()
    assert all(torch.equal(tensor, newest[0][f"average/{name}"]) for name, tensor in shown.items())


def test_evaluate_divides_the_data_as_training_did(data: Path, tmp_path: Path) -> None:
    """Another seed would put test images among those that were trained on: the bundle's is taken."""
    assert train(data, tmp_path / "run", "--seed", "9", "--steps", "5") == 0
    folder = tmp_path / "run" / "bundle"
    trained_on = json.loads((tmp_path / "run" / "options.json").read_bytes())["data"]["checksum"]
    assert main(["evaluate", str(folder), "--data", str(data), "--device", "cpu", "--record", "--time-limit", "0"]) == 0
    evaluation: Any = read_bundle(folder).manifest.evaluation
    assert evaluation["data"]["checksum"] == trained_on
    assert (
        main(
            [
                "evaluate",
                str(folder),
                "--data",
                str(data),
                "--seed",
                "1",
                "--device",
                "cpu",
                "--record",
                "--time-limit",
                "0",
            ]
        )
        == 0
    )
    evaluation = read_bundle(folder).manifest.evaluation
    assert evaluation["data"]["checksum"] != trained_on


def test_inspect_says_what_is_in_a_bundle(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal: architecture, parameters, training, scores, checksums. Elsewhere: the manifest and its version."""
    assert train(data, tmp_path / "run", "--steps", "5") == 0
    bundle = read_bundle(tmp_path / "run" / "bundle")
    capsys.readouterr()
    manifest = {"version": bundle.version, **json.loads((bundle.folder / "manifest.json").read_bytes())}
    assert main(["inspect", str(bundle.folder)]) == 0
    assert json.loads(capsys.readouterr().out) == manifest
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["inspect", str(bundle.folder)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    parameters = 4 * 16 + 16 + 16 * 180 + 180
    for part in (f"{bundle.name}@{bundle.version}", f"generator {parameters:,} parameters", "sha256", "steps 5 "):
        assert part in text
    assert main(["inspect", "--json", str(bundle.folder)]) == 0
    assert json.loads(capsys.readouterr().out) == manifest


def test_evaluate_on_a_terminal_prints_the_table_and_json_where_asked(
    data: Path, short_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table where a person looks; with --json the one line, and the table beside it on stderr."""
    command = ["evaluate", str(short_run / "bundle"), "--data", str(data), "--device", "cpu", "--time-limit", "0"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "not computed: distances: out of time" in out
    assert "{" not in out
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["skipped"]
    assert "not computed: distances: out of time" in err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_is_there_for_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` says how to call it, on stdout, with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: gan-models", *command]))


def test_help_says_what_each_preset_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    """And what it wants: images, and hours."""
    assert set(PRESET_WORDS) == set(PRESETS) - {"quick", "wide", "classes"}
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for preset in PRESET_WORDS:
        assert re.search(rf"^  {preset} +\S+ +", out, flags=re.MULTILINE)
    assert "thousands of images" in out
    assert "minutes" in out


def test_a_log_that_cannot_show_a_sign_ends_no_command() -> None:
    """Elsewhere than in UTF-8 signs are written as their numbers."""
    done = subprocess.run(
        [sys.executable, "-m", "models", "train", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r"28\xd728" in done.stdout


# --- Interrupted -------------------------------------------------------------------------------------------------


def start(*arguments: str) -> "subprocess.Popen[str]":
    """`models` with these arguments in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{PROGRAM}\nsys.exit(main())", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Until the condition holds, as long as the process lives."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_the_work_and_resume_finishes_it(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 130 and a checkpoint of the very step; resumed, the run gives the bits of one that nobody stopped."""
    arguments = ["train", "--preset", "classes", "--data", str(data), "--device", "cpu"]
    stopped = start(*arguments, "--out", str(tmp_path / "stopped"), "--steps", "1000000")
    stats = tmp_path / "stopped" / "stats.jsonl"
    wait_for(lambda: stats.exists() and stats.stat().st_size > 0, stopped)
    stopped.send_signal(number)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, err
    at = steps_of(tmp_path / "stopped")[-1]
    assert f"Stopped at step {at} of 1000000; --resume goes on." in out
    assert "Traceback" not in err
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{at:06d}.safetensors").exists()
    assert not (tmp_path / "stopped" / "bundle").exists()

    steps = str(at + 60)
    assert train(data, tmp_path / "stopped", "--resume", "--steps", steps, preset="classes") == 0
    assert train(data, tmp_path / "straight", "--steps", steps, preset="classes") == 0
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")
    seen = steps_of(tmp_path / "stopped")
    assert seen == sorted(set(seen))
    assert seen[-1] == at + 60


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(data: Path, tmp_path: Path) -> None:
    """The second is told so in one line and harms nothing; the lock of one that was killed is gone with it."""
    arguments = ["train", "--preset", "quick", "--unconditional", "--data", str(data), "--device", "cpu", "--resume"]
    arguments += ["--out", str(tmp_path)]
    first = start(*arguments, "--steps", "1000000")
    assert first.stdout is not None
    told = iter(first.stdout.readline, "")  # nothing is held back until the end
    assert f"No checkpoint in {tmp_path} yet: starting from the beginning.\n" in told
    second = start(*arguments, "--steps", "60")
    _, err = second.communicate()
    assert (second.returncode, err) == (1, f"error: {tmp_path}: another process is at work on this run\n")
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert train(data, tmp_path, "--resume", "--steps", "1") == 0


# Forks a child that goes on training after each SIGKILL, which comes some steps later, at a random moment.
KILLER = """
import contextlib, os, random, signal, time
from pathlib import Path
from models.training.run_folder import RunDir
from models.training.snapshots import Snapshots
data, out = sys.argv[1:]
arguments = ["train", "--preset", "quick", "--data", data, "--out", out, "--device", "cpu", "--resume",
             "--steps", "300", "--checkpoint-every", "3"]
run, rng, newest, kills = RunDir(Path(out)), random.Random(3), 0, 0

def train():
    pid = os.fork()
    if not pid:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os._exit(main(arguments))
    return pid

def seen():
    steps = [int(path.stem[5:]) for path in Path(out, "checkpoints").glob("step-*.safetensors")]
    return max(steps, default=0)

while True:
    pid, target = train(), newest + rng.randrange(3, 100)
    ended = 0
    while not ended and seen() < target:
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    kills += 1
    found = run.newest_checkpoint()
    assert found is not None
    assert found[1]["step"] >= newest, (found[1]["step"], newest)  # nothing that was saved is ever lost
    newest = found[1]["step"]
    assert run.record()["preset"] == "quick"
assert kills >= 3, kills
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing_that_was_saved(data: Path, tmp_path: Path) -> None:
    """Killed again and again, a run's newest checkpoint always reads whole, and its end is the uninterrupted one's."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + KILLER, str(data), str(tmp_path / "killed")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert train(data, tmp_path / "straight", "--steps", "300") == 0
    assert weights_of(tmp_path / "killed") == weights_of(tmp_path / "straight")
    seen = steps_of(tmp_path / "killed")
    assert seen == sorted(set(seen))


@pytest.mark.slow
def test_a_convolutional_run_survives_kills_at_random_steps(tmp_path: Path) -> None:
    """By the command itself, killed three times: every tensor of both bundles and every figure is as without kills."""
    labels = np.arange(60) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (60, 16, 16)) + 50 * labels[:, None, None]
    np.savez(tmp_path / "small.npz", images=pixels.astype(np.uint8), labels=labels)
    command = [*(sys.executable, "-m", "models", "train", "--preset", "conv-r3", "--data", str(tmp_path / "small.npz")),
               *("--steps", "40", "--batch-size", "4", "--device", "cpu", "--checkpoint-every", "3")]  # fmt: skip

    def begin(out: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*command, "--out", str(out), "--resume"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed, straight = tmp_path / "killed", tmp_path / "straight"

    def last_step() -> int:
        return max(steps_of(killed), default=0) if (killed / "stats.jsonl").exists() else 0

    random = np.random.default_rng(8)
    for _ in range(3):
        process, step = begin(killed), last_step() + int(random.integers(1, 10))
        wait_for(partial(lambda step: last_step() >= step, step), process)
        process.kill()
        process.communicate()
    for out in (killed, straight):
        process = begin(out)
        _, err = process.communicate()
        assert process.returncode == 0, err
    for bundle in ("bundle", "last/bundle"):
        for net in ("generator", "discriminator"):
            one, other = (load_file(out / bundle / f"{net}.safetensors") for out in (killed, straight))
            assert one.keys() == other.keys()
            for name, tensor in one.items():
                assert torch.equal(tensor, other[name]), f"{bundle} {net} {name}"
    assert computed(killed) == computed(straight)


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk: a report fits
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_a_full_disk_leaves_the_old_checkpoint(data: Path, tmp_path: Path) -> None:
    """The file that could not be written is named in one line, and the run goes on from before once there is room."""
    out = tmp_path / "run"
    assert train(data, out, "--steps", "20", preset="wide") == 0
    saved = (out / "checkpoints" / "step-000020.safetensors").read_bytes()
    arguments = ["train", "--preset", "wide", "--data", str(data), "--out", str(out), "--resume", "--steps", "40"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + FULL_DISK, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "]
    assert "step-000025.safetensors" in done.stderr  # before the score
    assert "File too large" in done.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000020.safetensors"]
    assert (out / "checkpoints" / "step-000020.safetensors").read_bytes() == saved
    assert train(data, out, "--resume", "--steps", "40", preset="wide") == 0
    seen = steps_of(out)
    assert seen == sorted(set(seen))


def test_a_run_that_diverges_stops_and_keeps_its_checkpoints(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN ends the run with a reason and exit code 4, and what was saved before it is still there."""
    step = trainer.train_step

    def poisoned(state: State) -> torch.Tensor:
        figures = step(state)
        if state.step == 25:
            with torch.no_grad():
                state.discriminator.output.weight[0, 0] = torch.nan
        return figures

    monkeypatch.setattr(trainer, "train_step", poisoned)
    assert train(data, tmp_path, "--checkpoint-every", "10") == 4
    assert "training diverged by step 25" in only_error(capsys)
    found = RunDir(tmp_path).newest_checkpoint()
    assert found is not None
    assert found[1]["step"] == 20
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_comes_at_every_nth_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever N is: it need not divide the steps between two reports. Others come before and after each score."""
    saved = []
    save = RunDir.save_checkpoint

    def noted(run: RunDir, step: int, *rest: Any) -> None:
        saved.append(step)
        save(run, step, *rest)

    monkeypatch.setattr(RunDir, "save_checkpoint", noted)
    assert train(data, tmp_path, "--checkpoint-every", "17") == 0
    assert saved == [17, 25, 25, 34, 50, 50, 51, 60, 60]


# --- Looked at while it goes on ----------------------------------------------------------------------------------


def test_a_run_can_be_looked_at_and_served_before_it_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 0, at every checkpoint and at the signal: samples, the report, and a bundle that goes at the end."""
    out, seen = tmp_path / "run", []
    report = Snapshots.report

    def looked(snapshots: Snapshots, *, must: bool = False) -> None:
        report(snapshots, must=must)
        if not (out / "bundle").exists():
            assert find_folders(out) == ([out / "preview"], {})
            bundle = read_bundle(out / "preview")
            assert (bundle.name, bundle.manifest.calibration) == ("colours-small-classes", None)
            assert bundle.draw(2).shape == (2, 10, 6, 3)
            step = bundle.manifest.training["steps"]
            assert bundle.manifest.training["selection"] == {"rule": "preview", "step": step}
            assert (out / "samples" / f"step-{step:06d}.png").exists()
            known = bundle.manifest.evaluation.get("best_validation_parzen")
            seen.append((step, known["step"] if isinstance(known, dict) else None))
        if snapshots.state.step == 40:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Snapshots, "report", looked)
    arguments = ("--checkpoint-every", "20", "--sample-every", "15")
    assert train(data, out, *arguments, preset="classes") == 130
    steps = {0: None, 15: None, 20: None, 25: None, 30: 25, 40: 25, 41: 25}
    assert list(dict.fromkeys(seen)) == list(steps.items())
    assert (out / "report.html").exists()
    assert train(data, out, *arguments, "--resume", preset="classes") == 0
    assert seen[-1][0] == 60
    assert find_folders(out) == ([out / "bundle"], {})
    assert train(data, out, *arguments, "--resume", "--steps", "80", preset="classes") == 0  # is served all the while
    assert find_folders(out) == ([out / "bundle"], {})


def test_looking_changes_no_bit(data: Path, tmp_path: Path) -> None:
    """Snapshots at other steps leave the weights and the figures of the steps that both report as they are."""
    assert train(data, tmp_path / "often", "--sample-every", "5", "--checkpoint-every", "10", preset="classes") == 0
    assert train(data, tmp_path / "seldom", preset="classes") == 0
    assert weights_of(tmp_path / "often") == weights_of(tmp_path / "seldom")


@contextmanager
def interrupted_at(wanted: str) -> Iterator[None]:
    """Ctrl-C as soon as this is what the progress shows."""
    between = TrainingProgress.between

    def interrupting(progress: TrainingProgress, phase: str, done: int, of: int) -> None:
        between(progress, phase, done, of)
        if phase.startswith(wanted):
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgress, "between", interrupting)
        yield


@pytest.mark.parametrize("selection", ["parzen", "frechet"])
def test_a_signal_in_the_midst_of_a_score_loses_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], selection: str
) -> None:
    """The checkpoint is there already; the run goes on with the score, and is that of one which nobody stopped."""
    options = ("--selection", selection)
    assert train(data, tmp_path / "straight", *options, preset="classes") == 0
    with interrupted_at("scoring: drawing"):
        for step in (25, 25, 25):  # however often
            assert train(data, tmp_path / "stopped", *options, "--resume", preset="classes") == 130
            assert f"Stopped at step {step} of 60; --resume goes on." in capsys.readouterr().out
            assert "validation" not in (tmp_path / "stopped" / "stats.jsonl").read_text()
    assert train(data, tmp_path / "stopped", *options, "--resume", preset="classes") == 0
    assert computed(tmp_path / "stopped") == computed(tmp_path / "straight")
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "straight")


def test_a_signal_before_the_bundle_is_written_is_made_good(data: Path, tmp_path: Path) -> None:
    """All steps are done and scored then: --resume has the bundle left to write."""
    with interrupted_at("finishing: calibrating"):
        assert train(data, tmp_path / "run") == 130
    assert not (tmp_path / "run" / "bundle").exists()
    assert find_folders(tmp_path / "run") == ([tmp_path / "run" / "preview"], {})
    assert train(data, tmp_path / "run", "--resume") == 0
    assert find_folders(tmp_path / "run") == ([tmp_path / "run" / "bundle"], {})


def test_a_signal_while_data_are_read_leaves_nothing_behind(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to save yet: one word, exit code 130, and no folder."""

    def read(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("models.data.load._read_npz", read)
    assert train(data, tmp_path / "run") == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Before whoever looks at the flag has come to it; the second signal acts as usual."""
    stop = StopOnSignal("Stopping.")
    with stop:
        stop.check()
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == "\nStopping.\n"
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_says_at_its_start_what_it_will_do(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line: images, shape, classes, nets, steps and folder."""
    assert train(data, tmp_path / "run", "--steps", "3", preset="classes") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training ")]
    for part in (
        *("classes on Colours (small)", "64 images of 6×10, RGB", "3 classes", "3,188 parameters in G", "3 steps of 8"),
        str(tmp_path / "run"),
    ):
        assert part in line


@pytest.mark.parametrize("command", ["inspect", "evaluate", "export", "interpolate", "neighbours"])
def test_a_run_in_place_of_a_bundle_is_told_what_to_give(
    data: Path, tmp_path: Path, short_run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Of a finished run its bundle, of another one the preview, and what makes a bundle of what is there."""
    more = {"evaluate": ["--data", str(data)], "neighbours": ["--data", str(data)], "export": ["--format", "onnx"]}
    out = [] if command in {"inspect", "evaluate"} else ["--out", str(tmp_path / "x.png")]

    def told(folder: Path) -> str:
        capsys.readouterr()
        assert main([command, str(folder), *more.get(command, []), *out]) == 1
        return only_error(capsys)

    assert f"is the folder of a run; its bundle is {short_run / 'bundle'}" in told(short_run)
    shutil.move(short_run / "bundle", short_run / "preview")
    for folder in (short_run, short_run / "bundle"):
        line = told(folder)
        for part in (
            *("no bundle yet", "step 3 of 3", f"{short_run / 'preview'} is a bundle of what is there so far"),
            *("with --resume finishes it", "--resume --steps 3 makes a bundle"),
        ):
            assert part in line


def test_a_run_without_a_step_yet_has_nothing_to_make_a_bundle_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So only what finishes it is told."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "options.json").write_text('{"options": {"steps": 9}}')
    assert main(["inspect", str(run)]) == 1
    told = only_error(capsys)
    assert "step 0 of 9" in told
    assert told.endswith("with --resume finishes it")


# --- Resuming ----------------------------------------------------------------------------------------------------


def test_resume_starts_where_there_is_nothing_and_rests_where_all_is_done(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command may be given again and again: it begins, goes on, or has nothing to do, and says which."""
    assert train(data, tmp_path / "run", "--resume", "--steps", "20") == 0
    assert "No checkpoint in" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(data, tmp_path / "run", "--resume", "--steps", "20") == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert train(data, tmp_path / "run", "--resume", "--steps", "40") == 0
    assert "Going on from step 20" in capsys.readouterr().out
    assert read_bundle(tmp_path / "run" / "bundle").manifest.training["steps"] == 40


def test_a_kill_before_the_bundle_is_made_good(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is there and the bundle missing, or still that of a shorter run: resume writes it."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", killed)
        assert train(data, tmp_path, "--steps", "20") == 130
    assert train(data, tmp_path, "--resume", "--steps", "20") == 0
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "publish", killed)
        assert train(data, tmp_path, "--resume", "--steps", "40") == 130
    assert read_bundle(tmp_path / "bundle").manifest.training["steps"] == 20
    assert train(data, tmp_path, "--resume", "--steps", "40") == 0
    assert read_bundle(tmp_path / "bundle").manifest.training["steps"] == 40


def test_a_run_can_be_ended_early_by_fewer_steps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its first score, a run still becomes a bundle when it is told that this was all."""
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "is_set", lambda _: True, raising=False)
        patch.setattr(StopOnSignal, "__init__", lambda *_: None)
        assert train(data, tmp_path, "--steps", "60") == 130
    assert steps_of(tmp_path) == [1]
    assert train(data, tmp_path, "--resume", "--steps", "1") == 0
    assert read_bundle(tmp_path / "bundle").manifest.training["steps"] == 1


def test_a_run_without_a_readable_checkpoint_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there may be worth more than a fresh start: nothing changes before its owner has looked."""
    assert train(data, tmp_path, "--steps", "20") == 0
    (tmp_path / "checkpoints" / "step-000020.safetensors").write_bytes(b"junk")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert train(data, tmp_path, "--resume", "--steps", "40") == 1
    assert "none of the checkpoints can be read: step-000020.safetensors: " in only_error(capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("real_report")
def test_an_error_of_the_system_without_a_number_is_told_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pillow's has only words, which name the file."""
    assert train(data, tmp_path, "--steps", "5") == 0
    (tmp_path / "samples" / "step-000003.png").write_bytes(b"junk")
    capsys.readouterr()
    assert train(data, tmp_path, "--resume", "--steps", "10") == 1
    assert "step-000003.png" in only_error(capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--noise", "uniform"], "latent was"),
        (["--generator-loss", "saturating"], "generator_loss was nonsaturating and is saturating"),
    ],
    ids=["seed", "noise", "loss"],
)
def test_resuming_with_other_options_is_refused(
    data: Path, short_run: Path, capsys: pytest.CaptureFixture[str], change: list[str], named: str
) -> None:
    """A run is what its options file says: every difference is named, and nothing is touched."""
    capsys.readouterr()
    before = (short_run / "options.json").read_bytes()
    assert train(data, short_run, "--resume", "--steps", "9", *change) == 1
    assert named in only_error(capsys)
    assert (short_run / "options.json").read_bytes() == before


def test_an_override_goes_on_and_is_recorded(data: Path, short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the step where it was given, with old and new value, in the run's record and in the bundle's manifest."""
    other = ["--generator-loss", "hinge", "--batch-size", "4"]
    assert train(data, short_run, "--resume", "--override", "--steps", "9", *other) == 0
    expected = [{"step": 3, "changes": {"batch_size": [8, 4], "generator_loss": ["nonsaturating", "hinge"]}}]
    assert json.loads((short_run / "options.json").read_text())["overrides"] == expected
    assert read_bundle(short_run / "bundle").manifest.training["overrides"] == expected
    # They are the run's options now: going on needs no override, and going back does.
    assert train(data, short_run, "--resume", "--steps", "12", *other) == 0
    assert read_bundle(short_run / "bundle").manifest.training["overrides"] == expected
    capsys.readouterr()
    assert train(data, short_run, "--resume", "--steps", "15") == 1
    assert "batch_size was 4 and is 8; generator_loss was hinge and is nonsaturating" in only_error(capsys)


def test_a_resumed_run_keeps_its_name(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Given once it need not be given again; another one is refused, and with --override the bundle is renamed."""
    assert train(data, tmp_path, "--steps", "3", "--name", "mine") == 0
    assert train(data, tmp_path, "--steps", "6", "--resume") == 0
    assert read_bundle(tmp_path / "bundle").name == "mine"
    capsys.readouterr()
    assert train(data, tmp_path, "--steps", "6", "--resume", "--name", "other") == 1
    assert "name was mine and is other" in only_error(capsys)
    assert train(data, tmp_path, "--steps", "6", "--resume", "--name", "other", "--override") == 0
    assert read_bundle(tmp_path / "bundle").name == "other"
    record = json.loads((tmp_path / "options.json").read_bytes())
    assert record["overrides"] == [{"step": 6, "changes": {"name": ["mine", "other"]}}]
    del record["name"]  # as options.json was before it held the name
    (tmp_path / "options.json").write_text(json.dumps(record))
    assert train(data, tmp_path, "--steps", "9", "--resume", "--name", "other") == 0


def test_an_override_cannot_change_the_nets(data: Path, short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint's tensors fit one shape of nets: another is one clear line, and the run is as it was."""
    before = (short_run / "options.json").read_bytes()
    capsys.readouterr()
    assert train(data, short_run, "--resume", "--override", "--steps", "9", "--conditional") == 1
    said = only_error(capsys)
    assert "conditional was False and is True" in said
    assert "its generator has other shapes" in said
    assert "begin a new run, with another --out" in said
    assert (short_run / "options.json").read_bytes() == before
    assert train(data, short_run / "new", "--override") == 1
    assert "--override goes with --resume" in only_error(capsys)


@pytest.mark.parametrize("fact", ["torch", "instruction_set", "device"])
def test_another_machine_is_refused(data: Path, short_run: Path, capsys: pytest.CaptureFixture[str], fact: str) -> None:
    """What changes the last bits of a sum is named; whoever can live with other bits says so."""
    record = json.loads((short_run / "options.json").read_text())
    now, record[fact] = record[fact], "older"
    (short_run / "options.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert train(data, short_run, "--resume", "--steps", "9") == 1
    assert f"{fact} was older and is {now}" in only_error(capsys)
    assert train(data, short_run, "--resume", "--steps", "9", "--override") == 0
    assert read_bundle(short_run / "bundle").manifest.training["overrides"] == [
        {"step": 3, "changes": {fact: ["older", now]}}
    ]


def test_a_resumed_run_has_the_threads_it_was_begun_with(
    data: Path, short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Restored, and said, since a sum's last bits depend on them."""
    torch.set_num_threads(2)
    assert train(data, short_run, "--resume", "--steps", "9") == 0
    assert torch.get_num_threads() == 1
    assert "Computing on 1 threads, as the run was begun." in capsys.readouterr().out


def test_labels_that_are_not_used_are_spoken_of(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unconditional preset on data with labels says so, unless that was asked for; --conditional uses them."""
    note = "quick is unconditional: the labels of Colours (small) are not used. --conditional uses them."
    assert train(data, tmp_path / "a", "--steps", "3") == 0
    assert note in capsys.readouterr().out
    assert train(data, tmp_path / "b", "--steps", "3", "--unconditional") == 0
    assert note not in capsys.readouterr().out
    assert train(data, tmp_path / "c", "--steps", "3", "--conditional") == 0
    assert note not in capsys.readouterr().out
    labels = [read_bundle(tmp_path / run / "bundle").manifest.labels for run in "abc"]
    assert labels[:2] == [None, None]
    assert labels[2] is not None


def test_resuming_on_other_data_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same name with one pixel changed is other data."""
    with np.load(data) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    out, copy = tmp_path / "run", tmp_path / data.name
    np.savez(copy, images=images, labels=labels)
    assert train(copy, out, "--steps", "3") == 0
    images[0, 0, 0, 0] ^= 1
    np.savez(copy, images=images, labels=labels)
    capsys.readouterr()
    assert train(copy, out, "--resume", "--steps", "9") == 1
    assert "data was" in only_error(capsys)


@pytest.fixture
def stars(tmp_path: Path) -> Path:
    """Wide grey pictures with an alpha channel, in files of a mode for colours."""
    folder = tmp_path / "stars"
    folder.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (20, 8, 12, 2), dtype=np.uint8)
    for number, picture in enumerate(levels):
        Image.fromarray(picture).convert("RGBA").save(folder / f"{number:02}.png")
    return folder


def test_a_run_goes_on_as_its_images_were_prepared(
    stars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record says how, its bundle too, scores follow it, and another preparation is refused."""
    out, size = tmp_path / "run", ("--image-size", "8")
    assert train(stars, out, "--steps", "3", *size, "--fit", "pad", "--background", "black") == 0
    how = {"fit": "pad", "background": "#000000", "resampling": "lanczos", "orientation": "exif", "colour": "grey"}
    assert json.loads((out / "options.json").read_bytes())["preparation"] == how
    assert train(stars, out, "--resume", "--steps", "6", *size) == 0
    assert read_bundle(out / "bundle").manifest.preparation == Preparation(**how)  # type: ignore[arg-type]
    assert main(["evaluate", str(out / "bundle"), "--data", str(stars), *size, "--time-limit", "0"]) == 0
    said = capsys.readouterr()
    assert "not the data that the bundle was trained on" not in said.err
    for other in (("--fit", "crop"), ("--background", "white"), ("--background", "#000001")):
        assert train(stars, out, "--resume", "--steps", "9", *size, *other) == 1
        assert "preparation was" in capsys.readouterr().err


def test_a_run_of_before_there_was_a_preparation_goes_on(
    stars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the files' modes made a set RGB: one that is grey by its pixels stays so to the run's end."""
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "reading", lambda *_: {"image_size": 8, "colour": "mode"})
        assert train(stars, tmp_path / "run", "--steps", "3") == 0
    options = tmp_path / "run" / "options.json"
    options.write_text(json.dumps({**json.loads(options.read_bytes()), "preparation": None}))
    for steps in ("6", "9"):
        assert train(stars, tmp_path / "run", "--resume", "--steps", steps, "--image-size", "8") == 0
    bundle = read_bundle(tmp_path / "run" / "bundle")
    assert bundle.manifest.image.shape == (3, 8, 8)
    assert bundle.manifest.preparation == Preparation(colour="rgb")


# --- Wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--steps", "0"], "--steps: Input should be greater than or equal to 1"),
        (["--seed", "-1"], "--seed: Input should be greater than or equal to 0"),
        (["--seed", str(2**53)], "--seed: Input should be less than"),
        (["--batch-size", "0"], "--batch-size: "),
        (["--update", "simultaneous", "--d-steps", "3"], "d_steps counts the discriminator's turns"),
        (["--score-every", "0"], "--score-every: Input should be greater than or equal to 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
        (["--device", "abacus"], "device abacus: "),
        (["--device", "meta"], "device meta: choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device cuda:99: "),
        (["--image-size", "0"], "image size must be from 1 to 1024 pixels"),
        (["--data", "no/such/data"], "no/such/data is no data set"),
        (["--out", "/dev/null/run"], "/dev/null/run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_one_line_and_exit_code_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    """The line names what is wrong, and no run folder is begun."""
    assert train(data, tmp_path / "run", *arguments) == 1
    assert reason in only_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["train", "--preset", "gpt", "--data", "x", "--out", "y"],
        ["train", "--preset", "quick", "--data", "x", "--out", "y", "--steps", "many"],
        ["train", "--preset", "quick", "--data", "x", "--out", "y", "--name", "../up"],
        ["train", "--preset", "quick", "--data", "x", "--out", "y", "--background", "no colour"],
        ["train", "--preset", "quick", "--data", "x", "--out", "y", "--background", "#ff000080"],
        ["train", "--preset", "quick", "--data", "x", "--out", "y", "--fit", "stretch"],
        ["inspect"],
        ["inspect", "x", "--loud"],
        ["toy", "--out", "x", "--steps", "0"],
        ["toy", "--out", "x", "--seed", "one"],
    ],
    ids=[
        "nothing",
        "command",
        "preset",
        "steps",
        "name",
        "colour",
        "opacity",
        "fit",
        "no bundle",
        "flag",
        "toy's steps",
        "toy's seed",
    ],
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """As every command line does: the usage, and what was wrong with it."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in said
    assert "invalid whole" not in said  # no name of a function


def test_a_folder_with_something_in_it_is_not_written_to(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --resume nobody's files are mixed with a run's."""
    (tmp_path / "thesis.txt").write_text("mine")
    assert train(data, tmp_path) == 1
    assert "is not empty: --resume goes on" in only_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_conditional_preset_refuses_data_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is written."""
    np.savez(tmp_path / "plain.npz", images=np.zeros((20, 4, 4), np.uint8))
    assert train(tmp_path / "plain.npz", tmp_path / "run", preset="classes") == 1
    assert "classes is class-conditional, and plain has no labels" in only_error(capsys)
    assert not (tmp_path / "run").exists()


def test_a_class_without_a_training_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The division is by chance: the only image of a class may go to the validation or test images."""
    images = np.random.default_rng(0).integers(0, 255, (20, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "rare.npz", images=images, labels=np.arange(20))
    seen = load_dataset(str(tmp_path / "rare.npz"), None, seed=0).train.labels
    assert seen is not None
    unseen = sorted({*range(20)} - {*seen.tolist()})
    warning = f"warning: no training image of {', '.join(map(str, unseen))}: what is drawn for such a label"
    assert train(tmp_path / "rare.npz", tmp_path / "run", "--steps", "2", preset="classes") == 0
    assert warning in capsys.readouterr().err
    assert train(tmp_path / "rare.npz", tmp_path / "plain", "--steps", "2") == 0
    assert not capsys.readouterr().err


def test_evaluate_and_inspect_refuse_what_they_cannot_use(
    data: Path, tmp_path: Path, short_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data of another shape, a bundle that is not there or damaged, a seed below zero: one line each."""
    folder = short_run / "bundle"
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--data", "digits"]) == 1
    assert "digits has images (1, 8, 8), colours-small-quick makes (3, 10, 6)" in only_error(capsys)
    assert main(["evaluate", str(folder), "--data", str(data), "--seed", "-1"]) == 1
    assert "the seed must be a whole number of 0 or more, not -1" in only_error(capsys)
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "manifest.json: No such file or directory" in only_error(capsys)
    (folder / "generator.safetensors").write_bytes(b"")
    for command in (["inspect", str(folder)], ["evaluate", str(folder), "--data", str(data)]):
        assert main(command) == 1
        assert "generator.safetensors: 0 bytes, the manifest says" in only_error(capsys)


def test_a_missing_extra_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where only serving is installed, training says what it lacks."""
    monkeypatch.delitem(sys.modules, "models.training.progress", raising=False)
    monkeypatch.delattr("models.training.progress", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert train(data, tmp_path / "run") == 1
    assert "is not installed: the train extra brings it" in only_error(capsys)


def test_an_experiment_names_the_extra_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plots need the train extra, and say so before they work for minutes."""
    monkeypatch.delitem(sys.modules, "models.experiments.toy_plot", raising=False)
    monkeypatch.delattr("models.experiments.toy_plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["toy", "--out", str(tmp_path / "out")]) == 1
    assert only_error(capsys).endswith("matplotlib.axes is not installed: the train extra brings it")
    assert not list(tmp_path.iterdir())


# --- Options and names -------------------------------------------------------------------------------------------


def options_of(*arguments: str) -> TrainingOptions:
    parsed = command_parser().parse_args(["train", "--data", "x", "--out", "y", *arguments])
    return resolve(parsed)


def test_algorithm_1_is_the_papers_and_the_preset_is_its_codes() -> None:
    """They differ in the update, G's loss and the factor on D's; everything else is the same run."""
    code, paper = options_of("--preset", "mlp-paper"), options_of("--preset", "mlp-paper", "--algorithm1")
    assert code == PRESETS["mlp-paper"]
    differing = {key for key in type(code).model_fields if getattr(code, key) != getattr(paper, key)}
    assert differing == {"update", "generator_loss", "d_loss_scale"}
    assert (paper.update, paper.generator_loss, paper.d_loss_scale) == ("alternating", "saturating", 1.0)
    heuristic = options_of(
        "--preset", "mlp-paper", "--algorithm1", "--generator-loss", "nonsaturating", "--d-steps", "3"
    )
    assert (heuristic.generator_loss, heuristic.d_steps) == ("nonsaturating", 3)


def test_every_flag_changes_its_option_alone() -> None:
    """The command line's numbers reach the options, and nothing else moves."""
    changed = options_of(
        *("--preset", "mlp-adam", "--steps", "7", "--seed", "3", "--batch-size", "5", "--noise", "uniform"),
        *("--precision", "bfloat16", "--augment", "ada"),
    )
    latent = LatentSpec(dim=100, distribution="uniform")
    expected = PRESETS["mlp-adam"].model_copy(
        update={"steps": 7, "seed": 3, "batch_size": 5, "latent": latent, "precision": "bfloat16", "augment": "ada"}
    )
    assert changed == expected


@given(text=st.text(max_size=120), preset=st.sampled_from(sorted(PRESETS)))
def test_any_data_has_a_valid_default_name(text: str, preset: str) -> None:
    """Folders are called anything; a run must not fail at its very end over the bundle's name."""
    assert re.search(NAME_PATTERN, default_name(text, preset))


# --- What a person sees ------------------------------------------------------------------------------------------

REPORT = Report(step=0, seconds=2.0, d_loss=1.25, g_loss=0.75, d_real=0.6, d_fake=0.4, images_per_s=1234.5)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


def test_without_a_terminal_a_plain_line_comes_twice_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is done then: steps, with the latest figures and the time left, or what comes between them."""
    clock = Clock()
    with TrainingProgress(100, 0, clock) as progress:
        for step in range(1, 21):
            clock.now_s += 3.5
            progress.stepped(step)
            if step % 5 == 0:
                REPORT.step = step
                progress.show(REPORT, Best(step=10, score=99.5), SELECTIONS["parzen"])
        for update in range(20):
            clock.now_s += 2.0
            progress.between("scoring: training the feature net", update, 20)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.split("  ")[0] == "step 9/100"
    assert second.split("  ")[0] == "step 18/100"
    for part in ("D loss 1.250", "G loss 0.750", "D(x) 0.60", "D(G(z)) 0.40", "1,234 images/s", "nats at 10"):
        assert part in first
    assert first.endswith("5 min left")  # 91 steps, at 3.5 s each
    assert third == "step 20/100  scoring: training the feature net 11/20"
    assert PLAIN_EVERY_S == 30


def test_a_terminal_gets_a_bar_that_moves_with_the_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Redrawn in place: the steps between two reports too, and what comes between steps in a bar of its own."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    clock = Clock()
    with TrainingProgress(100, 0, clock) as progress:
        REPORT.step = 40
        progress.show(REPORT, Best(), SELECTIONS["parzen"])
        clock.now_s += 1
        progress.stepped(41)
        progress.between("scoring: training the feature net", 7, 20)
    shown = capsys.readouterr().err
    for part in ("1,234 images/s", "41/100", "scoring: training the feature net", "7/20"):
        assert part in shown


def test_on_a_narrow_terminal_the_figures_give_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In 80 columns there is room for what is done, how far it is, and how long it will take."""
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)

    def shown() -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)  # without colours

    clock = Clock()
    with TrainingProgress(10_000, 0, clock) as progress:
        clock.now_s += 90
        REPORT.step = 250
        progress.show(REPORT, Best(), SELECTIONS["parzen"])
    assert re.search("step +250/10000 ━.* 58 min left D loss 1.250", shown())
    with TrainingProgress(10_000, 0, clock) as progress:
        progress.between("scoring: training the feature net", 7, 20)
    assert re.search("scoring: training the feature net +7/20 ", shown())


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """GAN_DATA_DIR where it says something; empty is not the current folder."""
    arguments = ["evaluate", "b", "--data", "mnist"]
    monkeypatch.setenv("GAN_DATA_DIR", "/srv/data")
    assert command_parser().parse_args(arguments).data_dir == Path("/srv/data")
    monkeypatch.setenv("GAN_DATA_DIR", "")
    assert command_parser().parse_args(arguments).data_dir is None
