"""Probes answer correctly without waiting, and Prometheus can parse the metrics."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from models.bundle import Bundle
from service.app import create_app
from service.codecs.time_slices import run_steps
from service.http.operations.merged_metrics import MergedCollector, series_of
from service.http.operations.probes import encode_page
from service.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]

# The public contract.
SERIES = {
    "gan_requests_total": {"route", "method", "status"},
    "gan_request_duration_seconds": {"route"},
    "gan_requests_in_flight": {"route"},
    "gan_rejected_total": {"route", "reason"},
    "gan_cancelled_total": {"route", "phase"},
    "gan_response_bytes": {"route"},
    "gan_request_bytes": {"route"},
    "gan_key_images_total": {"key"},
    "gan_key_rejected_total": {"key"},
    "gan_key_images_in_flight": {"key"},
    "gan_queue_images": {"device"},
    "gan_queue_requests": {"device"},
    "gan_queue_capacity_images": {"device"},
    "gan_queue_oldest_age_seconds": {"device"},
    "gan_queue_wait_seconds": {"bundle", "operation"},
    "gan_compute_seconds": {"bundle", "operation"},
    "gan_encode_seconds": {"format"},
    "gan_decode_seconds": set(),
    "gan_batch_images": {"bundle", "operation"},
    "gan_batch_padding_images_total": {"bundle", "operation"},
    "gan_batches_total": {"bundle", "operation", "closed_by"},
    "gan_images_total": {"bundle", "version", "operation"},
    "gan_discriminator_probability": {"bundle", "version", "origin"},
    "gan_engine_errors_total": {"kind"},
    "gan_engine_last_progress_timestamp_seconds": {"device"},
    "gan_out_of_memory_total": set(),
    "gan_engine_threads": {"device"},
    "gan_ready": set(),
    "gan_bundle_info": {"bundle", "version", "device"},
    "gan_bundle_swaps_total": {"bundle", "result"},
    "gan_warmup_seconds": {"bundle"},
    "gan_device_memory_bytes": {"device", "kind"},
    "gan_build_info": {"version", "torch"},
    "gan_log_lines_dropped_total": set(),
}


async def test_a_warm_service_says_yes(client: httpx.AsyncClient) -> None:
    """All probes answer 200."""
    for path in ("/livez", "/readyz", "/health", "/startupz"):
        reply = await client.get(path)
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


async def test_a_starting_service_lives_and_is_not_ready(
    tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """While bundles load the process is alive but not ready, and requests get 503 with Retry-After."""
    app = create_app(tiny_settings())
    gate = threading.Event()
    busy = [thread.run(gate.wait) for thread in app.state.manager.engine.threads]  # loading waits behind these
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service")
    async with app.router.lifespan_context(app), client:
        assert (await client.get("/livez")).status_code == 200
        for path in ("/readyz", "/health", "/startupz", "/sample", "/bundles"):
            reply = await client.get(path)
            assert "loaded" in problem(reply, 503, "not_ready")
            assert int(reply.headers["retry-after"]) >= 1
        gate.set()
        await asyncio.gather(*busy)
        await app.state.starting
        assert (await client.get("/readyz")).status_code == 200


async def test_a_draining_service_says_so(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """A draining process is alive but not ready, and then refuses new work."""
    app = create_app(tiny_settings())
    async with start(app) as client:
        await app.state.manager.stop()
        problem(await client.get("/readyz"), 503, "draining")
        problem(await client.get("/sample"), 503, "draining")
        assert (await client.get("/startupz")).status_code == 200
        page = (await client.get("/metrics")).text
        assert 'gan_rejected_total{reason="draining",route="/sample"} 1.0' in page
        assert 'route="/readyz"' not in "".join(line for line in page.splitlines() if "rejected" in line)


async def test_probes_do_not_wait_for_the_engine(client: httpx.AsyncClient, app: FastAPI, hold_engine: Hold) -> None:
    """While the engine is busy, every probe and the metrics answer."""
    async with hold_engine(app):
        for path in ("/livez", "/readyz", "/health", "/startupz", "/metrics"):
            assert (await client.get(path)).status_code == 200


def busy_registry(metrics: Metrics, versions: int) -> None:
    """Series of many versions of a bundle."""
    for version in range(versions):
        metrics.of_work("tiny", f"{version:012x}", "sample").images.inc(version)
        metrics.discriminator_probability.labels("tiny", f"{version:012x}", "sampled").observe(0.5)


async def test_probes_do_not_wait_for_a_scrape(
    start: Start, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of many versions is made in small steps, between which others are answered."""
    monkeypatch.setattr("service.codecs.time_slices.SLICE_S", 0.0)
    app = create_app(tiny_settings())
    async with start(app) as client:
        busy_registry(app.state.manager.metrics, 500)
        scrape = asyncio.create_task(client.get("/metrics"))
        await asyncio.sleep(0)
        for path in ("/livez", "/readyz"):
            assert (await client.get(path)).status_code == 200
        assert not scrape.done()
        assert (await scrape).text.count("gan_images_total{") == 500


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text;version=1.0.0"])
def test_steps_make_the_page_that_the_library_makes(accept: str) -> None:
    """Byte for byte, of one worker and of two together."""
    encoder, _ = choose_encoder(accept)
    metrics = Metrics(CollectorRegistry())
    busy_registry(metrics, 50)
    for collector in (MergedCollector([series_of(metrics.registry)] * workers) for workers in (1, 2)):
        assert run_steps(encode_page(encoder, collector)) == encoder(collector)


async def test_metrics_come_in_both_formats(client: httpx.AsyncClient) -> None:
    """Prometheus' text format and OpenMetrics both parse and have the same families."""
    text = await client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in parse_text(text.text)}
    scraper = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"}
    openmetrics = await client.get("/metrics", headers=scraper)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(openmetrics.text)  # type: ignore[no-untyped-call]
    assert {family.name for family in families} >= {"gan_ready", "gan_requests"}
    assert {"process_resident_memory_bytes", "python_info", "gan_ready"} <= names
    assert not any(name.endswith("_created") for name in names)


async def test_metrics_say_what_happened(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """One request of seven images is counted in every series that it concerns."""
    version = tiny_bundles["rgb"].version
    await client.get("/sample?count=7&seed=1&bundle=rgb&format=webp")
    page = (await client.get("/metrics")).text
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in parse_text(page)
        for sample in family.samples
    }
    assert samples["gan_images_total", *sorted(["rgb", "sample", version])] == 7
    assert samples["gan_batch_images_sum", "rgb", "sample"] == 7
    assert samples["gan_queue_wait_seconds_count", "rgb", "sample"] == 1
    assert samples["gan_compute_seconds_count", "rgb", "sample"] == 1
    assert samples["gan_encode_seconds_count", "webp"] == 1
    assert samples["gan_ready",] == 1
    assert samples["gan_queue_capacity_images", "cpu"] == 16384
    assert samples["gan_requests_in_flight", "/metrics"] == 1


def test_the_series_are_those_of_the_contract() -> None:
    """Names and labels are what dashboards rely on."""
    made = {name: set(labels) for name, _, labels in Metrics(CollectorRegistry()).declarations}
    assert made == SERIES


def test_time_is_measured_from_half_a_millisecond() -> None:
    """The buckets of histograms of seconds start low enough for a small net."""
    metrics = Metrics(CollectorRegistry())
    assert metrics.decode.buckets[0] == 0.0005
    assert metrics.decode.buckets[-1] == 120
