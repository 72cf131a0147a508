"""Signals as a flag that a loop may look at, acknowledged the moment they come."""

import contextlib
import os
import signal
import threading
from types import FrameType


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Work that can be done again was left because of a signal."""


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that no step is cut short. The second one acts as usual.

    Args:
        answer: One line that is written to stderr at once; nothing where it is empty.
    """

    def __init__(self, answer: str = "") -> None:
        self._answer = answer
        self._event = threading.Event()

    def is_set(self) -> bool:
        """Whether the signal has come."""
        return self._event.is_set()

    def set(self) -> None:
        """As if the signal had come: another process that works on the same got it."""
        self._event.set()

    def check(self) -> None:
        """Leave work that can be done again.

        Raises:
            Interrupted: The signal has come.
        """
        if self.is_set():
            raise Interrupted

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self._event.set()
        signal.signal(number, self._before[signal.Signals(number)])
        with contextlib.suppress(OSError):
            if self._answer:
                os.write(2, f"\n{self._answer}\n".encode())  # print() may not be called again while it is at work

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
