"""The page of a run shows what its folder holds, needs nothing else, and is there or not, never half."""

import json
import math
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.training import report
from models.training.report import MAX_FRAMES, MAX_POINTS, page, write_report
from models.training.run_folder import RunDir

RECORD = {
    "options": {"preset": "mlp-<b>", "steps": 4_000, "latent": {"dim": 100}},
    "data": {"name": "cats & dogs", "checksum": "abc"},
    "torch": "2.13.0",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails on a tag that is not closed."""

    OPEN = frozenset({"meta", "img", "input", "line", "polyline", "circle"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As the base class calls it."""
        self.tags.append((tag, dict(attrs)))
        if tag not in self.OPEN:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As the base class calls it."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """As the base class calls it."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """As the base class calls it."""
        self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, Any]]:
        """The attributes of each tag of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": step / 10, "d_loss": 1 / step, "g_loss": 2.0, "d_real": 0.5, "d_fake": 0.5} | more


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 4,000 steps with two scores, an alarm and two grids."""
    folder = RunDir(tmp_path / "a <run>")
    folder.begin(RECORD)
    for step in range(50, 4_050, 50):
        more: dict[str, Any] = {"pairs_right": 0.9, "g_gradient": 0.1 if step > 50 else 0.0, "r_v": None}
        if step % 2_000 == 0:
            more |= {"validation_log_likelihood": float(step), "frechet": 9.5, "frechet_floor": 0.25}
            folder.save_samples(step, np.full((64, 28, 28, 1), step // 20, np.uint8))
        if step > 3_900:
            more["alarms"] = [f"memorising: for {step} images"]
        folder.append_stats(row(step, **more))
    return folder


def test_a_page_shows_what_the_folder_holds(run: RunDir) -> None:
    """Charts with their latest values, scores beside their floors, alarms once, samples, options, environment."""
    shown = Page(page(run))
    labels = [svg["aria-label"] for svg in shown.all("svg")]
    assert labels == [
        f"{title} against steps"
        for title in (
            *("Losses", "D’s outputs", "Parzen log-likelihood of validation images", "Frechet"),
            *("Pairs that D ranks rightly", "Gradients"),
        )
    ]
    assert shown.text.count("memorising") == 1
    for words in ("4,000 of 4,000", "6 min 40 s", "memorising: for 4000 images", "cats & dogs", "mlp-<b>", "2.13.0"):
        assert words in shown.text
    assert re.search(r"real images\s+0\.25", shown.text)
    frames = re.search(r"const frames=(\[.*?\]\]);", page(run))
    assert frames is not None
    assert [step for step, _ in json.loads(frames[1])] == [2_000, 4_000]


def test_a_page_needs_nothing_from_elsewhere(run: RunDir) -> None:
    """No address but data, and the pictures are whole."""
    html = page(run)
    assert not re.search(r"https?://|@import|url\(", html)
    pictures = [image["src"] for image in Page(html).all("img")]
    assert pictures
    for source in pictures:
        head, _, content = source.partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(BytesIO(b64decode(content))) as picture:
            assert picture.size == (224, 224)


def test_lines_lie_where_the_numbers_are(run: RunDir) -> None:
    """D's loss of 1/step falls from the chart's top left to its bottom right, every point within the axes."""
    line = next(line for line in Page(page(run)).all("polyline") if line["class"] == "line1")
    points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
    assert len(points) == 80
    xs, ys = zip(*points, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)  # downwards
    assert xs[-1] == report.WIDTH - report.RIGHT
    assert report.TOP <= ys[0] < ys[-1] <= report.HEIGHT - report.BOTTOM


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=8))
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    """Equal ones, huge ones, none at all, and those that are no numbers: a page is always a page."""
    rows = [row(index + 1, d_loss=value, g_gradient=value) for index, value in enumerate(values)]
    for chart in (*report.TRAINING, *report.HEALTH):
        drawn = report._chart(chart, rows)  # noqa: SLF001 — one chart of many numbers, without a folder for each
        Page(drawn)
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    """A hundred thousand steps with two hundred grids: lines and frames are thinned, the first and last stay."""
    run = RunDir(tmp_path)
    run.begin(RECORD)
    for step in range(50, 100_050, 50):
        run.append_stats(row(step))
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    for step in range(500, 100_500, 2_000):
        run.save_samples(step, noise)
    html = page(run)
    assert len(html) < 6e6  # noise: real samples are a tenth of that
    shown = Page(html)
    assert all(len(line["points"].split()) == MAX_POINTS for line in shown.all("polyline"))
    assert shown.all("input")[0]["max"] == str(MAX_FRAMES - 1)


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    """Before the first step there is little to say."""
    run = RunDir(tmp_path)
    assert write_report(run) == tmp_path / "report.html"
    assert Page((tmp_path / "report.html").read_text()).all("svg") == []


def test_the_bundles_scores_and_the_neighbours_are_shown_when_they_are_there(run: RunDir) -> None:
    """What evaluate recorded, flattened; the picture as it is."""
    run.bundle.mkdir()
    manifest = {"name": "cats", "evaluation": {"frechet": {"value": 3.25, "floor": math.pi}}}
    (run.bundle / "manifest.json").write_text(json.dumps(manifest))
    Image.new("L", (4, 4)).save(run.path / "neighbours.png")
    shown = Page(page(run))
    assert re.search(r"frechet\.floor\s+3\.14159", shown.text)
    assert "nearest training images" in shown.text
    assert any(image["src"].startswith("data:image/png") for image in shown.all("img"))
    (run.bundle / "manifest.json").write_text("{")
    assert "frechet.floor" not in page(run)
