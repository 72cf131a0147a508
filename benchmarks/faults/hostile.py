"""One client sends what is made to stop the service; reports what probes, memory and another client notice.

    python -m benchmarks.faults.hostile

First come JSON bodies of the largest size, one at a time: wrong values, unknown fields, empty containers, quotes,
escapes. Then, for each kind of slow image, eight of them at once with a deadline of two minutes, and one ordinary
picture. Another process asks `/livez` all the time.
"""

import asyncio
import base64
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import uvloop

from benchmarks.faults.slow_images import chunk, picture, progressive, run_length, saved, segment
from benchmarks.tools.client import Client, Request
from benchmarks.tools.prober import probing
from benchmarks.tools.process import Service, running
from benchmarks.tools.report import Check, finish, parser, percentiles, table

MIB = 2**20
FLOOD, DEADLINE_MS, ORDINARY_MS = 8, 120_000, 8000
PROBES_PER_S, PROBED_S = 50, 3
LIVE_MS, TIMES_BODY = 100, 6
LARGE, MOST = 4 * MIB, 32 * MIB  # as much JSON as /sample and /discriminate take


def bodies() -> dict[str, tuple[str, bytes]]:
    """What is sent where."""

    def filled(start: bytes, part: bytes, end: bytes, size: int) -> bytes:
        return start + part * ((size - len(start) - len(end)) // len(part)) + end

    def fields(size: int) -> bytes:
        return b"{" + b",".join(b'"%07d":1' % number for number in range(size // 12)) + b"}"

    pixels = base64.b64encode(np.random.default_rng(0).bytes(MOST * 3 // 4 - 300))
    return {
        "wrong values": ("/sample", filled(b'{"labels":[', b"1.5,", b"1]}", LARGE)),
        "wrong images": ("/discriminate", filled(b'{"images":[', b"1,", b"1]}", MOST)),
        "unknown fields": ("/sample", fields(LARGE)),
        "many unknown fields": ("/discriminate", fields(MOST)),
        "empty lists": ("/discriminate", filled(b'{"images":[', b"[],", b"[]]}", MOST)),
        "nested lists": ("/discriminate", filled(b"", b"[", b"", MOST)),
        "quotes": ("/discriminate", filled(b"", b'"', b"", MOST)),
        "one long number": ("/sample", filled(b'{"seed":', b"7", b"}", LARGE)),
        "one long name": ("/discriminate", filled(b'{"images":["a"],"bundle":"', b"x", b'"}', MOST)),
        "one wide name": ("/discriminate", filled('{"\U0001f600'.encode(), b"x", b'":1}', MOST)),
        "escapes": ("/discriminate", filled(b'{"images":["', b"\\u0041", b'"]}', MOST)),
        "one image that is none": ("/discriminate", b'{"images":["' + pixels + b'"]}'),
        "images that are none": (
            "/discriminate",
            b'{"images":[' + b",".join([b'"' + pixels[:8000] + b'"'] * 4096) + b"]}",
        ),
    }


def images() -> dict[str, bytes]:
    """Files that were made to take long."""
    jpeg, png = saved(picture(200, 150), "jpeg"), saved(picture(200, 150), "png")
    return {
        "JPEG of EXIF": jpeg[:2] + segment(0xE1, b"Exif\0\0ab") * (8 * MIB // 12) + jpeg[2:],
        "JPEG of fill": jpeg[:2] + b"\xff" * (8 * MIB) + jpeg[2:],
        "JPEG of scans": progressive(4000, 4000, 5000),
        "PNG of chunks": png[:33] + chunk(b"tEXt", b"a\0b") * 9000 + png[33:],
        "BMP of runs": run_length(4000, 3000),
    }


async def send(service: Service, name: str, target: str, body: bytes) -> Mapping[str, Any]:
    """One body, and what is noticed of it."""
    before = service.rss_bytes()
    with probing(service.port, PROBED_S, PROBES_PER_S) as asked:
        await asyncio.sleep(PROBED_S / 6)
        request = Request("POST", target, 1, body, (("Content-Type", "application/json"),))
        async with Client(service.port) as client:
            answered = asyncio.create_task(client.exchange(request))
            most = before
            while not answered.done():
                most = max(most, service.rss_bytes())
                await asyncio.sleep(0.002)
        probes = await asyncio.wrap_future(asked)
    return {
        "what": name,
        "MiB": round(len(body) / MIB, 1),
        "outcome": answered.result().outcome,
        "ms": round(1000 * answered.result().latency_s),
        "slowest /livez ms": percentiles(e.latency_s for e in probes["/livez"])["max_ms"],
        "lost": sum(e.outcome != 200 for e in probes["/livez"]),
        "more memory MiB": round((most - before) / MIB),
    }


async def flood(service: Service, name: str, file: bytes) -> Mapping[str, Any]:
    """Eight such files at once, then an ordinary one."""

    def judge(body: bytes, timeout_ms: int) -> Request:
        return Request(
            "POST", "/discriminate", 1, body, (("Content-Type", "image/png"), ("X-Timeout-Ms", str(timeout_ms)))
        )

    ordinary = judge(saved(picture(600, 600), "png"), ORDINARY_MS)
    with probing(service.port, 2 * PROBED_S, PROBES_PER_S) as asked:
        async with Client(service.port) as client, Client(service.port) as other:
            slow = [asyncio.create_task(client.exchange(judge(file, DEADLINE_MS))) for _ in range(FLOOD)]
            await asyncio.sleep(PROBED_S / 6)
            answered = await other.exchange(ordinary)
            outcomes = {str(done.outcome) for done in await asyncio.gather(*slow)}
        probes = await asyncio.wrap_future(asked)
    return {
        "what": f"{FLOOD} × {name}",
        "MiB": round(len(file) / MIB, 1),
        "outcome": " ".join(sorted(outcomes)),
        "ordinary": answered.outcome,
        "after ms": round(1000 * answered.latency_s),
        "slowest /livez ms": percentiles(e.latency_s for e in probes["/livez"])["max_ms"],
        "lost": sum(e.outcome != 200 for e in probes["/livez"]),
    }


async def measure(arguments: Any) -> int:
    """Send them all; returns the exit code."""
    with running(bundles=arguments.bundles) as service:
        sent = [await send(service, name, *what) for name, what in bodies().items()]
        flooded = [await flood(service, name, file) for name, file in images().items()]
    table(sent)
    table(flooded)
    slowest = max(row["slowest /livez ms"] for row in [*sent, *flooded])
    memory = max(row["more memory MiB"] / max(1, row["MiB"]) for row in sent)
    checks = [
        Check(f"/livez within {LIVE_MS} ms", f"{slowest} ms", slowest < LIVE_MS),
        Check(
            "no /livez lost", str(sum(row["lost"] for row in [*sent, *flooded])), not any(row["lost"] for row in sent)
        ),
        Check(f"memory grows by {TIMES_BODY} times the body at most", f"{memory:.1f}", memory < TIMES_BODY),
        Check(
            "every ordinary picture is judged",
            json.dumps([row["ordinary"] for row in flooded]),
            all(row["ordinary"] == 200 for row in flooded),
        ),
    ]
    return finish("hostile", {"bodies": sent, "images": flooded}, checks)


def main() -> int:
    """Read the arguments and measure."""
    return uvloop.run(measure(parser("One client sends what is made to stop the service.").parse_args()))


if __name__ == "__main__":
    sys.exit(main())
