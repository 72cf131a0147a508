"""Signals as a flag that a loop may look at."""

import signal
import threading
from types import FrameType


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a flag, so that no step is cut short. The second one acts as usual."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.is_set = self._event.is_set

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGINT, signal.SIGTERM)}

    def _set(self, number: int, _frame: FrameType | None) -> None:
        self._event.set()
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
