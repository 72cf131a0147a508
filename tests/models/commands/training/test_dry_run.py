"""What a run would be, and what was read of its data: for a person, for a program, and in the run's folder."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from models.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread", "small_preset")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """40 cats and 12 dogs, grey of several sizes, one of them in colour, beside files that are no images."""
    for name, count in (("cat", 40), ("dog", 12)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(count):
            size = (8 + index % 3, 8)
            Image.new("L", size, 5 * index).save(tmp_path / "pets" / name / f"{index}.png")
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "pets" / "dog" / "red.png")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (tmp_path / "pets" / "dog" / name).write_bytes(b"")
    return tmp_path / "pets"


def dry_run(data: Path | str, out: Path, *more: str) -> int:
    return main(["train", "--preset", "small", "--data", str(data), "--out", str(out), "--device", "cpu",
                 "--dry-run", *more])  # fmt: skip


def test_a_program_gets_one_json_object(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else on stdout, whatever there is to say; nothing is written."""
    more = ["--conditional", "--image-size", "8", "--steps", "1000"]
    assert dry_run(pets, tmp_path / "run", "--json", *more) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"image", "images", "labels", "left_out", "parameters", "step_ms", "memory_bytes", "hours"}
    assert facts["image"] == {"channels": 3, "height": 8, "width": 8}
    assert facts["images"] == {"train": 43, "validation": 5, "test": 5}
    assert facts["labels"] == ["cat", "dog"]
    assert facts["left_out"] == {".heic": 2, ".txt": 1}
    assert facts["parameters"] > 1_000
    assert facts["memory_bytes"] > 2**20
    assert facts["hours"] == pytest.approx(facts["step_ms"] / 3600)
    assert not (tmp_path / "run").exists()


def test_a_person_gets_a_short_table(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data with sizes, colour, classes and what was left out; nets; and the cost in units that a person reads."""
    assert dry_run(pets, tmp_path / "run", "--image-size", "8", "--steps", "5") == 0
    said = capsys.readouterr()
    assert "All images become RGB because of 1 among 53: dog/red.png" in said.err
    for words in (
        "pets: 43 images to train, 5 to validate, 5 to test, 8×8 RGB",
        "made from images of 8×8 to 30×20",
        "1 of 53 are coloured",
        "2 classes, images to train/validate/test: cat: ",
        "under 30 images to train: dog",
        "3 files left out, no image by its name: .heic (2), .txt (1)",
        "small, unconditional: G with ",
    ):
        assert words in said.out
    assert re.search(r"^step +\d+ images, [\d.]+ m?s: [\d,]+ images/s$", said.out, re.MULTILINE)
    assert re.search(r"^memory +[\d,]+ MiB$", said.out, re.MULTILINE)
    assert re.search(r"^time +[\d.]+ (m?s|min) for 5 steps", said.out, re.MULTILINE)


def test_a_run_that_is_there_is_left_alone(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder stays as it is; and what would be said of going on does not come between the JSON."""
    monkeypatch.setattr("models.training.report.page", lambda _: "")
    out = tmp_path / "run"
    command = ["train", "--preset", "small", "--data", str(pets), "--out", str(out), "--steps", "1",
               "--image-size", "8", "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    record = json.loads((out / "options.json").read_text())
    (out / "options.json").write_text(json.dumps(record | {"threads": record["threads"] + 1}))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    assert main([*command, "--dry-run", "--json", "--resume"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["images"] == {"train": 43, "validation": 5, "test": 5}
    assert "threads, as the run was begun" in said.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_json_without_a_dry_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run has no result that would fit into one object."""
    assert main(["train", "--preset", "small", "--data", "digits", "--out", str(tmp_path / "run"), "--json"]) == 1
    assert "--json goes with --dry-run" in capsys.readouterr().err


def test_training_says_and_keeps_what_was_read(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same lines at the start and in the report, the whole in data.json."""
    out = tmp_path / "run"
    assert main(["train", "--preset", "small", "--data", str(pets), "--out", str(out), "--steps", "1",
                 "--image-size", "8", "--device", "cpu"]) == 0  # fmt: skip
    said, page = capsys.readouterr().out, (out / "report.html").read_text()
    data = json.loads((out / "data.json").read_text())
    assert (data["sizes"], data["coloured"]) == ([[8, 8], [30, 20]], 1)
    assert data["left_out"] == {"no image by its name": {".heic": 2, ".txt": 1}}
    cat, dog = data["classes"]
    assert sum(cat[split] for split in ("train", "validation", "test")) == 40
    for words in ("43 images to train", "8×8 to 30×20", "3 files left out", "under 30 images to train: dog"):
        assert words in said
        assert words in page
    assert f"{dog['train']} / {dog['validation']} / {dog['test']}" in page
    assert "RGB because of 1 among 53" in page


def test_a_run_in_a_folder_whose_name_is_no_utf_8_gets_its_report(pets: Path, tmp_path: Path) -> None:
    """The page is UTF-8: the name is escaped there, and training does not fail on it after hours."""
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    try:
        out.mkdir()
    except OSError:
        pytest.skip("this disk has no names that are not UTF-8")
    command = ["train", "--preset", "small", "--data", str(pets), "--out", str(out), "--steps", "1",
               "--image-size", "8", "--device", "cpu"]  # fmt: skip
    assert main(command) == 0
    assert r"<title>caf\xe9</title>" in (out / "report.html").read_text("utf-8")
