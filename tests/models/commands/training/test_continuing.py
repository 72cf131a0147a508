"""A run goes on with the data it was begun with, whatever its folder is called now; other classes need a new run."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.__main__ import main
from models.bundle import read_bundle
from models.data.dataset import relabelled
from models.data.load import load_dataset
from models.training.run_folder import RunDir

pytestmark = pytest.mark.usefixtures("one_thread", "small_preset")


@pytest.fixture(autouse=True)
def _blank_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.training.report.page", lambda _: "")


def save_classes(folder: Path, *names: str, count: int = 5) -> Path:
    """Images of one grey for each class: 0, 10, 20 … in the order of the arguments."""
    for grey, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("L", (4, 4), 10 * grey).save(folder / name / f"{index}.png")
    return folder


def train(data: Path, out: Path, steps: int, *more: str) -> int:
    return main(["train", "--preset", "small", "--data", str(data), "--out", str(out), "--steps", str(steps),
                 "--device", "cpu", *more])  # fmt: skip


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def begun_in_the_old_order(data: Path, out: Path, steps: int, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """A run as releases left it whose classes stood by code point whatever their names, without data.json."""

    def load_as_then(*arguments: object, **options: object) -> object:
        dataset = load_dataset(*arguments, **options)  # type: ignore[arg-type]
        return relabelled(dataset, sorted(dataset.label_names or ()))

    with monkeypatch.context() as patch:
        patch.setattr("models.commands.train.load_dataset", load_as_then)
        assert train(data, out, steps, *more) == 0
    (out / "data.json").unlink()


NUMBERS = [str(number) for number in range(12)]


@pytest.mark.parametrize("conditional", ["--conditional", "--unconditional"])
def test_a_run_that_was_begun_in_the_old_order_of_labels_goes_on_in_it(
    conditional: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its nets know as label 2 stays the folder 10; a new run has the new order."""
    data, out = save_classes(tmp_path / "digits", *NUMBERS), tmp_path / "run"
    begun_in_the_old_order(data, out, 3, monkeypatch, conditional)
    checksum = json.loads((out / "options.json").read_text())["data"]["checksum"]
    capsys.readouterr()
    assert train(data, out, 5, "--resume", conditional) == 0
    assert "The labels stand as when the run was begun: 0, 1, 10, 11, 2" in capsys.readouterr().out
    assert json.loads((out / "options.json").read_text())["data"]["checksum"] == checksum
    assert train(data, out, 7, "--resume", conditional) == 0
    assert train(data, tmp_path / "new", 3, conditional) == 0
    labels = [read_bundle(run / "bundle").manifest.labels for run in (out, tmp_path / "new")]
    expected = [tuple(sorted(NUMBERS)), tuple(NUMBERS)]
    assert labels == (expected if conditional == "--conditional" else [None, None])


def test_the_old_order_outlasts_an_override_with_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more images no checksum says how the labels stood, and the nets know them all the same."""
    data, out = save_classes(tmp_path / "digits", *NUMBERS), tmp_path / "run"
    begun_in_the_old_order(data, out, 3, monkeypatch, "--conditional")
    for count in (6, 7):
        save_classes(data, *NUMBERS, count=count)
        assert train(data, out, count, "--conditional", "--resume", "--override") == 0
        assert read_bundle(out / "bundle").manifest.labels == tuple(sorted(NUMBERS))


@pytest.mark.parametrize("conditional", ["--conditional", "--unconditional"])
def test_a_bundle_of_the_old_order_is_scored_by_the_names_of_its_labels(
    conditional: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same data: no warning, and the figures about classes are not left out."""
    monkeypatch.setattr("models.evaluation.features.LEAST_UPDATES", 5)
    data, out = save_classes(tmp_path / "digits", *NUMBERS, count=10), tmp_path / "run"
    begun_in_the_old_order(data, out, 3, monkeypatch, conditional)
    seen: list[Any] = []

    def suite(*arguments: object) -> None:
        seen.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("models.commands.evaluate.MetricSuite", suite)
    capsys.readouterr()
    assert main(["evaluate", str(out / "bundle"), "--data", str(data), "--device", "cpu"]) == 130
    assert "not the data" not in capsys.readouterr().err
    dataset, _, asked, *_ = seen
    assert dataset.label_names == tuple(sorted(NUMBERS))
    assert (asked is None) == (conditional == "--unconditional")
    greys = dataset.train.images[:, 0, 0, 0] // 10
    np.testing.assert_array_equal([int(dataset.label_names[label]) for label in dataset.train.labels], greys)


