"""Scores a share of the drawn images by D, so that /metrics shows when they drift, and no client notices.

- Each image is chosen with the same small chance, whoever asked for it and beside whatever others.
- The chosen ones wait in bounded room. What finds none is not scored: nothing piles up.
- A few times a second, for as long as no client's image waits, a few of them after another are judged on an engine's
  thread, like a new bundle's first batches, and so stand in none of the series of queue and batches.
- A bundle that is let go takes its waiting images along, and so does the end of the service.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8
from models.spec import Calibration
from service.engine.batching.batch import BatchSlice, DeviceFailed, Rows
from service.engine.engine import Loaded
from service.engine.engine_thread import EngineThread
from service.engine.payloads import DiscriminatePayload
from service.metrics import Metrics

PERIOD_S = 0.25  # between two looks at what waits
REST_S = 60.0  # after a failure, which is likely to come again
MOST_IMAGES, MOST_BYTES = 32, 16 * 2**20  # that wait; a single image may be larger
MOST_ROWS = 4  # judged at a time: a client who comes meanwhile waits for no more

log = logging.getLogger(__name__)


def probabilities_real(logits: Float32, calibration: Calibration | None) -> NDArray[np.float64]:
    """σ(scale·logit + offset), with the bundle's calibration; σ(logit) if it has none."""
    scale, offset = (calibration.scale, calibration.offset) if calibration else (1.0, 0.0)
    probabilities: NDArray[np.float64] = np.exp(-np.logaddexp(0, -(scale * logits.astype(np.float64) + offset)))
    return probabilities


class _Chosen(NamedTuple):
    """An image (h, w, c) that waits, and the label that it was drawn for."""

    image: UInt8
    label: int | None


class SampleScoring:
    """Chooses images, and has D judge them while nobody waits.

    Args:
        share: Of the images that are chosen; 0 switches scoring off.
        threads: The engine's.
        metrics: Where probabilities go.
        queued_rows: Clients' rows that wait now.
        device_failed: Called when the device has failed.
    """

    def __init__(
        self,
        share: float,
        threads: Sequence[EngineThread],
        metrics: Metrics,
        queued_rows: Callable[[], int],
        device_failed: Callable[[DeviceFailed], None],
    ) -> None:
        self._share = share
        self._threads = threads
        self._metrics = metrics
        self._queued_rows = queued_rows
        self._device_failed = device_failed
        self._chance = np.random.default_rng()
        # Images to pass over before the next chosen one: drawn at once, this costs a request one comparison.
        self._skip = self._gap() - 1 if share else math.inf
        self._waiting: WeakKeyDictionary[Loaded, list[_Chosen]] = WeakKeyDictionary()
        self._is_busy = False  # judging, or about to look
        self._timer: asyncio.TimerHandle | None = None

    def offer(self, bundle: Loaded, images: UInt8, labels: Int64 | None) -> None:
        """Choose among images (n, h, w, c) that a bundle has just drawn, for these labels if it has any."""
        while self._skip < len(images):
            place = int(self._skip)
            chosen = _Chosen(images[place], None if labels is None else int(labels[place]))
            if not self._keep(bundle, chosen):
                self._skip = len(images) - 1  # there won't be room for the others either
            self._skip += self._gap()
        self._skip -= len(images)

    def stop(self) -> None:
        """Score nothing any more. Does not wait for what is being judged."""
        self._skip = math.inf
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _gap(self) -> int:
        """From one chosen image to the next."""
        return int(self._chance.geometric(self._share))

    def _keep(self, bundle: Loaded, chosen: _Chosen) -> bool:
        """Whether there was room for an image."""
        if bundle.judge is None:
            return False
        waiting = [one.image.nbytes for images in self._waiting.values() for one in images]
        if waiting and (len(waiting) >= MOST_IMAGES or sum(waiting) + chosen.image.nbytes > MOST_BYTES):
            return False
        # Copied: a view would keep all of the client's images in memory.
        self._waiting.setdefault(bundle, []).append(chosen._replace(image=chosen.image.copy()))
        if not self._is_busy:
            self._look_in(PERIOD_S)
        return True

    def _look_in(self, seconds: float) -> None:
        self._is_busy = True
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """Have some images of one bundle judged, unless clients wait."""
        bundle = next(iter(self._waiting), None)
        self._is_busy = bundle is not None
        if bundle is None:
            return
        if self._queued_rows():
            self._look_in(PERIOD_S)
            return
        waiting = self._waiting.pop(bundle)
        if len(waiting) > MOST_ROWS:
            self._waiting[bundle] = waiting[MOST_ROWS:]
        self._judge(bundle, waiting[:MOST_ROWS])

    def _judge(self, bundle: Loaded, chosen: Sequence[_Chosen]) -> None:
        labels = None
        if bundle.manifest.labels is not None:
            labels = np.array([one.label for one in chosen], np.int64)
        payload = DiscriminatePayload(np.stack([one.image for one in chosen]), labels)
        thread = min(self._threads, key=EngineThread.busy_s)  # one that has nothing to do, if there is one
        slices = [BatchSlice(payload, 0, len(chosen))]
        thread.call(bundle.discriminate.run, [slices], partial(self._end, bundle))

    def _end(self, bundle: Loaded, rows: Rows | None, error: Exception | None) -> None:
        """Count what D said, and go on with those that still wait."""
        if math.isinf(self._skip):  # stopped
            return
        if rows is not None:
            probabilities = probabilities_real(rows[:, 0], bundle.manifest.calibration)
            series = self._metrics.discriminator_probability.labels(bundle.name, bundle.version, "sampled")
            series.observe(*probabilities.tolist())
            self._look()
        elif isinstance(error, DeviceFailed):
            self.stop()
            self._device_failed(error)
        else:
            log.warning("drawn images of %s can't be scored: %r", bundle.name, error)
            self._look_in(REST_S)
