"""Merges the metrics of several workers into those of one service."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from service.codecs.time_slices import Steps, run_steps

# A worker's metrics, each as [name, documentation, type, [[sample's name, labels, value], …]].
Series = list[list[Any]]

# Values are summed over the workers. The exceptions are values that all workers share, and points in time, of which the
# smallest or the largest is taken.
SMALLEST = {"gan_ready", "process_start_time_seconds"}
LARGEST = {
    *("gan_build_info", "gan_bundle_info", "gan_warmup_seconds", "python_info", "process_max_fds"),
    *("gan_queue_oldest_age_seconds", "gan_engine_last_progress_timestamp_seconds"),
}


def read_series(registry: CollectorRegistry) -> Steps[Series]:
    """A registry's metrics with their current values, in types that JSON has; one metric a step."""
    series: Series = []
    for metric in registry.collect():
        samples = [[s.name, s.labels, s.value] for s in metric.samples]
        series.append([metric.name, metric.documentation, metric.type, samples])
        yield None
    return series


def series_of(registry: CollectorRegistry) -> Series:
    """The same in one go."""
    return run_steps(read_series(registry))


class MergedCollector(Collector):
    """Collects the merged metrics of workers. All have the same metrics; the order is the first worker's."""

    def __init__(self, workers: Iterable[Series]) -> None:
        self._metrics: dict[str, list[list[Any]]] = {}  # by name, each worker's
        for series in workers:
            for metric in series:
                self._metrics.setdefault(metric[0], []).append(metric)

    def collect(self) -> Iterator[Metric]:
        """Called by the encoder."""
        for name, parts in self._metrics.items():
            _, documentation, kind, _ = parts[0]
            values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
            for *_, samples in parts:
                for sample, labels, value in samples:
                    key = sample, tuple(labels.items())
                    values[key] = _merged(name, values[key], value) if key in values else value
            metric = Metric(name, documentation, kind)
            for (sample, labels), value in values.items():
                metric.add_sample(sample, dict(labels), value)
            yield metric


def _merged(name: str, one: float, other: float) -> float:
    if name in LARGEST:
        return max(one, other)
    return min(one, other) if name in SMALLEST else one + other
