"""The documentation says what the code does: every setting, series, route, field and code, and no others."""

import contextlib
import io
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from prometheus_client import CollectorRegistry

from gan_client.core.calls import FileFormat
from models.__main__ import command_parser, main
from models.bundle import read_manifest
from models.signing import key_id_of, parse_public_keys
from service.codecs.decode import UPLOAD_TYPES
from service.codecs.encode import MEDIA_TYPES
from service.errors import ServiceError
from service.http.schemas import SampleRequest
from service.metrics import Metrics

SAMPLE = "`GET /sample`, `POST /sample`"
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def section(page: str, heading: str) -> str:
    """A page's text under one heading."""
    parts = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{heading}\n"))


def test_every_setting_is_documented_with_its_default() -> None:
    """The table of configuration.md is as `make docs` writes it from the settings."""
    with_table = runpy.run_path(str(ROOT / "deploy" / "site" / "settings_table.py"))["with_table"]
    page = (DOCS / "configuration.md").read_text()
    assert with_table(page) == page


def test_a_new_setting_gets_its_line_and_a_gone_one_leaves() -> None:
    """The others keep their words."""
    with_table = runpy.run_path(str(ROOT / "deploy" / "site" / "settings_table.py"))["with_table"]
    page = (DOCS / "configuration.md").read_text()
    other = re.sub(r"^\| `GAN_PORT`.*\n", "| `GAN_GONE` | 1 | gone |\n", page, flags=re.MULTILINE)
    port = "| `GAN_PORT` | 8000 | TCP port to listen on; 0 takes a free one |"
    assert with_table(other) == re.sub(r"^\| `GAN_PORT`.*$", port, page, flags=re.MULTILINE)


def test_every_series_is_documented_with_its_labels() -> None:
    """metrics.md has the series of the code, with their types and labels."""
    documented = {
        cells[0].strip("`"): cells[1] for cells in rows((DOCS / "metrics.md").read_text()) if "`gan_" in cells[0]
    }
    made = {
        name + (f"{{{','.join(labels)}}}" if labels else ""): kind
        for name, kind, labels in Metrics(CollectorRegistry()).declarations
    }
    assert documented == made


def test_every_route_is_documented(app: FastAPI) -> None:
    """api.md names the routes of the code, with their methods."""
    documented = set(re.findall(r"`(GET|POST) (/[^`]*)`", (DOCS / "api.md").read_text()))
    routes = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented == routes | {("GET", "/"), ("GET", "/docs")}


def test_every_code_is_documented_with_its_status() -> None:
    """api.md has the codes of the code."""

    def codes(error: type[ServiceError]) -> set[tuple[str, str]]:
        mine = {(str(error.status), error.code)} if hasattr(error, "code") else set()
        return mine.union(*(codes(kind) for kind in error.__subclasses__()))

    documented = {(cells[0], cells[1].strip("`")) for cells in rows(section("api.md", "Errors")) if cells[0].isdigit()}
    assert documented == codes(ServiceError)


def test_every_field_format_and_body_is_documented() -> None:
    """api.md has the fields and formats of /sample and the bodies of /discriminate."""
    sample = [(first.strip("`"), second.strip("`")) for first, second, *_ in rows(section("api.md", SAMPLE))]
    heads = [place for place, (first, _) in enumerate(sample) if first in {"field", "format"}]
    fields, formats = sample[heads[0] + 1 : heads[-1]], sample[heads[-1] + 1 :]
    assert [name for name, _ in fields] == list(SampleRequest.model_fields)
    assert dict(formats) == MEDIA_TYPES
    assert set(get_args(FileFormat)) == set(MEDIA_TYPES)  # the client names them too
    bodies = rows(section("api.md", "`POST /discriminate`"))
    assert {kind for cells in bodies for kind in re.findall(r"`(\w+/[\w-]+)`", cells[0])} == {
        *UPLOAD_TYPES,
        "application/json",
    }


def test_every_client_is_documented_with_the_version_that_is_tested() -> None:
    """protocols.md has the clients of `make test-clients`."""
    tested = {path.stem: path.read_text() for path in (ROOT / "tests" / "clients").glob("*.txt")}
    documented = {
        re.findall(r"[\w-]+", name)[0]: version for name, version, _ in rows((DOCS / "protocols.md").read_text())[1:]
    }
    assert documented.keys() == tested.keys()
    for name, version in documented.items():
        assert re.search(rf"^{name}\S*=={re.escape(version)}$", tested[name], re.MULTILINE)


def commands() -> list[list[str]]:
    """The arguments of every offline command in the README and the pages."""
    texts = [path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))]
    blocks = [block for text in texts for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[3:] for line in lines if re.search(r"python -m models ", line)]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_documented_command_can_be_given(arguments: list[str]) -> None:
    """Commands and flags of the pages are those of the code."""
    assert callable(command_parser().parse_args(arguments).run)


