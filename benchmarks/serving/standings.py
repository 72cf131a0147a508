"""The results of a comparison: medians and their spread, ratios, the tables, and which targets are met."""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from benchmarks.serving.contenders import KINDS
from benchmarks.tools.report import Check

OURS, WORKERS, UNOBSERVED = "ours", "ours, more workers", "unobserved"
STATIC, LIMIT = "static bytes", "limit"
START, MEMORY = "start", "memory"  # beside the loads
NOTHING = "–"  # in a cell
PAGE_WIDTH = 120
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NEW_PAGE = f"""# Performance

`make bench` measures the service beside other servers that do the same work and writes the table.

{BEGIN}
{END}
"""


FIGURES = (
    "Each cell: median (least…most) ×ratio to the service's. The knee is the highest rate at which 99 of 100 attempts "
    "are answered within 100 ms."
)


class Load(NamedTuple):
    """What clients do. `connections` is None for the open loop."""

    name: str
    says: str
    kind: str  # of contenders.KINDS
    connections: int | None

    @property
    def rows(self) -> int:
        """Images in one reply, or in one request to /discriminate."""
        return KINDS[self.kind]

    @property
    def unit(self) -> str:
        """What is counted."""
        return "requests/s" if self.rows == 1 else "rows/s" if self.kind.startswith("judge") else "images/s"


LOADS = (
    Load("png-1", "`count=1` PNG, 1 connection", "png", 1),
    Load("png-8", "`count=1` PNG, 8 connections", "png", 8),
    Load("png-64", "`count=1` PNG, 64 connections", "png", 64),
    Load("png-256", "`count=1` PNG, 256 connections", "png", 256),
    Load("png-open", "`count=1` PNG, open loop, at the knee", "png", None),
    Load("grid-8", "`count=64` PNG grid, 8 connections", "grid", 8),
    Load("json-8", "`count=64` JSON, 8 connections", "json", 8),
    Load("few-1", "`count=16` npy, 1 connection", "few", 1),
    Load("npy-2", "`count=1024` npy, 2 connections", "npy", 2),
    Load("judge-png-8", "`/discriminate`, one PNG, 8 connections", "judge png", 8),
    Load("judge-npy-8", "`/discriminate`, 256 rows npy, 8 connections", "judge npy", 8),
)


class Spread(NamedTuple):
    """A measurement over the rounds."""

    median: float
    least: float
    most: float


class Place(NamedTuple):
    """One measurement: whose, under which load, and of what."""

    server: str
    load: str
    what: str = "per_s"


# The columns of the table that a reader takes in at once; whoever is not in it is in the full one.
SUMMARY = {
    "a lone client's p50, ms": Place("", "png-1", "p50_ms"),
    "one image a request: requests/s": Place("", "png-64"),
    "p99, ms": Place("", "png-64", "p99_ms"),
    "64 in a picture: images/s": Place("", "grid-8"),
    "256 to judge: rows/s": Place("", "judge-npy-8"),
    "memory, MiB": Place("", MEMORY, "mib"),
}
NOT_IN_SUMMARY = {UNOBSERVED, STATIC}


class Results:
    """All that was measured, and what could not be.

    Attributes:
        titles: The servers that take part, by name, as tables call them.
        absent: Servers that could not be started, or could not go on, and why.
        faults: Loads that a server answered wrongly, and how.
        tunings: How servers that were tuned are run.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.titles = {**titles, LIMIT: "limit"}
        self.absent: dict[str, str] = {}
        self.faults: dict[tuple[str, str], str] = {}
        self.tunings: dict[str, str] = {}
        self._values: defaultdict[Place, list[float]] = defaultdict(list)

    def note(self, server: str, load: str, **values: float) -> None:
        """What one round gave."""
        for what, value in values.items():
            self._values[Place(server, load, what)].append(value)

    def values(self, place: Place) -> list[float]:
        """Round by round."""
        return self._values.get(place, [])

    def spread(self, place: Place) -> Spread | None:
        """Over the rounds; None where there is nothing."""
        values = self.values(place)
        return Spread(statistics.median(values), min(values), max(values)) if values else None

    def ratio(self, place: Place) -> float | None:
        """Its median over that of the service."""
        mine, theirs = self.spread(place._replace(server=OURS)), self.spread(place)
        return theirs.median / mine.median if mine and theirs and mine.median else None

    def facts(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Server, load, measurement: median, least and most."""
        told: dict[str, dict[str, dict[str, list[float]]]] = {}
        for place in self._values:
            figures = [float(f"{value:.4g}") for value in self.spread(place) or ()]
            told.setdefault(place.server, {}).setdefault(place.load, {})[place.what] = figures
        return told


