"""`select=discriminator`: of several candidates for an image, the first that the calibrated discriminator lets pass.

Rejection sampling (Azadi et al. 2019). Where p is the calibrated probability that an image is real, p/(1 − p) is the
ratio of the data's density to that of G's images, whose mean over G's images is 1. A candidate passes with a
probability of a quarter of the ratio, at most 1. So about one in four does, and as far as D can tell, what passes is
spread as the data are, but for images of which G makes less than a quarter of what it should.

An image has 64 candidates of its class, and if none passes it is the one that D takes for the most real. Candidate k of
image i depends on the seed, i and k alone, and so does the chance that it is given: image i is the same alone and among
others. The first candidate is the image that there is without selection.
"""

import asyncio
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.inference.noise import Float32, draw_candidates, draw_chances, sampled_labels
from models.inference.pixels import UInt8
from models.spec import Calibration
from service.engine.bundles.index import Version
from service.engine.model_manager import ModelManager, Timing
from service.errors import Invalid
from service.http.images.resolving import CANDIDATES_AT_ONCE, SamplePlan

CANDIDATES = 64  # of an image
# Of images whose candidates are computed together: how many, bytes of the candidates' pixels, and numbers of latents.
TOGETHER, TOGETHER_BYTES, TOGETHER_NUMBERS = 128, 2**22, 2**14


class Selected(NamedTuple):
    """The chosen images, uint8 (n, h, w, c), with their labels and latents.

    Attributes:
        passed: How many of them D let pass.
        tried: Candidates that were judged for all of them, each up to the one that passed.
        timing: Of all that was computed.
    """

    images: UInt8
    labels: list[int] | None
    latents: Float32
    passed: int
    tried: int
    timing: Timing

    def header(self) -> dict[bytes, bytes]:
        """What a reply says of it."""
        return {b"x-acceptance-rate": b"%.4f" % (self.passed / self.tried)}


def refusal(bundle: Bundle | Version) -> str | None:
    """Why a bundle's discriminator can't choose; None if it can."""
    manifest = bundle.manifest
    if manifest.calibration is None:
        return "this bundle has no calibrated discriminator: none, or one that can't tell real images from samples."
    options = manifest.training.get("options")
    if isinstance(options, dict) and options.get("generator_loss") == "hinge":
        return "this bundle's discriminator was trained with the hinge loss, and gives no ratio of densities."
    if manifest.latent.noise:
        return "this bundle's generator takes noise beside the latent."
    return None


def check_selectable(bundle: Bundle | Version) -> None:
    """See that a bundle's discriminator can choose.

    Raises:
        Invalid: It can't; says why.
    """
    if (reason := refusal(bundle)) is not None:
        raise Invalid(f"select: {reason}")


async def select(
    manager: ModelManager, bundle: Bundle, plan: SamplePlan, deadline_s: float, *, is_accepted: bool = False
) -> Selected:
    """Draw the plan's images, having D choose. Errors are those of `Batcher.submit`.

    Args:
        manager: Of the engine.
        bundle: Whose calibration says what D's logits mean.
        plan: That asks for it.
        deadline_s: Seconds from now in which all has to be done.
        is_accepted: As for `Batcher.submit`; else the candidates of all images take their room in the queue here.
    """
    assert bundle.manifest.calibration is not None  # noqa: S101 - `check_selectable` has been asked
    until = asyncio.get_running_loop().time() + deadline_s
    parts = []
    if is_accepted:
        together = _together(bundle)
        for start in range(0, plan.count, together):
            some = plan.part(start, min(together, plan.count - start))
            parts.append(await _Selection(manager, bundle, some, bundle.manifest.calibration).run(until))
        return _joined(parts)
    with manager.reserve(plan.rows), manager.batcher.accept(plan.rows):
        return await select(manager, bundle, plan, deadline_s, is_accepted=True)


def selecting_bytes(bundle: Bundle, plan: SamplePlan) -> int:
    """Memory that choosing takes beside the images: the candidates of some, and the images of all once more."""
    return (2 * CANDIDATES_AT_ONCE * min(_together(bundle), plan.count) + plan.count) * bundle.manifest.image.size


