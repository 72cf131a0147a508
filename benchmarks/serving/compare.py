"""Measures the service beside other servers that do the same work, and beside what the machine can do.

    python -m benchmarks.serving.compare [--seconds 4] [--rounds 3] [--bundle mnist …] [--servers ours …]
                                         [--loads png-64 …] [--write]

First every peer is tried with one and with all threads and workers, and keeps what answers most requests for one image
over 64 connections. In each round every server is started in turn, asked for one reply of each kind, whose pixels are
compared with those that the weights give here, and put under every load. The full table has the rounds' median with the
least and the most, and its ratio to the service's; the first table has medians of what matters most. A server that
can't be started, or answers wrongly, has the reason in the table instead. Servers, clients and limits run on the same
processors.

Closed loops are wrk's. The open loop is our own client (tools/client.py), which counts from when a request was due.
Rates rise until more than one of a hundred attempts is not answered within 100 ms, lost ones included; the highest rate
before that is the knee. On two processors that it shares with a server of fixed bytes, that client offers up to 11,900
requests/s, with Python's garbage collector off; autocannon came to 11,300 over a fixed number of connections, locust to
5,400.
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import uvloop

from benchmarks.serving.contenders import (
    CORES,
    OK,
    ROWS,
    SEED,
    Contender,
    NotServing,
    Numbers,
    Server,
    Uploads,
    contenders,
    serving,
)
from benchmarks.serving.limits import Limits
from benchmarks.serving.standings import (
    LIMIT,
    LOADS,
    MEMORY,
    OURS,
    START,
    STATIC,
    UNOBSERVED,
    Load,
    Place,
    Results,
    judge,
    lines,
    page_text,
    write_page,
)
from benchmarks.tools import wrk
from benchmarks.tools.client import MAX_CONNECTIONS, Client, Exchange, Request, offer
from benchmarks.tools.process import ROOT, allow_connections
from benchmarks.tools.report import finish, machine, parser, table
from models.bundle import Bundle, read_bundle
from models.inference.fast_nets import Verdicts
from models.inference.pixels import to_pixels
from service.capacity.measure import no_garbage_collection

PAGE = ROOT / "docs" / "performance.md"
CHECKED_SEED, UPLOADED_SEED = 7, 8
LOGIT_TOLERANCE = 1e-3
WARM_S, TUNE_S = 1, 2
TUNED_AT = 64  # connections
SEEDS_APART = 10**8  # between two measurements, so that no request comes twice
UNOBSERVED_LOADS = {"png-64"}
RATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)  # of what the closed loop of 64 gave
IN_TIME_S, MOST_LATE = 0.1, 0.01
HANGS_S = 60
MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    loads: Sequence[Load]
    seconds: float
    bundles: Path
    bundle: Bundle


def expected(bundle: Bundle, uploads: Uploads) -> dict[str, Numbers]:
    """What each kind of request is to be answered with."""
    most = bundle.draw(1024, seed=CHECKED_SEED)
    unknown = None if bundle.manifest.labels is None else torch.full((len(uploads.images),), -1)
    logits = Verdicts(bundle.discriminator)(to_pixels(uploads.images), unknown)[:, 0].numpy()
    return {
        "png": most[:1],
        "few": most[:16],
        "grid": most[:64],
        "json": most[:64],
        "npy": most,
        "judge png": logits[:1],
        "judge npy": logits,
    }


def fault(server: Server, kind: str, right: Numbers) -> str | None:
    """What is wrong with a server's reply. A grey level more or less is not: sums differ in their last bits."""
    status, body = server.ask(kind, CHECKED_SEED)
    if status != OK:
        return f"answers {status}"
    try:
        numbers = server.contender.read(kind, body)
    except Exception as error:  # noqa: BLE001 - whatever a reply that is none leads to
        return f"the reply can't be read: {error!r}"
    if numbers.shape != right.shape:
        return f"shape {numbers.shape}, not {right.shape}"
    away = float(np.abs(numbers.astype(float) - right.astype(float)).max())
    most = LOGIT_TOLERANCE if kind.startswith("judge") else 1
    return None if away <= most else f"up to {away:.3g} away from what is right"


