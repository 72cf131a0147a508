"""Runs several workers as one service: hands out connections, and passes on what the workers ask of one another.

The design, in short:

- A worker is a whole service, with an event loop, an engine on its share of the processors, and its share of the queue.
  Workers share no memory. More than one pays because a single interpreter limits how many small requests are answered
  a second, however many cores there are.
- Only the supervisor listens. It passes each connection, over a Unix socket, to the worker that has the fewest,
  preferring those that are ready. Were all workers to listen on one port, the kernel would deal connections out by
  hash, and of two connections both would often go to one worker.
- A second socket for each worker carries messages (channel.py). With every heartbeat a worker says how it is, and it
  is told how the worst of the others is, so that each can answer probes for all. A question that one worker asks
  (metrics, loading a bundle) goes to all others, and their answers come back together.
- Once a worker has started, it is bound to its share of the processors, where these are ours alone to divide: its event
  loop and its engine take turns, and so find their data still in the caches.
- A signal is passed on to every worker, and each drains as a single process does. The second signal is passed on as a
  message: systemd signals all processes of a service, so a worker would get each signal twice that was sent once.
- A worker that takes no more connections has its connection socket closed. It reads that socket to the end first, so
  no connection is lost.
- A worker that ends unasked, or is killed because it is unresponsive, ends the service: the others drain, and whatever
  started the service starts it again, just as when a single process fails.
"""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from service.cpu import set_affinity, shares
from service.server.channel import HEARTBEAT_S, Channel, Message
from service.server.listener import Acceptor
from service.server.signals import sighup_reloads
from service.worker_group import PROBES, Reasons

UNRESPONSIVE_S = 8.0  # without a heartbeat for so long, a worker makes the service not ready
DEAD_S = 40.0  # and after so long it is killed, for it will not recover by itself

log = logging.getLogger(__name__)


