"""Runs several workers as one service: passes connections to them, and messages between them.

The design, in short:

- A worker is a whole service, with an event loop, an engine on its share of the processors, and its share of the queue.
  Workers share no memory. More than one pays because a single interpreter limits how many small requests are answered
  a second, however many cores there are.
- Only the supervisor listens. It passes each connection, over a Unix socket, to the worker that has the fewest,
  preferring workers that are ready. If all workers listened on one port, the kernel would distribute connections by
  hash, and would often give both of two connections to one worker.
- A second socket for each worker carries messages (channel.py). With every heartbeat a worker reports how it would
  answer each probe. The supervisor tells each worker the worst answer of the others, so that each can answer probes for
  the whole service. A question of one worker (metrics, loading a bundle) goes to all others, and their answers come
  back together.
- Once a worker has started, it is bound to its share of the processors, if the service has them to itself: its event
  loop and its engine take turns, and find their data still in the caches.
- Where keys have limits, workers count in one file in memory (service/engine/key_limits.py), which they inherit.
- A signal is passed on to every worker, and each drains as a single process does. The second signal is passed on as a
  message: systemd signals all processes of a service, so a worker may get one signal twice.
- When a worker stops taking connections, the supervisor closes its end of their socket. The worker reads that socket to
  the end, so no connection is lost.
- A worker that ends by itself, or is killed because it is unresponsive, ends the service: the others drain, and
  whatever started the service starts it again, just as when a single process fails.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import IO, Any

from service.machine.cpu import set_affinity, shares
from service.machine.worker_group import PROBES, Reasons
from service.server.channel import HEARTBEAT_S, Channel, Message
from service.server.listener import Acceptor
from service.server.signals import sighup_reloads

UNRESPONSIVE_S = 8.0  # without a heartbeat for so long, a worker makes the service not ready
DEAD_S = 40.0  # after so long it is killed, because it will not recover by itself

log = logging.getLogger(__name__)


class Worker:
    """The supervisor's view of one worker.

    Args:
        number: From 1.
        process: The worker's process.
        connection_socket: Connections are sent over it.
        channel: For messages.

    Attributes:
        connections: Number of connections that it was given and has not closed.
        reasons: For each probe, why it says no; None for yes.
        last_heartbeat: When it last sent anything (time.monotonic()); None before the first message.
        known_others: The reasons of the others that were last sent to it.
        has_started: Whether it has loaded its bundles.
        listening: Reads its messages, until it ends.
    """

    def __init__(
        self, number: int, process: asyncio.subprocess.Process, connection_socket: socket.socket, channel: Channel
    ) -> None:
        self.number = number
        self.process = process
        self.channel = channel
        self.connections = 0
        self.reasons: Reasons = dict.fromkeys(PROBES, "it is being started")
        self.last_heartbeat: float | None = None
        self.known_others: Reasons = {}
        self.has_started = False
        self.listening: asyncio.Task[None] | None = None
        self._connection_socket = connection_socket
        self._has_ended = False
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    # Questions.

    def ask(self, what: Message) -> asyncio.Future[Any]:
        """Send a question. The future is its answer, or None if it ends first; cancel it to stop waiting."""
        number = next(self._numbers)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._questions.pop(number))
        if self._has_ended:
            answer.set_result(None)
        else:
            self.channel.send({"ask": number, "what": what})
        return answer

    def answers(self, number: int, value: Any) -> None:
        """Pass on its answer to the question of this number."""
        answer = self._questions.get(number)
        if answer is not None and not answer.done():
            answer.set_result(value)

    # Connections.

    @property
    def takes_connections(self) -> bool:
        """Whether it has begun to take connections and not stopped since."""
        return self.last_heartbeat is not None and self._connection_socket.fileno() >= 0

    def take(self, connection: socket.socket) -> bool:
        """Send it a connection. Returns False if its socket is full or closed."""
        try:
            socket.send_fds(self._connection_socket, [b"+"], [connection.fileno()])
        except OSError:
            return False
        self.connections += 1
        return True

    def close(self) -> None:
        """Send it no more connections."""
        self._connection_socket.close()

    # Health.

    @property
    def silent_s(self) -> float:
        """Seconds since its last heartbeat; 0 before the first."""
        return 0.0 if self.last_heartbeat is None else time.monotonic() - self.last_heartbeat

    @property
    def is_unresponsive(self) -> bool:
        """Whether its last heartbeat is too long ago."""
        return self.silent_s > UNRESPONSIVE_S

    def reason(self, probe: str) -> str | None:
        """Why it says no to this probe; None for yes."""
        reason = "it does not answer" if self.is_unresponsive else self.reasons[probe]
        return None if reason is None else f"worker {self.number}: {reason}"

    def discount_silence(self, seconds: float) -> None:
        """Leave out so many seconds, in which no heartbeat could be read, from its silence."""
        if self.last_heartbeat is not None:
            self.last_heartbeat = min(time.monotonic(), self.last_heartbeat + seconds)

    async def end_of_process(self) -> int:
        """Wait until its process has ended and all its messages are read. Returns the exit code."""
        code = await self.process.wait()
        if self.listening is not None:
            await asyncio.wait([self.listening], timeout=HEARTBEAT_S)
        return code

    def end(self) -> None:
        """Note that its process has ended."""
        self._has_ended = True
        self.close()
        for number in list(self._questions):
            self.answers(number, None)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


def hand_out(connection: socket.socket, workers: Iterable[Worker]) -> None:
    """Give a connection to the worker that has the fewest, preferring responsive and ready ones, and close our copy.

    Raises:
        OSError: No worker could take it.
    """

    def rank(worker: Worker) -> tuple[bool, bool, int]:
        # A worker that is still loading would refuse requests that another can answer.
        return worker.is_unresponsive, worker.reason("ready") is not None, worker.connections

    takers = sorted((worker for worker in workers if worker.takes_connections), key=rank)
    if not any(worker.take(connection) for worker in takers):
        raise OSError("no worker could take it")
    connection.close()


async def ask_all(workers: Sequence[Worker], wanted: int, what: Message, within_s: float) -> list[Any]:
    """Ask these workers; returns `wanted` answers. None stands for one that is late or does not exist yet."""
    questions = [worker.ask(what) for worker in workers]
    if questions:
        _, late = await asyncio.wait(questions, timeout=within_s)
        for question in late:
            question.cancel()
    values = [None if question.cancelled() else question.result() for question in questions]
    return values + [None] * (wanted - len(values))


def kill_dead_workers(workers: Iterable[Worker]) -> None:
    """Kill workers that have been silent for too long, unless they are already draining."""
    for worker in workers:
        if worker.silent_s > DEAD_S and worker.takes_connections:
            log.critical("worker %d has not answered for %g s: ending it", worker.number, DEAD_S)
            worker.signal(signal.SIGKILL)


class Supervisor:
    """The parent of all workers.

    Args:
        listener: Where clients connect.
        address: Where it is reached, for the log.
        arguments: The command line, which each worker parses itself.
        workers: Number of workers.
        size: The number and why, as fields of the log's line at the start.
    """

    def __init__(
        self,
        listener: socket.socket,
        address: str,
        arguments: Sequence[str],
        workers: int,
        size: Mapping[str, object],
    ) -> None:
        self._listener = listener
        self._acceptor = Acceptor(listener, lambda connection: hand_out(connection, self._workers))
        self._address = address
        self._arguments = arguments
        self._wanted = workers
        self._size = size
        self._shares = shares(workers)
        self._limits_file = _open_limits_file()
        self._workers: list[Worker] = []
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references to tasks
        self._exit_code: int | None = None  # None until the service begins to end
        self._was_told_to_stop = False
        self._reload_requested = False  # SIGHUP came, perhaps before some workers could handle it
        self._is_accepting = False
        self._failure: str | None = None  # why a worker could not start

    async def run(self) -> int:
        """Serve until a signal or a worker's end; returns the exit code."""
        loop = asyncio.get_running_loop()
        signals = [signal.SIGTERM, signal.SIGINT]
        if sighup_reloads():
            signals.append(signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self._pass_on, number)
        for place in range(1, self._wanted + 1):
            await self._start(place)
            if self._exit_code is not None:  # told to stop meanwhile, perhaps before this worker could be signalled
                self._workers[-1].signal(signal.SIGTERM)
                break
        watch = loop.create_task(self._watch())
        ends = {loop.create_task(worker.end_of_process()): worker for worker in self._workers}
        codes = []
        while ends:
            for end in (await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED))[0]:
                self._ended(ends.pop(end), end.result())
                codes.append(_exit_code(end.result()))
        watch.cancel()
        self._listener.close()
        return self._exit_code or max(codes)

    async def _start(self, number: int) -> None:
        messages, its_messages = socket.socketpair()
        connections, its_connections = socket.socketpair()
        with its_messages, its_connections:
            fds = its_messages.fileno(), its_connections.fileno(), self._limits_file.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.server.worker", *map(str, fds), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # so that a terminal sends Ctrl-C to the supervisor alone, which passes it on
            )
        connections.settimeout(0)
        worker = Worker(number, process, connections, await Channel.open(messages))
        self._workers.append(worker)
        worker.listening = self._spawn(self._listen_to(worker))

    def _ended(self, worker: Worker, code: int) -> None:
        worker.end()
        self._update_accepting()
        if self._exit_code is not None:
            return
        if self._failure is None:
            log.critical("worker %d ended with exit code %d: stopping the others", worker.number, code)
        self._exit_code = code if code > 0 else 1
        for other in self._workers:  # one that still loads has nothing to drain, and no more to say
            other.signal(signal.SIGTERM if other.has_started else signal.SIGKILL)

    def _pass_on(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._reload_requested = True
            for worker in self._workers:
                if (
                    worker.last_heartbeat is not None
                ):  # earlier it might die of it; it is signalled at its first heartbeat
                    worker.signal(number)
            return
        for worker in self._workers:
            if self._was_told_to_stop:
                worker.channel.send({"again": number})
            else:
                worker.signal(number)
        self._was_told_to_stop = True
        self._exit_code = self._exit_code or 0

    async def _watch(self) -> None:
        """Notice workers that have become unresponsive."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)
            # Usually next to nothing. If the whole service was suspended, the time in which no heartbeat could be read.
            late_s = time.monotonic() - before - HEARTBEAT_S
            for worker in self._workers:
                worker.discount_silence(late_s)
            self._tell_others()
            kill_dead_workers(self._workers)

    def _tell_others(self) -> None:
        """Send every worker the worst reasons of the others, if they have changed."""
        for worker in self._workers:
            others = [other for other in self._workers if other is not worker]
            worst = {probe: next(filter(None, [other.reason(probe) for other in others]), None) for probe in PROBES}
            if worst != worker.known_others and worker.last_heartbeat is not None:
                worker.known_others = worst
                worker.channel.send({"others": worst})

    # Messages from workers.

    async def _listen_to(self, worker: Worker) -> None:
        async for message in worker.channel.received():
            if worker.last_heartbeat is None and self._reload_requested:
                worker.signal(signal.SIGHUP)
            worker.last_heartbeat = time.monotonic()
            self._handle(worker, message)

    def _handle(self, worker: Worker, message: Message) -> None:
        match message:
            case {"reasons": reasons}:
                worker.reasons = reasons
                self._tell_others()
                self._update_accepting()
            case {"serves": serves}:
                self._note_start(worker, serves)
            case {"cannot_start": reason}:
                if self._failure is None:  # most likely the others fail in the same way
                    self._failure = reason
                    log.error("cannot start: %s", reason)
            case {"closed": connections}:
                worker.connections -= connections
            case {"closing": True}:
                worker.close()
                self._update_accepting()
            case {"ask": number, "what": what, "within_s": seconds}:
                self._spawn(self._relay(worker, number, what, seconds))
            case {"answer": number, "value": value}:
                worker.answers(number, value)

    def _note_start(self, worker: Worker, serves: Message) -> None:
        worker.has_started = True
        if self._shares is not None:  # not earlier: loading is faster on all processors
            set_affinity(self._shares[worker.number - 1], worker.process.pid)
        if sum(one.has_started for one in self._workers) == self._wanted:
            log.info("serving %s", self._address, extra={"fields": {**serves, **self._size}})

    async def _relay(self, asker: Worker, number: int, what: Message, within_s: float) -> None:
        """Pass one worker's question to all others, and send it their answers."""
        others = [worker for worker in self._workers if worker is not asker]
        asker.channel.send({"answer": number, "value": await ask_all(others, self._wanted - 1, what, within_s)})

    # Connections.

    def _update_accepting(self) -> None:
        """Accept while any worker takes connections; otherwise clients wait in the listener's queue."""
        wanted = any(worker.takes_connections for worker in self._workers)
        if wanted == self._is_accepting:
            return
        self._is_accepting = wanted
        if wanted:
            self._acceptor.start()
            return
        self._acceptor.stop()
        if self._exit_code is not None:
            self._listener.close()  # from now on clients are refused

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _open_limits_file() -> IO[bytes]:
    """An empty file without a name, in memory where the system has such. It is filled where keys have limits."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("gan-service limits"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _exit_code(code: int) -> int:
    """A worker's exit code as that of the service. A negative one is the signal that killed it."""
    if code >= 0:
        return code
    # SIGTERM and SIGINT kill a worker that does not handle them yet, and has nothing to drain.
    return 0 if -code in {signal.SIGTERM, signal.SIGINT} else 1