class Measurer:
    """Puts servers under load and notes what comes of it."""

    def __init__(self, plan: Plan, results: Results, right: Mapping[str, Numbers]) -> None:
        self._plan = plan
        self._results = results
        self._right = right
        self._seeds = itertools.count(SEEDS_APART, SEEDS_APART)

    def tune(self, contender: Contender) -> Contender:
        """The contender with the tuning that is best here; as it is where it has none, or can't be started."""
        rates = {}
        for tuning in contender.tunings:
            tried = replace(contender, variables={**contender.variables, **tuning.variables})
            try:
                with serving(tried, self._plan.bundle.folder) as server:
                    self._wrk(server, "png", TUNED_AT, WARM_S)
                    rates[tuning] = self._wrk(server, "png", TUNED_AT, TUNE_S).per_s
            except (NotServing, wrk.WrkError) as error:
                say(f"{contender.title} with {tuning}: {error}")
        if not rates:
            return contender
        best = max(rates, key=lambda tuning: rates[tuning])
        self._results.tunings[contender.name] = str(best)
        self._results.note(contender.name, "tuning", **{str(tuning): rate for tuning, rate in rates.items()})
        return replace(contender, variables={**contender.variables, **best.variables})

    def measure(self, contender: Contender) -> None:
        """Start a server and put it under every load; or note why not."""
        name = contender.name
        try:
            with serving(contender, self._plan.bundle.folder) as server:
                self._results.note(name, START, s=server.start_s)
                at_start = server.rss_bytes()
                for load in self._plan.loads:
                    if load.kind in contender.requests and (name != UNOBSERVED or load.name in UNOBSERVED_LOADS):
                        self._put_under(server, load)
                if name != STATIC:
                    self._results.note(
                        name,
                        MEMORY,
                        mib=server.memory_bytes() / MIB,
                        rss_mib=server.rss_bytes() / MIB,
                        rss_at_start_mib=at_start / MIB,
                    )
        except (NotServing, wrk.WrkError) as error:
            self._results.absent[name] = str(error)

    def _put_under(self, server: Server, load: Load) -> None:
        name = server.contender.name
        if server.contender.is_checked and (wrong := fault(server, load.kind, self._right[load.kind])):
            self._results.faults[name, load.name] = wrong
        elif load.connections is None:
            self._find_knee(server, load)
        else:
            self._closed_loop(server, load, load.connections)

    def _closed_loop(self, server: Server, load: Load, connections: int) -> None:
        self._wrk(server, load.kind, connections, WARM_S)
        before = server.cpu_s()
        seen = self._wrk(server, load.kind, connections, self._plan.seconds)
        self._results.note(
            server.contender.name,
            load.name,
            per_s=seen.per_s * load.rows,
            p50_ms=seen.p50_ms,
            p99_ms=seen.p99_ms,
            reply_bytes=seen.reply_bytes,
            failed=seen.failed,
            cpu_us=1e6 * (server.cpu_s() - before) / max(1, seen.replies),
        )

    def _wrk(self, server: Server, kind: str, connections: int, seconds: float) -> wrk.Seen:
        return wrk.measure(server.port, server.contender.requests[kind], connections, seconds, next(self._seeds))

    def _find_knee(self, server: Server, load: Load) -> None:
        """Offer more and more, and note the last that was answered in time."""
        closed = self._results.spread(Place(server.contender.name, "png-64"))
        if closed is None:
            return
        template, reached = server.contender.requests[load.kind], None
        for share in RATES:
            exchanges = open_loop(server.port, template, share * closed.median, self._plan.seconds, next(self._seeds))
            late = sum(e.outcome != OK or e.latency_s > IN_TIME_S for e in exchanges)
            if late > MOST_LATE * len(exchanges):
                break
            reached = exchanges
        if reached is None:
            too_late = f"more than {MOST_LATE:.0%} late at {share * closed.median:.0f} requests/s already"
            self._results.faults[server.contender.name, load.name] = too_late
        else:
            latencies = sorted(e.latency_s if e.outcome == OK else float("inf") for e in reached)
            p50, p99 = (1000 * latencies[int(share * (len(latencies) - 1))] for share in (0.5, 0.99))
            took_s = max(e.done for e in reached) - min(e.due for e in reached)
            per_s = sum(e.outcome == OK for e in reached) / took_s
            self._results.note(server.contender.name, load.name, per_s=per_s, p50_ms=p50, p99_ms=p99)

    def measure_limits(self) -> None:
        """The nets and the encoder alone, and the least that a start takes; or note why not."""
        folder = self._plan.bundle.folder
        options = [f"--bundles={folder.parent}", f"--bundle={folder.name}", f"--seconds={self._plan.seconds / 2}"]
        try:
            [(told, _)] = _lines_of("benchmarks.serving.limits", *options)
            (resident, _), (_, warm_s) = _lines_of("benchmarks.serving.bare", str(self._plan.bundles))
        except (ValueError, subprocess.CalledProcessError) as error:
            self._results.absent[LIMIT] = str(error)
            return
        limits = Limits(**json.loads(told))
        self._results.note(LIMIT, "png", image_us=1e6 * limits.image_s, png_us=1e6 * limits.png_s)
        self._results.note(LIMIT, "grid-8", per_s=limits.grid_images_per_s)
        self._results.note(LIMIT, "npy-2", per_s=limits.images_per_s)
        self._results.note(LIMIT, "judge-npy-8", per_s=limits.verdicts_per_s)
        self._results.note(LIMIT, START, s=warm_s)
        self._results.note(LIMIT, MEMORY, bare_mib=int(resident) / MIB)


