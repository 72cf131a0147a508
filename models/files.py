"""Writes files and folders whole: a reader, even after a crash, finds what was there before or what is there now."""

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


class FolderInUseError(RuntimeError):
    """Another process has locked the folder."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it there; its folder is made where it is missing.

    Raises:
        OSError: The disk, with the name of the file. What was there is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def create_file(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that is not there yet, with these rights from its first byte on.

    Raises:
        OSError: There is one already, which stays as it is; or the disk, and there is none.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - it is open already
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder to be filled, which takes the place of `folder` at the end of the block, unless that raises.

    Where a system can't swap two folders in one step, there is none for a moment. Files are synced by who writes them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's 0700 would lock out a server's user
        sync_folder(temporary)
        _put_in_place(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # by now it may be the old one


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there: out of everybody's sight at once, and then its files."""
    if folder.exists():
        hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        folder.replace(hidden / folder.name)
        shutil.rmtree(hidden)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        OSError: The disk, with the name of the file.
    """
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = os.fspath(path)  # a full disk doesn't say whose write it refused
        raise


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, where a system opens folders: Windows does not."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a folder onto its place; one that is there already ends up under the temporary name."""
    if exchange(temporary, folder):
        return
    try:
        temporary.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        aside = temporary.with_name(f"{temporary.name}-old")
        folder.replace(aside)
        try:
            temporary.replace(folder)
        finally:  # a signal may have come between the two
            aside.replace(temporary if folder.exists() else folder)


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Keep other processes from a folder while the block lasts. The lock ends with the process, however that ends.

    Gives whether this system can lock folders; some network file systems can't, and don't say so.

    Raises:
        FolderInUseError: Another process has it.
    """
    try:
        import fcntl  # noqa: PLC0415 - POSIX alone has it
    except ImportError:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"{folder}: another process has it") from None
        except OSError:
            pass  # some network file systems have no such locks: there nothing keeps two processes apart
        yield True
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where the system can: Linux' renameat2 with RENAME_EXCHANGE."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def cache_folder() -> Path:
    """Where everything lies that can be made again: `gan-service` in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gan-service"


def checksum_of(tensors: Mapping[str, Tensor], beside: str = "") -> str:
    """sha256, in hex, over a text and the names, shapes and numbers of tensors, in the order of the names."""
    digest = hashlib.sha256(beside.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