def _together(bundle: Bundle) -> int:
    size, dim = bundle.manifest.image.size, bundle.manifest.latent.dim
    return max(1, min(TOGETHER, TOGETHER_BYTES // (CANDIDATES_AT_ONCE * size), TOGETHER_NUMBERS // dim))


def _joined(parts: list[Selected]) -> Selected:
    if len(parts) == 1:
        return parts[0]
    labels = None if parts[0].labels is None else [label for part in parts for label in part.labels or ()]
    return Selected(
        np.concatenate([part.images for part in parts]),
        labels,
        np.concatenate([part.latents for part in parts]),
        sum(part.passed for part in parts),
        sum(part.tried for part in parts),
        Timing(sum(part.timing.queue_s for part in parts), sum(part.timing.compute_s for part in parts)),
    )


class _Selection:
    """Images that are chosen together, a few candidates of each at a time."""

    def __init__(self, manager: ModelManager, bundle: Bundle, plan: SamplePlan, calibration: Calibration) -> None:
        self._manager, self._bundle, self._plan, self._calibration = manager, bundle, plan, calibration
        latent, image, n = bundle.manifest.latent, bundle.manifest.image, plan.count
        labels = sampled_labels(latent, plan.seed, plan.first_index, n) if plan.labels is None else plan.labels
        self._labels = None if labels is None else np.asarray(labels, np.int64)
        self._chances = draw_chances(plan.seed, plan.first_index, n, CANDIDATES)
        self._images = np.zeros((n, image.height, image.width, image.channels), np.uint8)
        self._latents = np.zeros((n, latent.dim), np.float32)
        self._logits = np.full(n, -np.inf)  # of the best so far
        self._tried = np.zeros(n, np.int64)
        self._timing = Timing(0.0, 0.0)

    async def run(self, until: float) -> Selected:
        pending = np.arange(self._plan.count)
        for first in range(0, CANDIDATES, CANDIDATES_AT_ONCE):
            latents = self._candidates(pending, first)
            images, logits = await self._judged(pending, latents, until)
            pending = self._choose(pending, first, latents, images, logits)
            if not len(pending):
                break
        labels = None if self._labels is None else self._labels.tolist()
        passed, tried = self._plan.count - len(pending), int(self._tried.sum())
        return Selected(self._images, labels, self._latents, passed, tried, self._timing)

    def _candidates(self, pending: NDArray[np.int64], first: int) -> Float32:
        """The next latents of each image that has none yet: (images, candidates, dim)."""
        latent, plan = self._bundle.manifest.latent, self._plan
        drawn = [
            draw_candidates(latent, plan.seed, plan.first_index, plan.count, first + k)[pending]
            for k in range(CANDIDATES_AT_ONCE)
        ]
        return np.stack(drawn, axis=1)

    async def _judged(
        self, pending: NDArray[np.int64], latents: Float32, until: float
    ) -> tuple[UInt8, NDArray[np.float64]]:
        """What G makes of latents, (images, candidates, h, w, c), and D's calibrated logits, (images, candidates)."""
        shape, clock = latents.shape[:2], asyncio.get_running_loop().time
        labels = None if self._labels is None else self._labels[pending].repeat(CANDIDATES_AT_ONCE).tolist()
        images, drawing = await self._manager.sample_latents(
            self._bundle,
            latents.reshape(-1, latents.shape[2]),
            labels=labels,
            truncation=self._plan.truncation,
            deadline_s=until - clock(),
            is_accepted=True,
        )
        logits, _, judging = await self._manager.discriminate(
            self._bundle, images, labels=labels, deadline_s=until - clock(), is_accepted=True
        )
        for one in (drawing, judging):
            queue_s, compute_s = self._timing
            self._timing = Timing(queue_s + one.queue_s, compute_s + one.compute_s)
        calibrated = self._calibration.scale * logits.astype(np.float64) + self._calibration.offset
        return images.reshape(*shape, *images.shape[1:]), calibrated.reshape(shape)

    def _choose(
        self,
        pending: NDArray[np.int64],
        first: int,
        latents: Float32,
        images: UInt8,
        logits: NDArray[np.float64],
    ) -> NDArray[np.int64]:
        """Keep the first candidates that pass, and the best where none does; returns the images that have none yet."""
        chances = self._chances[pending, first : first + CANDIDATES_AT_ONCE]
        passes = np.log(chances) < logits - math.log(CANDIDATES_AT_ONCE)  # chance < ratio / 4, for any logit
        has_passed = passes.any(axis=1)
        at = np.where(has_passed, passes.argmax(axis=1), logits.argmax(axis=1))
        rows = np.arange(len(pending))
        is_kept = has_passed | (logits[rows, at] > self._logits[pending])
        kept, place, candidate = pending[is_kept], rows[is_kept], at[is_kept]
        self._images[kept], self._latents[kept] = images[place, candidate], latents[place, candidate]
        self._logits[kept] = logits[place, candidate]
        self._tried[pending] = first + np.where(has_passed, at + 1, CANDIDATES_AT_ONCE)
        return pending[~has_passed]
