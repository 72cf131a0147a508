"""Runs wrk, the closed loop: a number of connections, each of which asks again once it has been answered.

wrk is a client in C that takes a few microseconds a request, so that little of a shared processor goes to it.
"""

import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.tools.client import HOST, Request

PROGRAM = "wrk"
SCRIPT = Path(__file__).with_suffix(".lua")
TIMEOUT_S = 30  # a reply may take so long, as in the service; wrk's own two seconds are less than some servers need
SPARE_S = 60


class WrkError(RuntimeError):
    """wrk could not be run, or said something else than expected."""


class Seen(NamedTuple):
    """What a closed loop saw.

    `per_s` are replies with a status under 400. `reply_bytes` is the mean on the wire, heads included. `failed` are
    other replies, lost connections, and replies that took longer than TIMEOUT_S.
    """

    replies: int
    per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    reply_bytes: float
    failed: int


def is_there() -> bool:
    """Whether wrk is installed."""
    return shutil.which(PROGRAM) is not None


def measure(port: int, request: Request, connections: int, seconds: float, first_seed: int) -> Seen:
    """Ask for so long. A `{seed}` in the request's body becomes first_seed + 1, then + 2, and so on.

    Raises:
        WrkError: See there.
    """
    headers = [part for name, value in request.headers for part in ("-H", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body)
        body.flush()
        command = [PROGRAM, "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}s", f"--timeout={TIMEOUT_S}s", *headers]
        command += [
            "-s",
            str(SCRIPT),
            f"http://{HOST}:{port}{request.target}",
            "--",
            body.name,
            str(first_seed),
            request.method,
        ]
        try:
            done = subprocess.run(  # noqa: S603 - our own arguments
                command, capture_output=True, text=True, check=True, timeout=seconds + TIMEOUT_S + SPARE_S
            )
        except subprocess.CalledProcessError as error:
            raise WrkError(f"{PROGRAM} ended with {error.returncode}: {error.stdout}{error.stderr}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise WrkError(f"{PROGRAM}: {error}") from None
    return parse(done.stdout)


def parse(output: str) -> Seen:
    """What wrk.lua's line says, at the end of wrk's own output.

    Raises:
        WrkError: There is no such line.
    """
    line = output.rstrip().rpartition("\n")[2]
    if not line.startswith("{"):
        raise WrkError(f"{PROGRAM} said: {output}")
    told = json.loads(line)
    return Seen(
        replies=told["replies"],
        per_s=1e6 * (told["replies"] - told["refused"]) / told["microseconds"],
        p50_ms=told["p50_us"] / 1000,
        p90_ms=told["p90_us"] / 1000,
        p99_ms=told["p99_us"] / 1000,
        reply_bytes=told["bytes"] / max(1, told["replies"]),
        failed=told["refused"] + told["lost"] + told["late"],
    )