def test_every_command_is_documented() -> None:
    """Each has its line on a page."""
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
        command_parser().parse_args(["--help"])
    offered = set(re.findall(r"^    (\w+)(?: |$)", told.getvalue(), flags=re.MULTILINE))
    assert len(offered) >= 7
    assert offered == {arguments[0] for arguments in commands()}


@pytest.fixture
def run_example(live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, Any]]:
    """Run the lines of Python that api.md has under /sample, the first, the second …, against the tiny bundles."""
    monkeypatch.setenv("NO_PROXY", "*")
    examples = re.findall(r"```python\n(.*?)```", section("api.md", SAMPLE), flags=re.DOTALL)

    def run(place: int) -> dict[str, Any]:
        lines = examples[place].replace("http://localhost:8000", live.url).replace("labels=3&", "")
        (tmp_path / "lines.py").write_text(lines)
        return runpy.run_path(str(tmp_path / "lines.py"))

    return run


def test_the_page_draws_images_between_two(live: Any, run_example: Callable[[int], dict[str, Any]]) -> None:
    """The lines of api.md, run: latents that are sent give the images that they were drawn for, and one between."""
    images = run_example(1)["images"]
    ends = np.load(io.BytesIO(httpx.get(f"{live.url}/sample?seed=7&count=2&format=npy").content))
    np.testing.assert_array_equal(images[::2], ends)


def test_the_page_draws_ten_thousand_images(live: Any, run_example: Callable[[int], dict[str, Any]]) -> None:
    """The lines of api.md, run: each part is the continuation of the one before."""
    images = run_example(0)["images"]
    assert images.shape == (10_000, 8, 8, 1)
    across = httpx.get(f"{live.url}/sample?seed=7&first_index=4090&count=20&format=npy").content
    np.testing.assert_array_equal(images[4090:4110], np.load(io.BytesIO(across)))


def number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


def test_the_game_in_one_dimension_has_the_numbers_of_its_record() -> None:
    """The table of experiments.md and the sentence about the fresh D, against the file beside the picture."""
    record = json.loads((DOCS / "figures" / "toy.json").read_text())
    assert all(record["claims"].values())
    section_rows = rows(section("experiments.md", "Figure 1: the game in one dimension"))[1:]
    for (name, *numbers), stage in zip(section_rows, record["stages"], strict=True):
        assert name == stage["name"]
        recorded = (stage["step"], stage["value"], stage["jsd"], stage["gaps"][0][1], stage["gaps"][-1][1])
        assert [number(text) for text in numbers] == [
            round(n, d) for n, d in zip(recorded, (0, 4, 4, 3, 3), strict=True)
        ]
    text = " ".join((DOCS / "experiments.md").read_text().split())
    value, from_half = re.findall(r"finds the value (\S+), and is nowhere further than (\S+) from ½", text)[0]
    fresh = record["fresh_discriminator"]
    assert (number(value), number(from_half)) == (round(fresh["value"], 4), round(fresh["from_half"], 3))


def test_the_parzen_table_has_the_numbers_of_the_manifest() -> None:
    """Figures are copied from what `evaluate --record` wrote, and go stale with a new bundle."""
    manifest = json.loads((ROOT / "bundles" / "mnist-mlp" / "manifest.json").read_text())
    shown = {}
    for name, paper, paper_sigma, fine, fine_sigma in rows(section("experiments.md", "The Parzen table"))[1:]:
        texts = (*paper.split(" ± "), paper_sigma), (*fine.split(" ± "), fine_sigma)
        shown[name] = [[number(text) for text in part] for part in texts]
    assert shown == {
        name: [
            [
                round(row[grid][key], digits)
                for key, digits in (("log_likelihood", 1), ("standard_error", 1), ("sigma", 3))
            ]
            for grid in ("paper", "fine")
        ]
        for name, row in manifest["evaluation"]["parzen"].items()
    }


def test_the_table_of_verdicts_has_the_numbers_of_the_manifests() -> None:
    """The AUC as it is recorded, and the ends of each range in the bins that 5 and 95 % of the verdicts reach."""
    for name, auc, *ranges in rows(section("scores.md", "What D's verdicts are worth"))[1:]:
        manifest = json.loads((ROOT / "bundles" / name.strip("`") / "manifest.json").read_text())
        assert number(auc) == round(manifest["calibration"]["auc"], 2)
        for kind, text in zip(("real", "generated"), ranges, strict=True):
            counts = np.array(manifest["evaluation"]["verdicts"][kind])
            bins = np.searchsorted(counts.cumsum() / counts.sum(), (0.05, 0.95))
            assert [int(len(counts) * number(end)) for end in text.split(" … ")] == bins.tolist()


