"""Statistics of models in Triton's form, from the service's metrics: those of all workers together."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from service.http.operations.merged_metrics import MergedCollector, series_of
from service.http.v2.catalogue import Model
from service.machine.worker_group import WorkerGroup
from service.metrics import Metrics

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
    """Sums over a page of metrics, by name and these labels; all in one pass, for there may be very many models."""

    _LABELS = ("bundle", "version", "operation")

    def __init__(self, collector: MergedCollector) -> None:
        self._sums = defaultdict[tuple[str | None, ...], float](float)
        for metric in collector.collect():
            for sample in metric.samples:
                self._sums[sample.name, *map(sample.labels.get, self._LABELS)] += sample.value

    def of(self, name: str, model: Model) -> float:
        """The sum of a metric's samples that are a model's. Not all metrics have the version."""
        bundle, version, operation = model.bundle.name, model.bundle.version, model.operation
        return self._sums[name, bundle, version, operation] + self._sums[name, bundle, None, operation]

    def of_service(self, name: str) -> float:
        """The sum of a metric's samples that are no bundle's."""
        return self._sums[name, None, None, None]


def _statistics(sums: _Sums, model: Model) -> dict[str, Any]:
    queue, compute = (_times(sums, name, model) for name in (_WAIT, _COMPUTE))
    none = {"count": 0, "ns": 0}
    images = int(sums.of(_IMAGES, model))
    return {
        "name": model.name,
        "version": model.bundle.version,
        "last_inference": int(1000 * sums.of_service(_PROGRESS)) if images else 0,
        "inference_count": images,
        "execution_count": int(sums.of(_BATCHES, model)),
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


def _times(sums: _Sums, name: str, model: Model) -> dict[str, int]:
    return {
        "count": int(sums.of(f"{name}_count", model)),
        "ns": int(1e9 * sums.of(f"{name}_sum", model)),
    }
