"""Clients that ask for images one after the other, over connections that they keep, and note what they get."""

import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from benchmarks.tools.ray_cluster import HTTP_PORT

CLIENTS = 8
TIMEOUT_S = 10.0


class Answer(NamedTuple):
    """What became of one request: the status, or the error's name; the bundle; and how long it took."""

    outcome: int | str
    bundle: str | None
    seconds: float


class Load:
    """Several clients, each a thread.

    Args:
        target: What they ask for; a new seed is put in for `{}`.
    """

    def __init__(self, target: str = "/sample?seed={}") -> None:
        self.answers: list[Answer] = []
        self._target = target
        self._seeds = itertools.count()
        self._is_over = threading.Event()

    @contextmanager
    def running(self) -> "Iterator[Load]":
        """Ask while the block lasts, and wait for the last answers."""
        threads = [threading.Thread(target=self._ask_on) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()

    def wait_for(self, more: int) -> None:
        """Return once so many more requests were answered."""
        wanted = len(self.answers) + more
        while len(self.answers) < wanted:
            time.sleep(0.01)

    @property
    def outcomes(self) -> Counter[int | str]:
        """How many requests came to what."""
        return Counter(answer.outcome for answer in self.answers)

    def _ask_on(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=TIMEOUT_S)
        while not self._is_over.is_set():
            started = time.monotonic()
            outcome: int | str
            bundle = None
            try:
                connection.request("GET", self._target.format(next(self._seeds)))
                reply = connection.getresponse()
                reply.read()
                outcome, bundle = reply.status, reply.headers["X-Bundle"]
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
                connection.close()
            self.answers.append(Answer(outcome, bundle, time.monotonic() - started))
        connection.close()
