"""Scoring of drawn images: on real nets and a real thread, with a queue that is as long as the test says."""

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from models.bundle import DISCRIMINATOR, Bundle
from models.inference.pixels import UInt8
from service.engine import scoring
from service.engine.batching.batch import DeviceFailed, OutOfMemory
from service.engine.engine import Engine, Loaded
from service.engine.model_manager import ModelManager
from service.engine.scoring import MOST_BYTES, MOST_IMAGES, MOST_ROWS, SampleScoring, probabilities_real
from service.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]
Until = Callable[[Callable[[], bool]], Awaitable[None]]


class Bench:
    """Scoring of all images on an engine of its own.

    Attributes:
        queued: Rows that clients wait for.
        looks: How often they were counted.
        failures: What the device was said to have failed by.
    """

    def __init__(self) -> None:
        self.queued, self.looks = 0, 0
        self.failures: list[DeviceFailed] = []
        self.engine, self.metrics = Engine("cpu", exact=True), Metrics(CollectorRegistry())
        self.scoring = self.make(1.0)

    def make(self, share: float) -> SampleScoring:
        """Scoring of this share of the images."""
        return SampleScoring(share, self.engine.threads, self.metrics, self._look, self.failures.append)

    def _look(self) -> int:
        self.looks += 1
        return self.queued

    def load(self, bundle: Bundle) -> Loaded:
        """The bundle, with D runnable."""
        return self.engine.load(bundle.folder, {})

    def scored(self) -> float:
        """Images in the metrics."""
        samples = (one for metric in self.metrics.registry.collect() for one in metric.samples)
        return sum(one.value for one in samples if one.name == "gan_discriminator_probability_count")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """It looks whenever the loop turns."""
    monkeypatch.setattr(scoring, "PERIOD_S", 0.0)
    one = Bench()
    yield one
    for thread in one.engine.threads:
        thread.stop()


