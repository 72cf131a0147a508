"""gan-client sample: a folder that is filled, gone on with, and never mixed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gan_client import Client
from gan_client.__main__ import main
from gan_client.commands.folder import Folder, FolderError, Manifest, read_manifest, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sample(live: Any, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on the folder `out`; a flag is a keyword."""

    def run(**flags: object) -> int:
        given = {"url": live.url, "out": tmp_path / "out"} | flags
        return main(
            ["sample", *(text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value)))]
        )

    return run


def names(folder: Path) -> list[str]:
    """The images' files."""
    return sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")


def expected(live: Any, count: int, **options: Any) -> Any:
    """The images that belong in the folder."""
    with Client(live.url) as client:
        return client.sample_array(count, 3, **options)


def test_a_folder_of_pictures(live: Any, sample: Callable[..., int], tmp_path: Path) -> None:
    """One for each image, named by its index."""
    assert sample(count=70, seed=3, first_index=5, bundle="rgb") == 0
    assert names(tmp_path / "out") == [f"{index:012d}.png" for index in range(5, 75)]
    images = [np.asarray(Image.open(tmp_path / "out" / name)) for name in names(tmp_path / "out")]
    np.testing.assert_array_equal(np.stack(images), expected(live, 70, first_index=5, bundle="rgb"))


@pytest.mark.parametrize("labels", ["cat,2", '["cat", 2]'], ids=["commas", "JSON"])
def test_a_folder_of_arrays(live: Any, sample: Callable[..., int], tmp_path: Path, labels: str) -> None:
    """Of so many images each, named by the first one's index; labels take turns."""
    assert sample(count=250, seed=3, bundle="cond", files="npy", shard_size=100, labels=labels) == 0
    assert names(tmp_path / "out") == ["000000000000.npy", "000000000100.npy", "000000000200.npy"]
    arrays = [np.load(tmp_path / "out" / name) for name in names(tmp_path / "out")]
    assert [len(array) for array in arrays] == [100, 100, 50]
    np.testing.assert_array_equal(np.concatenate(arrays), expected(live, 250, bundle="cond", labels=["cat", 2] * 125))


@pytest.mark.parametrize("files", ["png", "npy"])
def test_running_it_again_draws_what_is_missing_and_nothing_else(
    live: Any, sample: Callable[..., int], tmp_path: Path, files: str
) -> None:
    """Files that are gone, or empty as after a power cut, come again; the rest stays, and so does the drawn seed."""
    folder = tmp_path / "out"
    assert sample(count=30, files=files, shard_size=10) == 0
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    kept, gone, *_, empty = before
    inode = (folder / kept).stat().st_ino
    (folder / gone).unlink()
    (folder / empty).write_bytes(b"")
    (folder / f".{gone}.1.part").write_bytes(b"half")
    drawn = live.metric("gan_images_total", bundle="tiny", operation="sample")
    assert sample(count=30, files=files, shard_size=10) == 0
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert (folder / kept).stat().st_ino == inode
    again = live.metric("gan_images_total", bundle="tiny", operation="sample") - drawn
    assert again == (2 if files == "png" else 20)


def read(folder: Path) -> Manifest:
    """The manifest of a folder that has one."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


@pytest.mark.parametrize(
    "changed",
    [
        {"count": 21},
        {"seed": 4},
        {"first_index": 1},
        {"bundle": "rgb"},
        {"labels": "cat"},
        {"truncation": 0.5},
        {"scale": 2},
        {"files": "npy"},
        {"shard_size": 10},
    ],
    ids=str,
)
def test_a_folder_of_other_options_is_refused(
    sample: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any]
) -> None:
    """What is there stays as it is, and the option is named."""
    options = {"count": 20, "seed": 3, "bundle": "cond"}
    assert sample(**options) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sample(**options | changed) == 2
    assert next(iter(changed)) in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_version_stays_that_of_the_beginning(
    sample: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that was begun with a version that is gone is not gone on with by another."""
    assert sample(count=3, seed=3) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["bundle"].startswith("tiny@")
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest | {"bundle": "tiny@0123456789ab"}))
    (tmp_path / "out" / names(tmp_path / "out")[0]).unlink()
    assert sample(count=3, seed=3) == 1
    assert "tiny@0123456789ab" in capsys.readouterr().err
    assert len(names(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "content", [{"photo.jpg": "x"}, {"manifest.json": "{}"}, {"manifest.json": "no"}, {"manifest.json": "[1]"}], ids=str
)
def test_a_folder_of_something_else_is_refused(
    sample: Callable[..., int], tmp_path: Path, content: dict[str, str]
) -> None:
    """Nothing is written between somebody's files."""
    (tmp_path / "out").mkdir()
    for name, text in content.items():
        (tmp_path / "out" / name).write_text(text)
    assert sample(count=3) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(content)


def test_a_mistake_makes_no_folder(sample: Callable[..., int], tmp_path: Path) -> None:
    """The options are tried with one image before anything is written."""
    assert sample(count=3, bundle="none") == 1
    assert sample(count=0) == 2
    for labels in ("[", "[]", "[1.5]"):
        with pytest.raises(SystemExit):
            sample(count=1, labels=labels)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_begun_leaves_nothing(tmp_path: Path) -> None:
    """It is written beside its place, and only a whole one is put there."""
    manifest = Manifest("tiny@0123456789ab", None, 3, 0, 20, None, 1.0, 1, "npy", 10)
    write_manifest(tmp_path, manifest)
    folder = Folder(tmp_path, manifest)
    rows = np.arange(10 * 4, dtype=np.uint8).reshape(10, 2, 2, 1)
    folder.write((0, 10), rows)
    folder.write((10, 6), rows[:6])
    folder.close()
    assert names(tmp_path) == ["000000000000.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "000000000000.npy"), rows)
    assert folder.missing() == [(10, 10)]


def test_a_manifest_of_a_later_format_is_refused(tmp_path: Path) -> None:
    """Nobody knows what it means."""
    write_manifest(tmp_path, Manifest("tiny@0123456789ab", None, 3, 0, 20, None, 1.0, 1, "npy", 10, format=2))
    with pytest.raises(FolderError, match="format 2"):
        read_manifest(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_ctrl_c_stops_at_once_and_the_same_command_goes_on(scripted: Any, live: Any, tmp_path: Path) -> None:
    """While a request is under way: exit code 130, whole files alone, and then the rest."""
    hung = threading.Event()

    def hang(handler: Any) -> None:
        hung.set()
        scripted.hang(handler)

    command = [sys.executable, "-m", "gan_client", "sample", "--url", scripted.url, "--count", "100", "--seed", "3"]
    command += ["--out", str(tmp_path / "out")]
    scripted.script.extend([scripted.passing, scripted.passing, hang])
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert hung.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on." in said
    assert "Traceback" not in said
    assert len(names(tmp_path / "out")) == 64
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ)
    assert "100 images" in done.stderr
    images = [np.asarray(Image.open(tmp_path / "out" / name)) for name in names(tmp_path / "out")]
    np.testing.assert_array_equal(np.stack(images), expected(live, 100)[..., 0])
