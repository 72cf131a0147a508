"""The service with an engine that a signal stops: on SIGUSR1 its thread blocks, on SIGUSR2 it goes on.

    python -m benchmarks.faults.gated [NOT_READY_AFTER_S DEAD_AFTER_S LINGER_S]

The engine has a single thread, whatever the machine. Everything else is what `python -m service` runs, with the same
settings. The numbers replace the times after which the probes call an engine stuck, and the time for which a failed
process lingers.
"""

import asyncio
import contextvars
import logging
import signal
import sys
import threading

from fastapi import FastAPI

from service.app import create_app
from service.engine import device, health
from service.engine.model_manager import ModelManager
from service.logs import set_up_logs
from service.server import server
from service.server.listener import listen
from service.settings import read_settings

HELD, RELEASED = "the engine is held", "the engine is released"

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Serve until told to stop; returns the exit code."""
    if arguments:
        health.NOT_READY_AFTER_S, health.DEAD_AFTER_S, server.LINGER_S = map(float, arguments)
    setattr(device, "cpu_limit", lambda: 1)  # noqa: B010 - mypy knows better than to let a function be replaced
    settings = read_settings({})
    set_up_logs(settings.log_format, settings.log_level)
    app = create_app(settings)
    _install_gate(app)
    return server.run(app, settings, [listen(settings.host, settings.port)])


def _install_gate(app: FastAPI) -> None:
    serving: ModelManager = app.state.manager
    gate = threading.Event()
    [thread] = serving.engine.threads

    def hold() -> None:
        log.info(HELD)
        gate.wait()
        log.info(RELEASED)

    def close_gate(*_: object) -> None:
        gate.clear()
        # The handler interrupts the event loop's thread between two steps, so this is the loop that runs.
        asyncio.get_running_loop().call_soon_threadsafe(thread.run, hold, context=contextvars.Context())

    signal.signal(signal.SIGUSR1, close_gate)
    signal.signal(signal.SIGUSR2, lambda *_: gate.set())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
