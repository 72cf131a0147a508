"""Numbers move along half a cosine."""

import pytest

from models.spec import half_cosine


def test_half_a_cosine_falls_from_one_to_nothing() -> None:
    """Slowly at both ends, and through the middle in the middle."""
    assert half_cosine(0) == 1
    assert half_cosine(1 / 3) == pytest.approx(0.75)
    assert half_cosine(0.5) == pytest.approx(0.5)
    assert half_cosine(1) == 0
