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
from PIL import Image

from models.training.report import MAX_FRAMES, duration, page, write_report
from models.training.run_folder import RunDir

RECORD = {
    "options": {"preset": "mlp-<b>", "steps": 4_000, "latent": {"dim": 100}},
    "data": {"name": "cats & dogs", "checksum": "abc"},
    "images": {"train": 1439, "validation": 179, "test": 180, "channels": 3, "height": 64, "width": 48, "classes": 12},
    "torch": "2.13.0",
}


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails on a tag that is not closed."""

    OPEN = frozenset({"meta", "img", "input"})

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


def charts(html: str) -> dict[str, str]:
    """The SVG of each chart by its title."""
    found = {}
    for image in Page(html).all("img"):
        head, _, content = image["src"].partition(",")
        if head == "data:image/svg+xml;base64":
            found[image["alt"].removesuffix(" against steps")] = b64decode(content).decode()
    return found


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "seconds": step / 10, "d_loss": 1 / step, "g_loss": 2.0, "d_real": 1 / step} | more


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run of 4,000 steps with two scores, an alarm and two grids."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "a <run>")
    run.begin(RECORD)
    run.save_real(np.full((64, 28, 28, 1), 9, np.uint8))
    for step in range(50, 4_050, 50):
        more: dict[str, Any] = {"pairs_right": 0.9, "g_gradient": step / 1e4 if step > 50 else 0.0, "r_v": None}
        if step % 2_000 == 0:
            more |= {"validation_log_likelihood": float(step), "validation_rows": 10}
            more |= {"validation_frechet": step / 4, "validation_frechet_floor": 0.25}
            run.save_samples(step, np.full((64, 28, 28, 1), step // 20, np.uint8))
        if step > 3_900:
            more["alarms"] = [f"memorising: for {step} images"]
        run.append_stats(row(step, **more))
    first = page(run)
    assert first == page(run)  # nothing on it depends on the clock or on chance
    return first


def test_a_page_shows_what_the_folder_holds(html: str) -> None:
    """Charts with their latest values, scores beside their floors, alarms once, samples, options, environment."""
    frechet = "Fréchet distance to validation images"
    assert list(charts(html)) == [
        *("Losses", "D’s outputs", "Parzen log-likelihood of validation images", frechet),
        "Gradients",
    ]
    assert "real images 0.25" in charts(html)[frechet]
    text = Page(html).text
    assert text.count("memorising") == 1
    for words in (
        *("1,439 · 179 · 180", "48×64, RGB", "classes 12 ", "4,000 of 4,000", "7 min"),
        "memorising: for 4000 images",
        "cats & dogs",
        "mlp-<b>",
        "2.13.0",
        "The same all the time: Pairs that D ranks rightly image over sample 0.9.",
    ):
        assert words in " ".join(text.split())
    frames = re.search(r"const frames=(\[.*?\]\]);", html)
    assert frames is not None
    assert [step for step, _ in json.loads(frames[1])] == [2_000, 4_000]


def test_a_page_needs_nothing_from_elsewhere(html: str) -> None:
    """No address but data, in the page and in its charts, and the sample grid is a whole picture."""
    assert not re.search(r"https?://|@import|url\(", html)
    assert not re.search(r'href="(?!#)|@import|<image', "".join(charts(html).values()))
    samples, real = (image["src"] for image in Page(html).all("img") if "svg" not in image["src"])
    for grid in (samples, real):
        head, _, content = grid.partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(BytesIO(b64decode(content))) as picture:
            assert picture.size == (224, 224)
    assert real != samples


@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0], [3e38, -3e38], [math.nan, 2.0, math.inf], [math.nan], [5e-324, 0.0]],
    ids=["equal", "huge", "not all numbers", "no number", "tiny"],
)
def test_any_numbers_can_be_drawn(values: list[float], tmp_path: Path) -> None:
    """Whatever a run computed, its page is a page, and what is no number is left out."""
    run = RunDir(tmp_path)
    for index, value in enumerate(values):
        run.append_stats({"step": index + 1, "seconds": 1.0, "d_loss": value, "g_gradient": value})
    drawn = charts(page(run))
    finite = {*filter(math.isfinite, values)}
    is_constant = len(finite) == 1 and sum(map(math.isfinite, values)) > 1
    assert ("Losses" in drawn) == (bool(finite) and not is_constant)
    assert not re.search("nan|inf", "".join(drawn.values()))


def test_long_runs_make_small_pages(tmp_path: Path) -> None:
    """A hundred thousand steps with more grids than frames: lines and frames are thinned, first and last stay."""
    run = RunDir(tmp_path)
    run.begin(RECORD)
    rows = [row(step) for step in range(50, 100_050, 50)]
    (tmp_path / "stats.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    for step in range(1, MAX_FRAMES + 3):
        run.save_samples(step, np.zeros((64, 2, 2, 3), np.uint8))
    html = page(run)
    assert len(charts(html)["Losses"]) < 30_000  # 2,000 points would take 70,000
    frames = re.search(r"const frames=(\[.*?\]\]);", html)
    assert frames is not None
    steps = [step for step, _ in json.loads(frames[1])]
    assert (len(steps), steps[0], steps[-1]) == (MAX_FRAMES, 1, MAX_FRAMES + 2)


def test_a_folder_of_any_name_has_a_page(tmp_path: Path) -> None:
    """Even of one that is no text."""
    run = RunDir(tmp_path / "r\udcff")
    run.path.mkdir()
    assert b"<h1>r\\xff</h1>" in write_report(run).read_bytes()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.000_62, "0.62 ms"),
        (0.1824, "182 ms"),
        (0.9999, "1 s"),
        (2.34, "2.34 s"),
        (59.97, "1 min"),
        (90 * 60, "1 h 30 min"),
        (18_600, "5 h 10 min"),
        (183_600, "2 days 3 h"),
        (172_799, "2 days 0 h"),
    ],
)
def test_durations_are_in_units_that_a_person_reads(seconds: float, words: str) -> None:
    """No 0.00 h, and no 400,000 s."""
    assert duration(seconds) == words


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    """Before the first step there is little to say."""
    run = RunDir(tmp_path)
    assert write_report(run) == tmp_path / "report.html"
    assert charts((tmp_path / "report.html").read_text()) == {}


def test_the_bundles_scores_and_the_neighbours_are_shown_when_they_are_there(tmp_path: Path) -> None:
    """What evaluate recorded, flattened; the picture as it is."""
    run = RunDir(tmp_path)
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
