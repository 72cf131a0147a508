"""A run's folder keeps what is whole, forgets what will be computed again, and touches nothing that isn't its own."""

import errno
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.training.run_folder import RunDir, RunError, environment


def test_checkpoints_fall_back_to_the_newest_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two are kept; one that was cut off is named and passed over, and the run is not begun anew when none reads."""
    folder = RunDir(tmp_path)
    folder.begin({})
    for step in (1, 999_999, 1_000_000):
        folder.save_checkpoint(step, {"x": torch.full((100,), float(step))}, {"step": step})
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-1000000.safetensors", "step-999999.safetensors"]
    newest, older = kept

    def newest_step() -> float | None:
        found = folder.newest_checkpoint()
        return None if found is None else found[0]["x"][0].item()

    assert newest_step() == 1_000_000
    assert not capsys.readouterr().err
    newest.write_bytes(newest.read_bytes()[:-1])
    assert newest_step() == 999_999
    assert "step-1000000.safetensors" in capsys.readouterr().err
    older.write_bytes(b"")
    with pytest.raises(
        RunError, match=r"none .* can be read: step-1000000\.safetensors: .*; step-999999\.safetensors: "
    ):
        newest_step()
    for path in kept:
        path.unlink()
    assert newest_step() is None


@pytest.mark.parametrize("place", [b"1234567", b"\0\0\0@"], ids=["the metadata", "a tensor"])
def test_a_checkpoint_whose_bits_flipped_is_passed_over(tmp_path: Path, place: bytes) -> None:
    """Of the right length and well formed, but other numbers: only its checksum tells."""
    folder = RunDir(tmp_path)
    folder.begin({})
    for step in (1, 2):
        folder.save_checkpoint(step, {"x": torch.full((100,), float(step)), "t": torch.tensor(3.0)}, {"step": 1234567})
    newest = tmp_path / "checkpoints" / "step-000002.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[raw.rindex(place)] ^= 1
    newest.write_bytes(raw)
    found = folder.newest_checkpoint()
    assert found is not None
    assert found[0]["x"][0].item() == 1
    assert found[1]["step"] == 1234567


def test_a_checkpoint_without_a_checksum_is_read(tmp_path: Path) -> None:
    """As they were written before there was one."""
    folder = RunDir(tmp_path)
    folder.begin({})
    save_file({"x": torch.ones(2)}, tmp_path / "checkpoints" / "step-000005.safetensors", {"facts": '{"step": 5}'})
    found = folder.newest_checkpoint()
    assert found is not None
    assert found[1] == {"step": 5}


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a picture would keep the report from being written ever after."""
    folder = RunDir(tmp_path)
    folder.begin({})
    folder.save_samples(5, np.zeros((4, 8, 8, 1), np.uint8))
    before = (tmp_path / "samples" / "step-000005.png").read_bytes()

    def full(_: Path, __: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.files.write_synced", full)
    with pytest.raises(OSError, match="No space left"):
        folder.save_samples(5, np.ones((4, 8, 8, 3), np.uint8))
    assert [path.read_bytes() for path in (tmp_path / "samples").iterdir()] == [before]


def test_the_last_good_checkpoint_outlives_the_newest_two(tmp_path: Path) -> None:
    """While something is wrong it is kept beside them, and going back leaves it as the newest."""
    folder = RunDir(tmp_path)
    folder.begin({})
    for step, good_step in ((10, 10), (20, 20), (30, 25), (40, 25), (50, 25)):
        folder.save_checkpoint(step, {"x": torch.zeros(1)}, {"step": step}, good_step)
    names = sorted(path.name[5:11] for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000020", "000040", "000050"]
    assert folder.go_back(5) == 50  # nothing is that old: better a doubtful state than none
    assert folder.go_back(25) == 20
    assert [path.name[5:11] for path in (tmp_path / "checkpoints").iterdir()] == ["000020"]


def test_stats_forget_what_will_be_computed_again(tmp_path: Path) -> None:
    """Lines after the checkpoint's step go, and so does one that a crash cut off."""
    folder = RunDir(tmp_path)
    folder.begin({})
    folder.truncate_stats(0)  # nothing there yet
    assert folder.stats() == []
    for number in (50, 100, 150):
        folder.append_stats({"step": number, "seconds": 1.0})
    with (tmp_path / "stats.jsonl").open("a") as file:
        file.write('{"step": 2')
    folder.truncate_stats(100)
    lines = (tmp_path / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [50, 100]
    assert [row["step"] for row in folder.stats()] == [50, 100]


def test_beginning_again_sweeps_out_only_what_a_kill_left(tmp_path: Path) -> None:
    """Half-written files of ours go; a stranger's hidden file in the same folder stays."""
    folder = RunDir(tmp_path)
    folder.begin({})
    leftovers = [
        tmp_path / ".options.json.123.tmp",
        tmp_path / ".stats.jsonl.9.tmp",
        tmp_path / ".report.html.9.tmp",
        tmp_path / "checkpoints" / ".step-000500.safetensors.77.tmp",
        tmp_path / "samples" / ".step-000500.png.77.tmp",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    (tmp_path / ".bundle-abcd").mkdir()
    mine = tmp_path / ".editor.tmp"
    mine.write_bytes(b"mine")
    folder.begin({})
    assert not any(path.exists() for path in (*leftovers, tmp_path / ".bundle-abcd"))
    assert mine.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"options": 3}'], ids=["empty", "cut off", "list", "number"])
def test_options_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    """A damaged options.json is one clear line: guessing what a run was would be worse."""
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(RunError, match=r"options\.json"):
        RunDir(tmp_path).record()


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked")
def test_a_run_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """A second one is refused until the first is gone, and nothing is left of the lock."""
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    with first.held(), pytest.raises(RunError, match="run: another process is at work on this run"), second.held():
        pass
    with second.held():
        pass
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked")
def test_a_run_is_held_also_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: two at once are then up to the user."""

    def unknown(_: int, __: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with RunDir(tmp_path).held():
        pass


def test_a_folder_is_used_as_soon_as_anything_lies_there(tmp_path: Path) -> None:
    """Missing and empty folders are free; a file in it, or in its place, is somebody's."""
    assert not RunDir(tmp_path / "new").is_used()
    assert not RunDir(tmp_path).is_used()
    (tmp_path / "note.txt").write_text("mine")
    assert RunDir(tmp_path).is_used()
    assert RunDir(tmp_path / "note.txt").is_used()
    assert RunDir(tmp_path).record() is None


def test_the_environment_says_what_figures_depend_on() -> None:
    """Device, instruction set, threads and versions, as JSON."""
    found = environment(torch.device("cpu"))
    assert set(found) == {"device", "instruction_set", "threads", "torch", "python", "source_commit"}
    assert json.loads(json.dumps(found)) == found
