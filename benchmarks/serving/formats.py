"""What each format costs: bytes, milliseconds until the first byte and until the last, and the service's memory.

    python -m benchmarks.serving.formats [--rounds 5]

One client alone, over one connection, with images of the default bundle; medians. Memory is what the service's has
grown by since its start, when a format's requests are over: streamed replies must not grow with what they hold.
"""

import argparse
import http.client
import statistics
import sys
import time
from typing import NamedTuple

from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, table

FORMATS = ("png", "webp", "jpeg", "json", "zip", "npy")
ANIMATIONS = ("png", "gif", "webp", "apng")
STREAM = "/sample?seed=7&count=4096&scale=8&format="
WAY = "/interpolate?seed_from=1&seed_to=2&steps=60&scale=8&format="
TARGETS = {
    **{f"{form}, 1 image": f"/sample?seed=7&format={form}" for form in FORMATS},
    **{f"{form}, 64 images": f"/sample?seed=7&count=64&format={form}" for form in FORMATS},
    **{f"{form}, 4096 images": f"/sample?seed=7&count=4096&format={form}" for form in FORMATS if form != "webp"},
    **{f"{form}, 60 between two, ×8": f"{WAY}{form}" for form in ANIMATIONS},
    **{f"{form}, 4096 images, ×8": f"{STREAM}{form}" for form in ("npy", "zip")},
}  # fmt: skip
LARGE = 2**22  # bytes of a reply that is asked for only once
MOST_GROWTH_MIB = 200
PART = 2**18


class Seen(NamedTuple):
    """One reply: its size, and milliseconds until its first byte and its last."""

    size: int
    first_ms: float
    all_ms: float


def ask(connection: http.client.HTTPConnection, target: str) -> Seen:
    """Read a reply and throw it away."""
    started = time.perf_counter()
    connection.request("GET", target)
    reply = connection.getresponse()
    assert reply.status == http.HTTPStatus.OK, reply.read()
    size = len(reply.read(1))
    first_s = time.perf_counter() - started
    while part := reply.read(PART):
        size += len(part)
    return Seen(size, 1e3 * first_s, 1e3 * (time.perf_counter() - started))


def measure(service: Service, rounds: int) -> list[dict[str, object]]:
    """Each format in turn."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    before, rows = service.rss_bytes(), []
    for name, target in TARGETS.items():
        seen = [ask(connection, target)]
        if seen[0].size < LARGE:
            seen = [ask(connection, target) for _ in range(rounds)]
        rows.append(
            {
                "reply": name,
                "bytes": seen[0].size,
                "first_ms": round(statistics.median([one.first_ms for one in seen]), 1),
                "all_ms": round(statistics.median([one.all_ms for one in seen]), 1),
                "grown_mib": (service.rss_bytes() - before) >> 20,
            }
        )
    return rows


def run(arguments: argparse.Namespace) -> int:
    """Measure, and say what came of it; returns the exit code."""
    with running(bundles=arguments.bundles, deadline_s=120) as service:
        rows = measure(service, arguments.rounds)
    table(rows)
    by_name = {row["reply"]: row for row in rows}
    checks = []
    for form in ("npy", "zip"):
        row = by_name[f"{form}, 4096 images, ×8"]
        first, whole, grown = (float(str(row[key])) for key in ("first_ms", "all_ms", "grown_mib"))
        wanted = f"a streamed {form} begins within a fifth of its time"
        checks.append(Check(wanted, f"{first:.0f} of {whole:.0f} ms", first < whole / 5))
        checks.append(Check(f"it takes up to {MOST_GROWTH_MIB} MiB", f"{grown:.0f} MiB", grown <= MOST_GROWTH_MIB))
    return finish("formats", {"rounds": arguments.rounds, "replies": rows}, checks)


def main() -> int:
    """Read the arguments and measure."""
    made = parser("What each format costs.")
    made.add_argument("--rounds", type=int, default=5, help="how often each reply is asked for")
    return run(made.parse_args())


if __name__ == "__main__":
    sys.exit(main())
