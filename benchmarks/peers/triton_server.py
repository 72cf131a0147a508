"""The service's work under Triton, through nvidia-pytriton: functions of arrays, batched by a server in C++.

Its protocol carries tensors: a reply is uint8 pixels, binary after a JSON head, and no picture is encoded. `sample`
draws one image a request, in batches; `sample_many` draws `count` images of one seed; `discriminate` gives a logit an
image.
"""

import os
import signal
import sysconfig
from functools import wraps

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.peers.work import HOST, MAX_REQUESTS, MAX_WAIT_S, ROWS_AT_ONCE, Ask, Nets, port, workers

IMAGE = (28, 28, 1)


def bind(triton, nets):
    """Say what is served: functions, their batches, and what they take and give."""

    @batch
    def sample(seed):
        return {"images": np.concatenate(nets.sample([Ask(seed=number) for number in seed[:, 0].tolist()]))}

    def sample_many(requests):
        asked = [Ask(seed=request["seed"].item(), count=request["count"].item()) for request in requests]
        return [{"images": images} for images in nets.sample(asked)]

    @batch
    def discriminate(images):
        return {"logits": nets.judge([images])[0][:, np.newaxis]}

    def batched(rows):
        delay = DynamicBatcher(max_queue_delay_microseconds=round(1e6 * MAX_WAIT_S))
        return ModelConfig(max_batch_size=rows, batcher=delay)

    seed, count = (Tensor(name=name, dtype=np.int64, shape=(1,)) for name in ("seed", "count"))
    pixels = Tensor(name="images", dtype=np.uint8, shape=IMAGE)
    many = Tensor(name="images", dtype=np.uint8, shape=(-1, *IMAGE))
    logits = Tensor(name="logits", dtype=np.float32, shape=(1,))
    triton.bind("sample", _copies(sample), [seed], [pixels], config=batched(MAX_REQUESTS))
    triton.bind("sample_many", _copies(sample_many), [seed, count], [many], config=ModelConfig(batching=False))
    triton.bind("discriminate", _copies(discriminate), [pixels], [logits], config=batched(ROWS_AT_ONCE))


def _copies(function):
    """One for each worker; Triton tells them apart by their identity."""

    def copy():
        @wraps(function)
        def call(*given):
            return function(*given)

        return call

    return [copy() for _ in range(workers())]


def serve():
    """Serve until told to stop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = TritonConfig(http_address=HOST, http_port=port(), allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as server:
        bind(server, Nets())
        server.serve()


if __name__ == "__main__":
    # Triton's own interpreters load the first libpython that the system's loader finds, and this one's library.
    libraries = (sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH"))
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    serve()
