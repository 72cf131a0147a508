"""Has shards made by processes of this machine.

Each has a pipe to this one, over which come the numbers of shards, and go images as they are drawn and records of
shards. A process whose pipe is at its end, because this one was killed, stops at the next block of images.
"""

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

import torch

from models.exchange.bulk.plan import BulkError, Made
from models.exchange.bulk.worker import Task, made_or_reason

LOOKS_EVERY_S = 0.2  # for a signal to stop, while nothing comes from the processes


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_by_processes(
    task: Task, numbers: Iterable[int], is_stopped: Callable[[], bool], *, workers: int
) -> Generator[Made | int, None, None]:
    """Make shards. Gives each when it is whole, and before it the numbers of its images as they are drawn.

    It ends early, with the processes, once `is_stopped`.

    Raises:
        BulkError: A shard can't be made, or a process ended.
    """
    waiting, running = iter(numbers), dict[Connection, BaseProcess]()
    try:
        for number in islice(waiting, workers):
            connection, process = _start(task)
            running[connection] = process
            _give(connection, number)
        while running and not is_stopped():
            for connection in cast("list[Connection]", wait(list(running), LOOKS_EVERY_S)):
                told = _received(connection, running[connection])
                yield told
                if isinstance(told, Made):
                    following = next(waiting, None)
                    _give(connection, following)
                    if following is None:
                        running.pop(connection).join()
                        connection.close()
    finally:
        for process in running.values():
            process.kill()
        for connection, process in running.items():
            process.join()
            connection.close()


def _start(task: Task) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, task))
    with _without_signals():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _without_signals() -> Iterator[None]:
    """Processes that are started meanwhile never hear a signal to stop: a terminal sends Ctrl-C to all of them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first start would start multiprocessing's tracker too, and that lets the signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _give(connection: Connection, number: int | None) -> None:
    with suppress(ConnectionError):  # that it has ended is seen where its words are awaited
        connection.send(number)


def _received(connection: Connection, process: BaseProcess) -> Made | int:
    """What a process tells."""
    try:
        told: Made | int | str = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        reason = f"a process that made shards ended with exit code {process.exitcode}"
        raise BulkError(f"{reason}; where memory was short, which -9 may mean, use fewer --workers") from None
    if isinstance(told, str):
        raise BulkError(told)
    return told


def _work(connection: Connection, task: Task) -> None:
    """What a process does: shards, until there are no more or nobody listens."""
    torch.set_num_threads(1)

    def tell(images: int) -> None:
        if connection.poll():  # nothing is sent to a process that is at work: this is the end
            raise EOFError
        connection.send(images)

    with suppress(EOFError, ConnectionError):
        while (number := connection.recv()) is not None:
            connection.send(made_or_reason(task, number, tell))