class Target(NamedTuple):
    """What a measurement is to be: at least, or at most, `factor` of another, or `factor` itself."""

    wanted: str
    place: Place
    factor: float
    than: Place | None
    at_least: bool = True


def _least(wanted: str, load: str, factor: float, server: str, whose: str = WORKERS) -> Target:
    """For throughput: peers keep the number of workers that is best here, and so do we."""
    return Target(wanted, Place(whose, load), factor, Place(server, load))


def _most(wanted: str, load: str, factor: float, server: str) -> Target:
    """For the p50 of a lone client, who meets the default number of workers."""
    mine, theirs = (Place(whose, load, "p50_ms") for whose in (WORKERS, server))
    return Target(wanted, mine, factor, theirs, at_least=False)


PEERS = ("mosec", "Triton", "LitServe", "BentoML", "Ray Serve", "plain FastAPI", "FastAPI, onnxruntime")
TARGETS = (
    _least("count=1, 64 connections: >= 1.25 x mosec", "png-64", 1.25, "mosec"),
    _least("count=1, 64 connections: >= 3.5 x Triton", "png-64", 3.5, "Triton"),
    _least("count=1, 64 connections: >= 7 x LitServe", "png-64", 7, "LitServe"),
    _least("count=1, 64 connections: >= 0.4 x the machine's limit", "png-64", 0.4, LIMIT),
    _most("count=1, 1 connection: p50 <= 0.7 x plain FastAPI's", "png-1", 0.7, "plain FastAPI"),
    _most("count=1, 1 connection: p50 <= 0.9 x FastAPI's with onnxruntime", "png-1", 0.9, "FastAPI, onnxruntime"),
    _most("count=16 npy, 1 connection: p50 <= FastAPI's with onnxruntime", "few-1", 1, "FastAPI, onnxruntime"),
    _least("count=64 PNG grid: >= 0.8 x model and encoder alone", "grid-8", 0.8, LIMIT),
    *(_least(f"count=64 PNG grid: >= {peer}", "grid-8", 1, peer) for peer in PEERS if peer != "Triton"),
    _least("count=1024 npy: >= 0.9 x the model alone", "npy-2", 0.9, LIMIT),
    _least("/discriminate, 256 rows: >= 0.85 x the model alone", "judge-npy-8", 0.85, LIMIT),
    _least("count=1, 64 connections: >= 0.92 x without metrics and log", "png-64", 0.92, UNOBSERVED, OURS),
    Target(
        "start to ready <= 1.3 x imports, reading and warming",
        Place(OURS, START, "s"),
        1.3,
        Place(LIMIT, START, "s"),
        at_least=False,
    ),
    Target("resident above a bare import <= 120 MiB", Place(OURS, MEMORY, "above_mib"), 120, than=None, at_least=False),
)


def judge(results: Results) -> list[Check]:
    """Each target whose servers take part, beside what was seen. What could not be measured is not met."""
    checks = []
    for target in TARGETS:
        places = [place for place in (target.place, target.than) if place is not None]
        if any(place.server not in results.titles for place in places):
            continue
        spreads = [results.spread(place) for place in places]
        if reasons := [_why_not(results, place) for place, spread in zip(places, spreads, strict=True) if not spread]:
            if any(reasons):  # else its load was not asked for
                checks.append(Check(target.wanted, "; ".join(filter(None, reasons)), met=False))
            continue
        checks.append(_compare(target, [spread.median for spread in spreads if spread]))
    return checks


def _why_not(results: Results, place: Place) -> str:
    reason = results.absent.get(place.server) or results.faults.get((place.server, place.load))
    return f"{place.server}: {reason}" if reason else ""


def _compare(target: Target, medians: Sequence[float]) -> Check:
    mine, *other = medians
    seen = mine / other[0] if other else mine
    met = seen >= target.factor if target.at_least else seen <= target.factor
    told = f"{seen:.3g} x ({number(mine)} and {number(other[0])})" if other else number(seen)
    return Check(target.wanted, told, met)


