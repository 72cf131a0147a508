"""The service's work under Ray Serve: replicas behind a proxy, and `serve.batch` within each.

It is started as its documentation advises for throughput: HAProxy in front, which talks to the replicas directly, the
user's code on the replica's own event loop, log lines in batches. Computing goes to a thread, so that the loop can
receive the next batch meanwhile.
"""

import asyncio
import os
import signal

# Read when ray is imported.
os.environ |= {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray
from fastapi import Response
from ray import serve

from benchmarks.peers.work import HOST, MAX_REQUESTS, MAX_WAIT_S, MEDIA_TYPES, Ask, Nets, decode, encode, port, workers

MOST_ONGOING = 512  # requests at a replica; more wait in the proxy
OBJECT_STORE_BYTES = 2**28
BATCHING = {"max_batch_size": MAX_REQUESTS, "batch_wait_timeout_s": MAX_WAIT_S}


@serve.deployment(num_replicas=workers(), max_ongoing_requests=MOST_ONGOING)
class Gan:
    """G and D."""

    def __init__(self):
        self.nets = Nets()

    @serve.batch(**BATCHING)
    async def sample(self, asked):
        """All requests of a batch."""
        return await asyncio.to_thread(self.nets.sample, asked)

    @serve.batch(**BATCHING)
    async def discriminate(self, uploads):
        """All requests of a batch."""
        return await asyncio.to_thread(self.nets.judge, uploads)

    async def __call__(self, request):
        """One request."""
        body = await request.body()
        if request.url.path == "/sample":
            ask = Ask.model_validate_json(body)
            return Response(encode(await self.sample(ask), ask), media_type=MEDIA_TYPES[ask.format])
        return Response(self.nets.verdicts(await self.discriminate(decode(body))), media_type="application/json")


if __name__ == "__main__":
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)) + 1,  # the proxy's and the controller's share is not ours to plan
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
    )
    serve.start(http_options={"host": HOST, "port": port()})
    serve.run(Gan.bind())
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()  # Serve's own end waits half a minute for its controller
