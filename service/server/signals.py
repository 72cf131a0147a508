"""What signals mean before there is a server that listens to them. Needs nothing that takes time to import."""

import os
import signal
import sys


def take_first(code: int = 0) -> None:
    """There is nothing to drain yet, or no more, and nothing to reload: the process ends with this code.

    The first process of a container is deaf to a signal that it does not handle, and another one dies of it.
    """
    if sighup_reloads():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))


def sighup_reloads() -> bool:
    """Whether that is what SIGHUP means here; where we have a terminal it means that it has gone."""
    return hasattr(signal, "SIGHUP") and not (sys.stdin and sys.stdin.isatty())
