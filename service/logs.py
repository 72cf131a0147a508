"""Log lines on stderr, for people or as JSON, each with the id of the request that caused it."""

import contextlib
import itertools
import json
import logging
import os
import secrets
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic_core import PydanticSerializationError, to_json

STDERR = 2
PIPE_BYTES = 4096  # POSIX promises 512, Linux this: a write of more may be cut by another process' write
QUEUE_BYTES = 2**20  # some thousands of lines: a second of a busy service
PAUSE_S = 0.01  # between two writes, so that a busy loop does not change places with the writing thread all the time
END_S = 2.0  # so long the end of the process waits for whoever reads the log

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class RequestFacts:
    """What is known of the request that is being answered; the edge fills it in as it learns more."""

    id: str
    method: str
    route: str  # template, or `unmatched`: never the raw path, which is the client's
    arrived_s: float  # time.monotonic()
    bundle: str | None = None
    count: int | None = None


_current: ContextVar[RequestFacts | None] = ContextVar("current_request", default=None)
_PROCESS = secrets.token_hex(10)
_numbers = itertools.count()


def new_request_id() -> str:
    """An id that no other request has."""
    # Unique, not secret: the system's random numbers for each request would cost more than all else of a small one.
    return f"{_PROCESS}{next(_numbers):012x}"


def enter_request(facts: RequestFacts) -> None:
    """From here on, this task and those it starts work for this request."""
    _current.set(facts)


def current_request() -> RequestFacts:
    """The request that this task works for; only tasks of a request may ask."""
    facts = _current.get()
    assert facts is not None, "outside a request"  # noqa: S101 - our bug if so
    return facts


def current_route() -> str:
    """Route template of the request that this task works for, as a metric's label."""
    facts = _current.get()
    return facts.route if facts else "unmatched"


class _Formatter(logging.Formatter):
    """One line for each record, from its parts."""

    def line(self, seconds: float, level: str, logger: str, message: str, facts: dict[str, object]) -> str:
        """The line without a traceback; `seconds` is Unix time."""
        raise NotImplementedError


class ConsoleFormatter(_Formatter):
    """One readable line: UTC time, level, message, then `key=value` facts; a traceback follows on lines of its own."""

    def line(self, seconds: float, level: str, logger: str, message: str, facts: dict[str, object]) -> str:  # noqa: ARG002
        """See the class."""
        shown = "".join([f" {key}={value}" for key, value in facts.items()])
        return f"{_time(seconds)} {level:<7} {message}{shown}"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without the traceback."""
        return self.line(record.created, record.levelname, record.name, record.message, _facts(record))


class JsonFormatter(_Formatter):
    """One JSON object on one line, whatever the message holds."""

    def line(self, seconds: float, level: str, logger: str, message: str, facts: dict[str, object]) -> str:
        """See the class."""
        head = {"time": _time(seconds), "level": level.lower(), "logger": logger, "message": message}
        with contextlib.suppress(PydanticSerializationError):  # bytes that are no text, as file names may have
            line = to_json(head | facts, fallback=str)
            if line.isascii():
                return line.decode()
        # Escaped, or a terminal's encoding and the line ends that Unicode knows would break it; that takes longer.
        return json.dumps(head | facts, default=str)

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        facts = _facts(record)
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return self.line(record.created, record.levelname, record.name, record.getMessage(), facts)


def _time(seconds: float) -> str:
    second, rest = divmod(seconds, 1)
    return f"{_second(int(second))}.{int(1000 * rest):03d}Z"


@lru_cache(maxsize=1)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """Facts handed over with `extra={"facts": …}`, and the id of the request in whose task the line was written."""
    facts: dict[str, object] = dict(getattr(record, "facts", {}))
    request = _current.get()
    if request is not None:
        facts["request_id"] = request.id
    return facts


class _Lines(logging.Handler):
    """Hands lines to a thread that writes them, so that nobody else ever waits for whoever reads the log.

    At most `QUEUE_BYTES` of them wait. What has no room then, or can't be written, is lost; the log says how many lines
    that were as soon as it can. Nothing less than a thread will do: a pipe that has room may have none after another
    worker's line, one may not be told not to block without its other writers being told so too, and a file on a disk
    that hangs always seems to have room.

    Attributes:
        dropped: Lines that were lost.
    """

    def __init__(self, formatter: _Formatter, fd: int) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.line = formatter.line
        self.dropped = 0
        self._untold = 0  # of these, lines that the log does not speak of yet
        self._fd = fd
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._has_news = self._is_writing = self._is_closed = False
        self._changed = threading.Condition()  # all of the above
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 - logging's way: what can't be logged harms nobody
            line = self.line(record.created, "ERROR", record.name, f"a line could not be made: {error!r}", {})
        self.put(line)

    def put(self, line: str) -> None:
        """Have a line written, if there is room."""
        encoded = f"{line}\n".encode(errors="backslashreplace")
        with self._changed:
            if self._waiting_bytes + len(encoded) > QUEUE_BYTES:
                self._lose(1)
            else:
                self._waiting.append(encoded)
                self._waiting_bytes += len(encoded)
            self._has_news = True
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._has_news or self._is_writing), END_S)

    def close(self) -> None:
        """End the thread, once it has written all."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._has_news or self._is_closed)
                if not self._has_news:
                    return
                self._has_news, self._is_writing = False, True
                lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
                untold = self._untold
            for piece in _pieces(lines):
                if not self._write(piece):
                    self._lose(len(piece))
            if untold and self._write([self._notice(untold)]):
                with self._changed:
                    self._untold -= untold
            time.sleep(PAUSE_S)

    def _lose(self, lines: int) -> None:
        with self._changed:
            self.dropped += lines
            self._untold += lines

    def _notice(self, lines: int) -> bytes:
        text = "log lines were lost: they could not be written in time"
        return f"{self.line(time.time(), 'WARNING', __name__, text, {'lines': lines})}\n".encode()

    def _write(self, piece: list[bytes]) -> bool:
        """Write lines, for as long as that takes; False where it fails, as on a full disk."""
        rest = b"".join(piece)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # another process, which writes to the same place, has made it so
                    select.select((), (self._fd,), ())
        except OSError:
            return False
        return True


