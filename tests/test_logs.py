"""Log lines: one object a line for machines, one readable line for people, and the request's id in both."""

import asyncio
import errno
import io
import json
import logging
import re
import sys
import warnings

import pytest

from service.logs import (
    ConsoleFormatter,
    JsonFormatter,
    RequestFacts,
    current_request,
    current_route,
    enter_request,
    log_facts,
    set_up_logs,
)

pytestmark = pytest.mark.usefixtures("logging_as_before")


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("service.test").makeRecord(
        "service.test", logging.INFO, "f", 1, message, (), None, extra=extra
    )
    made.created = 0.0
    return made


def test_json_is_one_object_on_one_line() -> None:
    """Whatever a message holds: line ends, quotes, things that are no JSON."""
    line = JsonFormatter().format(record('two\nlines "quoted"', facts={"count": 3, "thing": slice(1)}))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "info",
        "logger": "service.test",
        "message": 'two\nlines "quoted"',
        "count": 3,
        "thing": "slice(None, 1, None)",
    }


def test_json_writes_what_is_no_text() -> None:
    """A file's name may hold bytes that no encoding knows; the line that names it is not lost."""
    line = json.loads(JsonFormatter().format(record("no such file: \udcff", facts={"raw": b"\xff"})))
    assert (line["message"], line["raw"]) == ("no such file: \udcff", "b'\\xff'")


def test_json_is_ascii() -> None:
    """So no terminal's encoding breaks a line, nor do the line ends that Unicode has beside ours."""
    message = "é\u2028\u0085😀"
    line = JsonFormatter().format(record(message))
    assert line.isascii()
    assert json.loads(line)["message"] == message


def test_json_keeps_tracebacks_inside() -> None:
    """A traceback is a field, so a crash is still one line."""
    made = record("it broke")
    try:
        int("broken")
    except ValueError:
        made.exc_info = sys.exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: invalid literal" in json.loads(line)["traceback"]


def test_the_console_has_facts_behind_the_message() -> None:
    """Time, level, message, facts."""
    line = ConsoleFormatter().format(record("request", facts={"status": 200, "bundle": "mnist"}))
    assert line == "1970-01-01T00:00:00.000Z INFO    request status=200 bundle=mnist"


@pytest.mark.anyio
async def test_lines_of_a_request_carry_its_id() -> None:
    """Anything that is logged on behalf of a request can be found by its id; its route labels metrics."""
    assert current_route() == "unmatched"
    enter_request(RequestFacts("the-id", "GET", "/sample", 0.0))
    assert json.loads(JsonFormatter().format(record("inside")))["request_id"] == "the-id"
    assert current_request().id == "the-id"
    assert current_route() == "/sample"


@pytest.mark.parametrize("form", ["console", "json"])
def test_every_logger_goes_to_stderr_in_one_form(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours, the server's, Python's warnings; nothing below the level, nothing on stdout."""
    set_up_logs(form, "info")  # type: ignore[arg-type]
    logging.getLogger("service.x").info("ours")
    logging.getLogger("uvicorn.error").error("theirs")
    logging.getLogger("service.x").debug("unwanted")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("careful", stacklevel=1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "unwanted" not in err
    for word in ("ours", "theirs", "careful"):
        assert word in err
    if form == "json":
        assert [json.loads(line)["level"] for line in err.splitlines()] == ["info", "error", "warning"]


@pytest.mark.anyio
async def test_lines_of_one_step_are_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy loop writes once for all that it logs in one step; trouble is written at once, behind what waited."""
    written: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Stream())
    set_up_logs("console", "info")
    log = logging.getLogger("service.test")
    for number in range(3):
        log_facts(log, logging.INFO, "request", {"count": number})
    assert written == []
    await asyncio.sleep(0)
    assert [text.count("\n") for text in written] == [3]
    log.info("before")
    log.error("trouble")
    assert [line.split()[2] for line in written[1].splitlines()] == ["before", "trouble"]
    await asyncio.sleep(0)
    assert len(written) == 2


@pytest.mark.parametrize("form", ["console", "json"])
def test_the_short_way_writes_what_logging_writes(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of facts looks the same whether a record was made for it, as beside other handlers, or not."""
    set_up_logs(form, "info")  # type: ignore[arg-type]
    log, facts = logging.getLogger("service.test"), {"status": 200, "bundle": "mnist", "request_id": "the-id"}
    log_facts(log, logging.INFO, "request", facts)
    log_facts(log, logging.DEBUG, "unwanted", facts)
    logging.getLogger().addHandler(logging.NullHandler())
    log_facts(log, logging.INFO, "request", facts)
    short, long = [re.sub(r"T[0-9:.]+Z", "", line) for line in capsys.readouterr().err.splitlines()]
    assert short == long
    assert "the-id" in short


@pytest.mark.anyio
async def test_a_log_that_cannot_be_written_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a reader that has gone: requests go on, and what could not be written does not pile up."""
    written: list[str] = []

    class Stream(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", stream := Stream())
    troubles: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
    set_up_logs("console", "info")
    log = logging.getLogger("service.test")
    log_facts(log, logging.INFO, "request", {"count": 1})
    await asyncio.sleep(0)
    log.error("lost")
    stream.full = False
    log.error("kept")
    assert [line.split()[2] for line in "".join(written).splitlines()] == ["kept"]
    assert troubles == []
