"""Damaged ONNX files are refused with one line, in bounded time and memory, and open no other file."""

import random
from pathlib import Path

import pytest

from benchmarks.faults.foreign_files import OPTIONS, damaged, opened_files, sound_files, try_files
from models.__main__ import main
from models.exchange.importing.conversion import read_onnx

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = 300  # `python -m benchmarks.faults.foreign_files` tries as many as are wanted


def test_damaged_files_are_refused_in_one_line() -> None:
    """What they are made of is read; of them some still are nets, and of the others each has its reason."""
    for content in sound_files():
        read_onnx(content, OPTIONS)
    opened = opened_files()
    outcome = try_files(range(FILES))
    assert not outcome.wrong
    assert outcome.nets + outcome.refused.total() == FILES
    assert not opened


@pytest.mark.slow
def test_the_command_refuses_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2, one line on stderr and nothing written, or it writes the bundle."""
    for seed in range(3):
        rng = random.Random(seed)  # noqa: S311 - no secret
        (tmp_path / "net.onnx").write_bytes(damaged(rng.choice(sound_files()), rng))
        code = main(["import", str(tmp_path / "net.onnx"), "--name", "x", "--out", str(tmp_path / "x"), "--force"])
        said = capsys.readouterr().err
        assert code == 0 or (code, said.count("\n"), (tmp_path / "x").exists()) == (2, 1, False), said
