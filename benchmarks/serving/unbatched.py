"""The service with its batcher bypassed: each request goes straight to a thread of the engine. For comparison.

    python -m benchmarks.serving.unbatched

Everything else is what `python -m service` runs, with the same settings.
"""

import asyncio
import itertools
import sys
import time
from functools import partial
from typing import Any

from service.__main__ import serve
from service.engine import model_manager as core
from service.engine.batching.batch import BatchSlice, ModelRunner, Rows
from service.engine.batching.batcher import Batcher, Run
from service.engine.batching.request_queue import Result
from service.engine.engine_thread import settle
from service.http.layers.auth import read_keys
from service.logs import set_up_logs
from service.machine.worker_group import WorkerGroup
from service.server.listener import listen
from service.settings import read_settings


class Bypass(Batcher):
    """Hands on what it takes at once, whole and alone: no queue, no deadline, no cancellation, no metrics."""

    def __init__(self, run: Run, *more: Any, instances: int, **named: Any) -> None:
        super().__init__(run, *more, instances=instances, **named)
        self._straight = run
        self._turns = itertools.cycle(range(instances))

    async def submit(
        self,
        runner: ModelRunner,
        payload: object,
        rows: int,
        deadline_s: float,  # noqa: ARG002 — is none
        *,
        is_accepted: bool = False,  # noqa: ARG002
    ) -> Result:
        """As Batcher.submit, without what it is for."""
        started = time.monotonic()
        done: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        self._straight(next(self._turns), runner, [BatchSlice(payload, 0, rows)], partial(settle, done))
        return Result(await done, 0.0, time.monotonic() - started)


def main() -> int:
    """Serve until told to stop; returns the exit code."""
    setattr(core, "Batcher", Bypass)  # noqa: B010 - mypy knows better than to let a class be replaced
    settings = read_settings({})
    set_up_logs(settings.log_format, settings.log_level)
    return serve(settings, read_keys(settings), [listen(settings.host, settings.port)], WorkerGroup())


if __name__ == "__main__":
    sys.exit(main())
