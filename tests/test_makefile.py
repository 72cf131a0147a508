"""What `make` says where it can't go on."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no make")


@pytest.mark.parametrize("python", ["old", "missing"])
def test_another_python_is_refused_before_anything_is_made(tmp_path: Path, python: str) -> None:
    """One line says which Python is needed, and nothing is left that would spoil the next try."""
    (tmp_path / "old").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = 3, 10; '\"$2\"\n"
    )
    (tmp_path / "old").chmod(0o755)
    make = ["make", "serve", f"PYTHON={tmp_path / python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"Python 3.11 to 3.13 is needed, and {tmp_path / python} is none." in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_and_packages_name_the_same_pythons() -> None:
    """The check in front has the bounds of pyproject.toml, so this Python passes it."""
    [lowest, beyond] = re.findall(r"\(3, ([0-9]+)\)", (ROOT / "Makefile").read_text())
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
        == f">=3.{lowest},<3.{beyond}"
    )
    assert int(lowest) <= sys.version_info.minor < int(beyond)
