"""Merges the metrics of several workers into those of one service."""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

# A worker's metrics, each as [name, documentation, type, [[sample's name, labels, value], …]].
Series = list[list[Any]]

# Values are summed over the workers. The exceptions are values that all workers share, and points in time, of which the
# smallest or the largest is taken.
SMALLEST = {"gan_ready", "process_start_time_seconds"}
LARGEST = {
    *("gan_build_info", "gan_bundle_info", "gan_warmup_seconds", "python_info", "process_max_fds"),
    *("gan_queue_oldest_age_seconds", "gan_engine_last_progress_timestamp_seconds"),
}


def series_of(registry: CollectorRegistry) -> Series:
    """A registry's metrics with their current values, in types that JSON has."""
    return [
        [metric.name, metric.documentation, metric.type, [[s.name, s.labels, s.value] for s in metric.samples]]
        for metric in registry.collect()
    ]


class MergedCollector(Collector):
    """Collects the merged metrics of workers. All have the same metrics; the order is the first worker's."""

    def __init__(self, workers: Iterable[Series]) -> None:
        self._metrics: dict[str, Metric] = {}
        self._values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for series in workers:
            for name, documentation, kind, samples in series:
                self._metrics.setdefault(name, Metric(name, documentation, kind))
                values = self._values.setdefault(name, {})
                for sample, labels, value in samples:
                    key = sample, tuple(labels.items())
                    values[key] = _merged(name, values[key], value) if key in values else value

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        for name, metric in self._metrics.items():
            metric.samples = []
            for (sample, labels), value in self._values[name].items():
                metric.add_sample(sample, dict(labels), value)
            yield metric


def _merged(name: str, one: float, other: float) -> float:
    if name in LARGEST:
        return max(one, other)
    return min(one, other) if name in SMALLEST else one + other
