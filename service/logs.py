"""Log lines on stderr, for people or as JSON, each with the id of the request that caused it."""

import itertools
import json
import logging
import os
import re
import secrets
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

STDERR = 2
PIPE_BYTES = 4096  # POSIX promises 512, Linux this: a write of more may be cut by another process' write
QUEUE_BYTES = 2**20  # some thousands of lines: a second of a busy service
PAUSE_S = 0.01  # between two writes, so that the event loop is not interrupted for every line
END_S = 2.0  # how long a process that ends waits for whoever reads the log

_log = logging.getLogger(__name__)


class Trace(NamedTuple):
    """Where a request is found among the traces; `span` is OpenTelemetry's, None unless it is sampled."""

    trace_id: str
    span_id: str
    span: Any


@dataclass(eq=False)
class RequestMetadata:
    """What is known of the request that is being answered; it grows while the request is read."""

    id: str
    method: str
    route: str  # template, or `unmatched`: never the raw path, which is the client's
    arrived_s: float  # time.monotonic()
    bundle: str | None = None  # name@version
    count: int | None = None  # images
    key: str | None = None  # name of the client's key, where one is needed
    error: str | None = None  # code of the problem that it got
    trace: Trace | None = None  # where traces are on
    took_s: dict[str, float] = field(default_factory=dict)  # seconds by what they went to: queue, compute, encode …
    has_reserved: bool = False  # whether its images are counted for the key already
    has_left: bool = False  # whether its client has, before the end of the reply
    has_dropped_work: bool = False  # by leaving, which is counted once


_to_json = json.JSONEncoder(default=str, separators=(",", ":")).encode
_current: ContextVar[RequestMetadata | None] = ContextVar("current_request", default=None)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_PROCESS = secrets.token_hex(10)
_numbers = itertools.count()


def is_request_id(given: str) -> bool:
    """Whether an id that a client gives is safe in headers and logs."""
    return _REQUEST_ID.fullmatch(given) is not None


def new_request_id() -> str:
    """An id that no other request has."""
    # Unique, not secret: a random number from the system for each request would cost more than the rest of its work.
    return f"{_PROCESS}{next(_numbers):012x}"


def enter_request(request: RequestMetadata) -> None:
    """From here on, this task and those it starts work for this request."""
    _current.set(request)


def current_request() -> RequestMetadata:
    """The request that this task works for; only tasks of a request may ask."""
    request = _current.get()
    assert request is not None, "outside a request"  # noqa: S101 - our bug if so
    return request


def request_if_any() -> RequestMetadata | None:
    """The request that this task works for; None if it is not for one."""
    return _current.get()


def current_route() -> str:
    """Route template of the request that this task works for, as a metric's label."""
    request = _current.get()
    return request.route if request else "unmatched"


def current_key() -> str | None:
    """Name of the key of the request that this task works for, if any."""
    request = _current.get()
    return request.key if request else None


def current_span() -> Any:
    """OpenTelemetry's span of the request that this task works for; None unless it is sampled."""
    request = _current.get()
    return request.trace.span if request and request.trace else None


