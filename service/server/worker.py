"""`python -m service.server.worker MESSAGES CONNECTIONS LIMITS …`: one of several workers, started by the supervisor.

MESSAGES and CONNECTIONS are file descriptors of open sockets, LIMITS that of the file in which workers share the state
of keys' limits; the rest is the service's own command line.
"""

from service.server.signals import exit_on_signals

if __name__ == "__main__":  # before the other imports, which take half a second
    exit_on_signals()

import socket
import sys
from collections.abc import Sequence

from service.__main__ import prepare, run_process, serve
from service.server.worker_link import WorkerLink


def start(arguments: Sequence[str]) -> int:
    """Serve the connections that the supervisor passes on, until told to stop; returns the exit code."""
    messages, connections, limits, *rest = arguments
    prepared = prepare(rest)
    if isinstance(prepared, int):
        return prepared
    sockets = socket.socket(fileno=int(messages)), socket.socket(fileno=int(connections))
    worker_group = WorkerLink(*sockets, limits_file=int(limits))
    settings, keys, tls, _ = prepared  # the supervisor has logged the warnings
    return serve(settings, keys, [], worker_group, tls)


if __name__ == "__main__":
    run_process(start, sys.argv[1:])
