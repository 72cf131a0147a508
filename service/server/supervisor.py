"""Runs several workers as one service: hands out its connections, and passes on what they ask of one another.

The design, in short:

- A worker is a whole service, with an event loop, an engine on its share of the processors, and its share of the queue.
  Workers share no memory. One interpreter answers only so many small requests a second, however many cores there are.
- The supervisor alone listens. It passes each connection to the worker that has the fewest, of those that are ready if
  any is, over a socket of their own: where all listen on one port, the kernel deals connections out by hash, and of two
  both often go to one worker.
- Beside it each worker has a socket for messages, JSON by the line. A worker says at every beat how it is, and hears
  how the worst of the others is, so that each can answer probes for all. What it asks (metrics, to load a bundle) goes
  to all others, and their answers come back together.
- Once it has started, a worker keeps to its share of the processors, where they are ours alone to divide: its loop and
  its engine take turns, and find in a processor's caches what they left there.
- A signal goes to every worker; each drains as a single process does. A second one goes there as a message: where all
  processes of a service are signalled, as systemd does, a worker gets twice what was meant once.
- A worker that takes no more connections sees the end of the socket they come by after the last one that was sent: none
  is lost between the two.
- A worker that ends unasked, or is killed for being mute, ends the service: the others drain, and whoever runs us
  starts it again. So it is with a single process, and one way to fail is enough.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from service.cpu import set_affinity, shares
from service.server.listener import Acceptor
from service.server.signals import sighup_reloads
from service.worker_group import PROBES, Reasons

BEAT_S = 0.5
MUTE_S = 8.0  # no beat for so long: the service is not ready
LOST_S = 40.0  # and for so long: the worker will not come back by itself
LONGEST_LINE = 2**26  # all metrics of all workers, on one line

Message = dict[str, Any]

log = logging.getLogger(__name__)


class Worker:
    """One worker, as its supervisor sees it.

    Attributes:
        connections: Those that it was given and has not closed.
        reasons: For each probe, why it says no; None for yes.
        beat: When it was last heard (time.monotonic()); None before the first time.
        told: What it knows of the others.
        has_started: Whether it has loaded its bundles.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process, door: socket.socket) -> None:
        self.number = number
        self.process = process
        self.connections = 0
        self.reasons: Reasons = dict.fromkeys(PROBES, "it is being started")
        self.beat: float | None = None
        self.told: Reasons = {}
        self.has_started = False
        self._has_ended = False
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._door = door
        self._writer: asyncio.StreamWriter

    async def listen_to(self, messages: socket.socket) -> asyncio.StreamReader:
        """Open the way for messages; returns that of the worker's own."""
        reader, self._writer = await asyncio.open_unix_connection(sock=messages, limit=LONGEST_LINE)
        return reader

    def send(self, message: Message) -> None:
        """Send a message. One to a worker that has ended is lost."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def ask(self, what: Message) -> asyncio.Future[Any]:
        """Ask it something. Its answer is None where it ends before; who waits no more cancels it."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._asked.pop(number))
        if self._has_ended:
            answer.set_result(None)
        else:
            self.send({"ask": number, "what": what})
        return answer

    def answers(self, number: int, value: Any) -> None:
        """It has answered a question."""
        answer = self._asked.get(number)
        if answer is not None and not answer.done():
            answer.set_result(value)

    @property
    def takes_connections(self) -> bool:
        """Whether it has started to and has not stopped."""
        return self.beat is not None and self._door.fileno() >= 0

    def take(self, connection: socket.socket) -> bool:
        """Give it a connection; whether there was a way."""
        try:
            socket.send_fds(self._door, [b"+"], [connection.fileno()])
        except OSError:
            return False
        self.connections += 1
        return True

    def close_door(self) -> None:
        """Give it no more connections."""
        self._door.close()

    @property
    def is_mute(self) -> bool:
        """Whether it has not been heard of for too long."""
        return self.beat is not None and time.monotonic() - self.beat > MUTE_S

    def reason(self, probe: str) -> str | None:
        """What speaks against it."""
        reason = "it does not answer" if self.is_mute else self.reasons[probe]
        return None if reason is None else f"worker {self.number}: {reason}"

    def end(self) -> None:
        """Its process has ended."""
        self._has_ended = True
        self.close_door()
        for number in list(self._asked):
            self.answers(number, None)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


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
        self._acceptor = Acceptor(listener, self._hand_out)
        self._address = address
        self._arguments = arguments
        self._wanted = workers
        self._shares = shares(workers)
        self._workers: list[Worker] = []
        self._tasks: set[asyncio.Task[None]] = set()  # a loop alone does not keep its tasks alive
        self._code: int | None = None  # how this ends; None until it is about to
        self._is_told = False  # to end, by a signal
        self._has_to_reload = False  # by a signal, also those workers who could not hear it
        self._is_accepting = self._has_started = False

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
            if self._code is not None:  # told to stop meanwhile, which this one may not have heard
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
        return self._code or max(codes)

    async def _start(self, place: int) -> None:
        messages, its_messages = socket.socketpair()
        door, its_door = socket.socketpair()
        with its_messages, its_door:
            fds = its_messages.fileno(), its_door.fileno()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service.server.worker", *map(str, fds), *self._arguments),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=fds,
                start_new_session=True,  # a terminal's Ctrl-C is for us alone; we pass it on
            )
        door.settimeout(0)
        worker = Worker(place, process, door)
        reader = await worker.listen_to(messages)
        self._workers.append(worker)
        self._keep(self._hear(worker, reader))

    def _ended(self, worker: Worker, code: int) -> None:
        worker.end()
        self._accept_or_not()
        if self._code is not None:
            return
        log.critical("worker %d ended with exit code %d: stopping the others", worker.number, code)
        self._code = code if code > 0 else 1
        for other in self._workers:
            other.signal(signal.SIGTERM)

    def _pass_on(self, number: signal.Signals) -> None:
        self._has_to_reload |= number == signal.SIGHUP
        for worker in self._workers:
            if number == signal.SIGHUP:
                if worker.beat is not None:  # else it could end of it, and gets it once it is heard
                    worker.signal(number)
            elif self._is_told:
                worker.send({"again": number})
            else:
                worker.signal(number)
        if number != signal.SIGHUP:
            self._is_told = True
            self._code = self._code or 0

    async def _watch(self) -> None:
        """Look after those that can't speak for themselves any more."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            now = time.monotonic()
            late_s = now - before - BEAT_S  # a moment; or all of us have been suspended, and nobody could be heard
            for worker in self._workers:
                if worker.beat is not None:
                    worker.beat = min(now, worker.beat + late_s)
            self._tell_others()
            for worker in self._workers:
                if worker.beat is not None and now - worker.beat > LOST_S and worker.takes_connections:
                    log.critical("worker %d has not answered for %g s: ending it", worker.number, LOST_S)
                    worker.signal(signal.SIGKILL)

    def _tell_others(self) -> None:
        """Tell every worker how the worst of the others is, where that has changed."""
        for worker in self._workers:
            others = [other for other in self._workers if other is not worker]
            worst = {probe: next(filter(None, [other.reason(probe) for other in others]), None) for probe in PROBES}
            if worst != worker.told and worker.beat is not None:
                worker.told = worst
                worker.send({"others": worst})

    # What workers say.

    async def _hear(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while (line := await reader.readline()).endswith(b"\n"):  # the last one may be cut where its sender was
                self._take(worker, json.loads(line))

    def _take(self, worker: Worker, message: Message) -> None:
        if worker.beat is None and self._has_to_reload:
            worker.signal(signal.SIGHUP)
        worker.beat = time.monotonic()
        match message:
            case {"reasons": reasons}:
                worker.reasons = reasons
                self._tell_others()
                self._accept_or_not()
                if reasons["started"] is None and not worker.has_started:
                    self._note_start(worker)
                if not self._has_started and sum(one.has_started for one in self._workers) == self._wanted:
                    self._has_started = True
                    log.info("serving %s", self._address)
            case {"closed": connections}:
                worker.connections -= connections
            case {"closing": True}:
                self._close(worker)
            case {"ask": number, "what": what, "within_s": seconds}:
                self._keep(self._relay(worker, number, what, seconds))
            case {"answer": number, "value": value}:
                worker.answers(number, value)

    def _note_start(self, worker: Worker) -> None:
        worker.has_started = True
        if self._shares is not None:  # only now: loading is faster on all of them
            set_affinity(self._shares[worker.number - 1], worker.process.pid)

    async def _relay(self, asker: Worker, number: int, what: Message, seconds: float) -> None:
        """Ask all others what one worker wants to know, and give it their answers: null from one that gave none."""
        asked = [worker.ask(what) for worker in self._workers if worker is not asker]
        done, late = await asyncio.wait(asked, timeout=seconds) if asked else (set(), set())
        values = [answer.result() if answer in done else None for answer in asked]
        values += [None] * (self._wanted - 1 - len(asked))  # those that have not been started
        for answer in late:
            answer.cancel()
        asker.send({"answer": number, "value": values})

    # Connections.

    def _close(self, worker: Worker) -> None:
        worker.close_door()
        self._accept_or_not()

    def _accept_or_not(self) -> None:
        """While nobody takes connections, clients wait in the listener's queue."""
        wanted = any(worker.takes_connections for worker in self._workers)
        if wanted == self._is_accepting:
            return
        self._is_accepting = wanted
        if wanted:
            self._acceptor.start()
            return
        self._acceptor.stop()
        if self._code is not None:
            self._listener.close()  # what comes now is refused at once

    def _hand_out(self, connection: socket.socket) -> None:
        def rank(worker: Worker) -> tuple[bool, bool, int]:
            # One that is still loading would refuse what another can answer.
            return worker.is_mute, worker.reason("ready") is not None, worker.connections

        takers = sorted((worker for worker in self._workers if worker.takes_connections), key=rank)
        if not any(worker.take(connection) for worker in takers):
            raise OSError("no worker could take it")
        connection.close()  # this end of it

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _exit_code(code: int) -> int:
    """Of a worker that was told to stop. A signal's number, negative, is that of one which a signal has ended."""
    if code >= 0:
        return code
    return 0 if -code in {signal.SIGTERM, signal.SIGINT} else 1  # it had not begun to listen to them: nothing to drain
