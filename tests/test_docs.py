"""The documentation says what the code does: every setting, series, route, field and code, and no others."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.__main__ import shown
from service.decode import UPLOAD_TYPES
from service.encode import MEDIA_TYPES
from service.errors import ServiceError
from service.metrics import Metrics
from service.schemas import SampleRequest
from service.settings import Settings, variable

SAMPLE = "`GET /sample`, `POST /sample`"
DOCS = Path(__file__).parent.parent / "docs"


def rows(text: str) -> list[list[str]]:
    """The cells of a page's tables, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def section(page: str, heading: str) -> str:
    """A page's text under one heading."""
    parts = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    return next(part for part in parts if part.startswith(f"{heading}\n"))


def test_every_setting_is_documented_with_its_default() -> None:
    """configuration.md has the settings of the code, in their order, with their defaults."""
    documented = {
        cells[0].strip("`"): cells[1] for cells in rows((DOCS / "configuration.md").read_text()) if "`GAN_" in cells[0]
    }
    assert list(documented) == [variable(name) for name in Settings.model_fields]
    for name, field in Settings.model_fields.items():
        if name != "bundles":  # a folder's name differs from machine to machine
            assert documented[variable(name)] == shown(field.default)


def test_every_series_is_documented_with_its_labels() -> None:
    """metrics.md has the series of the code, with their types and labels."""
    documented = {
        cells[0].strip("`"): cells[1] for cells in rows((DOCS / "metrics.md").read_text()) if "`gan_" in cells[0]
    }
    made = {}
    for metric in vars(Metrics(CollectorRegistry())).values():
        if hasattr(metric, "_labelnames"):
            name = metric._name + ("_total" if metric._type == "counter" else "")  # noqa: SLF001
            labels = ",".join(metric._labelnames)  # noqa: SLF001
            made[name + (f"{{{labels}}}" if labels else "")] = metric._type  # noqa: SLF001
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
    bodies = rows(section("api.md", "`POST /discriminate`"))
    assert {kind for cells in bodies for kind in re.findall(r"`(\w+/[\w-]+)`", cells[0])} == {
        *UPLOAD_TYPES,
        "application/json",
    }


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """No page names a file that is not there."""
    for target in re.findall(r"\]\(([^)#]+)", (DOCS / page).read_text()):
        if "://" not in target:
            assert (DOCS / target).exists(), target