@pytest.mark.parametrize("command", [one for one in commands() if one[0] in {"interpolate", "classes"}], ids=" ".join)
def test_the_pictures_on_the_pages_are_those_of_the_bundle(tmp_path: Path, command: list[str]) -> None:
    """The page's own command makes its picture, to one grey level."""
    assert main([command[0], str(ROOT / command[1]), *command[2:-1], str(tmp_path / "new.png")]) == 0
    with Image.open(tmp_path / "new.png") as new, Image.open(ROOT / command[-1]) as old:
        assert np.abs(np.asarray(new).astype(int) - np.asarray(old).astype(int)).max() <= 1


def test_the_gallery_has_the_verdicts_of_its_record() -> None:
    """The table and the calibration's errors, against the file beside the picture, which is of the present bundles."""
    judged = json.loads((DOCS / "figures" / "gallery" / "verdicts.json").read_text())
    for one in judged:
        assert one["version"] == read_manifest(ROOT / "bundles" / one["bundle"])[1]
    text = section("gallery.md", "What /discriminate says")
    shown = [
        [number(part.rstrip(" %")) for cell in cells[2:] for part in cell.split(" … ")] for cells in rows(text)[1:]
    ]
    said = [said for one in judged for said in one["sets"].values()]
    assert shown == [
        [*(round(one["quantiles"][at], 2) for at in ("0.5", "0.05", "0.95")), round(100 * one["above_half"])]
        for one in said
    ]
    errors = re.findall(r"error here is (\S+) for.*?and (\S+) for.*?it is (\S+) and (\S+)\.", " ".join(text.split()))
    kinds = [one[kind] for kind in ("calibration_error", "plain_error") for one in judged]
    assert [number(error) for error in errors[0]] == [round(error, 3) for error in kinds]
    aucs = re.findall(r"AUC (\S+); (\S+) for", text)
    assert [number(auc) for auc in aucs[0]] == [round(one["auc"], 2) for one in judged]


def test_the_gallery_has_the_scores_of_the_manifests() -> None:
    """Figures are copied from what `evaluate --record` wrote, and go stale with a new bundle."""
    bundles = [json.loads((ROOT / "bundles" / name / "manifest.json").read_text()) for name in ("mnist", "mnist-mlp")]
    table = rows(section("gallery.md", "Scores beside published ones"))
    figures = [one["evaluation"]["suite"]["figures"] for one in bundles]
    for name, *shown in (cells for cells in table if cells[0].strip("`") in figures[0]):
        recorded = [*(one[name.strip("`")]["value"] for one in figures), figures[0][name.strip("`")]["real"]]
        assert [number(text) for text in shown] == [round(value, 3) for value in recorded]
    parzen = [one["evaluation"]["parzen"] for one in bundles]
    ours = [*(one["generator"] for one in parzen), parzen[0]["training images"]]
    likelihoods = [cells[1] for cells in table if len(cells) == 2 and " ± " in cells[1]]
    assert likelihoods[:3] == [
        f"{row['paper']['log_likelihood']:.1f} ± {row['paper']['standard_error']:.1f}" for row in ours
    ]


PAGES = [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md"]


def prose(page: Path) -> str:
    """A page's text without its blocks of code, in which a `#` is no heading and brackets are no link."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[tuple[Path, str]]:
    """The files of this repository that a page links to, each with the heading."""
    targets = [target.partition("#") for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in target]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in targets]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """No page links to a file or a heading that is not there."""
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target.name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """Paths from the repository's root, and programs that `python -m` runs."""
    text = page.read_text()
    named = re.findall(r"(?<![\w/.:-])(?:benchmarks|bundles|deploy|docs|models|service|tests)/[\w./-]*\w", text)
    programs = [name.replace(".", "/") for name in re.findall(r"python -m ((?:benchmarks|models|service)[\w.]*)", text)]
    assert not [path for path in named if not (ROOT / path).exists()]
    assert not [path for path in programs if not any((ROOT / path).with_suffix(end).exists() for end in ("", ".py"))]


def test_every_page_can_be_found_from_the_readme() -> None:
    """By links from page to page, so that nobody has to know its name."""
    found, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            waiting += [target for target, _ in links(page) if target.suffix == ".md"]
    assert {*DOCS.rglob("*.md"), ROOT / "benchmarks" / "README.md"} <= found


def test_the_key_on_the_page_is_one() -> None:
    """The example of a file of keys in bundle-format.md is what the service reads, with an id as `keygen` makes it."""
    blocks = section("bundle-format.md", "Signatures").split("```")[1::2]
    [block] = [block for block in blocks if "ID KEY" in block]
    [(key_id, key)] = parse_public_keys(block.splitlines()).items()
    assert key_id == key_id_of(key)


def test_every_threat_names_tests_that_are_there() -> None:
    """In SECURITY.md each threat has what stops it, and names the functions that test it."""
    threats = [cells for cells in rows((ROOT / "SECURITY.md").read_text()) if cells[0] != "threat"]
    files = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = {name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file, flags=re.MULTILINE)}
    assert len(threats) >= 25
    for threat, stops, tests in threats:
        named = re.findall(r"`(\w+)`", tests)
        assert named, threat
        assert stops, threat
        assert set(named) <= defined, threat
