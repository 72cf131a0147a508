"""The dashboard is what its description gives, and each query finds data in a real Prometheus beside a real service."""

import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy.grafana.dashboard import FILE, as_json
from deploy.grafana.queries import series
from models.bundle import Bundle
from service.metrics import Metrics
from service.settings import Settings
from tests.conftest import LiveServer
from tests.deploy.conftest import Prometheus

ROOT = Path(__file__).parents[2]
PROVISIONING = ROOT / "deploy/grafana/provisioning"
BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {one["name"]: one for one in BOARD["templating"]["list"]}
CHOICES = {name: one["query"]["query"] for name, one in VARIABLES.items() if one["type"] == "query"}
# Every query, by where it stands.
QUERIES = {
    **{f"{panel['title']} {query['refId']}": query["expr"] for panel in PANELS for query in panel["targets"]},
    **{f"annotation {one['name']}": one["target"]["expr"] for one in BOARD["annotations"]["list"]},
}
# What a test on a CPU can't fill, and what that would need.
EMPTY = {"Device memory A": "a CUDA device, whose allocator tells how much it holds"}
# The first that is found in a query says in which unit its values are.
UNITS = {
    r"histogram_quantile\(.*_seconds_bucket": "s",
    r"_seconds_sum.* / .*_seconds_count": "s",
    r" / ": "percentunit",
    r"rate\(process_cpu_seconds_total": "short",  # seconds a second
    r"rate\(gan_(requests|rejected|cancelled|key_rejected)_total": "reqps",
    r"rate\(gan_((key_)?images_total|batch_images_sum|discriminator_probability_(count|bucket))": "count:images/s",
    r"rate\(gan_(batches_total|batch_images_bucket)": "count:batches/s",
    r"rate\(gan_(request|response)_bytes_sum": "binBps",
    r"avg\((up|gan_ready)": "percentunit",
    r"_bytes\{": "bytes",
    r"_seconds\{": "s",
    "": "short",
}


def test_the_file_is_what_the_description_gives() -> None:
    """`make docs` writes it: a change by hand would be lost."""
    assert FILE.read_text() == as_json()


# --- What Grafana asks of it -------------------------------------------------------------------------------------


def test_panels_have_ids_and_places_of_their_own() -> None:
    """Grafana merges panels of one id, and pushes apart those that overlap. No line has a gap."""
    assert BOARD["schemaVersion"] == 42
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert ids == list(range(1, len(ids) + 1))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert set(cells) == {(x, y) for x in range(24) for y in range(max(y for _, y in cells) + 1)}
    assert all(first["gridPos"]["y"] <= second["gridPos"]["y"] for first, second in pairwise(BOARD["panels"]))


def test_every_panel_has_a_name_of_its_own_and_says_what_it_answers() -> None:
    """The runbook names panels by their titles."""
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"] for panel in PANELS)


