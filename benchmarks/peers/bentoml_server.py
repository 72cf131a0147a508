"""The service's work under BentoML, with its adaptive batching.

A batched API takes and gives lists, in which the requests' items follow one another. Its replies are JSON, with files
in base64.
"""

import base64
import os
import sys

import bentoml

from benchmarks.peers.work import HOST, MAX_REQUESTS, Ask, Nets, decode, encode, port, workers

TIMEOUT_S = 30  # of a request, as the service's
MAX_LATENCY_MS = 1000 * TIMEOUT_S  # past it requests are refused


@bentoml.service(workers=workers(), traffic={"timeout": TIMEOUT_S}, logging={"access": {"enabled": False}})
class Gan:
    """G and D."""

    def __init__(self):
        self.nets = Nets()

    @bentoml.api(batchable=True, max_batch_size=MAX_REQUESTS, max_latency_ms=MAX_LATENCY_MS)
    def sample(self, asked: list[Ask]) -> list[str]:
        """All requests of a batch."""
        images = self.nets.sample(asked)
        return [base64.b64encode(encode(*pair)).decode() for pair in zip(images, asked, strict=True)]

    @bentoml.api(batchable=True, max_batch_size=MAX_REQUESTS, max_latency_ms=MAX_LATENCY_MS)
    def discriminate(self, files: list[str]) -> list[str]:
        """All requests of a batch."""
        logits = self.nets.judge([decode(base64.b64decode(file)) for file in files])
        return [self.nets.verdicts(part).decode() for part in logits]


if __name__ == "__main__":
    command = ["bentoml", "serve", f"{__spec__.name}:Gan", "--host", HOST, "--port", str(port())]
    os.execv(sys.executable, [sys.executable, "-m", *command])  # noqa: S606 - its own way to be started
