"""What all programs begin and end with: arguments, percentiles and trends, the table and the line of JSON."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.tools.process import ROOT

BLOCKS = 20


class Check(NamedTuple):
    """One expectation: what was wanted, what was seen, and whether that will do."""

    wanted: str
    seen: str
    met: bool


class Trend(NamedTuple):
    """A straight line through measurements: its slope and that slope's standard error, per unit of time."""

    slope: float
    error: float

    @property
    def is_flat(self) -> bool:
        """Whether the slope can't be told from zero, or falls."""
        return self.slope <= 2 * self.error


def parser(description: str, seconds: float | None = None) -> argparse.ArgumentParser:
    """Arguments that every program takes; --seconds only where there is a default for it."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--bundles", type=Path, default=ROOT / "bundles", help="folder of bundles to serve")
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help="length of the main measurement")
    return made


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, in milliseconds; nothing where there is nothing."""
    values = 1000 * np.fromiter(seconds, float)
    if not len(values):
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {"p50_ms": _rounded(p50), "p90_ms": _rounded(p90), "p99_ms": _rounded(p99), "max_ms": _rounded(values.max())}


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Least squares over the means of 20 blocks, or of pairs where there are fewer than 40 measurements.

    Neighbours in time resemble each other: single values, taken as independent, would claim too much certainty.
    """
    blocks = min(BLOCKS, len(times) // 2)
    x, y = (np.array([np.mean(block) for block in np.array_split(np.asarray(v), blocks)]) for v in (times, values))
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return Trend(float(slope), float(np.sqrt(covariance[0, 0])))


def finish(program: str, facts: Mapping[str, object], checks: Sequence[Check]) -> int:
    """Print the table and the JSON line; the exit code is 1 where an expectation is not met."""
    width = max((len(check.wanted) for check in checks), default=0)
    print(f"\n{'expected':<{width}}  seen")
    for check in checks:
        print(f"{check.wanted:<{width}}  {check.seen}{'' if check.met else '   <- NOT MET'}")
    line = {"program": program, "met": all(check.met for check in checks), **facts, "machine": machine()}
    print(json.dumps(line))
    return 0 if line["met"] else 1


def table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows under the names of their cells."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[place]) for row in cells)) for place, name in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def machine() -> dict[str, object]:
    """Where this ran, and how busy the machine is."""
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": _rounded(os.getloadavg()[0]),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.3g}") if abs(value) < 1000 else round(float(value))