def test_everything_asks_the_chosen_prometheus() -> None:
    """A data source has another uid on every host; the variable begins with compose's."""
    askers = [*PANELS, *(query for panel in PANELS for query in panel["targets"]), *BOARD["annotations"]["list"]]
    askers += [VARIABLES[name] for name in CHOICES]
    assert {(one["datasource"]["type"], one["datasource"]["uid"]) for one in askers} == {
        ("prometheus", "${datasource}")
    }
    (source,) = yaml.safe_load((PROVISIONING / "datasources/prometheus.yml").read_text())["datasources"]
    assert VARIABLES["datasource"]["current"] == {"text": source["name"], "value": source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraping["scrape_interval"]


def test_grafana_finds_the_dashboard_where_compose_mounts_it() -> None:
    """The provider's folder and the home page both lie in the mounted folder."""
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    folder = mounts["./" + FILE.parent.relative_to(ROOT).as_posix()]
    assert mounts["./" + PROVISIONING.relative_to(ROOT).as_posix()] == "/etc/grafana/provisioning"
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards/gan-service.yml").read_text())["providers"]
    assert provider["options"]["path"] == folder
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/{FILE.name}"


@pytest.mark.parametrize("name", CHOICES)
def test_instances_and_bundles_can_be_chosen(name: str) -> None:
    """One, several or all, which is what it begins with."""
    variable = VARIABLES[name]
    assert variable["multi"]
    assert variable["includeAll"]
    assert variable["current"]["value"] == "$__all"
    assert sum(f'{name}=~"${name}"' in query for query in QUERIES.values()) > 10


# --- What the queries are ----------------------------------------------------------------------------------------


def test_every_metric_is_shown() -> None:
    """One that nobody looks at should not be exported."""
    declared = [one.name for one in Metrics(CollectorRegistry()).declarations]
    assert [name for name in declared if not any(name in query for query in QUERIES.values())] == []


def test_a_query_for_what_is_not_exported_cannot_be_written() -> None:
    """A misspelled series would be an empty panel, and nobody is told."""
    with pytest.raises(KeyError):
        series("gan_request_total")


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_every_query_aggregates_as_it_should(query: str) -> None:
    """Quantiles keep `le` and add up all instances first; a rate's window holds scrapes enough; legends name labels."""
    assert query.count("histogram_quantile") == len(re.findall(r"histogram_quantile\([\d.]+, sum by \(le\b", query))
    assert query.count("_bucket{") == len(re.findall(r"sum by \(le\b[^)]*\) \(rate\(\w+_bucket\{", query))
    assert re.findall(r"\[(.*?)\]", query) == ["$__rate_interval"] * query.count("rate(")
    assert all(quotient.endswith(" >= 0") for quotient in [query] if " / " in query or "quantile" in query)
    # Alerts are about a few instances together.
    assert all("$instance" in braces for braces in re.findall(r"\{(.*?)\}", query) if "alertname" not in braces)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_shows_the_unit_of_its_query(panel: dict[str, Any]) -> None:
    """Seconds as seconds, bytes as bytes, shares as per cent, counts a second as such."""
    unit = panel["options"].get("cellValues", panel["fieldConfig"]["defaults"]).get("unit")
    if panel["type"] in {"table", "state-timeline"}:
        assert unit is None
        return
    for query in panel["targets"]:
        assert unit == next(unit for pattern, unit in UNITS.items() if re.search(pattern, query["expr"]))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_legend_names_labels_that_are_there(panel: dict[str, Any]) -> None:
    """Another would be shown as it is written."""
    labels = {one.name: set(one.labels) for one in Metrics(CollectorRegistry()).declarations}
    for query in panel["targets"]:
        kept = {label for by in re.findall(r"by \(([^)]*)\)", query["expr"]) for label in by.split(", ")}
        if not kept and (name := re.search(r"\w+(?=\{)", query["expr"])):
            kept = labels.get(name[0], set()) | {"instance"}
        assert set(re.findall(r"\{\{(\w+)\}\}", query.get("legendFormat", ""))) <= kept


# --- What they find ----------------------------------------------------------------------------------------------


def filled_in(query: str, window: str = "1m", instance: str = ".*", bundle: str = ".*") -> str:
    """A query as Grafana sends it."""
    query = query.replace("$__rate_interval", window).replace("$instance", instance).replace("$bundle", bundle)
    assert "$" not in query
    return query


def put_to_work(server: LiveServer, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every metric move: images, verdicts, refusals, a client that leaves, a failure, bundles that come and go."""
    with httpx.Client(base_url=server.url, headers={"X-API-Key": "of-alice"}, trust_env=False) as client:
        for bundle in ("tiny", "rgb", "cond"):
            picture = client.get(f"/sample?bundle={bundle}&count=5").raise_for_status().content
            png = {"Content-Type": "image/png"}
            client.post(f"/discriminate?bundle={bundle}", content=picture, headers=png).raise_for_status()
            client.get(f"/sample?bundle={bundle}&format=json").raise_for_status()
        assert client.get("/sample?count=0").status_code == 422
        assert client.get("/sample", headers={"X-API-Key": "of-nobody"}).status_code == 401
        assert client.get("/nothing").status_code == 404
        with monkeypatch.context() as patch:
            patch.setattr("service.engine.runners.SampleRunner.run", failing)
            assert client.get("/sample").status_code == 500
        leave(server)
        for verb in ("unload", "load"):
            change = client.post(
                f"/v2/repository/models/cond/{verb}", headers={"X-API-Key": "of-the-operator"}, json={}
            )
            change.raise_for_status()
    sampled = {"bundle": "tiny", "version": version, "origin": "sampled"}
    server.wait_for(lambda: server.metric("gan_discriminator_probability_count", **sampled) > 0)


def failing(*_: object) -> None:
    raise RuntimeError("this engine fails")


def leave(server: LiveServer) -> None:
    """Ask for an image, and hang up before it is there."""

    def departures() -> float:
        return sum(
            server.metric("gan_cancelled_total", route="/sample", phase=phase) for phase in ("queued", "running")
        )

    before = departures()
    with server.engine_held():
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b"GET /sample HTTP/1.1\r\nHost: a\r\nX-API-Key: of-bob\r\n\r\n")
            server.wait_for(lambda: server.metric("gan_key_images_in_flight", key="bob") > 0)
        server.wait_for(lambda: departures() > before)


@pytest.fixture(scope="module")
def scraped(
    prometheus: type[Prometheus],
    tiny_settings: Callable[..., Settings],
    tiny_bundles: dict[str, Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Prometheus, float]]:
    """A Prometheus, and when it had seen a service at work."""
    folder = tmp_path_factory.mktemp("prometheus")
    keys, rules = folder / "keys", folder / "rules.yml"
    keys.write_text("alice of-alice\nbob of-bob\n")
    firing = {"alert": "GanServiceTest", "expr": 'up{job="gan-service"} == 1'}
    rules.write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": [firing]}]}))
    settings = tiny_settings(
        api_keys_file=keys,
        admin_keys="of-the-operator",
        **({"scored_share": 1.0} if "scored_share" in Settings.model_fields else {}),
    )
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        LiveServer(settings).running() as server,
        prometheus(folder, [server.port], [rules]).running() as one,
    ):
        for _ in range(2):  # a counter that is new has no rate yet
            put_to_work(server, tiny_bundles["tiny"].version, monkeypatch)
            now = one.scrape()
        yield one, now


@pytest.mark.slow
@pytest.mark.parametrize("place", QUERIES)
def test_every_query_finds_data(place: str, scraped: tuple[Prometheus, float]) -> None:
    """Prometheus can parse each, and none of its values is NaN or infinite."""
    prometheus, now = scraped
    found = prometheus.query(filled_in(QUERIES[place]), now)
    assert bool(found) is (place not in EMPTY)
    assert all(math.isfinite(value) for _, value in found)


@pytest.mark.slow
def test_the_variables_find_their_values(scraped: tuple[Prometheus, float], tiny_bundles: dict[str, Bundle]) -> None:
    """Instances that are scraped, and bundles that are in memory."""
    prometheus, _ = scraped
    found = {}
    for name, query in CHOICES.items():
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match
        found[name] = prometheus.get(f"/label/{match[2]}/values", **{"match[]": filled_in(match[1])})
    (instance,) = found["instance"]
    assert instance.startswith("127.0.0.1:")
    assert set(found["bundle"]) == set(tiny_bundles)


@pytest.mark.slow
def test_only_the_chosen_is_shown(scraped: tuple[Prometheus, float]) -> None:
    """Grafana writes several values as (a|b)."""
    prometheus, now = scraped
    chosen = prometheus.query(filled_in(QUERIES["In memory A"], bundle="(tiny|rgb)"), now)
    assert {labels["bundle"] for labels, _ in chosen} == {"tiny", "rgb"}
    assert not prometheus.query(filled_in(QUERIES["Requests A"], instance="(another)"), now)


@pytest.mark.slow
def test_nothing_is_divided_by_zero_where_nothing_happens(scraped: tuple[Prometheus, float]) -> None:
    """In a window without a request, panels show zeros and gaps."""
    prometheus, _ = scraped
    idle = prometheus.scrape(seconds=2.5)
    for query in QUERIES.values():
        assert all(math.isfinite(value) for _, value in prometheus.query(filled_in(query, window="2s"), idle))
