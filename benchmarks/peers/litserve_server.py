"""The service's work under LitServe: uvicorn and FastAPI in front, a process for each API that gets batches."""

import base64
import os

import litserve
from fastapi import Response
from pydantic import BaseModel

from benchmarks.peers.work import HOST, MAX_REQUESTS, MAX_WAIT_S, MEDIA_TYPES, Ask, Nets, decode, encode, port, workers

BATCHING = {"max_batch_size": MAX_REQUESTS, "batch_timeout": MAX_WAIT_S}


class Upload(BaseModel):
    """A file in base64: LitServe reads JSON and forms, and no other bodies."""

    file: str


class Sample(litserve.LitAPI):
    """G."""

    def setup(self, device):  # noqa: ARG002 - LitServe's signature
        """Load, in the process that computes."""
        self.nets = Nets()

    def decode_request(self, request: Ask):
        """One request."""
        return request

    def batch(self, inputs):
        """A list will do."""
        return inputs

    def predict(self, x):
        """All requests of a batch."""
        return list(zip(self.nets.sample(x), x, strict=True))

    def unbatch(self, output):
        """A list will do."""
        return output

    def encode_response(self, output):
        """One reply."""
        images, ask = output
        return Response(encode(images, ask), media_type=MEDIA_TYPES[ask.format])


class Discriminate(litserve.LitAPI):
    """D."""

    def setup(self, device):  # noqa: ARG002 - LitServe's signature
        """Load, in the process that computes."""
        self.nets = Nets()

    def decode_request(self, request: Upload):
        """One request."""
        return decode(base64.b64decode(request.file))

    def batch(self, inputs):
        """A list will do."""
        return inputs

    def predict(self, x):
        """All requests of a batch."""
        return self.nets.judge(x)

    def unbatch(self, output):
        """A list will do."""
        return output

    def encode_response(self, output):
        """One reply."""
        return Response(self.nets.verdicts(output), media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(
        [Sample(api_path="/sample", **BATCHING), Discriminate(api_path="/discriminate", **BATCHING)],
        accelerator="cpu",
        workers_per_device=workers(),
    )
    server.run(
        host=HOST,
        port=port(),
        num_api_servers=len(os.sched_getaffinity(0)),
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