class _Formatter(logging.Formatter):
    """UTC time with milliseconds."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


class ConsoleFormatter(_Formatter):
    """One readable line: time, level, message, then the fields as `key=value`; a traceback follows on its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without the traceback."""
        fields = "".join([f" {key}={value}" for key, value in _fields(record).items()])
        return f"{self.formatTime(record)} {record.levelname:<7} {record.message}{fields}"


class JsonFormatter(_Formatter):
    """One JSON object on one line, in ASCII: no terminal's encoding and no line end of Unicode's can break it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _to_json(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Fields given as `extra={"fields": …}`, and the ids of the request in whose task the line was written."""
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    request = _current.get()
    if request is not None:
        fields["request_id"] = request.id
        if request.trace is not None:
            fields["trace_id"], fields["span_id"] = request.trace.trace_id, request.trace.span_id
    return fields


def _record(level: int, message: str, **fields: object) -> logging.LogRecord:
    """A record of this module's own, for lines that can't go through a logger."""
    name = logging.getLevelName(level)
    return logging.makeLogRecord(
        {"name": __name__, "levelno": level, "levelname": name, "msg": message, "fields": fields}
    )


class _QueuedHandler(logging.Handler):
    """Hands lines to a thread that writes them, so that nobody else ever waits for whoever reads the log.

    At most `QUEUE_BYTES` wait. Lines that find no room, or can't be written, are dropped, and a later line says how
    many. It takes a thread: a pipe that has room may have none after another worker's line, making it non-blocking
    changes it for every process that shares it, and a file on a disk that hangs always seems to have room.

    Attributes:
        dropped: Lines that were lost.
    """

    def __init__(self, formatter: logging.Formatter, fd: int) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.dropped = 0
        self._unreported = 0  # of these, lines that the log does not mention yet
        self._fd = fd
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._has_news = self._is_writing = self._is_closed = False
        self._changed = threading.Condition()  # guards all of the above
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        try:
            line = self._encode(record)
        except Exception as error:  # noqa: BLE001 - logging's way: what can't be logged harms nobody
            line = self._encode(_record(logging.ERROR, f"a line could not be made: {error!r}"))
        with self._changed:
            if self._waiting_bytes + len(line) > QUEUE_BYTES:
                self._drop(1)
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
            self._has_news = True
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, but not for ever."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._has_news or self._is_writing), END_S)

    def close(self) -> None:
        """End the thread once it has written everything."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _encode(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

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
                unreported = self._unreported
            self._write_all(lines)
            if unreported:
                self._report(unreported)
            time.sleep(PAUSE_S)

    def _write_all(self, lines: list[bytes]) -> None:
        for piece in _pieces(lines):
            if not self._write(b"".join(piece)):
                self._drop(len(piece))

    def _report(self, lines: int) -> None:
        notice = _record(logging.WARNING, "log lines were lost: they could not be written in time", lines=lines)
        if self._write(self._encode(notice)):
            with self._changed:
                self._unreported -= lines

    def _drop(self, lines: int) -> None:
        with self._changed:
            self.dropped += lines
            self._unreported += lines

    def _write(self, rest: bytes) -> bool:
        """Write bytes, however long that takes; False where it fails, as on a full disk."""
        try:
            while rest:
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:  # another process that writes to the same place has made it non-blocking
                    select.select((), (self._fd,), ())
        except OSError:
            return False
        return True


def _pieces(lines: list[bytes]) -> Iterator[list[bytes]]:
    """The lines in pieces that a pipe takes whole, so that no other process' line gets inside one that fits."""
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
    return sum(handler.dropped for handler in logging.root.handlers if isinstance(handler, _QueuedHandler))


def set_up_logs(form: Literal["console", "json"], level: str, fd: int = STDERR) -> None:
    """Send every logger's lines, uvicorn's and Python's warnings included, to stderr in one form."""
    if sys.stderr is None:  # it was closed when we were started, and its number may be that of a connection by now
        fd = os.open(os.devnull, os.O_WRONLY)
    handler = _QueuedHandler(JsonFormatter() if form == "json" else ConsoleFormatter(), fd)
    # No line shows these, and looking them up takes time.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # Python writes these to stderr itself, and waits for whoever reads it.
    threading.excepthook = _log_uncaught
    sys.unraisablehook = _log_uncaught
    # It warns of every broken form. The client is told so, and could otherwise fill the log.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


def _log_uncaught(what: "threading.ExceptHookArgs | sys.UnraisableHookArgs") -> None:
    if what.exc_type is not SystemExit:  # by which a thread ends itself
        where = what.thread if isinstance(what, threading.ExceptHookArgs) else what.object
        _log.error("nobody caught an exception in %r", where, exc_info=what.exc_value)
