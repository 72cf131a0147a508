"""The dashboard, a row of panels for each question of an operator: `make docs` writes its JSON, which Grafana reads.

Names and labels come from `service.metrics`: a panel that asks for what is not exported can't be made.
"""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import AnnotationQuery, Dashboard, DatasourceVariable, QueryVariable, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.units import (
    BytesIEC,
    BytesPerSecondIEC,
    PercentUnit,
    RequestsPerSecond,
    Seconds,
    Short,
)

from deploy.grafana.panels import (
    BATCHES_PER_SECOND,
    IMAGES_PER_SECOND,
    SOURCE,
    Panel,
    buckets,
    line,
    number,
    rows,
    states,
)
from deploy.grafana.queries import JOB, mean, or_zero, quantile, rate, ratio, series, total

FILE = Path(__file__).parent / "dashboards" / "gan-service.json"
FIRING = 'ALERTS{alertname=~"GanService.*", alertstate="firing"}'  # some are about all instances together
PLAIN = [(0, "blue")]
GREEN_FROM_ONE = [(0, "red"), (1, "green")]
PERCENTILES = (50, 95, 99)
SCORES_STEP = "2m"  # few images are scored: shorter steps would show noise


def glance() -> list[Panel]:
    """Is it up and well, and how much is asked of it."""
    up = f'up{{job="{JOB}", instance=~"$instance"}}'
    requests = rate("gan_requests_total")
    return [
        number(
            "Answers the scrape",
            "Instances that Prometheus reaches, of those it knows.",
            PercentUnit,
            f"avg({up})",
            GREEN_FROM_ONE,
        ),
        number(
            "Ready",
            "Instances that can take work: warmed up, not draining, no device error.",
            PercentUnit,
            f"avg({series('gan_ready')})",
            GREEN_FROM_ONE,
        ),
        number(
            "Alerts",
            "Alerts that fire, of all instances.",
            Short,
            or_zero(f"count({FIRING})"),
            [(0, "green"), (1, "red")],
        ),
        number("Requests", "Without probes and scrapes.", RequestsPerSecond, requests, PLAIN),
        number(
            "Server errors",
            "Requests answered with 5xx, of all.",
            PercentUnit,
            ratio(_with_status("5.."), requests),
            [(0, "green"), (0.001, "orange"), (0.01, "red")],
        ),
        number(
            "p95 latency",
            "From a request's head to the last byte of its reply.",
            Seconds,
            quantile(0.95, "gan_request_duration_seconds"),
            PLAIN,
        ),
        number(
            "Images",
            "Images drawn and judged, without padding.",
            IMAGES_PER_SECOND,
            rate("gan_batch_images_sum"),
            PLAIN,
        ),
        number(
            "Engine at work",
            "The part of their time in which its threads compute.",
            PercentUnit,
            _at_work(),
            [(0, "green"), (0.8, "orange"), (0.95, "red")],
        ),
    ]


def traffic() -> list[Panel]:
    """Who asks for what, and what they get."""
    requests = rate("gan_requests_total")
    failed = {"5xx": _with_status("5.."), "429": _with_status("429"), "other 4xx": _with_status("4..", "429|499")}
    return [
        line(
            "Requests by route and status",
            "Who asks for what, and what do they get?",
            RequestsPerSecond,
            {"{{route}} {{status}}": rate("gan_requests_total", "route, status")},
            stacked=True,
        ),
        line(
            "Share that failed",
            "Is it us (5xx), too much at a time (429), or the client (other 4xx)?",
            PercentUnit,
            {legend: ratio(query, requests) for legend, query in failed.items()},
        ),
        line(
            "Refused, by reason",
            "Why were requests turned away?",
            RequestsPerSecond,
            {"{{reason}}": rate("gan_rejected_total", "reason")},
            stacked=True,
        ),
        line(
            "In flight",
            "How many are being answered?",
            Short,
            {"{{route}}": total("gan_requests_in_flight", "route")},
            stacked=True,
        ),
        line(
            "Clients that left",
            "How much is given up, and how much of it is computed all the same (running)?",
            RequestsPerSecond,
            {"{{phase}}": rate("gan_cancelled_total", "phase")},
        ),
        line(
            "Bytes",
            "How much is read and sent?",
            BytesPerSecondIEC,
            {"read": rate("gan_request_bytes_sum"), "sent": rate("gan_response_bytes_sum")},
        ),
    ]


