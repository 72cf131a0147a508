"""`python -m service.server.worker MESSAGES CONNECTIONS …`: one of several workers. Only the supervisor starts it.

MESSAGES and CONNECTIONS are the numbers of open sockets; the rest is the service's own command line.
"""

from service.server.signals import take_first

if __name__ == "__main__":  # before the other imports, which take half a second
    take_first()

import socket
import sys
from collections.abc import Sequence

from service.__main__ import prepare, run_process, serve
from service.server.worker_link import WorkerLink


def start(arguments: Sequence[str]) -> int:
    """Serve what the supervisor hands over until told to stop; returns the exit code."""
    messages, connections, *rest = arguments
    prepared = prepare(rest)
    if isinstance(prepared, int):
        return prepared
    worker_group = WorkerLink(socket.socket(fileno=int(messages)), socket.socket(fileno=int(connections)))
    settings, keys, _ = prepared  # the supervisor has told the warnings
    return serve(settings, keys, [], worker_group)


if __name__ == "__main__":
    run_process(start, sys.argv[1:])
