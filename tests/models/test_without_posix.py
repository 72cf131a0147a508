"""The offline commands on a system that is not POSIX, as Windows is: what only that has is blanked in a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.bundle import read_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

# Packages are imported before: on Windows they know what to do, but here they go by the platform's name.
PROGRAM = """
import os, signal, sys
import matplotlib.figure, numpy, PIL.Image, pydantic, rich.progress, safetensors.torch, sklearn.datasets, torch
import sklearn.linear_model, sklearn.metrics
torch.set_num_threads(1)

for name in ("fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "posix", "syslog"):
    sys.modules[name] = None
for name in [name for name in dir(signal) if name.startswith("SIG")]:
    if name not in {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}:
        delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "kill", "sched_getaffinity", "O_NOCTTY"):
    delattr(os, name)
opens = os.open

def without_folders(path, flags, *rest, **more):
    if os.path.isdir(path) and "dir_fd" not in more:  # which shutil needs here
        raise PermissionError(13, "Permission denied", os.fspath(path))
    return opens(path, flags, *rest, **more)

os.open = without_folders

import models.files
from models.__main__ import main
models.files.exchange = lambda one, other: False  # nor can two folders be swapped
sys.exit(main())
"""


def models(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_run_becomes_a_bundle_without_posix(tmp_path: Path) -> None:
    """It trains, shows itself, scores and publishes, and says what this system can't do."""
    run = str(tmp_path / "run")
    command = ["train", "--preset", "mlp-paper", "--data", "digits", "--steps", "2", "--out", run, "--device", "cpu"]
    done = models(*command)
    assert done.returncode == 0, done.stderr
    assert "this system can't lock a run's folder" in done.stderr
    assert read_bundle(tmp_path / "run" / "bundle").name == "digits-mlp-paper"
    assert not (tmp_path / "run" / "preview").exists()


def test_what_a_run_costs_is_said_without_posix(tmp_path: Path) -> None:
    """All but the memory, of which this system says nothing."""
    run = str(tmp_path / "run")
    done = models("train", "--preset", "mlp-paper", "--data", "digits", "--out", run, "--dry-run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "unknown" in done.stdout