def _pieces(lines: list[bytes]) -> Iterator[list[bytes]]:
    """The lines in pieces that no other process' lines can get into, but where a single one is longer than that."""
    size, piece = 0, list[bytes]()
    for line in lines:
        if piece and size + len(line) > PIPE_BYTES:
            yield piece
            size, piece = 0, []
        piece.append(line)
        size += len(line)
    if piece:
        yield piece


def lines_dropped() -> int:
    """Lines that this process' log has lost."""
    return sum(handler.dropped for handler in logging.root.handlers if isinstance(handler, _Lines))


def log_facts(log: logging.Logger, level: int, message: str, facts: dict[str, object]) -> None:
    """Write a line with facts, in less time than `log.log(level, message, extra={"facts": facts})` takes.

    Where ours is the only handler, as in a service, no record is made. The facts name the request, if there is one.
    """
    if not log.isEnabledFor(level):
        return
    handlers = logging.root.handlers
    if len(handlers) == 1 and isinstance(handlers[0], _Lines):
        lines = handlers[0]
        lines.put(lines.line(time.time(), logging.getLevelName(level), log.name, message, facts))
    else:
        log.log(level, message, extra={"facts": facts})


def set_up_logs(form: Literal["console", "json"], level: str, fd: int = STDERR) -> None:
    """Send every logger's lines, uvicorn's and Python's warnings included, to stderr in one form."""
    if sys.stderr is None:  # it was closed when we were started, and its number may be a connection's by now
        fd = os.open(os.devnull, os.O_WRONLY)
    handler = _Lines(JsonFormatter() if form == "json" else ConsoleFormatter(), fd)
    # No line shows these, and to look for them takes as long as to write it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - as logging's own documentation says
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # Python writes these to stderr itself, and waits for whoever reads it.
    threading.excepthook = _log_uncaught
    sys.unraisablehook = _log_uncaught
    # It warns of every broken form. The client is told; the log would be its to fill.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def _log_uncaught(what: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    if what.exc_type is not SystemExit:  # by which a thread ends itself
        where = what.thread if isinstance(what, threading.ExceptHookArgs) else what.object
        _log.error("nobody caught an exception in %r", where, exc_info=what.exc_value)
