"""What is counted in one go is what would have been counted one by one."""

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from service.metrics import MOST_KEPT, PROBABILITY, Metrics


def test_many_probabilities_are_observed_as_one_by_one() -> None:
    """On the edges of buckets too, and again into the same histogram."""
    values = np.concatenate([np.linspace(0, 1, 101), PROBABILITY, [1e-12]])
    together, apart = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    for _ in range(2):
        together.of_probability("tiny", "uploaded").observe(*values.tolist())
        for value in values.tolist():
            apart.discriminator_probability.labels("tiny", "uploaded").observe(value)

    def shown(metrics: Metrics) -> dict[str, float]:
        lines = generate_latest(metrics.registry).decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("gan_discriminator_probability"))
        return {name: round(float(value), 9) for name, value in pairs}

    assert shown(together) == shown(apart)
    assert len(shown(apart)) == len(PROBABILITY) + 3


def test_what_is_kept_back_is_there_whenever_somebody_looks() -> None:
    """Nothing that a request left behind is missing from a page, and memory is bounded where nobody ever looks."""
    metrics = Metrics(CollectorRegistry())
    series = metrics.of_route("/sample")
    values = [0.0005, 0.002, 200.0] * MOST_KEPT
    for looks in (1, 2):
        for value in values:
            series.end("GET", 200, value, 0, 300)
        series.in_flight += 1
        read = metrics.registry.get_sample_value
        assert read("gan_request_duration_seconds_count", {"route": "/sample"}) == looks * len(values)
        assert read("gan_request_duration_seconds_bucket", {"route": "/sample", "le": "0.0005"}) == looks * MOST_KEPT
        assert read("gan_requests_in_flight", {"route": "/sample"}) == looks
        assert read("gan_response_bytes_sum", {"route": "/sample"}) == looks * 300 * len(values)
        ended = {"route": "/sample", "method": "GET", "status": "200"}
        assert read("gan_requests_total", ended) == looks * len(values)
    unread = Metrics(CollectorRegistry())
    for value in values:
        unread.of_route("/sample").end("GET", 200, value, 0, 300)
    [metric] = unread.request_duration.collect()  # the histogram itself, not through the registry
    assert [sample.value for sample in metric.samples if sample.name.endswith("_count")] == [len(values)]
