"""Log lines on stderr, for people or as JSON, each with the id of the request that caused it."""

import json
import logging
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal


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


class ConsoleFormatter(logging.Formatter):
    """One readable line: UTC time, level, message, then `key=value` facts; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without the traceback."""
        facts = "".join(f" {key}={value}" for key, value in _facts(record).items())
        return f"{_time(record)} {record.levelname:<7} {record.message}{facts}"


class JsonFormatter(logging.Formatter):
    """One JSON object on one line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _facts(record: logging.LogRecord) -> dict[str, object]:
    """Facts handed over with `extra={"facts": …}`, and the id of the request in whose task the line was written."""
    facts: dict[str, object] = dict(getattr(record, "facts", {}))
    request = _current.get()
    if request is not None:
        facts["request_id"] = request.id
    return facts


def set_up_logs(form: Literal["console", "json"], level: str) -> None:
    """Send every logger's lines, uvicorn's and Python's warnings included, to stderr in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    # It warns of every broken form. The client is told; the log would be its to fill.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