def images_of(bundle: Bundle, count: int) -> UInt8:
    """Images of the bundle's shape."""
    channels, height, width = bundle.manifest.image.shape
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), np.uint8)


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
async def test_drawn_images_get_the_probabilities_that_an_upload_of_them_would(
    name: str, tiny_settings: Make, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the labels that they were drawn for; and no series of clients' work knows of it."""
    monkeypatch.setattr(scoring, "PERIOD_S", 0.0)
    manager = ModelManager(tiny_settings(scored_share=1), Metrics(CollectorRegistry()))
    read = manager.metrics.registry.get_sample_value
    await manager.start()
    bundle = await manager.find(name, 60)
    images, labels, _ = await manager.sample(
        bundle, seed=7, first_index=0, labels=None, count=9, truncation=1.0, deadline_s=60
    )
    series = {"bundle": name, "version": bundle.version, "origin": "sampled"}
    await until(lambda: read("gan_discriminator_probability_count", series) == 9)
    assert read("gan_images_total", {"bundle": name, "version": bundle.version, "operation": "sample"}) == 9
    page = [one for metric in manager.metrics.registry.collect() for one in metric.samples]
    assert not any(one.labels.get("operation") == "discriminate" for one in page)
    logits, _, _ = await manager.discriminate(bundle, images, labels=labels, deadline_s=60)
    expected = probabilities_real(logits, bundle.manifest.calibration)
    assert read("gan_discriminator_probability_sum", series) == pytest.approx(expected.sum())
    await manager.stop()


async def test_it_waits_while_clients_wait(bench: Bench, tiny_bundles: dict[str, Bundle], until: Until) -> None:
    """However often it looks; then all that waited are scored, a few at a time."""
    loaded = bench.load(tiny_bundles["tiny"])
    bench.queued = 1
    bench.scoring.offer(loaded, images_of(loaded, MOST_ROWS + 1), None)
    await until(lambda: bench.looks == 3)
    assert bench.scored() == 0
    bench.queued, bench.looks = 0, 0
    await until(lambda: bench.scored() == MOST_ROWS + 1)
    assert bench.looks == 2


async def test_what_finds_no_room_is_not_scored(
    bench: Bench, tiny_bundles: dict[str, Bundle], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is counted in images and in bytes, over all bundles; the clients' own arrays are not kept."""
    tiny, rgb = bench.load(tiny_bundles["tiny"]), bench.load(tiny_bundles["rgb"])
    bench.queued = 1
    for _ in range(3):
        images = images_of(rgb, 5000)
        bench.scoring.offer(rgb, images, None)
        bench.scoring.offer(tiny, images_of(tiny, 5), None)
    whole = weakref.ref(images)
    del images
    assert whole() is None
    bench.queued = 0
    await until(lambda: bench.scored() == MOST_IMAGES)
    monkeypatch.setattr(scoring, "MOST_BYTES", 3 * 64)
    bench.scoring.offer(tiny, images_of(tiny, 5), None)
    await until(lambda: bench.scored() == MOST_IMAGES + 3)
    monkeypatch.setattr(scoring, "MOST_BYTES", 0)
    bench.scoring.offer(tiny, images_of(tiny, 5), None)
    await until(lambda: bench.scored() == MOST_IMAGES + 4)
    assert MOST_BYTES < 2**25


async def test_a_bundle_that_leaves_takes_its_images_along(
    bench: Bench, tiny_bundles: dict[str, Bundle], until: Until
) -> None:
    """Waiting images don't keep it in memory, nor do scored ones."""
    scored, waiting = bench.load(tiny_bundles["rgb"]), bench.load(tiny_bundles["tiny"])
    bench.scoring.offer(scored, images_of(scored, 3), None)
    await until(lambda: bench.scored() == 3)
    await asyncio.sleep(0)
    bench.queued = 1
    bench.scoring.offer(waiting, images_of(waiting, 3), None)
    gone = weakref.ref(scored), weakref.ref(waiting)
    del scored, waiting
    gc.collect()
    assert (gone[0](), gone[1]()) == (None, None)
    bench.queued, other = 0, bench.load(tiny_bundles["cond"])
    bench.scoring.offer(other, images_of(other, 1), np.array([2]))
    await until(lambda: bench.scored() == 4)


@pytest.mark.parametrize("error", [OutOfMemory("no room"), ZeroDivisionError("poison")], ids=str)
async def test_an_error_is_logged_and_survived(
    error: Exception,
    bench: Bench,
    tiny_bundles: dict[str, Bundle],
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a rest it goes on."""
    monkeypatch.setattr(scoring, "REST_S", 0.0)
    loaded = bench.load(tiny_bundles["tiny"])

    def fail(_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loaded.discriminate, "run", fail)
        bench.scoring.offer(loaded, images_of(loaded, 1), None)
        await until(lambda: bool(caplog.records))
    assert caplog.messages == [f"drawn images of tiny can't be scored: {error!r}"]
    bench.scoring.offer(loaded, images_of(loaded, 2), None)
    await until(lambda: bench.scored() == 2)
    assert not bench.failures


async def test_a_lost_device_is_told_once(bench: Bench, tiny_bundles: dict[str, Bundle], until: Until) -> None:
    """Here the engine's thread has ended; nothing is scored from then on."""
    loaded = bench.load(tiny_bundles["tiny"])
    for thread in bench.engine.threads:
        thread.stop()
        await until(lambda one=thread: not one.is_alive)  # type: ignore[misc]
    bench.scoring.offer(loaded, images_of(loaded, 9), None)
    await until(lambda: bool(bench.failures))
    looks = bench.looks
    bench.scoring.offer(loaded, images_of(loaded, 9), None)
    await asyncio.sleep(0)
    assert (len(bench.failures), bench.looks) == (1, looks)


async def test_a_stop_does_not_wait_for_it(
    tiny_settings: Make, until: Until, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for what waits nor for what is being judged, and both end without a word."""
    monkeypatch.setattr(scoring, "PERIOD_S", 0.0)
    gate, judging = threading.Event(), threading.Event()

    def judge(_: object) -> None:
        judging.set()
        gate.wait(60)
        raise DeviceFailed("as it is switched off")

    manager = ModelManager(tiny_settings(scored_share=1), Metrics(CollectorRegistry()))
    await manager.start()
    bundle: Any = await manager.find("tiny", 60)
    monkeypatch.setattr(bundle.discriminate, "run", judge)
    asked: dict[str, Any] = {"first_index": 0, "labels": None, "truncation": 1.0, "deadline_s": 60}
    await manager.sample(bundle, seed=7, count=20, **asked)
    await until(judging.is_set)
    await manager.stop()
    gate.set()
    await until(lambda: not any(thread.is_alive for thread in manager.engine.threads))
    await asyncio.sleep(0)
    assert manager.batcher.failure is None
    assert not caplog.records


@pytest.mark.parametrize("share", [0.003, 0.1, 1.0])
async def test_every_image_has_the_same_chance(
    share: float, bench: Bench, tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands in replies of whatever size; the share is that of the setting."""
    loaded, one = bench.load(tiny_bundles["tiny"]), bench.make(share)
    images, labels = images_of(loaded, 10), np.arange(10)
    chosen: list[int] = []
    monkeypatch.setattr(one, "_chance", np.random.default_rng(0))

    def keep(_: Loaded, image: Any) -> bool:
        chosen.append(image.label)
        return True

    monkeypatch.setattr(one, "_keep", keep)
    for _ in range(5000):
        one.offer(loaded, images, labels)
        one.offer(loaded, images[:1], labels[:1])
    assert len(chosen) == pytest.approx(55_000 * share, abs=5 * math.sqrt(55_000 * share) * (share < 1))
    counts = np.bincount(chosen, minlength=10)
    counts[0] //= 2  # it was offered twice as often
    assert counts == pytest.approx(5000 * share, abs=5 * math.sqrt(5000 * share) * (share < 1))


async def test_nothing_is_scored_where_it_is_switched_off_or_there_is_no_d(
    bench: Bench, tiny_bundles: dict[str, Bundle]
) -> None:
    """A share of 0, and a bundle with a generator alone."""
    loaded = bench.load(tiny_bundles["tiny"])
    bench.make(0.0).offer(loaded, images_of(loaded, 5000), None)
    files = {name: facts for name, facts in loaded.manifest.files.items() if name != DISCRIMINATOR}
    alone = replace(loaded, manifest=loaded.manifest.model_copy(update={"files": files}))
    bench.scoring.offer(alone, images_of(loaded, 5000), None)
    await asyncio.sleep(0)
    assert (bench.looks, bench.scored()) == (0, 0)
