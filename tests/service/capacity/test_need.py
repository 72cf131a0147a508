"""From a measured curve to settings, expectations and replicas."""

import math

import pytest

from service.capacity.measure import Seen
from service.capacity.need import expect, highest_scale, hours_per_million, replicas_for, settings_for
from service.settings import Settings


def seen(scale: float, p99_ms: float) -> Seen:
    return Seen(scale, 100 * scale, 100 * scale, p99_ms / 4, p99_ms / 2, p99_ms, 1.0, 0.0, 0.1, 0.2)


CURVE = [seen(0.5, 10), seen(0.8, 20), seen(1.0, 80)]


def test_a_rate_between_two_is_expected_between_them() -> None:
    """Along a line of logarithms, and at the ends what was measured."""
    assert expect(CURVE, 0.5).p99_ms == pytest.approx(10)
    assert expect(CURVE, 0.9).p99_ms == pytest.approx(40)
    assert expect(CURVE, 0.9).p95_ms == pytest.approx(20)
    assert expect(CURVE, 2).p99_ms == pytest.approx(80)


def test_the_highest_rate_is_where_the_curve_passes_the_wanted_latency() -> None:
    """Also where requests failed beyond; None where even the lowest is too slow."""
    assert highest_scale(CURVE, 40) == pytest.approx(0.9, abs=0.01)
    assert highest_scale(CURVE, 100) == 1
    assert highest_scale(CURVE, 5) is None
    beyond = highest_scale([*CURVE[:2], seen(1.0, math.inf)], 40)
    assert beyond is not None
    assert 0.8 <= beyond < 0.9


@pytest.mark.parametrize("workers", [1, 4])
def test_the_settings_can_be_applied(workers: int) -> None:
    """Whatever was measured, the service accepts them; the queue is no longer than the deadline."""
    for p99_ms, images_per_s in ((0.1, 3), (50, 100_000), (50, 1e7), (1e6, 1e5)):
        wanted = settings_for(Settings(), workers, p99_ms, images_per_s)
        applied = Settings.model_validate(wanted)
        assert applied.workers == workers
        assert applied.deadline_s >= min(p99_ms / 1000, applied.max_deadline_s)
        rounding = 0.01 * images_per_s + 1
        assert applied.max_queued_images <= max(workers * 4096, images_per_s * applied.deadline_s + rounding)


def test_replicas_and_machine_hours() -> None:
    """Enough for the whole, and no more than that; a million images at 100 a second are 2.8 hours."""
    assert [replicas_for(scale) for scale in (7.5, 1.0, 0.99, 0.5, 0.34, 0.1)] == [1, 1, 2, 2, 3, 10]
    assert hours_per_million(100) == pytest.approx(2.78, abs=0.01)