def test_a_renamed_folder_is_the_same_data(tmp_path: Path) -> None:
    """A copied disk or another mount: the run goes on, and keeps its bundle's name."""
    data, out = save_classes(tmp_path / "pets", "cat", "dog", count=10), tmp_path / "run"
    assert train(data, out, 3, "--conditional") == 0
    moved = data.rename(tmp_path / "pets-copy")
    assert train(moved, out, 5, "--conditional", "--resume") == 0
    bundle = read_bundle(out / "bundle")
    assert bundle.name == "pets-small"
    assert bundle.manifest.training["overrides"] == []
    assert json.loads((out / "options.json").read_text())["data"]["name"] == "pets-copy"


@pytest.mark.parametrize("has_record", [True, False], ids=["with data.json", "of an earlier release"])
def test_a_new_class_needs_a_new_run(*, has_record: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the refusal nor what becomes of an override speaks of overriding; the run stays as it was."""
    data, out = save_classes(tmp_path / "pets", "cat", "dog", count=10), tmp_path / "run"
    assert train(data, out, 3, "--conditional") == 0
    if not has_record:
        (out / "data.json").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    save_classes(data, "cat", "dog", "owl", count=10)
    for more in ([], ["--override"]):
        capsys.readouterr()
        assert train(data, out, 5, "--conditional", "--resume", *more) == 1
        said = error(capsys)
        assert "data was pets (" in said
        assert "begin a new run, with another --out" in said
        assert ("its nets know 2 classes in their order (there is now owl)" in said) == has_record
        assert not {"--override", "size mismatch", "state_dict"} & set(said.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert train(data, tmp_path / "new", 3, "--conditional") == 0


def test_another_class_in_the_place_of_one_needs_a_new_run_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nets would fit, and would draw owls where they learnt dogs."""
    data, out = save_classes(tmp_path / "pets", "cat", "dog", count=10), tmp_path / "run"
    assert train(data, out, 3, "--conditional") == 0
    shutil.rmtree(data)
    save_classes(data, "owl", "cat", count=10)
    assert train(data, out, 5, "--conditional", "--resume", "--override") == 1
    assert "(there is now owl; there is no more dog)" in error(capsys)


def test_a_run_whose_classes_are_called_like_splits_goes_on_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier releases made classes of train and test: the refusal says how they are read again."""
    data, out = save_classes(tmp_path / "pets", "train", "test", count=10), tmp_path / "run"
    assert train(data, out, 3, "--conditional", "--splits", "none") == 0
    assert train(data, out, 5, "--unconditional", "--resume") == 1
    assert "--splits none" in error(capsys)
    assert train(data, out, 5, "--conditional", "--resume", "--splits", "none") == 0


def test_more_images_of_the_same_classes_can_be_overridden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And so can other classes where the nets see none."""
    data, out = save_classes(tmp_path / "pets", "cat", "dog", count=10), tmp_path / "run"
    assert train(data, out, 3, "--conditional") == 0
    assert train(data, tmp_path / "plain", 3, "--unconditional") == 0
    save_classes(data, "cat", "dog", count=12)
    assert train(data, out, 5, "--conditional", "--resume") == 1
    assert "--override goes on all the same" in error(capsys)
    assert train(data, out, 5, "--conditional", "--resume", "--override") == 0
    save_classes(data, "cat", "dog", "owl", count=12)
    assert train(data, tmp_path / "plain", 5, "--unconditional", "--resume", "--override") == 0
    assert [one["name"] for one in RunDir(tmp_path / "plain").data()["classes"]] == ["cat", "dog", "owl"]


def test_more_classes_than_a_manifest_holds_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their names are written at the end, which may be hours later."""
    images = np.zeros((30_000, 1, 1), np.uint8)
    np.savez(tmp_path / "words.npz", images=images, labels=np.arange(30_000))
    assert train(tmp_path / "words.npz", tmp_path / "run", 3, "--conditional") == 1
    assert "30,000 classes" in error(capsys)
    assert not (tmp_path / "run").exists()
