"""The record of a run, a folder that people and later commands read:

    options.json              what was asked for: name, options, data set and its checksum, environment
    data.json                 what was read of the data: images, classes, sizes, what was left out
    stats.jsonl               one JSON object a line, with at least `step` and `seconds`
    samples/step-000500.png   images from the same noise every time; samples/real.png has real ones
    checkpoints/step-000500.safetensors    the whole state in one file; the newest two are kept
    preview/                  a bundle of what is there so far, until bundle/ is written
    bundle/                   the end product: the weights that scored best
    last/bundle/              the last step's weights, where a server on this folder doesn't look

A checkpoint is written whole or not at all, and has a checksum of its own. After a kill at any moment the run goes on
from the newest one that can be read.
"""  # noqa: D400, D415

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from models.files import FolderInUseError, checksum_of, locked_folder, replace_file
from models.inference.pixels import UInt8, encode_png, grid

KEPT_CHECKPOINTS = 2


class RunError(ValueError):
    """The run folder and the command do not fit together; the message is one line for a person."""


class RunDir:
    """One run's folder. It is made by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bundle = path / "bundle"
        self.preview = path / "preview"
        self.last = path / "last" / "bundle"
        self._options = path / "options.json"
        self._data = path / "data.json"
        self._stats = path / "stats.jsonl"
        self._checkpoints = path / "checkpoints"
        self._samples = path / "samples"
        self.real = self._samples / "real.png"

    def is_used(self) -> bool:
        """Whether a run has begun here, or anything else lies here."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from this run while the block lasts. The lock ends with the process, however that ends.

        Raises:
            RunError: Another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked_folder(self.path) as is_locked:
                if not is_locked:
                    print("note: this system can't lock a run's folder: see that no other process trains there",
                          file=sys.stderr, flush=True)  # fmt: skip
                yield
        except FolderInUseError:
            raise RunError(f"{self.path}: another process is at work on this run") from None

    def begin(self, record: dict[str, Any]) -> None:
        """Write options.json, and remove the temporary files of a run that was killed."""
        for folder in (self._checkpoints, self._samples):
            folder.mkdir(parents=True, exist_ok=True)
        pages = (self._options, self._data, self._stats, self.path / "report.html")
        for target in (*pages, self._checkpoints / "step-*", self._samples / "*"):
            for rest in target.parent.glob(f".{target.name}.*.tmp"):
                rest.unlink()
        for bundle in (self.bundle, self.preview, self.last):
            for rest in bundle.parent.glob(f".{bundle.name}-*"):
                shutil.rmtree(rest)
        replace_file(self._options, (json.dumps(record, indent=1) + "\n").encode())

    def record(self) -> dict[str, Any] | None:
        """What options.json says, or None where no run has begun.

        Raises:
            RunError: The file is there and cannot be read.
        """
        try:
            record = json.loads(self._options.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(f"{self._options}: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("options", {}), dict):
            raise RunError(f"{self._options}: not the record of a run")
        return record

    def save_data(self, summary: Mapping[str, Any]) -> None:
        """Write data.json, which says what was read of the data."""
        replace_file(self._data, (json.dumps(summary, indent=1) + "\n").encode())

    def data(self) -> dict[str, Any]:
        """What data.json says; empty where there is none, as in runs that were begun before there was one."""
        try:
            found = json.loads(self._data.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def append_stats(self, row: dict[str, Any]) -> None:
        """Add one line to stats.jsonl."""
        with self._stats.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def add_to_stats(self, row: dict[str, Any]) -> None:
        """Add figures to the last line, where it is of the same step; else add a line."""
        rows = self.stats()
        last = rows.pop() if rows and rows[-1]["step"] == row["step"] else {}
        replace_file(self._stats, "".join(json.dumps(one) + "\n" for one in (*rows, last | row)).encode())

    def stats(self) -> list[dict[str, Any]]:
        """The rows of stats.jsonl so far, without a last line that a crash cut off."""
        if not self._stats.exists():
            return []
        lines = self._stats.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if _step_of(line) < float("inf")]

    def truncate_stats(self, step: int) -> None:
        """Remove the lines after a step: a run that goes on from a checkpoint computes them again."""
        if not self._stats.exists():
            return
        kept = [line for line in self._stats.read_text("utf-8").splitlines() if _step_of(line) <= step]
        replace_file(self._stats, "".join(f"{line}\n" for line in kept).encode())

    def save_samples(self, step: int, images: UInt8) -> bytes:
        """Write images (n, h, w, c) as one square picture; returns the PNG."""
        picture = _square(images)
        replace_file(self._samples / f"step-{step:06d}.png", picture)
        return picture

    def samples(self) -> list[tuple[int, Path]]:
        """The pictures of samples by step, the first one first."""
        return _by_step(self._samples, ".png")

    def save_real(self, images: UInt8) -> None:
        """Write real images (n, h, w, c) as one square picture, to be seen beside the samples."""
        replace_file(self.real, _square(images))

    def save_checkpoint(
        self, step: int, tensors: dict[str, Tensor], metadata: dict[str, Any], good_step: int | None = None
    ) -> None:
        """Write a checkpoint, then delete older ones, but for the newest two and the newest of `good_step` or before.

        Raises:
            OSError: The disk. Earlier checkpoints are untouched.
        """
        named = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        written = json.dumps(metadata)
        beside = {"facts": written, "sha256": checksum_of(named, written)}  # finds bits that flip on a disk
        replace_file(self._path_of(step), save_tensors(named, metadata=beside))
        good = [path for path in self._newest_first() if good_step is not None and _step_in(path) <= good_step]
        for old in self._newest_first()[KEPT_CHECKPOINTS:]:
            if old not in good[:1]:
                old.unlink()

    def go_back(self, good_step: int) -> int | None:
        """Delete the checkpoints after a step, unless none would be left; returns the step of the newest then."""
        found = self._newest_first()
        good = [path for path in found if _step_in(path) <= good_step]
        for path in found if good else []:
            if path not in good:
                path.unlink()
        return _step_in((good or found)[0]) if found else None

    def newest_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata of the newest checkpoint that reads whole, or None where there is none yet.

        A damaged one is named on stderr, and the one before it is read.

        Raises:
            RunError: None of them can be read. To begin anew would overwrite what is left of the run.
        """
        faults = []
        for path in self._newest_first():
            try:
                found = _read_checkpoint(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                faults.append(f"{path.name}: {' '.join(str(error).split())}")
                continue
            for fault in faults:
                print(f"warning: passing over a checkpoint that cannot be read: {fault}", file=sys.stderr, flush=True)
            return found
        if faults:
            raise RunError(f"{self._checkpoints}: none of the checkpoints can be read: {'; '.join(faults)}")
        return None

    def _path_of(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:06d}.safetensors"

    def _newest_first(self) -> list[Path]:
        return [path for _, path in reversed(_by_step(self._checkpoints, ".safetensors"))]


def _square(images: UInt8) -> bytes:
    """A PNG with as many images a row as there are rows."""
    return encode_png(grid(images, columns=max(1, int(len(images) ** 0.5))), smallest=False)


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the software, on which a run's figures depend as well."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "source_commit": _source_commit(),
    }


def _source_commit() -> str | None:
    """The commit of this source tree, with `+` if files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", os.fspath(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict
    if "sha256" in metadata and metadata["sha256"] != checksum_of(tensors, metadata["facts"]):
        raise ValueError("its checksum differs")
    return tensors, json.loads(metadata["facts"])


def _by_step(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """The files whose names say a step, by step."""
    found = [path for path in folder.glob(f"step-*{suffix}") if path.stem.removeprefix("step-").isdecimal()]
    return sorted((_step_in(path), path) for path in found)


def _step_in(path: Path) -> int:
    """The step of a file's name."""
    return int(path.stem.removeprefix("step-"))


def _step_of(line: str) -> float:
    """The line's step; infinite for a line that a crash cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
