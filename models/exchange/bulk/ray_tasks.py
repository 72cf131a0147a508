"""Has shards made by tasks of a Ray cluster, which decides where they run and repeats those whose machine was lost.

Every machine has this package, finds the bundle at the same path, and writes to the same place.
"""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from models.exchange.bulk.plan import BulkError, Made
from models.exchange.bulk.worker import Task, made_or_reason

LOOKS_EVERY_S = 0.2  # for a signal to stop, while no task ends


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster of this address while the block lasts.

    Raises:
        BulkError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray  # noqa: PLC0415 - of the extra
    except ModuleNotFoundError:
        raise BulkError("--ray needs Ray: the ray extra brings it") from None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BulkError(f"no Ray cluster at {address}: {' '.join(str(error).split())}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def make_by_ray(
    task: Task, numbers: Iterable[int], is_stopped: Callable[[], bool], *, ray: Any, workers: int | None
) -> Generator[Made | int, None, None]:
    """Make shards, `workers` of them at a time, by default as many as the cluster has processors.

    It ends early, with the tasks, once `is_stopped`.

    Raises:
        BulkError: A shard can't be made.
    """
    make = ray.remote(num_cpus=1)(made_or_reason)
    waiting = iter(numbers)
    most = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    running = [make.remote(task, number) for number in islice(waiting, most)]
    try:
        while running and not is_stopped():
            done, running = ray.wait(running, timeout=LOOKS_EVERY_S)
            for one in done:
                yield _received(ray, one)
                running += [make.remote(task, number) for number in islice(waiting, 1)]
    finally:
        for one in running:
            ray.cancel(one, force=True)


def _received(ray: Any, one: Any) -> Made:
    try:
        told: Made | str = ray.get(one)
    except ray.exceptions.RayError as error:
        raise BulkError(f"Ray: {' '.join(str(error).split())}") from None
    if isinstance(told, str):
        raise BulkError(told)
    return told
