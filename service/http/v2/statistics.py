"""Statistics of models in Triton's form, from the service's metrics: those of all workers together."""

from collections.abc import Iterable
from typing import Any

from service.http.merged_metrics import MergedCollector, series_of
from service.http.v2.catalogue import Model
from service.metrics import Metrics
from service.worker_group import WorkerGroup

ANSWER_S = 5.0  # within which all workers must answer
_IMAGES, _BATCHES = "gan_images_total", "gan_batches_total"
_WAIT, _COMPUTE, _PROGRESS = (
    "gan_queue_wait_seconds",
    "gan_compute_seconds",
    "gan_engine_last_progress_timestamp_seconds",
)


async def model_statistics(metrics: Metrics, worker_group: WorkerGroup, models: Iterable[Model]) -> dict[str, Any]:
    """What each model has done since the start.

    A request counts when its first batch begins, with its time in the queue; computing counts by batches. Failures are
    not known by model: the metrics have them by route.

    Raises:
        NotReady: Another worker does not answer.
    """
    others = await worker_group.ask("metrics", within_s=ANSWER_S)
    sums = _Sums(MergedCollector([series_of(metrics.registry), *others]))
    return {"model_stats": [_statistics(sums, model) for model in models]}


class _Sums:
    """Sums over a page of metrics."""

    def __init__(self, collector: MergedCollector) -> None:
        self._samples = [sample for metric in collector.collect() for sample in metric.samples]

    def of(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, or not these at all."""
        found = (sample for sample in self._samples if sample.name == name)
        return sum(
            sample.value
            for sample in found
            if all(sample.labels.get(label, value) == value for label, value in labels.items())
        )


def _statistics(sums: _Sums, model: Model) -> dict[str, Any]:
    labels = {"bundle": model.bundle.name, "version": model.bundle.version, "operation": model.operation}
    queue, compute = (_times(sums, name, labels) for name in (_WAIT, _COMPUTE))
    none = {"count": 0, "ns": 0}
    images = int(sums.of(_IMAGES, **labels))
    return {
        "name": model.name,
        "version": model.bundle.version,
        "last_inference": int(1000 * sums.of(_PROGRESS)) if images else 0,
        "inference_count": images,
        "execution_count": int(sums.of(_BATCHES, **labels)),
        "inference_stats": {
            "success": {"count": queue["count"], "ns": queue["ns"] + compute["ns"]},
            "fail": none,
            "queue": queue,
            "compute_input": none,
            "compute_infer": compute,
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [],
        "memory_usage": [],
    }


def _times(sums: _Sums, name: str, labels: dict[str, str]) -> dict[str, int]:
    return {
        "count": int(sums.of(f"{name}_count", **labels)),
        "ns": int(1e9 * sums.of(f"{name}_sum", **labels)),
    }
