"""Handles signals while there is no server that does. Imports nothing that takes time."""

import os
import signal
import sys


def take_first(code: int = 0) -> None:
    """End the process with this code on SIGTERM and SIGINT, and ignore SIGHUP: there is nothing to drain or to reload.

    Without handlers, the first process of a container would ignore signals to stop, and any other would die of them.
    """
    if sighup_reloads():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))


def sighup_reloads() -> bool:
    """Whether SIGHUP means to reload. Where there is a terminal, it means that the terminal has gone."""
    return hasattr(signal, "SIGHUP") and not (sys.stdin and sys.stdin.isatty())
