"""`python -m service capacity`: measures this machine with these bundles, and says what a load needs.

1. For each number of workers that may pay, the knee is searched: the highest rate at which 99 of 100 requests are
   answered in the wanted time (`measure`). With a traffic file the requests are those of its busiest seconds.
2. The better number of workers gives the settings (`need`). The service is started again with them, and asked at
   several rates up to the knee, in rounds: the curve, from which the latency at any rate is read.
3. Another rate checks that curve.

Our client takes its share of the processors that it shares with the service; the report says how much.
"""

import argparse
import asyncio
import contextlib
import json
import math
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from service.capacity.measure import Driver, Plan, Seen
from service.capacity.need import highest_scale, replicas_for, settings_for
from service.capacity.report import Found, facts, words
from service.capacity.service_process import ServiceProcess, StartError
from service.capacity.traffic import Traffic, TrafficError, busiest, read_traffic, steady
from service.settings import Settings

if sys.platform == "win32":
    from asyncio import SelectorEventLoop as new_event_loop  # noqa: N813 - in uvloop it is a function
else:
    from uvloop import new_event_loop

T = TypeVar("T")
DESCRIPTION = "Measure this machine with these bundles, and say which settings and how many replicas a load needs."
CURVE = (0.4, 0.6, 0.8, 1.0)  # of the knee
CHECKED = 0.7  # of the knee, unless the traffic says which rate each replica gets
SPARE_FILES = 256  # beside the connections
MOST_MS = 10**6  # that may be wanted
NOT_HELD, BAD_ARGUMENT, BY_SIGNAL = 1, 2, 128


class _NotHeldError(Exception):
    """No rate keeps the wanted latency."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, beside the settings."""
    parser.add_argument("--p99-ms", type=_milliseconds, required=True, metavar="N", help="wanted latency, in ms")
    parser.add_argument(
        "--traffic", type=Path, metavar="FILE", help="the load, as CSV with the head time_s,requests_per_s,count"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MOST_MS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of milliseconds up to {MOST_MS:,}")
    return value


def run(
    settings: Settings,
    flags: Mapping[str, str],
    workers: Sequence[int],
    arguments: argparse.Namespace,
    plan: Plan | None = None,
) -> int:
    """Measure and print; returns the exit code."""
    plan = plan or Plan(connections=_allow_connections(Plan().connections))
    try:
        traffic = None if arguments.traffic is None else read_traffic(arguments.traffic, settings.max_count)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            found = runner.run(_until_a_signal(_find(settings, flags, workers, arguments.p99_ms, traffic, plan)))
    except TrafficError as error:
        return _say(str(error), BAD_ARGUMENT)
    except StartError as error:
        return _say(str(error), error.code)
    except _NotHeldError as error:
        return _say(str(error), NOT_HELD)
    except _StoppedError as error:
        return BY_SIGNAL + error.number
    print(json.dumps(facts(found)) if arguments.json else "\n".join(words(found)))
    return 0


def _say(message: str, code: int = 0) -> int:
    print(f"capacity: {message}", file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------------------------------------- the steps


async def _find(
    settings: Settings,
    flags: Mapping[str, str],
    workers: Sequence[int],
    p99_ms: float,
    traffic: Traffic | None,
    plan: Plan,
) -> Found:
    loads = [steady(1, 1, plan.seconds)] if traffic is None else busiest(traffic, plan.seconds)
    knees = dict[int, list[Seen]]()
    bundle = device = ""
    for number in workers:
        async with ServiceProcess(settings, flags, {"workers": number}) as service:
            bundle, device = await service.bundle_and_device()
            found = [await _knee(service, load, p99_ms, plan, number) for load in loads]
        if None not in found:
            knees[number] = [seen for seen in found if seen is not None]
    if not knees:
        raise _NotHeldError(f"no rate keeps a p99 of {p99_ms:g} ms on this machine")
    best = max(knees, key=lambda number: min(seen.scale for seen in knees[number]))
    place = min(range(len(loads)), key=lambda place: knees[best][place].scale)
    knee, load = knees[best][place], loads[place]
    wanted = settings_for(settings, best, p99_ms, knee.scale * load.images_per_s)
    async with ServiceProcess(settings, flags, wanted) as service:
        driver = Driver(service, load, p99_ms, plan, lambda seen: _tell(seen, "these settings"))
        await driver.saturate()  # to warm it
        curve = await driver.curve([share * knee.scale for share in CURVE])
        scale = highest_scale(curve, p99_ms)
        if scale is None:
            raise _NotHeldError(f"with {wanted} a p99 of {p99_ms:g} ms was not kept: the machine is not quiet enough")
        checked = await driver.look(_rate_to_check(scale, traffic))
    return Found(
        bundle=bundle,
        device=device,
        p99_ms=p99_ms,
        traffic=traffic,
        load=load,
        knees={number: seen[place] for number, seen in knees.items()},
        settings=wanted,
        curve=curve,
        checked=checked,
    )


async def _knee(service: ServiceProcess, load: Traffic, p99_ms: float, plan: Plan, workers: int) -> Seen | None:
    name = f"{workers} worker{'s' * (workers > 1)}"
    return await Driver(service, load, p99_ms, plan, lambda seen: _tell(seen, name)).find_knee()


def _tell(seen: Seen, name: str) -> None:
    _say(f"{name}: {seen.requests_per_s:,.0f} requests/s, p99 {seen.p99_ms:,.1f} ms")


def _rate_to_check(scale: float, traffic: Traffic | None) -> float:
    """What each replica would get, if the curve has it."""
    share = 0.0 if traffic is None else 1 / replicas_for(scale)
    return share if CURVE[0] * scale < share < scale else CHECKED * scale


# ------------------------------------------------------------------------------------------------------ the process


def _allow_connections(count: int) -> int:
    """Have as many files open as that takes, or as the system allows; returns how many connections there may be."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such module and no such limit
        import resource  # noqa: PLC0415

        soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + SPARE_FILES
        if most != resource.RLIM_INFINITY:
            wanted = min(wanted, most)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
        return max(1, min(count, wanted - SPARE_FILES))
    return count


class _StoppedError(Exception):
    """A signal has said to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


async def _until_a_signal(work: Coroutine[Any, Any, T]) -> T:
    """Do the work; a signal cancels it, so that the service that it has started is stopped on the way out."""
    task, told = asyncio.create_task(work), list[int]()

    def stop(number: int) -> None:
        told.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):  # on Windows
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if told:
            raise _StoppedError(told[0]) from None
        raise