def number(value: float) -> str:
    """Three or more figures, thousands by commas."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def lines(results: Results, loads: Iterable[Load]) -> list[dict[str, object]]:
    """The table for a terminal: a line for each load and server, and one for each server that is absent."""
    made: list[dict[str, object]] = []
    for load in loads:
        for server, title in results.titles.items():
            place = Place(server, load.name)
            line: dict[str, object] = {"load": load.name, "server": title}
            if (spread := results.spread(place)) is not None:
                line |= {"": load.unit, "median": number(spread.median)}
                line |= {"least": number(spread.least), "most": number(spread.most)}
                line |= {"of ours": number(ratio) if (ratio := results.ratio(place)) is not None else ""}
                for what in ("p50_ms", "p99_ms", "reply_bytes", "cpu_us", "failed"):
                    if (more := results.spread(place._replace(what=what))) is not None:
                        line[what] = number(more.median)
                made.append(line)
            if fault := results.faults.get((server, load.name)):
                made.append(line | {"remark": fault})
    made += [{"server": results.titles[server], "remark": f"failed: {why}"} for server, why in results.absent.items()]
    return made


def page_text(results: Results, loads: Sequence[Load], remarks: Mapping[str, str], conditions: str) -> str:
    """The page's part between its marks: a table that a reader takes in at once, and folded, all the rest."""
    figures = f"{fill(FIGURES, PAGE_WIDTH)}\n\n{full_table(results, loads)}"
    targets = [["target", "seen", ""]] + [
        [check.wanted, check.seen, "met" if check.met else "**not met**"] for check in judge(results)
    ]
    return "\n\n".join(
        [
            fill(conditions, PAGE_WIDTH),
            summary(results),
            _folded("Every load, and the spread of the rounds", figures),
            _folded("The servers", notes(results, remarks)),
            _folded("Targets", _markdown(targets)),
        ]
    )


def summary(results: Results) -> str:
    """A line for each server, with medians."""
    rows = [
        [_title(results, server), *(_median(results, place._replace(server=server)) for place in SUMMARY.values())]
        for server in results.titles
        if server not in NOT_IN_SUMMARY
    ]
    return _markdown([["", *SUMMARY], *rows])


def full_table(results: Results, loads: Iterable[Load]) -> str:
    """A line for each measurement, a column for each server."""
    servers = [server for server in results.titles if server != UNOBSERVED]
    rows = []
    for load in loads:
        rows.append(_row(results, f"{load.says}: {load.unit}", servers, Place("", load.name)))
        if load.connections in {1, None}:
            rows.append(_row(results, "its p50, ms", servers, Place("", load.name, "p50_ms")))
        if load.connections in {64, None}:
            rows.append(_row(results, "its p99, ms", servers, Place("", load.name, "p99_ms")))
    seen = set()
    for load in loads:
        if load.kind not in seen and load.connections is not None:
            seen.add(load.kind)
            says = re.sub(r", \d+ connections?", "", load.says)
            rows.append(
                _row(results, f"{says}: bytes of a reply, heads included", servers, Place("", load.name, "reply_bytes"))
            )
    rows.append(_row(results, "resident memory after all this, MiB", servers, Place("", MEMORY, "mib")))
    rows.append(_row(results, "start to the first answer, s", servers, Place("", START, "s")))
    heads = ["", *(_title(results, server) for server in servers)]
    return _markdown([heads, *(row for row in rows if {*row[1:]} != {NOTHING})])


def notes(results: Results, remarks: Mapping[str, str]) -> str:
    """What there is to say about each server, and what failed."""
    told = {server: "; ".join(filter(None, [says, results.tunings.get(server)])) for server, says in remarks.items()}
    lines = [f"- {results.titles[server]}: {says}." for server, says in told.items() if says]
    lines += [f"- {results.titles[server]} failed: {why}" for server, why in results.absent.items()]
    lines += [f"- {results.titles[server]}, {load}: {why}" for (server, load), why in results.faults.items()]
    return "\n".join(lines)


def _title(results: Results, server: str) -> str:
    return results.titles[server] + (": failed" if server in results.absent else "")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    heads, *others = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *others])


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def _median(results: Results, place: Place) -> str:
    spread = results.spread(place)
    return NOTHING if spread is None else number(spread.median)


def _row(results: Results, says: str, servers: Iterable[str], place: Place) -> list[str]:
    return [says, *(_cell(results, place._replace(server=server)) for server in servers)]


def _cell(results: Results, place: Place) -> str:
    """Median, least … most, and the ratio to the service's; a dash where nothing was measured."""
    spread, ratio = results.spread(place), results.ratio(place)
    if spread is None:
        return NOTHING
    told = number(spread.median)
    if spread.least != spread.most and place.what != "reply_bytes":
        told += f" ({number(spread.least)}…{number(spread.most)})"
    return told if ratio is None or place.server == OURS else f"{told} ×{ratio:.2f}"


def write_page(path: Path, text: str) -> None:
    """Put a text between the page's two marks; a page that is not there is made.

    Raises:
        ValueError: The page has no such marks.
    """
    page = path.read_text("utf-8") if path.exists() else NEW_PAGE
    if BEGIN not in page or END not in page.partition(BEGIN)[2]:
        raise ValueError(f"{path.name}: no {BEGIN} … {END}")
    before, _, rest = page.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")