class Worker:
    """One worker, as its supervisor sees it.

    Args:
        number: From 1.
        process: It, or something with `send_signal`.
        connection_socket: Where it receives connections.
        channel: For messages.

    Attributes:
        connections: How many it was given and has not closed.
        reasons: For each probe, why it says no; None for yes.
        last_heartbeat: When it last sent anything (time.monotonic()); None before the first time.
        told: What it was told of the others.
        has_started: Whether it has loaded its bundles.
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
        self.told: Reasons = {}
        self.has_started = False
        self._connection_socket = connection_socket
        self._has_ended = False
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    # Questions.

    def ask(self, what: Message) -> asyncio.Future[Any]:
        """Its answer to a question; None if it ends before it answers. Cancel the future to stop waiting."""
        number = next(self._numbers)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._questions.pop(number))
        if self._has_ended:
            answer.set_result(None)
        else:
            self.channel.send({"ask": number, "what": what})
        return answer

    def answers(self, number: int, value: Any) -> None:
        """It has answered the question of this number."""
        answer = self._questions.get(number)
        if answer is not None and not answer.done():
            answer.set_result(value)

    # Connections.

    @property
    def takes_connections(self) -> bool:
        """Whether it has begun to take connections and has not stopped."""
        return self.last_heartbeat is not None and self._connection_socket.fileno() >= 0

    def take(self, connection: socket.socket) -> bool:
        """Give it a connection. Returns False if its socket is full or closed."""
        try:
            socket.send_fds(self._connection_socket, [b"+"], [connection.fileno()])
        except OSError:
            return False
        self.connections += 1
        return True

    def close(self) -> None:
        """Give it no more connections."""
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

    def excuse(self, seconds: float) -> None:
        """Do not count so many seconds, in which its heartbeats could not be read, as its silence."""
        if self.last_heartbeat is not None:
            self.last_heartbeat = min(time.monotonic(), self.last_heartbeat + seconds)

    def end(self) -> None:
        """Its process has ended."""
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
        # A worker that is still loading would refuse what another can answer.
        return worker.is_unresponsive, worker.reason("ready") is not None, worker.connections

    takers = sorted((worker for worker in workers if worker.takes_connections), key=rank)
    if not any(worker.take(connection) for worker in takers):
        raise OSError("no worker could take it")
    connection.close()


async def ask_all(workers: Sequence[Worker], wanted: int, what: Message, within_s: float) -> list[Any]:
    """The answers of so many workers: None for one that gives none in time, or that does not exist yet."""
    questions = [worker.ask(what) for worker in workers]
    if questions:
        _, late = await asyncio.wait(questions, timeout=within_s)
        for question in late:
            question.cancel()
    values = [None if question.cancelled() else question.result() for question in questions]
    return values + [None] * (wanted - len(values))


def kill_the_dead(workers: Iterable[Worker]) -> None:
    """Kill workers that have been silent for too long, unless they are on their way out."""
    for worker in workers:
        if worker.silent_s > DEAD_S and worker.takes_connections:
            log.critical("worker %d has not answered for %g s: ending it", worker.number, DEAD_S)
            worker.signal(signal.SIGKILL)


class Supervisor:
    """The parent of all workers.

    Args:
        listener: Where clients connect.
        address: The same for the log.
        arguments: The command line. Each worker reads it, and the environment, for itself.
        workers: How many.
    """

    def __init__(self, listener: socket.socket, address: str, arguments: Sequence[str], workers: int) -> None:
        self._listener = listener
        self._acceptor = Acceptor(listener, lambda connection: hand_out(connection, self._workers))
        self._address = address
        self._arguments = arguments
        self._wanted = workers
        self._shares = shares(workers)
        self._workers: list[Worker] = []
        self._tasks: set[asyncio.Task[None]] = set()  # a loop alone does not keep its tasks alive
        self._exit_code: int | None = None  # None until the end has begun
        self._was_told_to_stop = False
        self._has_to_reload = False  # SIGHUP came, perhaps before some workers could hear it
        self._is_accepting = False

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
            if self._exit_code is not None:  # told to stop meanwhile, which this worker may not have heard
                self._workers[-1].signal(signal.SIGTERM)
                break
        watch = loop.create_task(self._watch())
        ends = {loop.create_task(worker.process.wait()): worker for worker in self._workers}
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
            fds = its_messages.fileno(), its_connections.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.server.worker", *map(str, fds), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # a terminal sends Ctrl-C to us alone, and we pass it on
            )
        connections.settimeout(0)
        worker = Worker(number, process, connections, await Channel.open(messages))
        self._workers.append(worker)
        self._keep(self._listen_to(worker))

    def _ended(self, worker: Worker, code: int) -> None:
        worker.end()
        self._accept_or_not()
        if self._exit_code is not None:
            return
        log.critical("worker %d ended with exit code %d: stopping the others", worker.number, code)
        self._exit_code = code if code > 0 else 1
        for other in self._workers:
            other.signal(signal.SIGTERM)

    def _pass_on(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._has_to_reload = True
            for worker in self._workers:
                if worker.last_heartbeat is not None:  # before, it could die of it; it gets it with its first heartbeat
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
            # Usually a moment. After a suspension of the whole service, the time in which nobody could be heard.
            late_s = time.monotonic() - before - HEARTBEAT_S
            for worker in self._workers:
                worker.excuse(late_s)
            self._tell_others()
            kill_the_dead(self._workers)

    def _tell_others(self) -> None:
        """Tell every worker how the worst of the others is, where that has changed."""
        for worker in self._workers:
            others = [other for other in self._workers if other is not worker]
            worst = {probe: next(filter(None, [other.reason(probe) for other in others]), None) for probe in PROBES}
            if worst != worker.told and worker.last_heartbeat is not None:
                worker.told = worst
                worker.channel.send({"others": worst})

    # What workers say.

    async def _listen_to(self, worker: Worker) -> None:
        async for message in worker.channel.received():
            if worker.last_heartbeat is None and self._has_to_reload:
                worker.signal(signal.SIGHUP)
            worker.last_heartbeat = time.monotonic()
            self._heed(worker, message)

    def _heed(self, worker: Worker, message: Message) -> None:
        match message:
            case {"reasons": reasons}:
                worker.reasons = reasons
                self._tell_others()
                self._accept_or_not()
                if reasons["started"] is None and not worker.has_started:
                    self._note_start(worker)
            case {"closed": connections}:
                worker.connections -= connections
            case {"closing": True}:
                worker.close()
                self._accept_or_not()
            case {"ask": number, "what": what, "within_s": seconds}:
                self._keep(self._relay(worker, number, what, seconds))
            case {"answer": number, "value": value}:
                worker.answers(number, value)

    def _note_start(self, worker: Worker) -> None:
        worker.has_started = True
        if self._shares is not None:  # only now: loading is faster on all of them
            set_affinity(self._shares[worker.number - 1], worker.process.pid)
        if sum(one.has_started for one in self._workers) == self._wanted:
            log.info("serving %s", self._address)

    async def _relay(self, asker: Worker, number: int, what: Message, within_s: float) -> None:
        """Ask all others what one worker wants to know, and send it their answers."""
        others = [worker for worker in self._workers if worker is not asker]
        asker.channel.send({"answer": number, "value": await ask_all(others, self._wanted - 1, what, within_s)})

    # Connections.

    def _accept_or_not(self) -> None:
        """While no worker takes connections, clients wait in the listener's queue."""
        wanted = any(worker.takes_connections for worker in self._workers)
        if wanted == self._is_accepting:
            return
        self._is_accepting = wanted
        if wanted:
            self._acceptor.start()
            return
        self._acceptor.stop()
        if self._exit_code is not None:
            self._listener.close()  # what comes now is refused at once

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _exit_code(code: int) -> int:
    """The exit code of a worker that was told to stop. A negative one is the number of the signal that killed it."""
    if code >= 0:
        return code
    # SIGTERM and SIGINT kill one that does not handle them yet: it had nothing to drain.
    return 0 if -code in {signal.SIGTERM, signal.SIGINT} else 1
