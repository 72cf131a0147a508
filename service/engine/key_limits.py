"""Limits for each key, by its name: images a second, and images in flight.

- A key may always have a second's worth of images computed. What a request asks for beyond that, the key pays off
  before its next one is accepted. So no count is impossible, and over time each key gets its rate and no more.
- Images are in flight from their request's acceptance until they are computed, or nobody waits for them any more.
- What is kept of a key is when it will have paid off everything, and its images in flight: 16 bytes in a table. Several
  workers have the table in one file that each has mapped, and change a row of it under a lock of the file's, which the
  kernel releases if its holder dies. So limits hold for the service, whichever worker is asked.
- A name keeps its row for as long as the service runs, so keys may come and go.
"""

import math
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.errors import Draining, Invalid, NotReady, QueueFull, RateLimited

if sys.platform != "win32":  # where a service has one worker
    import fcntl

MAX_NAMES = 2**17  # more than a file of keys has room for; all later names share the last row
_COUNT = struct.Struct("<q")  # names in the table, at its beginning
_ROW = struct.Struct("<dq")  # when all is paid off, on the monotonic clock; images in flight
_NAME_BYTES = 64
_ROW_BYTES = _ROW.size + _NAME_BYTES
_BYTES = _COUNT.size + MAX_NAMES * _ROW_BYTES
_ROUNDING_S = 1e-6


class KeyLimits:
    """The limits of every key, and how much of them is used.

    Args:
        images_per_s: 0 for no such limit.
        images_in_flight: 0 for no such limit.
        max_count: Most images that a request asks for.
        file: Descriptor of the file in which several workers have their table; it is empty at first.
        clock: Seconds, rising, the same for all workers.
    """

    def __init__(
        self,
        images_per_s: float,
        images_in_flight: int,
        max_count: int,
        file: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images_per_s = images_per_s
        self._images_in_flight = images_in_flight
        self._clock = clock
        self._file = file
        if file is None:
            self._table = mmap.mmap(-1, _BYTES)  # pages take memory once they are written to
        else:
            os.ftruncate(file, _BYTES)
            self._table = mmap.mmap(file, _BYTES)
        self._rows: dict[str, int] = {}  # where each name's row begins, of those that this process knows
        # How much a key can save up: a second's worth, and at least one image's.
        self._burst_s = max(1.0, 1 / images_per_s) if images_per_s else 0.0
        # No key ever owes more. A clock that has gone back would otherwise close it out for as long as it went back.
        self._most_owed_s = self._burst_s + (max_count / images_per_s if images_per_s else 0.0)
        self._policies = ", ".join(
            [f'"images";q={max(1, int(images_per_s))};qu="images";w={math.ceil(self._burst_s)}'] * bool(images_per_s)
            + [f'"in-flight";q={images_in_flight};qu="concurrent-images"'] * bool(images_in_flight)
        )

    def check(self, key: str, images: int, retry_after_s: Callable[[], int]) -> None:
        """Raise what `reserve` would raise now."""
        self._check(*self._state_of(key), images, retry_after_s)

    @contextmanager
    def reserve(self, key: str, images: int, retry_after_s: Callable[[], int]) -> Iterator[None]:
        """Accept images, which are in flight inside the block. A request that is refused there costs nothing.

        Args:
            key: Its name.
            images: All that a request asks for.
            retry_after_s: Whole seconds until what waits now is computed.

        Raises:
            RateLimited: Another limit is used up.
            Invalid: More images than may ever be in flight.
        """
        row = self._row(key)
        cost_s = images / self._images_per_s if self._images_per_s else 0.0
        with self._locked(row, _ROW.size):
            owed_s, in_flight = self._read(row)
            self._check(owed_s, in_flight, images, retry_after_s)
            self._write(row, owed_s + cost_s, in_flight + images)
        paid_s = 0.0
        try:
            yield
        except (QueueFull, NotReady, Draining):
            paid_s = cost_s
            raise
        finally:
            with self._locked(row, _ROW.size):
                owed_s, in_flight = self._read(row)
                self._write(row, max(0.0, owed_s - paid_s), in_flight - images)

    def fields(self, key: str) -> dict[str, str]:
        """The RateLimit header fields of draft-ietf-httpapi-ratelimit-headers-11, as they are now."""
        return self._fields(*self._state_of(key))

    def _state_of(self, key: str) -> tuple[float, int]:
        row = self._row(key)
        with self._locked(row, _ROW.size):  # another worker may be in the middle of writing it
            return self._read(row)

    def _check(self, owed_s: float, in_flight: int, images: int, retry_after_s: Callable[[], int]) -> None:
        most = self._images_in_flight
        if most and images > most:
            raise Invalid(f"This request asks for {images} images; a key may have {most} in flight.")
        wait_s, reason = 0.0, ""
        if self._images_per_s:
            wait_s = owed_s + 1 / self._images_per_s - self._burst_s
            reason = f"This key may have {self._images_per_s:g} images a second computed"
        if most and in_flight + images > most:
            wait_s, reason = max(wait_s, retry_after_s()), f"This key may have {most} images in flight"
        if wait_s > _ROUNDING_S:
            seconds = max(1, math.ceil(wait_s - _ROUNDING_S))
            raise RateLimited(reason, seconds, self._fields(owed_s, in_flight, seconds))

    def _fields(self, owed_s: float, in_flight: int, most_s: int | None = None) -> dict[str, str]:
        limits = []
        if self._images_per_s:
            left = max(0, int((self._burst_s - owed_s) * self._images_per_s + _ROUNDING_S))
            whole_in_s = max(1, math.ceil(owed_s))
            limits.append(f'"images";r={left};t={whole_in_s if most_s is None else min(whole_in_s, most_s)}')
        if self._images_in_flight:
            limits.append(f'"in-flight";r={max(0, self._images_in_flight - in_flight)}')
        return {"RateLimit-Policy": self._policies, "RateLimit": ", ".join(limits)}

    # The table.

    def _read(self, row: int) -> tuple[float, int]:
        """Seconds until all is paid off, and images in flight."""
        paid_off_at, in_flight = _ROW.unpack_from(self._table, row)
        return min(max(0.0, paid_off_at - self._clock()), self._most_owed_s), in_flight

    def _write(self, row: int, owed_s: float, in_flight: int) -> None:
        _ROW.pack_into(self._table, row, self._clock() + owed_s, in_flight)

    def _row(self, name: str) -> int:
        """Where the row of a name begins; a new name gets one."""
        row = self._rows.get(name)
        if row is None:
            with self._locked(0, _COUNT.size):
                row = self._find_or_add(name)
        return row

    def _find_or_add(self, name: str) -> int:
        (count,) = _COUNT.unpack_from(self._table)
        for number in range(len(self._rows), count):  # those that other workers have added
            begin = _COUNT.size + number * _ROW_BYTES
            written = self._table[begin + _ROW.size : begin + _ROW_BYTES]
            self._rows[written.rstrip(b"\0").decode()] = begin
        if name not in self._rows and count < MAX_NAMES:
            begin = self._rows[name] = _COUNT.size + count * _ROW_BYTES
            self._table[begin + _ROW.size : begin + _ROW_BYTES] = name.encode().ljust(_NAME_BYTES, b"\0")
            _COUNT.pack_into(self._table, 0, count + 1)
        return self._rows.get(name, _BYTES - _ROW_BYTES)

    @contextmanager
    def _locked(self, begin: int, length: int) -> Iterator[None]:
        """Have these bytes alone. Nobody keeps them for longer than it takes to change them."""
        if self._file is None:
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX, length, begin)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, length, begin)
