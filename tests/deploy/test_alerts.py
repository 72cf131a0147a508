"""The alerts fire when they should and at no other time, and each leads to its section of the runbook."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from service.app import work_routes
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import Settings
from tests.test_docs import DOCS, anchors

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
ALERTMANAGER = ROOT / "deploy/alertmanager/alertmanager.yml"
ALL_RULES = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in ALL_RULES if "alert" in rule}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def of(name: str, **labels: str) -> str:
    """A series of the one instance."""
    pairs = {"job": "gan-service", "instance": "a"} | labels
    return name + "{" + ", ".join(f'{label}="{value}"' for label, value in pairs.items()) + "}"


def requests(status: int, route: str = "/sample") -> str:
    """The series of the requests that ended so."""
    return of("gan_requests_total", route=route, status=str(status))


def judged(below: str) -> str:
    """The series of drawn images that D finds less probable than this."""
    name = "gan_discriminator_probability_bucket"
    return of(name, bundle="mnist", version="0123456789ab", origin="sampled", le=below)


UP, READY, STARTED = of("up"), of("gan_ready"), of("process_start_time_seconds")
MEMORY = of("process_resident_memory_bytes")
AGE = of("gan_queue_oldest_age_seconds", device="cpu")
PROGRESS = of("gan_engine_last_progress_timestamp_seconds", device="cpu")
FULL = of("gan_rejected_total", route="/sample", reason="queue_full")
OUT_OF_MEMORY, LINES = of("gan_out_of_memory_total"), of("gan_log_lines_dropped_total")
REFUSED = of("gan_bundle_swaps_total", bundle="mnist", result="refused")
JUDGED = of("gan_discriminator_probability_count", bundle="mnist", version="0123456789ab", origin="sampled")

# Values in promtool's words: `0+5x10` is 0, 5, 10 … 50, `_` none. The service answers 20 requests a second, while
# clients make mistakes, pass their limits and leave, and a probe fails.
WELL = {
    UP: "1x500",
    READY: "1x500",
    STARTED: "-14400x500",
    MEMORY: "4e8x500",
    requests(200): "0+300x500",
    requests(422): "0+300x500",
    requests(499): "0+150x500",
    requests(501): "0+15x500",
    requests(429): "0+150x500",
    of("gan_rejected_total", route="/sample", reason="rate_limited"): "0+150x500",
    requests(503, "/readyz"): "0+3x500",
    AGE: "0x500",
    PROGRESS: "0+15x500",
    OUT_OF_MEMORY: "3x500",
    LINES: "7x500",
    of("gan_bundle_swaps_total", bundle="mnist", result="loaded"): "1x500",
}
# The judgements of drawn images, and how many of them are less probable than ½.
JUDGEMENTS = {judged("0.5"): "0+40x500", judged("+Inf"): "0+80x500", JUDGED: "0+80x500"}
BURN14, BURN6, BURN1 = (f"GanServiceErrorBudgetBurn{n}x" for n in (14, 6, 1))


class Case(NamedTuple):
    """What differs from a service that is well, and which alerts fire when; a value comes every `step`."""

    story: str
    series: Mapping[str, str]
    fires: Mapping[str, set[str]]
    step: str = "15s"


# The short ones go wrong after ten minutes, 40 values; the objective's after an hour, 240.
CASES = [
    Case("all is well", {}, {"1m": set(), "30m": set()}),
    Case("all is well for hours", JUDGEMENTS, {"6h": set()}, "1m"),
    Case(
        "every request fails",
        {requests(200): "0+300x240 72000x60", requests(500): "0x240 0+300x60"},
        {"60m": set(), "62m": {BURN14, BURN6, BURN1}},  # 14.4 x 0.1 % of an hour are 52 s
    ),
    Case(
        "every request is refused, as the queue is full",
        {requests(200): "0+300x240 72000x60", requests(429): "0+150x240 36000+450x60", FULL: "0x240 0+300x60"},
        {"60m": set(), "62m": {BURN14, BURN6, BURN1}, "72m": {BURN14, BURN6, BURN1, "GanServiceRejecting"}},
    ),
    Case(
        "two of a hundred fail for an hour, then all is well",
        {requests(504): "0+6x240 1440x60"},
        {"58m": {BURN14, BURN6, BURN1}, "68m": {BURN6, BURN1}},  # the short window has ended the first
    ),
    Case("one of a hundred fails", {requests(500): "0+3x240"}, {"59m": {BURN6, BURN1}}),
    Case("three of a thousand fail", {requests(500): "0+1x240"}, {"1m": set(), "59m": {BURN1}}),
    Case("fewer than one of a thousand fail", {requests(500): "0x40 7x200"}, {"30m": set(), "59m": set()}),
    Case(
        "two refusals in a hundred, for five minutes",
        {FULL: "0x40 0+6x20 120x60"},
        {"10m": set(), "15m": {BURN1}, "24m": {BURN1}},
    ),
    Case(
        "nine requests fail, and no other comes",
        {requests(200): "_", requests(500): "0x3 1x3 2x3 3x3 4x3 5x3 6x3 7x3 8x3 9x100"},
        {"9m": set(), "12m": set()},
    ),
    Case(
        "ten requests fail, and no other comes",
        {requests(200): "_", requests(500): "0x3 1x3 2x3 3x3 4x3 5x3 6x3 7x3 8x3 9x3 10.1x100"},
        {"9m": set(), "12m": {BURN14, BURN6, BURN1}},
    ),
    Case("nothing answers", {UP: "1x40 0x10 1x60"}, {"10m45s": set(), "12m": {"GanServiceDown"}, "14m": set()}),
    Case("there is nothing to ask", {UP: "_"}, {"45s": set(), "2m": {"GanServiceDown"}}),
    Case("every other scrape fails", {UP: "1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1"}, {"1m": set(), "4m": set()}),
    Case(
        "it is started anew",
        {STARTED: "-14400x40 600x100"},
        {"10m": set(), "10m15s": {"GanServiceRestarted"}, "26m": set()},
    ),
    Case("it gets ready within a minute", {READY: "0x4 1x40"}, {"1m": set(), "3m": set()}),
    Case("it does not get ready", {READY: "1x40 0x20 1x60"}, {"11m": set(), "13m": {"GanServiceNotReady"}}),
    Case(
        "the engine stops, and 40 s later the process",
        {AGE: "0x40 5 20 35 0x100", PROGRESS: "0+15x40 600x3 660+15x100"},
        {"10m15s": set(), "10m45s": {"GanServiceEngineStuck"}, "14m": {"GanServiceEngineStuck"}, "17m": set()},
    ),
    Case(
        "the engine of one of two workers stops",
        {AGE: "0x40 5 20 35 0x100", READY: "1x41 0x2 1x100"},
        {"10m15s": set(), "10m45s": {"GanServiceEngineStuck"}},
    ),
    Case("an image comes after a long rest", {AGE: "0x40 0.1 0x100", PROGRESS: "0x140"}, {"10m15s": set()}),
    Case(
        "the queue is long, and the engine works",
        {AGE: "0x40 16x40 0x40"},
        {"14m": set(), "16m": {"GanServiceQueueOld"}, "22m": set()},
    ),
    Case("half of the deadline is not reached", {AGE: "14x100"}, {"20m": set()}),
    Case(
        "a batch finds no memory",
        {OUT_OF_MEMORY: "3x40 4x100"},
        {"10m": set(), "11m": {"GanServiceOutOfMemory"}, "26m": set()},
    ),
    Case(
        "a bundle is refused for the first time",
        {REFUSED: "_x40 1x100"},
        {"9m": set(), "11m": {"GanServiceBundleRefused"}, "26m": set()},
    ),
    Case(
        "a bundle is refused again",
        {REFUSED: "1x70 2x100"},
        {"17m": set(), "18m": {"GanServiceBundleRefused"}, "34m": set()},
    ),
    Case("lines are lost", {LINES: "7x40 9x100"}, {"10m": set(), "11m": {"GanServiceLogLinesDropped"}, "26m": set()}),
    Case(
        "memory grows by 20 MiB an hour",
        {MEMORY: "4e8+349525x500"},
        {"4h": set(), "6h": {"GanServiceMemoryGrowing"}},
        "1m",
    ),
    Case("memory grows by 10 MiB an hour", {MEMORY: "4e8+174763x500"}, {"6h": set()}, "1m"),
    Case(
        "memory has peaks, and one more bundle comes into it",
        {MEMORY: " ".join(["4e8x30 9e8x7"] * 3 + ["7e8x30 9e8x7"] * 9)},
        {"2h": set(), "4h": set(), "6h": set()},
        "1m",
    ),
    Case(
        "D finds three quarters of the images improbable, no longer half",
        {**JUDGEMENTS, judged("0.5"): "0+40x240 9600+60x200"},
        {"4h": set(), "4h30m": set(), "6h": {"GanServiceDrift"}},
        "1m",
    ),
    Case("D's judgements move a little", {**JUDGEMENTS, judged("0.5"): "0+40x240 9600+50x200"}, {"6h": set()}, "1m"),
    Case(
        "D's judgements move, and there are few",
        {judged("0.5"): "0+1x240 240+2x200", judged("+Inf"): "0+2x440", JUDGED: "0+2x440"},
        {"6h": set()},
        "1m",
    ),
]


@pytest.mark.slow
@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.story)
def test_the_alerts_that_fire(case: Case, tmp_path: Path) -> None:
    """These at these times, and no others."""
    moments = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": time,
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)],
        }
        for time, alerts in case.fires.items()
    ]
    series = [{"series": name, "values": values} for name, values in {**WELL, **case.series}.items()]
    test = {"interval": case.step, "input_series": series, "promql_expr_test": moments}
    path = tmp_path / "test.yml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": case.step, "tests": [test]}))
    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_nearly_does() -> None:
    """A case names all that fire, so it is a quiet one for the others."""
    fired = {alert for case in CASES for alerts in case.fires.values() for alert in alerts}
    assert fired == set(ALERTS)


@needs_promtool
def test_prometheus_accepts_the_rules() -> None:
    """Its own checker reads expressions and templates, and finds no rule twice."""
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
def test_alertmanager_accepts_its_configuration() -> None:
    """Its own checker reads the file that the container mounts."""
    subprocess.run(["amtool", "check-config", ALERTMANAGER], check=True, capture_output=True)


def test_alertmanager_knows_the_alerts_that_its_rules_name() -> None:
    """Every alert is routed by its severity, and what inhibits and is inhibited exists."""
    settings = yaml.safe_load(ALERTMANAGER.read_text())
    assert {rule["labels"]["severity"] for rule in ALERTS.values()} == {"page", "ticket"}
    assert {one["name"] for one in settings["receivers"]} == {"page", "ticket"}
    for rule in settings["inhibit_rules"]:
        for matchers in (rule["source_matchers"], rule["target_matchers"]):
            [pattern] = re.findall(r'alertname=~?"(.*)"', " ".join(matchers))
            assert any(re.fullmatch(pattern, name) for name in ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_leads_to_its_section_of_the_runbook(name: str) -> None:
    """The address ends in the anchor that GitHub gives the heading."""
    page, _, anchor = ALERTS[name]["annotations"]["runbook_url"].rpartition("#")
    assert page.endswith("docs/operations.md")
    assert anchor == name.lower()
    assert anchor in anchors(DOCS / "operations.md")


def test_the_rules_read_only_series_that_there_are() -> None:
    """A rule that asks for another name never fires, and nobody is told."""
    declared = Metrics(CollectorRegistry())
    families = {family.name for family in declared.registry.collect()} | {"up"}
    recorded = {rule["record"] for rule in ALL_RULES if "record" in rule}
    for rule in ALL_RULES:
        for name in re.findall(r"\b(?:gan|process)_\w+(?![\w:])|\w+:\w+:\w+", rule["expr"]):
            assert name in recorded or name in families or re.sub(r"_(total|bucket|count)$", "", name) in families, name


def test_the_objective_counts_the_routes_that_need_the_engine(app: FastAPI) -> None:
    """Those and no others, wherever a rule names them."""
    routes = set(app.openapi()["paths"])
    work = set(work_routes(Settings()))
    assert work <= routes
    patterns = {pattern for rule in ALL_RULES for pattern in re.findall(r'route=~"([^"]*)"', rule["expr"])}
    [pattern] = patterns
    assert {route for route in routes if re.fullmatch(pattern, route)} == work


def test_the_objective_counts_a_full_queue_and_no_other_refusal_with_429() -> None:
    """A key that passes its own limit spends nobody's budget."""

    def kinds(error: type[ServiceError]) -> set[type[ServiceError]]:
        return {error}.union(*(kinds(kind) for kind in error.__subclasses__()))

    reasons = {kind.rejection for kind in kinds(ServiceError) if getattr(kind, "status", None) == 429}
    assert "queue_full" in reasons
    assert reasons <= {"queue_full", "rate_limited"}


def test_half_of_the_deadline_is_half_of_the_deadline() -> None:
    """The rule has the default's half; a service with another deadline needs another rule."""
    [limit] = re.findall(r"> (\d+)$", ALERTS["GanServiceQueueOld"]["expr"])
    assert float(limit) == Settings.model_fields["deadline_s"].default / 2