def latency() -> list[Panel]:
    """Which route is slow, and for how many."""
    return [
        line(
            f"p{percent} by route",
            f"In what time are {percent} % of requests answered, whatever the answer is?",
            Seconds,
            {"{{route}}": quantile(percent / 100, "gan_request_duration_seconds", "route")},
        )
        for percent in PERCENTILES
    ]


def time_split() -> list[Panel]:
    """Where a request's time goes."""
    steps = {"decode": "decode", "queue": "queue_wait", "compute": "compute", "encode": "encode"}
    return [
        line(
            "Where the time goes",
            "How long are one decoding, one wait, one engine call and one encoding, on average?",
            Seconds,
            {legend: mean(f"gan_{step}_seconds") for legend, step in steps.items()},
            stacked=True,
        ),
        line(
            "Engine calls, p95",
            "How long does a batch take?",
            Seconds,
            {"{{bundle}} {{operation}}": quantile(0.95, "gan_compute_seconds", "bundle, operation")},
        ),
        line(
            "Encoding, p95",
            "Which format takes long?",
            Seconds,
            {"{{format}}": quantile(0.95, "gan_encode_seconds", "format")},
        ),
        line("Decoding", "How long do uploads take before they can wait?", Seconds, _quantiles("gan_decode_seconds")),
    ]


def batching() -> list[Panel]:
    """Whether requests share batches."""
    padding, images = rate("gan_batch_padding_images_total", "operation"), rate("gan_batch_images_sum", "operation")
    return [
        buckets(
            "Images in a batch",
            "Do requests share batches? Batches a second, by how many images are in them.",
            BATCHES_PER_SECOND,
            rate("gan_batch_images_bucket", "le"),
        ),
        line(
            "Batches, by why they closed",
            "Is the engine the limit (full), does it wait for work (idle), or are batches held open (window)?",
            BATCHES_PER_SECOND,
            {"{{closed_by}}": rate("gan_batches_total", "closed_by")},
            stacked=True,
        ),
        line(
            "Padding",
            "Which part of what is computed only fills a batch's fixed size?",
            PercentUnit,
            {"{{operation}}": ratio(padding, f"{padding} + {images}")},
        ),
    ]


def queue() -> list[Panel]:
    """Whether there is more work than can be done."""
    place = "{{instance}} {{device}}"
    return [
        line(
            "Images waiting, of the room there is",
            "How near is the next 429?",
            Short,
            {f"waiting, {place}": series("gan_queue_images"), f"room, {place}": series("gan_queue_capacity_images")},
        ),
        line(
            "Requests waiting",
            "Do many small ones wait, or a few large ones?",
            Short,
            {place: series("gan_queue_requests")},
        ),
        line(
            "Oldest in the queue",
            "Does the queue move? Above half the deadline, answers will come too late.",
            Seconds,
            {place: series("gan_queue_oldest_age_seconds")},
        ),
        line(
            "Wait in the queue",
            "How long is it from a request's arrival to its first batch?",
            Seconds,
            _quantiles("gan_queue_wait_seconds"),
        ),
    ]


