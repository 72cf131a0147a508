"""The service under Ray Serve with an engine that sleeps instead of computing: what replicas cost, and nothing else.

`benchmarks.serving.sleeping_replica:app` is what Ray imports; `on_ray.py` measures it.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray import serve

from models.inference.pixels import UInt8
from service.engine.batching.batch import BatchSlice, count_rows
from service.engine.engine import Engine
from service.engine.payloads import SamplePayload
from service.ray import Replica, build

BATCH_S = 0.1


def build_sleeping() -> FastAPI:
    """The application of a replica that sleeps."""
    load = Engine.load

    def load_and_forget(engine: Engine, folder: Path, *more: Any) -> object:
        loaded = load(engine, folder, *more)
        shape = loaded.manifest.image

        def run(slices: Sequence[BatchSlice[SamplePayload]]) -> UInt8:
            time.sleep(BATCH_S)
            return np.zeros((count_rows(slices), shape.height, shape.width, shape.channels), np.uint8)

        setattr(loaded.sample, "run", run)  # noqa: B010 - mypy knows better than to let a method be replaced
        return loaded

    setattr(Engine, "load", load_and_forget)  # noqa: B010 - as above
    return build()


app = serve.deployment(name="gan-service", user_config={})(serve.ingress(build_sleeping)(Replica)).bind()
