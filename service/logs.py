"""Log lines on stderr, for people or as JSON, each with the id of the request that caused it."""

import asyncio
import contextlib
import itertools
import json
import logging
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TextIO

from pydantic_core import PydanticSerializationError, to_json

PIPE_BYTES = 4096  # POSIX promises 512, Linux this: a write of more may be cut by another process' write


@dataclass
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


_Parts = tuple[float, str, str, str, dict[str, object]]  # of a line, see `_Formatter.line`


class _Lines(logging.StreamHandler[TextIO]):
    """Writes what is logged within one step of the event loop in one go, at its end; all else, and trouble, at once.

    Where other processes write to the same place, `is_shared`, it is as much in one go as a pipe keeps together.
    """

    def __init__(self, formatter: _Formatter, *, is_shared: bool) -> None:
        super().__init__(sys.stderr)
        self._most = PIPE_BYTES if is_shared else math.inf
        self.setFormatter(formatter)
        self.line = formatter.line
        self._lines: list[str | _Parts] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging, under this handler's lock."""
        try:
            self.put(self.format(record), record.levelno)
        except Exception:  # noqa: BLE001 - logging's way: what can't be logged harms nobody
            self.handleError(record)

    def put(self, line: "str | _Parts", level: int) -> None:
        """Take a line, or what one will be made of. Called under the lock."""
        self._lines.append(line)
        if level >= logging.WARNING or (len(self._lines) == 1 and not _soon(self.flush)):
            self.flush()

    def flush(self) -> None:
        """Write what waits. Where that fails, as on a full disk, the lines are lost and nothing else: as in logging."""
        with self.lock or contextlib.nullcontext():
            waiting, self._lines = self._lines, []
            lines = [one if isinstance(one, str) else self.line(*one) for one in waiting]
            with contextlib.suppress(OSError, ValueError):
                for text in _joined(lines, self._most):
                    self.stream.write(text)
                    super().flush()


def _joined(lines: list[str], most: float) -> Iterator[str]:
    """The lines as text in pieces of at most so many bytes, or of one line."""
    size, piece = 0, list[str]()
    for line in lines:
        more = len(line) + 1 if line.isascii() else len(line.encode(errors="replace")) + 1
        if piece and size + more > most:
            yield "\n".join([*piece, ""])
            size, piece = 0, []
        piece.append(line)
        size += more
    if piece:
        yield "\n".join([*piece, ""])


def _soon(call: Callable[[], None]) -> bool:
    """Have this called when the running step of this thread's event loop is over; False where there is none."""
    try:
        asyncio.get_running_loop().call_soon(call)
    except RuntimeError:
        return False
    return True


def log_facts(log: logging.Logger, level: int, message: str, facts: dict[str, object]) -> None:
    """Write a line with facts, in less time than `log.log(level, message, extra={"facts": facts})` takes.

    Where ours is the only handler, as in a service, no record is made. The facts name the request, if there is one.
    """
    if not log.isEnabledFor(level):
        return
    handlers = logging.root.handlers
    if len(handlers) == 1 and isinstance(handlers[0], _Lines):
        lines = handlers[0]
        parts = time.time(), logging.getLevelName(level), log.name, message, facts
        with lines.lock or contextlib.nullcontext():
            lines.put(parts, level)
    else:
        log.log(level, message, extra={"facts": facts})


def set_up_logs(form: Literal["console", "json"], level: str, *, is_shared: bool = False) -> None:
    """Send every logger's lines, uvicorn's and Python's warnings included, to stderr in one form.

    `is_shared`: other processes do the same, and lines must not be cut by one another.
    """
    handler = _Lines(JsonFormatter() if form == "json" else ConsoleFormatter(), is_shared=is_shared)
    # No line shows these, and to look for them takes as long as to write it.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001 - as logging's own documentation says
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # It warns of every broken form. The client is told; the log would be its to fill.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
