"""The service with an engine that computes nothing and answers with a few images made at the start. For comparison.

    python -m benchmarks.serving.no_engine

Batches go through the same queue and the same threads as in `python -m service`, with the same settings.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.inference.pixels import UInt8
from service.__main__ import serve
from service.engine.batching.batch import BatchSlice, count_rows
from service.engine.engine import Engine
from service.engine.payloads import SamplePayload
from service.http.layers.auth import read_keys
from service.logs import set_up_logs
from service.machine.worker_group import WorkerGroup
from service.server.listener import listen
from service.settings import read_settings

IMAGES = 64


def main() -> int:
    """Serve until told to stop; returns the exit code."""
    load = Engine.load

    def load_and_forget(engine: Engine, folder: Path, *more: Any) -> object:
        loaded = load(engine, folder, *more)
        labels = None if loaded.manifest.labels is None else np.zeros(IMAGES, np.int64)
        images: UInt8 = loaded.sample.run([BatchSlice(SamplePayload(0, 0, labels, 1.0), 0, IMAGES)])

        def run(slices: Sequence[BatchSlice[SamplePayload]]) -> UInt8:
            return images[np.arange(count_rows(slices)) % IMAGES]

        setattr(loaded.sample, "run", run)  # noqa: B010 - mypy knows better than to let a method be replaced
        return loaded

    setattr(Engine, "load", load_and_forget)  # noqa: B010 - as above
    settings = read_settings({})
    set_up_logs(settings.log_format, settings.log_level)
    return serve(settings, read_keys(settings), [listen(settings.host, settings.port)], WorkerGroup())


if __name__ == "__main__":
    sys.exit(main())
