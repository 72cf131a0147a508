"""Batches of one size from arrays of any, and whose they are where several programs draw from one seed."""

import itertools
from collections.abc import Iterator

import numpy as np

from gan_client.core.paging import Span
from gan_client.results import UInt8


def shard_spans(batch_size: int, shard: int, shards: int) -> Iterator[Span]:
    """The spans of every `shards`-th batch, from number `shard` on, for ever."""
    return ((number * batch_size, batch_size) for number in itertools.count(shard, shards))


class Rebatcher:
    """Takes arrays of any number of rows, and gives the same rows `size` at a time."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}: at least one image is needed")
        self._size = size
        self._waiting: list[UInt8] = []

    def add(self, array: UInt8) -> Iterator[UInt8]:
        """The batches that are full now."""
        self._waiting.append(array)
        rows = sum(map(len, self._waiting))
        if rows < self._size:
            return
        whole = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        end = rows - rows % self._size
        self._waiting = [whole[end:]] if end < rows else []
        yield from (whole[start : start + self._size] for start in range(0, end, self._size))

    def rest(self) -> Iterator[UInt8]:
        """The last batch, if any rows are left for one."""
        if self._waiting:
            yield np.concatenate(self._waiting)
