"""The service without metrics: nothing is counted or timed. For comparison.

    GAN_LOG_LEVEL=warning python -m benchmarks.serving.unobserved

Everything else is what `python -m service` runs, with the same settings; that level leaves out the request log.
"""

import sys
from typing import Any, Self

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from service import app
from service.__main__ import serve
from service.http.layers.auth import read_keys
from service.logs import set_up_logs
from service.machine.worker_group import WorkerGroup
from service.metrics import Histogram, Metrics
from service.server.listener import listen
from service.settings import read_settings


class _Nothing:
    """A series of which nothing becomes."""

    def labels(self, *_: object) -> Self:
        return self

    def _ignore(self, *_: object) -> None:
        pass

    inc = dec = set = observe = set_function = set_to_current_time = clear = remove = _ignore


class _NoSeries:
    """The series of a route, or of a kind of work."""

    in_flight = 0
    queue_wait = compute = batch_images = batch_padding_images = images = _Nothing()

    def end(self, *_: object) -> None:
        pass

    def batches(self, _: str) -> _Nothing:
        return self.images


class _NoMetrics(Metrics):
    """All names, and no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        names: dict[str, Any] = vars(self)
        names.update(
            {name: _Nothing() for name, series in names.items() if isinstance(series, MetricWrapperBase | Histogram)}
        )
        nothing = _NoSeries()
        names.update(dict.fromkeys(("of_route", "of_work"), lambda *_: nothing))
        names["forget_bundles_but"] = nothing.end


def main() -> int:
    """Serve until told to stop; returns the exit code."""
    setattr(app, "Metrics", _NoMetrics)  # noqa: B010 - mypy knows better than to let a class be replaced
    settings = read_settings({})
    set_up_logs(settings.log_format, settings.log_level)
    return serve(settings, read_keys(settings), [listen(settings.host, settings.port)], WorkerGroup())


if __name__ == "__main__":
    sys.exit(main())
