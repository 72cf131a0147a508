"""What clients ask for, and when: the traffic file, its busiest moments, and random arrivals at their rates.

A traffic file is CSV with the head `time_s,requests_per_s,count`. A row says that from its time on, so many requests a
second ask for so many images each; until the next time, and the last for as long as the one before it. Rows with one
time add up.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HEAD = ["time_s", "requests_per_s", "count"]
MAX_BYTES, MAX_ROWS, MAX_LINE = 2**24, 200_000, 1000
LEAST_PER_S, MOST_PER_S, MOST_S = 1e-9, 1e9, 1e10
LEAST_S = 0.1  # that all rows together last
ALONE_S = 1.0  # how long a single time lasts


class TrafficError(ValueError):
    """A traffic file can't be used; the message is one line that says why."""


class Piece(NamedTuple):
    """Requests for so many images each, at random times, `per_s` on average from one time to another."""

    start_s: float
    end_s: float
    per_s: float
    images: int

    @property
    def requests(self) -> float:
        """How many there are on average."""
        return self.per_s * (self.end_s - self.start_s)


class Traffic(NamedTuple):
    """All that is asked for in some span of time, which begins at 0."""

    pieces: tuple[Piece, ...]
    seconds: float

    @property
    def requests_per_s(self) -> float:
        """On average."""
        return sum(piece.requests for piece in self.pieces) / self.seconds

    @property
    def images_per_s(self) -> float:
        """On average."""
        return sum(piece.requests * piece.images for piece in self.pieces) / self.seconds

    @property
    def counts(self) -> list[int]:
        """The counts that are asked for."""
        return sorted({piece.images for piece in self.pieces})


class Arrivals(NamedTuple):
    """Times in seconds, rising, and how many images each of them asks for."""

    due_s: NDArray[np.float64]
    counts: NDArray[np.int64]


def steady(per_s: float, count: int, seconds: float) -> Traffic:
    """Requests of one kind, at one rate."""
    return Traffic((Piece(0, seconds, per_s, count),), seconds)


