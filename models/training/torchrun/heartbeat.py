"""Whether the other ranks of a run are still there: each says so every few seconds, from a thread beside its work.

A rank that waits for another waits as long as that one works, be it an hour for a score. What ends a run is silence: of
a process that is stopped, or of a machine that is gone. A process that dies is noticed at once, by its connections.
"""

import os
import threading
from collections.abc import Iterable
from datetime import timedelta
from typing import Protocol

from torch.distributed.distributed_c10d import Store

BEAT_S = 5.0
SILENT_BEATS = 12  # a minute
STORE_TIMEOUT = timedelta(seconds=BEAT_S * SILENT_BEATS)
CLOSING_S = 2.0  # in which a process that is about to end by itself does so, and says why
STOPPING = b"stopping"


class Stop(Protocol):
    """A wish to stop, as `threading.Event` has it."""

    def is_set(self) -> bool:
        """Whether somebody wants to stop."""

    def set(self) -> None:
        """Somebody does."""


class Heartbeat:
    """Tells the other ranks that this one is there, and ends the process once one of them has been silent for a minute.

    Beats are counted, not seconds: ranks on a laptop that slept have missed none of each other's. They also carry the
    wish to stop, so that a signal to one rank reaches those that are busy with something else than steps.

    Args:
        store: Where beats are left. Its time-out bounds the silence of the store itself.
        rank, size: This process among those of the run.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(size) if other != rank]
        self._count = 0
        self._heard = dict.fromkeys(self._others, b"")
        self._silent_beats = dict.fromkeys(self._others, 0)
        self._stop: Stop = threading.Event()
        self._ended = threading.Event()
        self._say()

    def start(self) -> None:
        """Beat until `end`."""
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def end(self) -> None:
        """The run has ended for this rank: silence has no meaning any more."""
        self._ended.set()

    def watch(self, stop: Stop) -> None:
        """From now on this wish to stop is all ranks', and theirs is this one."""
        self._stop = stop

    def beat(self) -> list[int]:
        """Say that this rank is there; returns the ranks that have been silent for too long.

        Raises:
            RuntimeError: The store does not answer.
        """
        self._say()
        for other, said in zip(self._others, self._store.multi_get(_keys(self._others)), strict=True):
            self._silent_beats[other] = 0 if said != self._heard[other] else self._silent_beats[other] + 1
            self._heard[other] = said
            if said.endswith(STOPPING):
                self._stop.set()
        return [other for other, beats in self._silent_beats.items() if beats >= SILENT_BEATS]

    def _say(self) -> None:
        self._count += 1
        (key,) = _keys([self._rank])
        self._store.set(key, f"{self._count} {STOPPING.decode() if self._stop.is_set() else ''}")

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                silent = self.beat()
                reason = f"no word from rank {', '.join(map(str, silent))}" if silent else ""
            except RuntimeError:
                reason = "no word from torchrun's store, which is beside rank 0"
            if reason:
                self._leave(reason)

    def _leave(self, reason: str) -> None:
        if self._ended.wait(CLOSING_S):
            return
        line = f"error: {reason} for {BEAT_S * SILENT_BEATS:.0f} s: a process that was stopped, or a machine that is "
        os.write(2, f"\n{line}gone. --resume goes on from the last checkpoint\n".encode())
        os._exit(1)  # the main thread waits for the silent rank, where no exception reaches it


def _keys(ranks: Iterable[int]) -> list[str]:
    return [f"beat/{rank}" for rank in ranks]
