"""Our own histogram and counter show on a page what prometheus_client's would."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Reference

from service.metrics import BYTES, PROBABILITY, Histogram, Metrics


@pytest.mark.parametrize("buckets", [PROBABILITY, BYTES], ids=["probability", "bytes"])
@pytest.mark.parametrize("labels", [{}, {"bundle": "tiny", "origin": "uploaded"}], ids=["plain", "labelled"])
def test_a_histogram_looks_like_that_of_the_library(buckets: tuple[float, ...], labels: dict[str, str]) -> None:
    """The same page, byte for byte, with values on the edges of buckets and outside of them."""
    values = [0.0, *buckets, *(bound * 1.01 for bound in buckets)]
    ours, theirs = Metrics(CollectorRegistry()).registry, CollectorRegistry()
    histogram = Histogram("size", "What it is.", tuple(labels), buckets)
    ours.register(histogram)
    histogram.labels(*labels.values()).observe(*values)
    reference = Reference("size", "What it is.", tuple(labels), buckets=buckets, registry=theirs)
    for value in values:
        (reference.labels(**labels) if labels else reference).observe(value)
    assert generate_latest(theirs) in generate_latest(ours)


def test_a_histogram_without_labels_is_shown_before_its_first_value() -> None:
    """A rate over it then has a beginning."""
    metrics = Metrics(CollectorRegistry())
    assert metrics.registry.get_sample_value("gan_decode_seconds_count") == 0
    metrics.decode.observe(0.002)
    assert metrics.registry.get_sample_value("gan_decode_seconds_bucket", {"le": "0.001"}) == 0
    assert metrics.registry.get_sample_value("gan_decode_seconds_bucket", {"le": "0.0025"}) == 1


def test_a_request_that_ended_is_in_every_series_of_its_route() -> None:
    """Counted by outcome, timed and weighed, whatever the outcome."""
    metrics = Metrics(CollectorRegistry())
    series = metrics.of_route("/sample")
    series.in_flight += 1
    for status in (200, 499, 200):
        series.end("GET", status, 0.0005, 0, 300)
    read = metrics.registry.get_sample_value
    assert read("gan_requests_in_flight", {"route": "/sample"}) == 1
    assert read("gan_request_duration_seconds_bucket", {"route": "/sample", "le": "0.0005"}) == 3
    assert read("gan_request_bytes_sum", {"route": "/sample"}) == 0
    assert read("gan_response_bytes_sum", {"route": "/sample"}) == 900
    for outcome, requests in (("200", 2), ("499", 1)):
        assert read("gan_requests_total", {"route": "/sample", "method": "GET", "status": outcome}) == requests
    assert metrics.of_route("/sample") is series


def test_series_of_bundles_that_have_gone_are_dropped() -> None:
    """Of a version those that name it, and all of a name with its last version, but for its swaps."""
    metrics = Metrics(CollectorRegistry())
    for name, version in (("one", "a"), ("one", "b"), ("two", "c")):
        for operation in ("sample", "discriminate"):
            series = metrics.of_work(name, version, operation)
            series.images.inc()
            series.batches("full").inc()
            series.batch_images.observe(1)
        metrics.discriminator_probability.labels(name, version, "sampled").observe(0.5)
        metrics.bundle_swaps.labels(name, "loaded").inc()

    def labelled(**labels: str) -> set[str]:
        samples = (sample for family in metrics.registry.collect() for sample in family.samples)
        return {sample.name for sample in samples if labels.items() <= sample.labels.items()}

    metrics.forget_bundles_but([("one", "b"), ("three", "d")])
    assert labelled(version="a") == set()
    assert labelled(bundle="two") == {"gan_bundle_swaps_total"}
    assert labelled(version="b") > {"gan_images_total", "gan_discriminator_probability_sum"}
    read = metrics.registry.get_sample_value
    assert read("gan_batches_total", {"bundle": "one", "operation": "sample", "closed_by": "full"}) == 2
    metrics.of_work("one", "a", "sample").images.inc()
    assert read("gan_images_total", {"bundle": "one", "version": "a", "operation": "sample"}) == 1
