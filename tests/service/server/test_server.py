"""The server drains on signals, ends if the start fails, and sets the exit code."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import uvicorn

from benchmarks.tools.process import Readings
from models.bundle import Bundle
from service.__main__ import start
from service.engine.bundles.index import find_folders
from service.engine.engine import Engine, Loaded
from service.settings import Settings, flag, variable

pytestmark = pytest.mark.usefixtures(
    "logging_as_before", "one_worker"
)  # `start` sets up the log of its process, which here is pytest's


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services that are started here have one process, whatever the machine; test_supervisor.py has others."""
    monkeypatch.setenv("GAN_WORKERS", "1")


# ------------------------------------------------------------------------------------------- drain, in a thread of ours


@pytest.fixture
def one_waiting(live_server: Any, tiny_settings: Callable[..., Settings]) -> Any:
    """A server whose engine is held with one request in it: (server, that request's future, what lets it go)."""

    @contextmanager
    def make(**settings: Any) -> Iterator[Any]:
        server = live_server(tiny_settings(**settings))
        with server.running(), ThreadPoolExecutor(1) as pool, ExitStack() as held:
            held.enter_context(server.engine_held())
            waiting = pool.submit(httpx.get, f"{server.url}/sample?seed=1", timeout=60)
            server.wait_for(lambda: server.metric("gan_batch_images_count", bundle="tiny", operation="sample") == 1)
            yield server, waiting, held.close

    return make


