"""Where a data set is written: a folder of this machine, or anything that fsspec has a name for.

In both, a file is whole before it has its name. In a folder it is written as `….part`, synced and renamed. Object
stores have no renaming (S3 would copy everything and delete it), but show nothing of a file that is not whole, so there
it gets its name at once, from a temporary file of the machine that made it.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from models.exchange.bulk.plan import SHARD_NAME, BulkError, OptionsError
from models.files import FolderInUseError, locked_folder, replace_file, sync_folder

PART = ".part"


class Storage(Protocol):
    """What can be done with either of them. Errors are `BulkError` or `OSError`."""

    place: str

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes away while the block lasts, where that is possible."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is there, by name."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, or put it in place of what was there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        ...

    def new_files(self, names: Sequence[str]) -> contextlib.AbstractContextManager[list[Path]]:
        """Local files to be written, which get these names at the end of the block, unless that raises."""
        ...


def storage_of(place: str) -> Storage:
    """The storage that a path or a URI names.

    Raises:
        BulkError: It needs a package that is not installed.
        OptionsError: Nobody knows such URIs.
    """
    if "://" not in place:
        return Folder(Path(place))
    try:
        from fsspec.core import url_to_fs  # noqa: PLC0415 - of the extra
        from fsspec.implementations.local import LocalFileSystem  # noqa: PLC0415
    except ModuleNotFoundError:
        raise BulkError(f"{place}: this needs fsspec: the bulk extra brings it") from None
    try:
        system, path = url_to_fs(place)
    except ImportError as error:  # its words name the package
        raise BulkError(f"{place}: {error}") from None
    except ValueError as error:
        raise OptionsError(f"{place}: {error}") from None
    return Folder(Path(path)) if isinstance(system, LocalFileSystem) else ObjectStore(place, system, path)


class Folder:
    """A folder of this machine, or one that it shares."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()  # of whichever process: they need not be started in the same place
        self.place = str(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `Storage`. Before and after, what others have left unfinished is removed."""
        self._path.mkdir(parents=True, exist_ok=True)
        try:
            with locked_folder(self._path):
                self._remove_parts()
                try:
                    yield
                finally:
                    self._remove_parts()
        except FolderInUseError:
            raise BulkError(f"{self.place}: another process is at work here") from None

    def _remove_parts(self) -> None:
        for part in self._path.glob(f"*{PART}"):
            if SHARD_NAME.match(part.name):
                part.unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """See `Storage`."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return {}

    def read(self, name: str) -> bytes | None:
        """See `Storage`."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        replace_file(self._path / name, content)

    def remove(self, name: str) -> None:
        """See `Storage`."""
        (self._path / name).unlink()

    @contextmanager
    def new_files(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """See `Storage`."""
        # Two processes may write the same shard at a time, where one of them was given up too early.
        parts = [self._path / f"{name}.{os.getpid()}-{os.urandom(4).hex()}{PART}" for name in names]
        try:
            yield parts
            for part, name in zip(parts, names, strict=True):
                with part.open("r+b") as file:
                    os.fsync(file.fileno())
                part.replace(self._path / name)
            sync_folder(self._path)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)


class ObjectStore:
    """A file system of fsspec's that is not this machine's."""

    def __init__(self, place: str, system: Any, path: str) -> None:
        self.place = place
        self._system, self._path = system, path.rstrip("/")

    @contextmanager
    def held(self) -> Iterator[None]:
        """There are no locks: two who make the same data set write the same bytes."""
        yield

    def sizes(self) -> dict[str, int]:
        """See `Storage`."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            self._system.invalidate_cache()
            entries = self._system.ls(self._path, detail=True)
            return {one["name"].rpartition("/")[2]: one["size"] for one in entries if one["type"] == "file"}
        return {}

    def read(self, name: str) -> bytes | None:
        """See `Storage`."""
        with self._errors(), contextlib.suppress(FileNotFoundError):
            content: bytes = self._system.cat_file(self._of(name))
            return content
        return None

    def write(self, name: str, content: bytes) -> None:
        """See `Storage`."""
        with self._errors():
            self._system.pipe_file(self._of(name), content)

    def remove(self, name: str) -> None:
        """See `Storage`."""
        with self._errors():
            self._system.rm_file(self._of(name))

    @contextmanager
    def new_files(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """See `Storage`."""
        with tempfile.TemporaryDirectory(prefix="gan-bulk-") as folder:
            paths = [Path(folder, name) for name in names]
            yield paths
            with self._errors():
                for path in paths:
                    self._system.put_file(str(path), self._of(path.name))

    def _of(self, name: str) -> str:
        return f"{self._path}/{name}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each file system has errors of its own
            words = " ".join(str(error).split()) or type(error).__name__
            raise BulkError(f"{self.place}: {words}") from None
