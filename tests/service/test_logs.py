"""Log lines: one object a line for machines, one readable line for people, and the request's id in both."""

import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.logs import (
    ConsoleFormatter,
    JsonFormatter,
    RequestMetadata,
    current_request,
    current_route,
    enter_request,
    lines_dropped,
    set_up_logs,
)

PIPE_ROOM = 2**16  # of Linux, which a log that nobody reads fills first

pytestmark = pytest.mark.usefixtures("logging_as_before")


class Pipe:
    """What a log writes to; it is read when a test likes."""

    def __init__(self, flush_log: Callable[[], None]) -> None:
        self.exit, self.entry = os.pipe()
        self._flush_log = flush_log

    def lines(self) -> list[str]:
        """Read all that is logged, however much that is."""
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(self.read)
            self._flush_log()
            os.write(self.entry, b"\0")
            return reading.result(60)

    def read(self) -> list[str]:
        """Read until there is a zero."""
        content = b""
        while not content.endswith(b"\0"):
            content += os.read(self.exit, 2**16)
        return content[:-1].decode().splitlines()


@pytest.fixture
def pipe(flush_log: Callable[[], None]) -> Iterator[Pipe]:
    """A pipe of our own, for a log that `set_up_logs` sends there."""
    made = Pipe(flush_log)
    yield made
    os.close(made.entry)
    os.close(made.exit)


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("service.test").makeRecord(
        "service.test", logging.INFO, "f", 1, message, (), None, extra=extra
    )
    made.created = made.msecs = 0.0
    return made


def test_json_is_one_object_on_one_line() -> None:
    """Whatever a message holds: line ends, quotes, things that are no JSON."""
    line = JsonFormatter().format(record('two\nlines "quoted"', fields={"count": 3, "thing": slice(1)}))
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
    line = json.loads(JsonFormatter().format(record("no such file: \udcff", fields={"raw": b"\xff"})))
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


def test_the_console_has_fields_behind_the_message() -> None:
    """Time, level, message, fields."""
    line = ConsoleFormatter().format(record("request", fields={"status": 200, "bundle": "mnist"}))
    assert line == "1970-01-01T00:00:00.000Z INFO    request status=200 bundle=mnist"


@pytest.mark.anyio
async def test_lines_of_a_request_carry_its_id() -> None:
    """Anything that is logged on behalf of a request can be found by its id; its route labels metrics."""
    assert current_route() == "unmatched"
    enter_request(RequestMetadata("the-id", "GET", "/sample", 0.0))
    assert json.loads(JsonFormatter().format(record("inside")))["request_id"] == "the-id"
    assert current_request().id == "the-id"
    assert current_route() == "/sample"


@pytest.mark.parametrize("form", ["console", "json"])
def test_every_logger_goes_to_stderr_in_one_form(
    form: str, capfd: pytest.CaptureFixture[str], flush_log: Callable[[], None]
) -> None:
    """Ours, the server's, Python's warnings; nothing below the level, nothing on stdout."""
    set_up_logs(form, "info")  # type: ignore[arg-type]
    logging.getLogger("service.x").info("ours")
    logging.getLogger("uvicorn.error").error("theirs")
    logging.getLogger("service.x").debug("unwanted")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("careful", stacklevel=1)
    flush_log()
    out, err = capfd.readouterr()
    assert out == ""
    assert "unwanted" not in err
    for word in ("ours", "theirs", "careful"):
        assert word in err
    if form == "json":
        assert [json.loads(line)["level"] for line in err.splitlines()] == ["info", "error", "warning"]


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_slow_reader_gets_every_line_whole_and_in_order(form: str, pipe: Pipe) -> None:
    """More than a pipe holds is logged before anybody reads, by several threads, some of it longer than one write."""
    set_up_logs(form, "info", pipe.entry)  # type: ignore[arg-type]
    log = logging.getLogger("service.test")

    def write(thread: int) -> None:
        for number in range(200):
            fields = {"thread": thread, "number": number, "long": "x" * (23 * number)}
            log.info("request", extra={"fields": fields})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    lines = pipe.lines()
    assert len(lines) == 400
    for thread in range(2):
        found = [re.search(rf"thread\"?[:=]{thread}\D+(\d+)\D+?(x*)\"?}}?$", line) for line in lines]
        read = [(int(one[1]), len(one[2])) for one in found if one]
        assert read == [(number, 23 * number) for number in range(200)]


def test_processes_that_share_a_log_cut_none_of_their_lines(pipe: Pipe) -> None:
    """Workers write to one pipe, which is full most of the time: each line is there once, and whole."""
    program = """
import logging, sys
from service.logs import set_up_logs
set_up_logs("json", "info")
for number in range(2000):
    logging.getLogger("test").info(sys.argv[1], extra={"fields": {"number": number, "long": "x" * (number % 300)}})
logging.getLogger().handlers[0].flush()
"""
    workers = [subprocess.Popen([sys.executable, "-c", program, name], stderr=pipe.entry) for name in "ab"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read)
        assert [worker.wait(60) for worker in workers] == [0, 0]
        os.write(pipe.entry, b"\0")
        lines = [json.loads(line) for line in reading.result(60)]
    for name in "ab":
        assert [line["number"] for line in lines if line["message"] == name] == list(range(2000))