def engine() -> list[Panel]:
    """Whether the engine works, at which share of what it can, and whether memory is flat."""
    progress = series("gan_engine_last_progress_timestamp_seconds")
    return [
        line(
            "Engine at work, by instance",
            "How much more can be asked? At 100 % more load only makes the queue longer.",
            PercentUnit,
            {"{{instance}}": _at_work("instance")},
        ),
        line(
            "Images, by version",
            "What is computed, without padding?",
            IMAGES_PER_SECOND,
            {"{{bundle}}@{{version}} {{operation}}": rate("gan_images_total", "bundle, version, operation")},
            stacked=True,
        ),
        line(
            "Since the engine's last progress",
            "Is it busy or stuck? It grows while nothing is asked, too.",
            Seconds,
            {"{{instance}} {{device}}": f"time() - {progress}"},
        ),
        line(
            "Engine errors since the start",
            "What failed: single requests' rows, batches of several, memory, the device?",
            Short,
            {
                "{{kind}}": total("gan_engine_errors_total", "kind"),
                "batches without memory": total("gan_out_of_memory_total"),
            },
        ),
        line(
            "Device memory",
            "How much of a GPU's memory is used? Empty on a CPU.",
            BytesIEC,
            {"{{kind}}, {{instance}} {{device}}": series("gan_device_memory_bytes")},
        ),
        line(
            "Process memory",
            "Is it flat after warm-up, or does it grow?",
            BytesIEC,
            {"{{instance}}": series("process_resident_memory_bytes")},
        ),
        line(
            "Processors",
            "How many are kept busy?",
            Short,
            {"{{instance}}": rate("process_cpu_seconds_total", "instance")},
        ),
        line(
            "Log lines lost since the start",
            "Is the log complete?",
            Short,
            {"{{instance}}": series("gan_log_lines_dropped_total")},
        ),
    ]


def bundles() -> list[Panel]:
    """What is loaded, and whether it changed."""
    return [
        rows(
            "In memory",
            "Which version of which bundle is where?",
            series("gan_bundle_info"),
            ["instance", "bundle", "version", "device"],
        ),
        rows(
            "Releases",
            "Which version of the service, and of torch, runs where?",
            series("gan_build_info"),
            ["instance", "version", "torch"],
        ),
        states(
            "Ready, over time",
            "When was it ready, and when not?",
            series("gan_ready"),
            "{{instance}}",
            {"0": "no", "1": "yes"},
            GREEN_FROM_ONE,
        ),
        line(
            "Swaps since the start",
            "What came into memory, left it, or was refused?",
            Short,
            {"{{bundle}} {{result}}": total("gan_bundle_swaps_total", "bundle, result")},
        ),
        line(
            "Versions in memory",
            "How many versions of each bundle does an instance keep?",
            Short,
            {"{{bundle}}, {{instance}}": total("gan_bundle_info", "bundle, instance")},
        ),
        line(
            "Loading and warming",
            "How long did it take, for the version that was asked for last?",
            Seconds,
            {"{{bundle}}, {{instance}}": series("gan_warmup_seconds")},
        ),
    ]


def drift() -> list[Panel]:
    """Whether the discriminator sees other images than it used to."""
    scores, labels = "gan_discriminator_probability", "bundle, version, origin"
    legend = "{{bundle}}@{{version}} {{origin}}"
    return [
        line(
            "Mean probability of being real",
            "Does D think otherwise of what is drawn (sampled) or sent (uploaded)?",
            PercentUnit,
            {legend: mean(scores, labels)},
            at_least=SCORES_STEP,
        ),
        line(
            "Images scored",
            "From how many is that?",
            IMAGES_PER_SECOND,
            {legend: rate(f"{scores}_count", labels)},
            at_least=SCORES_STEP,
        ),
        *(
            buckets(
                f"Probabilities of {origin} images",
                "How are they distributed, between 0 and 1? Images a second.",
                IMAGES_PER_SECOND,
                rate(f"{scores}_bucket", "le", f'origin="{origin}"'),
                at_least=SCORES_STEP,
            )
            for origin in ("sampled", "uploaded")
        ),
    ]