def _lines_of(module: str, *arguments: str) -> list[tuple[str, float]]:
    """The lines that a program of ours prints, each with the seconds from its start."""
    started = time.perf_counter()
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own module
        assert process.stdout is not None
        told = [(line, time.perf_counter() - started) for line in process.stdout]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, module)
    return told


def open_loop(port: int, template: Request, per_s: float, seconds: float, first_seed: int) -> list[Exchange]:
    """Requests at random times whatever becomes of them; all of them are lost where the server hangs."""

    def request(place: int) -> Request:
        return template._replace(body=template.body.replace(SEED.encode(), str(first_seed + place).encode()))

    async def ask() -> list[Exchange]:
        async with Client(port) as client:
            return await asyncio.wait_for(offer(client, request, per_s, seconds), seconds + HANGS_S)

    with no_garbage_collection():
        try:
            return uvloop.run(ask())
        except TimeoutError:
            return [Exchange(template, 0.0)]


def note_what_follows(results: Results) -> None:
    """What takes measurements of several programs, round by round."""

    def rounds(*places: Place) -> Iterator[tuple[float, ...]]:
        return zip(*(results.values(place) for place in places), strict=False)  # one may have failed in a later round

    parts = Place(STATIC, "png-64", "cpu_us"), Place(LIMIT, "png", "image_us"), Place(LIMIT, "png", "png_us")
    for costs in rounds(*parts):
        results.note(LIMIT, "png-64", per_s=1e6 * CORES / sum(costs))
    for bare, mine in rounds(Place(LIMIT, MEMORY, "bare_mib"), Place(OURS, MEMORY, "rss_at_start_mib")):
        results.note(OURS, MEMORY, above_mib=mine - bare)


