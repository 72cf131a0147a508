"""Goes through a data set: what is missing, its making, and the record of it."""

import json
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import NamedTuple

from models.exchange.bulk.plan import (
    SHARD_NAME,
    BulkError,
    Made,
    Manifest,
    OptionsError,
    ShardRecord,
    read_record,
    require_same,
)
from models.exchange.bulk.storage import Storage
from models.exchange.bulk.worker import Task

MANIFEST = "manifest.json"
UNFINISHED = "manifest.part.json"  # the same, of the shards so far; it goes when MANIFEST comes
RECORDED_EVERY_S = 5.0  # what is not recorded when the machine stops is made again

# Makes shards by their numbers, until it is told to stop: see `make_by_processes`.
Maker = Callable[[Task, Iterable[int], Callable[[], bool]], Generator[Made | int, None, None]]


class Progress(NamedTuple):
    """How far a data set has come, in images.

    Attributes:
        images: In all.
        found: In shards that were there.
        drawn: Since then; not all of them need be in finished shards.
        written: Since then, in finished shards.
    """

    images: int
    found: int
    drawn: int = 0
    written: int = 0

    @property
    def is_done(self) -> bool:
        """Whether all of them are there."""
        return self.found + self.written == self.images


def generate(
    task: Task, empty: Manifest, storage: Storage, make: Maker, is_stopped: Callable[[], bool]
) -> Generator[Progress, None, None]:
    """Make what is missing of a data set. Gives its progress, at the beginning and again and again.

    Args:
        task: What is made.
        empty: Its record, without shards.
        storage: Where.
        make: Who makes shards.
        is_stopped: Once it says so, no more is made. What is whole stays.

    Raises:
        OptionsError: The folder has something else in it.
        BulkError, OSError: Shards can't be made, or can't be found where they were written.
    """
    with storage.held():
        record = _Record.found(storage, empty)
        missing = [number for number in range(task.options.shards) if number not in record.shards]
        progress = Progress(task.options.count, record.images)
        yield progress
        if missing or not record.is_finished:
            with closing(make(task, missing, is_stopped)) as told:
                record.write()
                try:
                    for one in told:
                        if isinstance(one, int):
                            progress = progress._replace(drawn=progress.drawn + one)
                        else:
                            record.add(one)
                            progress = progress._replace(written=record.images - progress.found)
                        yield progress
                finally:
                    record.write()
            if progress.is_done:
                record.finish()


class _Record:
    """Which shards are finished, in memory and in a file beside them."""

    def __init__(self, storage: Storage, manifest: Manifest, *, is_finished: bool = False) -> None:
        self._storage, self._manifest = storage, manifest
        self._written_at = 0.0
        self.is_finished = is_finished
        self.shards = {one.first_index // manifest.options.shard_size: one for one in manifest.shards}
        self.images = sum(one.images for one in manifest.shards)
        self.software = list(manifest.software)

    @classmethod
    def found(cls, storage: Storage, empty: Manifest) -> "_Record":
        """What is there already: recorded shards whose files have their sizes.

        Raises:
            OptionsError: The folder was begun with other options, or has shards that nothing is recorded of.
        """
        sizes = storage.sizes()
        name = next((name for name in (UNFINISHED, MANIFEST) if name in sizes), None)
        if name is None:
            if shards := sorted(filter(SHARD_NAME.fullmatch, sizes)):
                raise OptionsError(f"{storage.place} has {shards[0]} in it, but no {MANIFEST}: choose another folder")
            return cls(storage, empty)
        place = f"{storage.place}/{name}"
        manifest = read_record(storage.read(name) or b"", place)
        require_same(empty.options, manifest.options, storage.place)
        whole = tuple(one for one in manifest.shards if _is_there(one, sizes))
        is_finished = name == MANIFEST
        return cls(storage, manifest.model_copy(update={"shards": whole}), is_finished=is_finished)

    def add(self, made: Made) -> None:
        """A shard is finished."""
        self.shards[made.record.first_index // self._manifest.options.shard_size] = made.record
        self.images += made.record.images
        if made.software not in self.software:
            self.software.append(made.software)
        if time.monotonic() - self._written_at >= RECORDED_EVERY_S:
            self.write()

    def write(self) -> None:
        """Put all of it on disk."""
        self._storage.write(UNFINISHED, self._as_json())
        self._written_at = time.monotonic()

    def finish(self) -> None:
        """Say that everything is there.

        Raises:
            BulkError: It is not.
        """
        sizes = self._storage.sizes()
        if lost := [one for one in self.shards.values() if not _is_there(one, sizes)]:
            raise BulkError(f"{len(lost)} shards are not in {self._storage.place}, the first from image "
                            f"{lost[0].first_index} on, though they were written: all who write must reach the same "
                            "place, and nobody else change it")  # fmt: skip
        self._storage.write(MANIFEST, self._as_json())
        self._storage.remove(UNFINISHED)

    def _as_json(self) -> bytes:
        update = {
            "shards": tuple(self.shards[number] for number in sorted(self.shards)),
            "software": tuple(sorted(self.software, key=json.dumps)),
        }
        return self._manifest.model_copy(update=update).model_dump_json(indent=1).encode() + b"\n"


def _is_there(shard: ShardRecord, sizes: dict[str, int]) -> bool:
    return all(sizes.get(name) == file.bytes for name, file in shard.files.items())