def test_a_signal_lets_accepted_work_finish_and_refuses_new(one_waiting: Any, problem: Any) -> None:
    """A draining server is not ready and refuses new work; the accepted request is answered, and the exit code is 0."""
    with one_waiting() as (server, waiting, let_go):
        server.handle_exit(signal.SIGTERM, None)
        server.wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        problem(httpx.get(f"{server.url}/readyz"), 503, "draining")
        refused = httpx.get(f"{server.url}/sample")
        problem(refused, 503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/livez").status_code == 200
        assert not waiting.done()
        let_go()
        assert waiting.result(60).status_code == 200
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/livez")


def test_the_delay_accepts_work_while_not_ready(one_waiting: Any) -> None:
    """Until the delay is over, requests of load balancers that have not noticed yet are answered."""
    with one_waiting(drain_delay_s=600) as (server, waiting, let_go):
        server.handle_exit(signal.SIGTERM, None)
        server.wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        let_go()
        assert waiting.result(60).status_code == 200
        assert httpx.get(f"{server.url}/sample").status_code == 200


def test_ctrl_c_waits_for_no_load_balancer(one_waiting: Any) -> None:
    """On SIGINT the drain begins without the delay, and accepted work is still finished."""
    with one_waiting(drain_delay_s=600) as (server, waiting, let_go):
        server.handle_exit(signal.SIGINT, None)
        server.wait_for(lambda: httpx.get(f"{server.url}/sample").status_code == 503)
        let_go()
        assert waiting.result(60).status_code == 200
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 0


def test_what_does_not_finish_in_time_is_told(one_waiting: Any, problem: Any) -> None:
    """After the time-out, unfinished requests get a reply, not a cut connection."""
    with one_waiting(drain_timeout_s=0.05) as (server, waiting, _):
        server.handle_exit(signal.SIGTERM, None)
        problem(waiting.result(60), 503, "draining")
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 0


def test_a_second_signal_stops_at_once(one_waiting: Any, problem: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A second signal cuts the drain short and sets the exit code; the log has no error."""
    with one_waiting(drain_timeout_s=600) as (server, waiting, _):
        server.handle_exit(signal.SIGTERM, None)
        server.wait_for(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        server.handle_exit(signal.SIGTERM, None)
        problem(waiting.result(60), 503, "draining")
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 128 + signal.SIGTERM
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_a_reply_that_is_not_taken_in_time_is_cut_off(
    live_server: Any, tiny_settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    """Its client notices that it is incomplete; the log has one line for it and no traceback."""
    with live_server(tiny_settings(drain_timeout_s=0.05)).running() as server:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(b"GET /sample?count=1024&scale=11&format=npy HTTP/1.1\r\nHost: x\r\n\r\n")
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        server.handle_exit(signal.SIGTERM, None)
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 0
        taken = len(slow.makefile("rb").read())
        assert taken < 1024 * 88 * 88
        slow.close()
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in errors] == [
        "Cancel 1 running task(s), timeout graceful shutdown exceeded"
    ]
    assert not errors[0].exc_info


def refuses_connections(port: int) -> bool:
    """Whether the port refuses connections."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_second_signal_waits_for_no_slow_client(one_waiting: Any) -> None:
    """A second signal also ends a server that only waits for a slow client; the exit code is the signal's."""
    with (
        one_waiting(drain_timeout_s=600, deadline_s=120) as (server, waiting, let_go),
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow,
    ):
        slow.sendall(b"POST /discriminate HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n")
        server.wait_for(lambda: server.metric("gan_requests_in_flight", route="/discriminate") == 1)
        server.handle_exit(signal.SIGTERM, None)
        let_go()
        assert waiting.result(60).status_code == 200
        server.wait_for(lambda: refuses_connections(server.port))  # only slow clients are left
        server.handle_exit(signal.SIGTERM, None)
        assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 503 ")
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert server.exit_code == 128 + signal.SIGTERM
        assert not server.server_state.connections


@pytest.mark.slow
def test_a_body_that_is_still_coming_at_the_end_is_told(one_waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When even the time for sending is over, a request that nobody has read yet hears why it is not answered.

    The engine's threads end before that, which is no failure, however long the last client takes.
    """
    monkeypatch.setattr("service.server.server.LINGER_S", 0.1)
    with one_waiting(drain_timeout_s=0.05) as (server, _, _):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
            slow.sendall(
                b"POST /discriminate HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
            )
            server.wait_for(lambda: server.metric("gan_requests_in_flight", route="/discriminate") == 1)
            server.handle_exit(signal.SIGTERM, None)
            reply = slow.makefile("rb").read()
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b'"code":"draining"' in reply
        server.thread.join(60)
        assert server.exit_code == 0
        assert not server.server_state.connections


def test_a_connection_that_is_being_taken_at_the_end_is_ended_like_all_others(
    live_server: Any, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn closes only connections that it knows of, so the server first waits for those being set up."""
    known = []

    async def note(server: uvicorn.Server, _: Any) -> None:
        known.append(len(server.server_state.connections))

    server = live_server(tiny_settings())
    with server.running():

        async def end() -> None:
            ours, theirs = socket.socketpair()
            with ours, monkeypatch.context() as patch:
                patch.setattr(uvicorn.Server, "shutdown", note)
                server.take(theirs)
                await server.shutdown([])

        asyncio.run_coroutine_threadsafe(end(), server.loop).result(60)
    assert known == [1]


# ------------------------------------------------------------------------------------------------------------- reloads


def test_signals_during_a_reload_lead_to_one_more_and_keep_nobody_waiting(
    live_server: Any,
    tiny_settings: Callable[..., Settings],
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hundred signals lead to one more reload, which sees all changes; a load request runs in between."""
    shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
    look, looks, reached, gate = find_folders, list[Path](), threading.Event(), threading.Event()

    def noted(root: Path) -> Any:
        looks.append(root)
        reached.set()
        gate.wait(60)
        return look(root)

    server = live_server(tiny_settings(bundles=tmp_path))
    with server.running():
        monkeypatch.setattr("service.engine.bundles.index.find_folders", noted)
        serving, loop = server.app.state.manager, server.loop
        loop.call_soon_threadsafe(server.reload_requested.set)
        assert reached.wait(60)
        waiting = asyncio.run_coroutine_threadsafe(serving.bundles.load("tiny"), loop)
        shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / "rgb")
        for _ in range(200):
            loop.call_soon_threadsafe(server.reload_requested.set)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)  # so all of these have come
        gate.set()
        waiting.result(60)
        server.wait_for(lambda: serving.bundles.version("rgb") is not None)
        last = asyncio.run_coroutine_threadsafe(serving.bundles.load("tiny"), loop)
        last.result(60)  # behind whatever else there may be
        assert len(looks) == 4


def test_a_signal_during_the_start_is_heeded_after_it(
    live_server: Any,
    tiny_settings: Callable[..., Settings],
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start would miss a bundle that is added after it has listed the folder."""
    shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
    server, load = live_server(tiny_settings(bundles=tmp_path)), Engine.load

    def late(engine: Engine, folder: Path, *rest: Any) -> Loaded:
        if not (tmp_path / "rgb").exists():
            shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / "rgb")
            server.loop.call_soon_threadsafe(server.reload_requested.set)
        return load(engine, folder, *rest)

    monkeypatch.setattr(Engine, "load", late)
    with server.running():
        server.wait_for(lambda: server.app.state.manager.bundles.version("rgb") is not None)


def test_a_reload_that_fails_is_not_the_last(
    live_server: Any,
    tiny_settings: Callable[..., Settings],
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After any error, expected or not, it is logged, and the next signal reloads again."""
    shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")

    def fail(_: Path) -> None:
        raise RuntimeError("nobody knows")

    server = live_server(tiny_settings(bundles=tmp_path))
    with server.running():
        with monkeypatch.context() as patch:
            patch.setattr("service.engine.bundles.index.find_folders", fail)
            server.loop.call_soon_threadsafe(server.reload_requested.set)
            server.wait_for(lambda: "nobody knows" in caplog.text)
        shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / "rgb")
        server.loop.call_soon_threadsafe(server.reload_requested.set)
        server.wait_for(lambda: server.app.state.manager.bundles.version("rgb") is not None)


# ------------------------------------------------------------------------------------------------------- command line


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Help shows flag, variable and default of each setting."""
    with pytest.raises(SystemExit) as ended:
        start(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in Settings.model_fields:
        assert flag(field) in text
        assert f"[{variable(field)}, default " in text
    for default in ("default 32MiB]", "default 16M]", "default 4096]", "default on]", "default 0]", "default unset]"):
        assert default in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-count", "0"], "GAN_MAX_COUNT (or --max-count) is '0'"),
        (["--max-count"], "--max-count"),
        (["--colour", "red"], "--colour"),
        (["--max-c", "3"], "--max-c"),
        (["--wrokers", "2"], "unrecognized arguments: --wrokers 2; did you mean --workers?"),
        (["--max_count=2"], "; did you mean --max-count?"),
        (["--device", "cuda:99"], "GAN_DEVICE (or --device): there is no device cuda:99"),
        (["--precision", "float16"], "GAN_PRECISION (or --precision) is 'float16'"),
        (
            ["--device", "cpu", "--precision", "tf32"],
            "GAN_PRECISION (or --precision): there is no tf32 on cpu",
        ),
    ],
)
def test_a_bad_setting_is_one_line_and_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process ends with one line, before anything is started."""
    try:
        code = start(["--port", "0", *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("gan-service: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_key_that_is_none_ends_it_and_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator who sets a key must not get an open service, nor find the key in the log."""
    monkeypatch.setenv("GAN_API_KEYS", "secret phrase")
    assert start(["--port", "0"]) == 2
    err = capsys.readouterr().err
    assert "GAN_API_KEYS" in err
    assert "phrase" not in err


def test_an_unusable_host_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the setting, and nothing is loaded before."""
    assert start(["--host", "192.0.2.1", "--port", "0"]) == 2
    err = capsys.readouterr().err
    assert err == "gan-service: GAN_HOST (or --host) is '192.0.2.1': Cannot assign requested address\n"


def test_a_port_in_use_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Another process listens on the port."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert start(["--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert err == f"gan-service: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


@pytest.mark.parametrize(
    "damage", ["missing folder", "empty folder", "no manifest", "changed weights", "changed default", "unknown default"]
)
def test_a_start_without_its_bundles_is_one_line_and_code_3(
    damage: str,
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    flush_log: Callable[[], None],
) -> None:
    """The line names the file and the reason, if no bundle or not the default one can be loaded."""
    arguments = []
    match damage:
        case "missing folder":
            tmp_path = tmp_path / "nowhere"
        case "no manifest":
            (tmp_path / "x").mkdir()
        case "changed weights" | "changed default":
            if damage == "changed default":  # no other bundle replaces the default one
                shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / "rgb")
                arguments = ["--default-bundle", "tiny"]
            shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
            weights = tmp_path / "tiny" / "generator.safetensors"
            content = weights.read_bytes()
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "unknown default":
            shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
            arguments = ["--default-bundle", "other"]
    assert start(["--port", "0", "--device", "cpu", "--bundles", str(tmp_path), *arguments]) == 3
    flush_log()
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path) in err


class Process:
    """`python -m service` as an operator runs it, with its log as JSON."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", "0", "--device", "cpu", "--log-format", "json", *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            cwd=Path(__file__).parents[3],
        )
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(json.loads(line) if line.startswith("{") else {"message": line})
                self._news.notify_all()

    def message(self, start: str) -> str:
        """Wait for a message with this start, and return the whole message."""

        def found() -> list[str]:
            return [line["message"] for line in self.lines if line["message"].startswith(start)]

        with self._news:
            assert self._news.wait_for(found, 120), self.lines
            return found()[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(60)
        self._reader.join(60)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.mark.slow
def test_a_life_from_start_to_sigterm(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The log shows a whole life: a refused bundle, serving, a reload on SIGHUP, a drain, exit code 0."""
    shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{}")
    with Process("--bundles", str(tmp_path), GAN_MAX_COUNTS="3") as service:
        url = service.message("serving ").removeprefix("serving ")
        [serving] = [line for line in service.lines if line["message"].startswith("serving ")]
        assert serving["bundles"] == f"tiny@{tiny_bundles['tiny'].version}"
        assert (serving["device"], serving["workers"]) == ("cpu", 1)
        assert "format null" in service.message(f"bundle refused: {tmp_path}/broken/manifest.json: ")
        assert "did you mean GAN_MAX_COUNT?" in service.message("GAN_MAX_COUNTS")
        reply = httpx.get(f"{url}/sample?seed=1", headers={"X-Request-ID": "find-me"})
        assert reply.headers["x-bundle"] == f"tiny@{tiny_bundles['tiny'].version}"
        assert "server" not in reply.headers
        shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / "rgb")
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "manifest.json").write_text("{}")
        service.process.send_signal(signal.SIGHUP)
        assert (rgb := f"rgb@{tiny_bundles['rgb'].version}") in service.message("bundles: ")
        assert service.message(f"bundle refused: {tmp_path}/bad/manifest.json: ")
        assert httpx.get(f"{url}/sample?bundle=rgb").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert service.message("stopped") == "stopped"
        (line,) = [line for line in service.lines if line.get("request_id") == "find-me"]
        assert (line["route"], line["status"], line["count"]) == ("/sample", 200, 1)
        assert line["bundle"] == reply.headers["x-bundle"]
        [changes] = [line for line in service.lines if line["message"] == "bundles have changed"]
        assert changes["added"] == [rgb]
        assert changes["means"] == {"rgb": rgb}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see that a signal is handled")
def test_a_stop_while_it_is_being_imported_ends_it_in_order(tiny_bundles: dict[str, Bundle]) -> None:
    """Nothing was accepted yet, so there is nothing to drain: exit code 0 at once."""
    with Process("--bundles", str(tiny_bundles["tiny"].folder.parent), "--port", "0") as service:
        wait_until_caught(service, signal.SIGTERM)  # the first thing that the program does
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0


@pytest.mark.parametrize("command", [("-m", "service"), ("-c", "from service.server.script import main; main()")])
def test_signals_are_handled_before_anything_that_takes_time(command: tuple[str, str], tmp_path: Path) -> None:
    """A signal during the import of the settings' library ends the process with exit code 0."""
    (tmp_path / "pydantic_settings.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, *command], env=environment, cwd=root, timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see that a signal is handled")
@pytest.mark.slow
def test_sighup_while_it_is_being_imported_changes_nothing(tiny_bundles: dict[str, Bundle]) -> None:
    """SIGHUP is ignored then, because the bundles are about to be loaded anyway."""
    with Process("--bundles", str(tiny_bundles["tiny"].folder.parent), "--default-bundle", "tiny") as service:
        wait_until_caught(service, signal.SIGTERM)
        service.process.send_signal(signal.SIGHUP)
        assert service.message("serving ")


def wait_until_caught(service: Process, number: signal.Signals) -> None:
    """Return once the process handles this signal."""
    status = Path(f"/proc/{service.process.pid}/status")
    caught = 0
    while not caught >> (number - 1) & 1:
        caught = int(re.findall(r"SigCgt:\s*([0-9a-f]+)", status.read_text())[0], 16)


@pytest.mark.slow
def test_ctrl_c_before_it_is_ready_ends_it_in_order(tiny_bundles: dict[str, Bundle]) -> None:
    """The service can be stopped as soon as it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Process("--bundles", str(tiny_bundles["tiny"].folder.parent), "--port", str(port)) as service:
        answered = False
        while not answered:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("GET", "/livez")
                answered = connection.getresponse().status == 200
            except ConnectionRefusedError:
                assert service.process.poll() is None
            finally:
                connection.close()
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0


# -------------------------------------------------------------------------------------------------- a log nobody reads


@contextmanager
def unread(bundles: Path, workers: int = 1) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service whose log is no longer read and that has dropped lines; with its address."""
    command = [sys.executable, "-m", "service", "--port", "0", "--device", "cpu", "--log-format", "json"]
    command += ["--bundles", str(bundles), "--default-bundle", "tiny", "--workers", str(workers)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stderr is not None
            [url] = re.findall("http://[0-9.:]+", next(line for line in process.stderr if '"serving ' in line))
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            while lines_lost(url) == 0:
                for _ in range(100):
                    connection.request("GET", "/nothing", headers={"X-Request-ID": "x" * 128})
                    assert connection.getresponse().read()
            connection.close()
            yield process, url
        finally:
            process.kill()


def lines_lost(url: str) -> float:
    """The service's count of dropped log lines."""
    return Readings(httpx.get(f"{url}/metrics", timeout=60).text).total("gan_log_lines_dropped_total")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_a_log_that_nobody_reads_stops_no_request_no_probe_and_no_end(
    workers: int, tiny_bundles: dict[str, Bundle]
) -> None:
    """With a full pipe, requests and probes are answered, and SIGTERM ends the process in order."""
    with unread(tiny_bundles["tiny"].folder.parent, workers) as (process, url):
        for target in ("/sample?seed=1", "/livez", "/readyz"):
            assert httpx.get(url + target, timeout=60).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_the_log_says_how_many_lines_it_lost(tiny_bundles: dict[str, Bundle]) -> None:
    """Once the log is read again, a line says at the gap how many were dropped; no others are missing."""
    with unread(tiny_bundles["tiny"].folder.parent) as (process, url):
        assert process.stderr is not None
        lost, lines = lines_lost(url), map(json.loads, process.stderr)
        assert next(line["lines"] for line in lines if "lines" in line) == lost
        process.send_signal(signal.SIGTERM)
        assert [line["message"] for line in lines if line["message"] != "request"][-1] == "stopped"
        assert process.wait(60) == 0


@pytest.mark.slow
def test_a_process_that_can_tell_nobody_why_it_ends_ends_all_the_same(tmp_path: Path) -> None:
    """With a full stderr, the exit code alone says that the bundles can't be loaded."""
    exit_, entry = os.pipe()
    os.set_blocking(entry, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(entry, bytes(2**12))
    os.set_blocking(entry, True)
    command = [sys.executable, "-m", "service", "--port", "0", "--device", "cpu", "--bundles", str(tmp_path)]
    done = subprocess.run(command, stderr=entry, cwd=Path(__file__).parents[3], timeout=60, check=False)
    assert done.returncode == 3
    os.close(entry)
    os.close(exit_)


def test_what_nobody_expected_is_logged_and_code_1() -> None:
    """An unexpected error is logged in the configured format, and the process ends with exit code 1."""
    program = """
from service.__main__ import run_process
from service.logs import set_up_logs
set_up_logs("json", "info")
run_process(int, "x")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "invalid literal" in json.loads(done.stderr)["traceback"]


@pytest.mark.slow
def test_the_reason_for_the_end_is_the_last_that_is_logged(tmp_path: Path) -> None:
    """The reason is logged even if the process ends at once."""
    command = [sys.executable, "-m", "service", "--port", "0", "--device", "cpu", "--bundles", str(tmp_path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=root, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert f"cannot start: {tmp_path}" in done.stderr
