"""Files and folders are replaced whole, and what was there stays where that fails."""

import os
from pathlib import Path

import pytest
import torch

from models.files import cache_folder, checksum_of, remove_folder, replace_file, replaced_folder


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    """Nothing else is left beside it."""
    path = tmp_path / "new" / "a.txt"
    for content in (b"one", b"two"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert [*path.parent.iterdir()] == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the error names the file, which a full disk's own does not."""
    path = tmp_path / "a.txt"
    replace_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.txt"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("can_swap", [True, False], ids=["swap", "renames"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_swap: bool) -> None:
    """The first comes to its place, the second takes it over; a block that raises changes nothing."""
    if not can_swap:
        monkeypatch.setattr("models.files.exchange", lambda _one, _other: False)
    place = tmp_path / "parent" / "a"
    for name in ("one", "two"):
        with replaced_folder(place) as folder:
            (folder / name).write_text(name)
        assert [path.name for path in place.iterdir()] == [name]
    with pytest.raises(FileNotFoundError), replaced_folder(place) as folder:
        (folder / "three").rename(folder / "four")
    assert [path.name for path in place.iterdir()] == ["two"]
    assert [*place.parent.iterdir()] == [place]
    assert place.stat().st_mode & 0o777 == 0o755


def test_a_signal_between_two_renames_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system can't swap two folders there is none for a moment, but never for longer."""
    monkeypatch.setattr("models.files.exchange", lambda _one, _other: False)
    place, replace = tmp_path / "a", Path.replace
    with replaced_folder(place) as folder:
        (folder / "one").touch()

    def interrupted(path: Path, target: Path) -> Path:
        if target == place and (path / "two").exists() and not place.exists():
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(place) as folder:
        (folder / "two").touch()
    assert [path.name for path in place.iterdir()] == ["one"]
    assert [*tmp_path.iterdir()] == [place]


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    """And it is no fault where there is none."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for _ in range(2):
        remove_folder(tmp_path / "a")
        assert not [*tmp_path.iterdir()]


def test_the_cache_is_where_the_desktop_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_CACHE_HOME where it says something, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "gan-service"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "gan-service"


def test_a_checksum_covers_names_shapes_numbers_and_the_text() -> None:
    """The order in which tensors come makes no difference, everything else does."""
    ones, zeros = torch.ones(2, 3), torch.zeros(2)
    same = checksum_of({"a": ones, "b": zeros})
    assert same == checksum_of({"b": zeros, "a": ones})
    others = [
        checksum_of({"a": ones, "c": zeros}),
        checksum_of({"a": ones.T, "b": zeros}),
        checksum_of({"a": ones, "b": zeros + 1}),
        checksum_of({"a": ones, "b": zeros}, "text"),
    ]
    assert len({same, *others}) == 5
