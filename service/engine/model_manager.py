"""The engine, the batcher and the bundles that they serve: start, sample, judge, stop."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from models.bundle import Bundle
from models.inference.noise import Float32, draw_labels
from models.inference.pixels import UInt8
from service.engine.batching.batch import BatchSlice, ModelRunner, Rows, Then, TraceBatch
from service.engine.batching.batcher import Batcher
from service.engine.batching.policy import EAGER, SHARING
from service.engine.batching.request_queue import Result
from service.engine.bundles.bundles import Bundles
from service.engine.engine import Engine, Loaded
from service.engine.health import Health
from service.engine.hints import Hints
from service.engine.key_limits import KeyLimits
from service.engine.payloads import UNKNOWN_LABEL, DiscriminatePayload, Encodings, SamplePayload
from service.engine.scoring import SampleScoring
from service.errors import NoDiscriminator, NoEncoder, NotReady
from service.logs import current_key, request_if_any
from service.machine.worker_group import WorkerGroup
from service.metrics import Metrics
from service.settings import Settings


class Timing(NamedTuple):
    """Where a request's time went, in seconds."""

    queue_s: float
    compute_s: float


class ModelManager:
    """What the routes call.

    Args:
        settings: All settings.
        metrics: Where work is counted.
        clock: Seconds, rising.
        worker_group: The other workers, if there are any.
        has_several_keys: Whether clients with different keys share the queue.

    Attributes:
        bundles: What requests can ask for.
        key_limits: Those of clients' keys; None where there are none.

    Raises:
        ValueError: The settings name a device that is not there.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        worker_group: WorkerGroup | None = None,
        trace_batch: TraceBatch | None = None,
        has_several_keys: Callable[[], bool] = bool,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.worker_group = worker_group or WorkerGroup()
        self.engine = Engine(
            settings.device,
            exact=settings.exact,
            workers=settings.worker_count,
            processors=settings.processors,
            precision=settings.precision,
            cuda_graphs=settings.cuda_graphs,
        )
        self.batcher = self._make_batcher(clock)
        self.batcher.trace_batch = trace_batch
        self.batcher.has_several_keys = has_several_keys
        self.key_limits = self._make_key_limits(clock)
        self.is_draining = False
        device_failed = partial(self.batcher.fail_all, "the device failed")
        self.bundles = Bundles(
            settings,
            metrics,
            self.engine,
            is_draining=lambda: self.is_draining,
            device_failed=device_failed,
        )
        self._scoring = SampleScoring(
            settings.scored_share,
            self.engine.threads,
            metrics,
            queued_rows=lambda: self.batcher.queued_rows,
            device_failed=device_failed,
        )
        self.health = Health(
            self.engine,
            self.batcher,
            self.worker_group,
            is_started=lambda: self.bundles.is_started,
            is_draining=lambda: self.is_draining,
            clock=clock,
        )
        self._set_gauges()

    def _make_key_limits(self, clock: Callable[[], float]) -> KeyLimits | None:
        rate, in_flight = self.settings.key_images_per_s, self.settings.key_images_in_flight
        if not (rate or in_flight):
            return None
        return KeyLimits(rate, in_flight, self.settings.max_count, self.worker_group.limits_file, clock)

    def _make_batcher(self, clock: Callable[[], float]) -> Batcher:
        policy = SHARING if self.engine.device.shares_processor else EAGER
        return Batcher(
            self._run,
            self.metrics,
            device=self.engine.name,
            instances=len(self.engine.threads),
            max_rows=self.engine.device.max_batch_rows,
            max_queued_rows=self.settings.own_queued_images,
            policy=policy._replace(max_queue_delay_s=self.settings.batch_window_ms / 1000),
            clock=clock,
        )

    def _set_gauges(self) -> None:
        self.metrics.engine_threads.labels(self.engine.name).set(len(self.engine.threads))
        self.metrics.ready.set_function(lambda: float(self.health.ready() is None))
        for kind in self.engine.memory():
            gauge = self.metrics.device_memory.labels(self.engine.name, kind)
            gauge.set_function(partial(self._memory, kind))

    def _run(self, instance: int, runner: ModelRunner, slices: Sequence[BatchSlice[Any]], then: Then[Rows]) -> None:
        self.engine.threads[instance].call(runner.run, [slices], then)

    def _memory(self, kind: str) -> float:
        return float(self.engine.memory()[kind])

    async def start(self) -> None:
        """Load and warm bundles, then be ready.

        Raises:
            BundleError: No bundle can be loaded, or not the default one. It says why of the first such folder by name.
        """
        await self.bundles.reload()
        self.batcher.start()

    async def stop(self, delay_s: float = 0.0) -> None:
        """Say not ready; after the delay refuse new requests; finish what runs, up to the drain time-out; end."""
        self.is_draining = True
        self._scoring.stop()
        await asyncio.sleep(delay_s)
        await self.batcher.drain(self.settings.drain_timeout_s)
        await self.batcher.close()
        for thread in self.engine.threads:
            thread.stop()
        self.bundles.stop()

    def admit(self) -> None:
        """Raise what would refuse any request now: Draining, NotReady, QueueFull."""
        if not self.batcher.is_draining and (reason := self.health.able()) is not None:
            raise NotReady(reason)
        self.batcher.admit()

    def check_key(self) -> None:
        """Raise RateLimited where the key of the current request may not have a single image computed now."""
        key = current_key()
        if self.key_limits is not None and key is not None:
            self.key_limits.check(key, 1, self.batcher.retry_after_s)

    @contextmanager
    def reserve(self, images: int) -> Iterator[None]:
        """Accept all images of the current request by the limits of its key; they are in flight inside the block.

        What is submitted inside is not counted again. A request with a single submit needs no block of its own.

        Raises:
            RateLimited, Invalid: See `KeyLimits.reserve`.
        """
        request = request_if_any()
        if request is None or request.key is None or request.has_reserved or not images:
            yield
            return
        series, limits = self.metrics.of_key(request.key), self.key_limits
        limited = limits.reserve(request.key, images, self.batcher.retry_after_s) if limits else nullcontext()
        with limited:
            request.has_reserved = True
            series.in_flight += images
            try:
                yield
            finally:
                series.in_flight -= images
                request.has_reserved = False

    async def find(self, name: str | None, deadline_s: float) -> Loaded:
        """The bundle of this name, alias or name@version, ready to run; see `Bundles.find`."""
        return await self.bundles.find(name, deadline_s)

    def fingerprint(self, bundle: Bundle) -> str:
        """Equal for two replicas where the bundle's images have the same bytes on both."""
        return _warm(bundle).fingerprint

    def hints(self, bundle: Bundle) -> Hints:
        """What tells images that a client can't have meant for this bundle."""
        return _warm(bundle).hints

    async def sample(
        self,
        bundle: Bundle,
        *,
        seed: int,
        first_index: int,
        labels: list[int] | None,
        count: int,
        truncation: float,
        deadline_s: float,
        is_accepted: bool = False,
    ) -> tuple[UInt8, list[int] | None, Timing]:
        """Images first_index … first_index + count − 1 of a seed: uint8 (count, h, w, c), and their labels.

        `labels` has one for each image; a bundle with labels gets them drawn from the seed where it is None.
        `bundle` is what `find` gave, also if another version has taken its place since. Errors are those of
        `Batcher.submit`.
        """
        chosen = None if labels is None else np.asarray(labels, dtype=np.int64)
        frequencies = bundle.manifest.latent.label_frequencies
        if chosen is None and frequencies is not None:
            chosen = draw_labels(frequencies, seed, first_index, count)
        payload = SamplePayload(seed, first_index, chosen, truncation)
        result = await self._submit(_warm(bundle).sample, payload, count, deadline_s, is_accepted=is_accepted)
        self._scoring.offer(_warm(bundle), result.rows, chosen)
        return result.rows, None if chosen is None else chosen.tolist(), Timing(result.queue_s, result.compute_s)

    async def sample_latents(
        self,
        bundle: Bundle,
        latents: Float32,
        *,
        labels: list[int] | None,
        truncation: float,
        deadline_s: float,
        is_accepted: bool = False,
    ) -> tuple[UInt8, Timing]:
        """Images of latents (n, dim): uint8 (n, h, w, c). A bundle with labels needs one for each. See `sample`."""
        chosen = None if labels is None else np.asarray(labels, dtype=np.int64)
        payload = SamplePayload(0, 0, chosen, truncation, latents)
        result = await self._submit(_warm(bundle).sample, payload, len(latents), deadline_s, is_accepted=is_accepted)
        return result.rows, Timing(result.queue_s, result.compute_s)

    async def discriminate(
        self,
        bundle: Bundle,
        images: UInt8,
        *,
        labels: list[int] | None,
        deadline_s: float,
        is_accepted: bool = False,
    ) -> tuple[Float32, list[int] | None, Timing]:
        """D's logits (n,) for uint8 images (n, h, w, c) of the bundle's shape, and the labels that they are for.

        `labels` has one for each image; where it is None, the class head of a bundle with classes names them. Errors:
        see `Batcher.submit`.
        """
        payload = _of_images(bundle, images, labels)
        if bundle.judge is None:
            raise NoDiscriminator(bundle.name)
        runner = _warm(bundle).discriminate
        result = await self._submit(runner, payload, len(images), deadline_s, is_accepted=is_accepted)
        judged_as = None if payload.labels is None else result.rows[:, 1].astype(np.int64).tolist()
        return result.rows[:, 0], judged_as, Timing(result.queue_s, result.compute_s)

    async def encode(
        self, bundle: Bundle, images: UInt8, *, labels: list[int] | None, deadline_s: float
    ) -> tuple[Encodings, Timing]:
        """Where uint8 images (n, h, w, c) of the bundle's shape lie in latent space, and what G makes there.

        `labels` has one for each image; where it is None, E finds those of a bundle with classes. Errors: see
        `Batcher.submit`.
        """
        runner = _warm(bundle).encode
        if runner is None:
            raise NoEncoder(bundle.name)
        result = await self._submit(runner, _of_images(bundle, images, labels), len(images), deadline_s)
        found = Encodings.of_rows(result.rows, bundle.manifest.latent.dim, images.shape[1:])
        return found, Timing(result.queue_s, result.compute_s)

    async def _submit(
        self, runner: ModelRunner, payload: Any, rows: int, deadline_s: float, *, is_accepted: bool = False
    ) -> Result:
        """Rows through the batcher, which are counted for the client's key."""
        key = current_key()
        if key is None:
            return await self.batcher.submit(runner, payload, rows, deadline_s, is_accepted=is_accepted)
        with self.reserve(rows):
            result = await self.batcher.submit(runner, payload, rows, deadline_s, is_accepted=is_accepted)
        self.metrics.of_key(key).images.inc(rows)
        return result


def _of_images(bundle: Bundle, images: UInt8, labels: list[int] | None) -> DiscriminatePayload:
    """A bundle with classes needs labels; those that nobody gave are unknown."""
    chosen = None
    if bundle.manifest.labels is not None:
        chosen = np.asarray([UNKNOWN_LABEL] * len(images) if labels is None else labels, dtype=np.int64)
    return DiscriminatePayload(images, chosen)


def _warm(bundle: Bundle) -> Loaded:
    assert isinstance(bundle, Loaded)  # noqa: S101 - requests bring back what `find` gave them
    return bundle
