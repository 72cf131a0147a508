"""Handles signals before the server is up and after it has ended. Imports nothing that takes time."""

import os
import signal
import sys


def exit_on_signals(code: int = 0) -> None:
    """End the process with this code on SIGTERM and SIGINT, and ignore SIGHUP: nothing has to be drained or reloaded.

    Without handlers, the first process of a container would ignore SIGTERM, and any other would die of it with another
    exit code.
    """
    if sighup_reloads():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))


def sighup_reloads() -> bool:
    """Whether SIGHUP means to reload. For a process with a terminal it means that the terminal was closed."""
    return hasattr(signal, "SIGHUP") and not (sys.stdin and sys.stdin.isatty())
