"""Asks the probes as an orchestrator does: from another process, on time, over a new connection each time."""

import asyncio
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

from benchmarks.tools.client import Client, Exchange, Request, offer

PATHS = ("/livez", "/readyz")


@contextmanager
def probing(port: int, seconds: float, per_s: float) -> "Iterator[Future[Mapping[str, list[Exchange]]]]":
    """Ask each path `per_s` times a second for so long, beside whatever the block does. The result comes at its end.

    A process of its own, since what it measures must not be this process' own slowness.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(int).result()  # it is up
        yield pool.submit(probe, port, seconds, per_s)


def probe(port: int, seconds: float, per_s: float) -> Mapping[str, list[Exchange]]:
    """Each path's exchanges."""
    return asyncio.run(_probe(port, seconds, per_s))


async def _probe(port: int, seconds: float, per_s: float) -> Mapping[str, list[Exchange]]:
    client = Client(port, reuse=False)
    requests = [partial(_get, path) for path in PATHS]
    asked = [offer(client, request, per_s, seconds, seed) for seed, request in enumerate(requests)]
    return dict(zip(PATHS, await asyncio.gather(*asked), strict=True))


def _get(path: str, _: int) -> Request:
    return Request("GET", path)
