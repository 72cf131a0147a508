"""How cost grows: the bundles that are made for it serve, and what was measured can be drawn."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serving.growth import ask, plot, serve_alone, write_wide
from benchmarks.tools import wrk


@pytest.mark.skipif(not wrk.is_there(), reason="wrk is not installed")
@pytest.mark.slow
def test_a_wider_net_s_images_are_counted(tmp_path: Path) -> None:
    """A whole measurement, small: as many images a second as replies times their count."""
    with serve_alone(write_wide(tmp_path, 20), 1) as service:
        seen = ask(service, 16, 2, 0.5)
    assert seen["failed"] == 0
    assert seen["images_per_s"] >= 16
    assert 0 < seen["p50_ms"] <= seen["p99_ms"]


def test_what_was_measured_is_drawn(tmp_path: Path) -> None:
    """One picture of four panels."""
    point = {"images_per_s": 10, "p50_ms": 1.5}
    found = {
        "count": [{"workers": w, "count": c, **point} for w in (1, 2) for c in (1, 4)],
        "connections": [{"workers": w, "connections": c, **point} for w in (1, 2) for c in (1, 4)],
        "width": [{"width": w, "resident_mib": 300, **point} for w in (150, 300)],
    }
    plot(found, tmp_path / "figures" / "growth.png")
    with Image.open(tmp_path / "figures" / "growth.png") as picture:
        assert picture.size == (1300, 360)