def read_traffic(file: Path, max_count: int) -> Traffic:
    """Read a traffic file, whose requests may ask for at most `max_count` images.

    Raises:
        TrafficError: It can't be read, or a row is wrong.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise TrafficError(f"{file}: has over {MAX_BYTES} bytes")
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise TrafficError(f"{file}: {reason}") from None
    try:
        return _parse(text, max_count)
    except (ValueError, csv.Error) as error:
        raise TrafficError(f"{file}: {error}") from None


def _parse(text: str, max_count: int) -> Traffic:
    lines = csv.reader(_lines(text))
    head = [cell.strip() for cell in next(lines, [])]
    if head != HEAD:
        raise ValueError(f"its first line must be {','.join(HEAD)}")
    rows = list[tuple[float, float, int]]()
    for cells in lines:
        if any(cell.strip() for cell in cells):
            try:
                rows.append(_row(cells, max_count, rows[-1][0] if rows else 0.0))
            except ValueError as error:
                raise ValueError(f"line {lines.line_num}: {error}") from None
    if not any(per_s for _, per_s, _ in rows):
        raise ValueError("it asks for nothing")
    return _pieces(rows)


def _lines(text: str) -> Iterator[str]:
    """One after the other: no line, and no number of empty ones, costs much before it is refused."""
    for number, line in enumerate(io.StringIO(text, newline="")):
        if number > MAX_ROWS:  # beside the head
            raise ValueError(f"has over {MAX_ROWS} rows")
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number + 1}: has over {MAX_LINE} characters")
        yield line


def _row(cells: Sequence[str], max_count: int, last_s: float) -> tuple[float, float, int]:
    if len(cells) != len(HEAD):
        raise ValueError(f"has {len(cells)} cells in place of {len(HEAD)}")
    values = []
    for name, cell, most in zip(HEAD, cells, (MOST_S, MOST_PER_S, max_count), strict=True):
        try:
            value = float(cell)
        except ValueError:
            raise ValueError(f"{name} is {cell[:40]!r}: no number") from None
        least = {"time_s": last_s, "requests_per_s": 0, "count": 1}[name]
        if not least <= value <= most:
            raise ValueError(f"{name} is {value:g}, which is not between {least:g} and {most:g}")
        if name == "requests_per_s" and 0 < value < LEAST_PER_S:
            raise ValueError(f"{name} is {value:g}: less than {LEAST_PER_S:g} can't be told from nothing")
        values.append(value)
    time_s, per_s, count = values
    if not count.is_integer():
        raise ValueError(f"count is {count:g}: no whole number")
    return time_s, per_s, int(count)


def _pieces(rows: Sequence[tuple[float, float, int]]) -> Traffic:
    moments = [(time_s, list(same)) for time_s, same in groupby(rows, key=lambda row: row[0])]
    times = [time_s for time_s, _ in moments]
    times.append(2 * times[-1] - times[-2] if len(times) > 1 else times[-1] + ALONE_S)
    pieces = [
        Piece(start - times[0], end - times[0], per_s, count)
        for (_, same), start, end in zip(moments, times[:-1], times[1:], strict=True)
        for _, per_s, count in same
        if per_s
    ]
    if times[-1] - times[0] < LEAST_S:
        raise ValueError(f"it lasts less than {LEAST_S:g} s")
    return Traffic(tuple(pieces), times[-1] - times[0])


def busiest(traffic: Traffic, seconds: float) -> list[Traffic]:
    """The spans of so many seconds with the most images and with the most requests: one or two of them.

    Small requests cost for each of them, large ones for each image, so that either may be what replicas are needed for.
    """
    if traffic.seconds <= seconds:
        return [traffic]
    starts = {_busiest_start(traffic, seconds, by_images=by_images) for by_images in (True, False)}
    return [_cut(traffic, start, seconds) for start in sorted(starts)]


def _busiest_start(traffic: Traffic, seconds: float, *, by_images: bool) -> float:
    """Where the busiest span begins: where a piece does, or so that it ends where one does."""
    starts, ends, per_s = (np.array(column) for column in list(zip(*traffic.pieces, strict=True))[:3])
    if by_images:
        per_s = per_s * [piece.images for piece in traffic.pieces]
    times = np.unique([*starts, *ends])
    changes = np.zeros(len(times))
    np.add.at(changes, np.searchsorted(times, starts), per_s)
    np.subtract.at(changes, np.searchsorted(times, ends), per_s)
    until = np.concatenate([[0.0], np.cumsum(np.cumsum(changes)[:-1] * np.diff(times))])  # what comes before each time
    candidates = np.clip(np.concatenate([times, times - seconds]), 0, traffic.seconds - seconds)
    within = np.interp(candidates + seconds, times, until) - np.interp(candidates, times, until)
    return float(candidates[within >= within.max() * (1 - 1e-9)].min())


def _cut(traffic: Traffic, start_s: float, seconds: float) -> Traffic:
    pieces = [
        Piece(max(piece.start_s - start_s, 0), min(piece.end_s - start_s, seconds), piece.per_s, piece.images)
        for piece in traffic.pieces
        if piece.end_s > start_s and piece.start_s < start_s + seconds
    ]
    return Traffic(tuple(pieces), seconds)


def arrivals(traffic: Traffic, scale: float, seconds: float, seed: int) -> Arrivals:
    """Poisson arrivals at so many times the traffic's rates, which begin again where the traffic is over."""
    rng = np.random.default_rng(seed)
    starts, ends, per_s, counts = (np.array(column) for column in zip(*traffic.pieces, strict=True))
    due_s, due_counts = list[NDArray[np.float64]](), list[NDArray[np.int64]]()
    for begin_s in np.arange(0, seconds, traffic.seconds):
        requests = rng.poisson(scale * per_s * (ends - starts))
        places = np.repeat(np.arange(len(starts)), requests)
        due_s.append(begin_s + starts[places] + (ends - starts)[places] * rng.random(len(places)))
        due_counts.append(counts[places])
    every_due, every_count = np.concatenate(due_s), np.concatenate(due_counts)
    order = np.argsort(every_due, kind="stable")
    order = order[: np.searchsorted(every_due[order], seconds)]
    return Arrivals(every_due[order], every_count[order])
