"""The service under Ray Serve: `serve run service.ray:app`, or `serve deploy deploy/ray/gan-service.yaml`.

Each replica is the whole service, with an engine and bundles of its own; only our server is missing, as Ray's
proxy and uvicorn take its place.

- Settings are the GAN_… variables of the replica's process. A replica computes with as many processors as Ray reserves
  for it, unless GAN_PROCESSORS says otherwise: by itself a reservation limits nothing.
- Ray sends requests to a replica once `reconfigure` has returned, which waits for the bundles.
- A changed `user_config` has each replica look at its folder of bundles again, in place. Whatever it finds, it goes on:
  Ray would end a replica whose `reconfigure` raises.
- A replica is replaced where /livez would say no.
- Any replica answers /metrics, for itself alone. So each also hands its series to Ray's exporter, which adds a label
  `replica`.
"""

import asyncio
import gc
import logging
import math
import os
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve import metrics

from service.app import create_app
from service.logs import set_up_logs
from service.settings import Settings, check_names, read_settings

EXPORT_S = 5.0  # between two looks at all series
STEP_SAMPLES = 64  # handed over at a time

Series = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name, and its labels

log = logging.getLogger(__name__)


def own_settings() -> Settings:
    """The settings of this replica's process."""
    settings = read_settings({})
    if settings.processors is not None:
        return settings
    reserved = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return settings.model_copy(update={"processors": max(1, math.ceil(reserved))})


def build() -> FastAPI:
    """The application of this replica."""
    settings = own_settings()
    set_up_logs(settings.log_format, settings.log_level)
    return create_app(settings)


class Exporter:
    """Hands a registry's series to Ray's exporter. They are gauges there, with the values that /metrics shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, metrics.Gauge] = {}
        self._shown: set[Series] = set()

    async def keep_exporting(self) -> None:
        """Do so every `EXPORT_S`, until cancelled."""
        while True:
            try:
                await self.export()
            except Exception:
                log.exception("metrics not handed to Ray")
            await asyncio.sleep(EXPORT_S)

    async def export(self) -> None:
        """Hand over every series with its value now, and 0 for those that are gone: Ray forgets none by itself."""
        values: dict[Series, float] = {}
        for metric in self._registry.collect():
            values |= {(one.name, tuple(one.labels.items())): one.value for one in metric.samples}
            await asyncio.sleep(0)  # requests go before
        for number, (sample, labels) in enumerate([*values, *(self._shown - values.keys())]):
            self._gauge(sample, labels).set(values.get((sample, labels), 0.0), tags=dict(labels))
            if number % STEP_SAMPLES == 0:
                await asyncio.sleep(0)
        self._shown = set(values)

    def _gauge(self, sample: str, labels: tuple[tuple[str, str], ...]) -> metrics.Gauge:
        if sample not in self._gauges:
            keys = tuple(name for name, _ in labels)
            self._gauges[sample] = metrics.Gauge(sample, description=sample, tag_keys=keys)
        return self._gauges[sample]


class Replica:
    """One replica. `app` is its application, whose lifespan Ray has started."""

    app: FastAPI
    _exporting: "asyncio.Task[None] | None" = None

    async def reconfigure(self, user_config: Any) -> None:  # noqa: ARG002 - that it has changed is all it says
        """Take up bundles: at the start all, and then what has changed."""
        if self._exporting is not None:
            if await self.app.state.manager.bundles.reload_if_possible():
                gc.unfreeze()  # the replaced bundles are among what Ray has frozen
                gc.collect()
                gc.freeze()
            return
        for warning in check_names(os.environ):
            log.warning(warning)
        await self.app.state.starting
        exporter = Exporter(self.app.state.manager.metrics.registry)
        self._exporting = asyncio.create_task(exporter.keep_exporting(), name="export")

    async def check_health(self) -> None:
        """Raise where this replica has to be replaced."""
        reason = self.app.state.manager.health.live()
        if reason is not None:
            raise RuntimeError(reason)


GanService = serve.deployment(
    name="gan-service",
    user_config={},  # so that `reconfigure` is called at the start
    max_ongoing_requests=512,  # the service refuses by itself what is too much
    health_check_period_s=1,
    health_check_timeout_s=3,  # three of them, and it is replaced
    graceful_shutdown_timeout_s=30,
)(serve.ingress(build)(Replica))
app = GanService.bind()