def test_a_log_that_nobody_reads_stops_nobody(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without room are lost and counted, and so is one that is too long for it; the others are in order."""
    monkeypatch.setattr("service.logs.QUEUE_BYTES", room := 2**16)
    set_up_logs("json", "info", pipe.entry)
    log, written = logging.getLogger("service.test"), 0
    while lines_dropped() < 100:
        log.info("request", extra={"fields": {"number": written}})
        written += 1
    dropped = lines_dropped()
    lines = [json.loads(line) for line in pipe.lines()]
    kept = [line["number"] for line in lines if line["message"] == "request"]
    assert (kept, len(kept)) == (sorted(set(kept)), written - dropped)
    assert sum(map(len, map(str, lines))) < 3 * (room + PIPE_ROOM)
    notices = [line for line in lines if line["message"] != "request"]  # one, or more where the writer was slow
    assert {notice["level"] for notice in notices} == {"warning"}
    assert sum(notice["lines"] for notice in notices) == dropped
    log.info("there is room again")
    log.info("x" * room)
    assert [json.loads(line).get("lines") for line in pipe.lines()] == [None, 1]
    assert lines_dropped() == dropped + 1


def test_the_end_waits_for_no_reader(
    pipe: Pipe, flush_log: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is logged last is written at the end, but where nobody takes it there is an end all the same."""
    set_up_logs("console", "info", pipe.entry)
    log = logging.getLogger("service.test")
    log.info("last words")
    flush_log()
    assert b"last words" in os.read(pipe.exit, 2**16)
    log.info("x" * 2**17)
    with monkeypatch.context() as patch:
        patch.setattr("service.logs.END_S", 0.01)
        flush_log()
    assert len(pipe.lines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_log_that_cannot_be_written_harms_nobody(pipe: Pipe, flush_log: Callable[[], None]) -> None:
    """On a full disk lines don't pile up, and once there is room a line says how many were lost."""
    full, disk = os.open("/dev/full", os.O_WRONLY), os.dup(pipe.entry)
    os.dup2(full, disk)
    set_up_logs("json", "info", disk)
    log = logging.getLogger("service.test")
    for number in range(3):
        log.info("request", extra={"fields": {"number": number}})
    log.error("lost")
    flush_log()
    os.dup2(pipe.entry, disk)
    assert pipe.lines() == []
    log.error("kept")
    kept, notice = map(json.loads, pipe.lines())
    assert (kept["message"], notice["lines"], lines_dropped()) == ("kept", 4, 4)
    os.close(full)
    os.close(disk)


def test_a_pipe_that_another_process_keeps_from_blocking_loses_nothing(pipe: Pipe) -> None:
    """Non-blocking is an option of the pipe, which parent and children share: a full one is then an error to us too."""
    os.set_blocking(pipe.entry, False)
    set_up_logs("json", "info", pipe.entry)
    for number in range(300):
        logging.getLogger("service.test").info("request", extra={"fields": {"number": number, "long": "x" * 1000}})
    assert [json.loads(line)["number"] for line in pipe.lines()] == list(range(300))
    assert lines_dropped() == 0


def test_what_nobody_catches_and_what_cannot_be_shown_are_lines_as_well(pipe: Pipe) -> None:
    """Python would write these to stderr itself, in no form, and wait for its reader."""

    class Bad:
        def __str__(self) -> str:
            raise ValueError("not shown")

        def __del__(self) -> None:
            raise ValueError("not deleted")

    set_up_logs("json", "info", pipe.entry)
    thread = threading.Thread(target=int, args=["broken"])
    thread.start()
    thread.join()
    leaver = threading.Thread(target=sys.exit)
    leaver.start()
    leaver.join()
    logging.getLogger("service.test").info("%s", bad := Bad())
    del bad
    gc.collect()
    uncaught, unshown, undeleted = map(json.loads, pipe.lines())
    assert "invalid literal for int()" in uncaught["traceback"]
    assert "not shown" in unshown["message"]
    assert "not deleted" in undeleted["traceback"]


def test_a_log_without_stderr_goes_nowhere() -> None:
    """A closed stderr's number may belong to another file by now: a pipe here, a client's connection in a service."""
    program = """
import logging, os
exit_, entry = os.pipe()
assert 2 in {exit_, entry}
from service.logs import set_up_logs
set_up_logs("json", "info")
logging.error("lost")
logging.shutdown()
os.set_blocking(exit_, False)
try:
    print(os.read(exit_, 100))
except BlockingIOError:
    print("nothing")
"""
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, program]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout == "nothing\n"