def keys() -> list[Panel]:
    """Who asks for how much, by the names in the keys file."""
    return [
        line(
            "Images, by key",
            "Who has how much computed?",
            IMAGES_PER_SECOND,
            {"{{key}}": rate("gan_key_images_total", "key")},
            stacked=True,
        ),
        line(
            "Images in flight, by key",
            "Whose images wait or are being computed?",
            Short,
            {"{{key}}": total("gan_key_images_in_flight", "key")},
            stacked=True,
        ),
        line(
            "Refused, by key",
            "Who is turned away?",
            RequestsPerSecond,
            {"{{key}}": rate("gan_key_rejected_total", "key")},
            stacked=True,
        ),
    ]


# The panels of each row, and how many stand side by side.
ROWS: dict[str, tuple[Callable[[], list[Panel]], int]] = {
    "At a glance": (glance, 8),
    "Traffic and errors": (traffic, 3),
    "Latency by route": (latency, 3),
    "Where the time goes": (time_split, 4),
    "Batching": (batching, 3),
    "Queue": (queue, 4),
    "Engine, device and memory": (engine, 4),
    "Bundles and swaps": (bundles, 3),
    "Drift": (drift, 4),
    "Keys, by name": (keys, 3),
}


def _with_status(status: str, but: str = "") -> str:
    matchers = f'status=~"{status}"' + (f', status!~"{but}"' if but else "")
    return or_zero(rate("gan_requests_total", matchers=matchers))


def _quantiles(histogram: str) -> dict[str, str]:
    return {f"p{percent}": quantile(percent / 100, histogram) for percent in PERCENTILES}


def _at_work(by: str = "") -> str:
    return ratio(rate("gan_compute_seconds_sum", by), total("gan_engine_threads", by))


def variables() -> list[DatasourceVariable | QueryVariable]:
    """Which Prometheus, and of what it has all or some instances and bundles."""
    prometheus = (
        DatasourceVariable("datasource")
        .label("Prometheus")
        .type("prometheus")
        .current(VariableOption(text="Prometheus", value="gan-prometheus"))  # compose's; elsewhere the default one
    )
    instance = _choice("instance", "Instance", f'up{{job="{JOB}"}}')  # up, so that one that is down can be chosen
    return [prometheus, instance, _choice("bundle", "Bundle", series("gan_bundle_info", bundles=False))]


def _choice(label: str, title: str, query: str) -> QueryVariable:
    definition = f"label_values({query}, {label})"
    return (
        QueryVariable(label)
        .label(title)
        .datasource(SOURCE)
        .query({"qryType": 1, "query": definition, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
        .definition(definition)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all"))
    )


def annotations() -> list[AnnotationQuery]:
    """What happened at that moment, as marks in every panel."""
    swaps = series("gan_bundle_swaps_total")
    return [
        # A counter that is new has no growth yet, and counts from zero.
        _marks(
            "Swaps", "blue", "{{bundle}} {{result}}", f"{swaps} - ({swaps} offset $__rate_interval or 0 * {swaps}) > 0"
        ),
        _marks("Restarts", "orange", "started", f"1000 * {series('process_start_time_seconds')}").use_value_for_time(
            use_value_for_time=True
        ),
        _marks("Alerts", "red", "{{alertname}}", FIRING),
    ]


def _marks(name: str, colour: str, text: str, query: str) -> AnnotationQuery:
    return (
        AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(enable=True)
        .icon_color(colour)
        .title_format(name)
        .text_format(text)
        .tag_keys("instance")
        .target(Dataquery().ref_id("Anno").expr(query).range())
    )


def dashboard() -> Dashboard:
    """All of it, with ids and places in order."""
    board = (
        Dashboard("gan-service")
        .uid("gan-service")
        .description("Requests, queue, batches, engine and bundles of the image service.")
        .tags(["gan-service"])
        .editable()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
    )
    for variable in variables():
        board.with_variable(variable)
    for marks in annotations():
        board.annotation(marks)
    ids = count(1)
    for title, (panels, abreast) in ROWS.items():
        board.with_row(Row(title).id(next(ids)))
        for panel in panels():
            board.with_panel(panel.id(next(ids)).span(24 // abreast))
    return board


def as_json() -> str:
    """The dashboard as Grafana reads it."""
    return json.dumps(dashboard().build(), cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json())
