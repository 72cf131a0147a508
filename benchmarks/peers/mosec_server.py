"""The service's work under mosec: a web layer in Rust, and Python processes that get whole batches."""

import os

from mosec import Server, Worker

from benchmarks.peers.work import HOST, MAX_REQUESTS, MAX_WAIT_S, Ask, Nets, decode, encode, port, workers

MAX_WAIT_MS = round(1000 * MAX_WAIT_S)
TIMEOUT_MS = 30_000  # of a request, as the service's


class Sample(Worker):
    """G: parse, make a batch's images, encode."""

    resp_mime_type = "application/octet-stream"  # one for all formats: a worker has no say about a single reply

    def __init__(self):
        super().__init__()
        self.nets = Nets()

    def deserialize(self, data):
        """One request."""
        return Ask.model_validate_json(data)

    def forward(self, data):
        """All requests of a batch."""
        return list(zip(self.nets.sample(data), data, strict=True))

    def serialize(self, data):
        """One reply."""
        return encode(*data)


class Discriminate(Worker):
    """D: decode, judge a batch's images, write."""

    def __init__(self):
        super().__init__()
        self.nets = Nets()

    def deserialize(self, data):
        """One request."""
        return decode(data)

    def forward(self, data):
        """All requests of a batch."""
        return self.nets.judge(data)

    def serialize(self, data):
        """One reply."""
        return self.nets.verdicts(data)


if __name__ == "__main__":
    os.environ |= {
        "MOSEC_ADDRESS": HOST,
        "MOSEC_PORT": str(port()),
        "MOSEC_TIMEOUT": str(TIMEOUT_MS),
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = Server()
    batching = {"max_batch_size": MAX_REQUESTS, "max_wait_time": MAX_WAIT_MS}
    server.append_worker(Sample, num=workers(), route="/sample", **batching)
    server.append_worker(Discriminate, num=workers(), route="/discriminate", **batching)
    server.run()
