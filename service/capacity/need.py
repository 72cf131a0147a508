"""From what was measured to what a load needs: the settings, the latency to expect, replicas and machine hours."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.capacity.measure import Seen
from service.settings import Settings

# Times the wanted latency. Whoever would wait longer is refused, and makes nobody else late. One request of a hundred
# may take longer than is wanted, and most of those clients would rather have a late image than an error.
DEADLINES = 4.0
LEAST_DEADLINE_S = 0.2
MOST_MS = 1e9  # in place of for ever
PER_HOUR = 3600
MILLION = 1e6


class Expected(NamedTuple):
    """The latency to expect at a rate."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


def settings_for(settings: Settings, workers: int, p99_ms: float, images_per_s: float) -> dict[str, float]:
    """The settings, by field name, of a service that answers within the deadline or refuses at once.

    The queue holds what can be computed within the deadline; and in each worker a largest request, without which the
    service would not start.
    """
    deadline_s = min(max(DEADLINES * p99_ms / 1000, LEAST_DEADLINE_S), settings.max_deadline_s)
    deadline_s = math.ceil(100 * deadline_s - 1e-6) / 100
    queue = max(workers * settings.max_count, math.ceil(images_per_s * deadline_s))
    return {"workers": workers, "max_queued_images": queue, "deadline_s": deadline_s}


def expect(curve: Sequence[Seen], scale: float) -> Expected:
    """The latency between rates that were measured, along a line through their logarithms."""
    scales = [seen.scale for seen in curve]
    columns = ([getattr(seen, name) for seen in curve] for name in Expected._fields)
    logs = (np.log(np.minimum(column, MOST_MS)) for column in columns)
    return Expected(*(float(np.exp(np.interp(scale, scales, one))) for one in logs))


def highest_scale(curve: Sequence[Seen], p99_ms: float) -> float | None:
    """The highest rate of a curve that keeps the latency; None if none does."""
    fine = np.linspace(curve[0].scale, curve[-1].scale, 200)
    kept = [scale for scale in fine.tolist() if expect(curve, scale).p99_ms <= p99_ms]
    return max(kept, default=None)


def replicas_for(scale: float) -> int:
    """How many replicas a traffic needs of which each does so many times the whole."""
    return max(1, math.ceil(1 / scale - 1e-9))


def hours_per_million(images_per_s: float) -> float:
    """Machine hours for a million images at this rate."""
    return MILLION / images_per_s / PER_HOUR