def facts_of(results: Results) -> dict[str, object]:
    """All that was measured, for programs."""
    return {
        "servers": results.titles,
        "tunings": results.tunings,
        "figures": results.facts(),
        "absent": results.absent,
        "faults": {f"{server}, {load}": why for (server, load), why in results.faults.items()},
    }


def _conditions(arguments: argparse.Namespace, bundle: str) -> str:
    here = machine()
    return (
        f"Medians of {arguments.rounds} rounds of {arguments.seconds:g} s on {here['cores']} cores that clients share: "
        f"{here['processor']}, Python {here['python']}, torch {version('torch')}, onnxruntime "
        f"{version('onnxruntime')}, `{bundle}`. One image a request comes over 64 connections, the rest over 8. "
        "The limit is, for one image, the cores over the processor time of a fixed reply, an image and a PNG; "
        "for the rest the nets, and for pictures the encoder, alone on all cores."
    )


def measure_bundle(arguments: argparse.Namespace, name: str, fail: Callable[[str], NoReturn]) -> tuple[Results, str]:
    """Race all chosen servers with one bundle; the results, and the page's text about them."""
    bundle = read_bundle(arguments.bundles / name)
    uploads = Uploads(bundle.draw(ROWS, seed=UPLOADED_SEED))
    everybody = contenders(uploads, arguments.bundles, bundle.name)
    names = [contender.name for contender in everybody]
    for given, known in ((arguments.servers or names, names), (arguments.loads, [load.name for load in LOADS])):
        if unknown := set(given) - set(known):
            fail(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [contender for contender in everybody if contender.name in (arguments.servers or names)]
    results = Results({contender.name: contender.title for contender in chosen})
    loads = [load for load in LOADS if load.name in arguments.loads]
    measurer = Measurer(Plan(loads, arguments.seconds, arguments.bundles, bundle), results, expected(bundle, uploads))
    if not arguments.untuned:
        say(f"{name}: tuning")
        chosen = [measurer.tune(contender) for contender in chosen]
    for number in range(1, arguments.rounds + 1):
        say(f"{name}, round {number}: limits")
        measurer.measure_limits()
        for contender in chosen:
            if contender.name not in results.absent:
                say(f"{name}, round {number}: {contender.title}")
                measurer.measure(contender)
    note_what_follows(results)
    table(lines(results, loads))
    remarks = {contender.name: contender.says for contender in chosen}
    return results, page_text(results, loads, remarks, _conditions(arguments, name))


def main() -> int:
    """Read the arguments and measure."""
    made = parser("The service beside other servers.", seconds=4)
    made.add_argument(
        "--bundle", nargs="+", default=["mnist", "mnist-mlp"], help="folders under --bundles that all serve, in turn"
    )
    made.add_argument("--rounds", type=int, default=3, help="how often each server is started and measured")
    made.add_argument("--servers", nargs="+", metavar="NAME", help="only these, as the table names them")
    made.add_argument("--loads", nargs="+", metavar="LOAD", default=[load.name for load in LOADS], help="only these")
    made.add_argument("--untuned", action="store_true", help="leave peers with one thread and one worker")
    made.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = made.parse_args()
    if not wrk.is_there():
        made.error(f"{wrk.PROGRAM} is not installed; Debian has it as a package of that name")
    allow_connections(MAX_CONNECTIONS)
    measured = {name: measure_bundle(arguments, name, made.error) for name in arguments.bundle}
    if arguments.write:
        write_page(PAGE, "\n\n".join(f"### With `{name}`\n\n{text}" for name, (_, text) in measured.items()))
    facts: dict[str, object] = {"seconds": arguments.seconds, "rounds": arguments.rounds, "torch": version("torch")}
    checks = [
        check._replace(wanted=f"{name}, {check.wanted}")
        for name, (results, _) in measured.items()
        for check in judge(results)
    ]
    return finish("compare", facts | {name: facts_of(results) for name, (results, _) in measured.items()}, checks)


def say(what: str) -> None:
    """Progress, beside the results."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
