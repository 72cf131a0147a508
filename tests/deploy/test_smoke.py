"""The smoke test of deployments, against real servers and against one that is something else."""

import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import httpx
import pytest

from service.settings import Settings

ROOT = Path(__file__).parents[2]
CHECKS = ["probes", "metrics", "keys", "bundles", "sample", "discriminate", "v1", "v2", "openapi", "errors"]


def smoke(*arguments: str) -> tuple[int, dict[str, tuple[str, str]], str]:
    """Exit code, what it said of each check, and its error output."""
    done = subprocess.run(
        [sys.executable, "-I", str(ROOT / "deploy/smoke"), *arguments], capture_output=True, text=True, check=False
    )
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    return done.returncode, {head[5:]: (head[:4].strip(), more) for head, _, more in lines}, done.stderr


def test_a_deployment_that_keeps_its_promises_passes(live: Any) -> None:
    """One line for each check, in order; what needs a key is skipped."""
    code, said, err = smoke(live.url)
    assert list(said) == CHECKS
    assert {name: how for name, (how, _) in said.items() if how != "ok"} == {"keys": "skip"}
    assert (code, err) == (0, "")


def test_keys_tls_and_a_prefix_are_followed(
    live_server: Any,
    tiny_settings: Callable[..., Settings],
    make_certificate: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    """With its key and authority a deployment passes whole; without either it fails."""
    certificate, key = make_certificate(tmp_path, "one")
    settings = tiny_settings(api_keys="k1", tls_cert_file=certificate, tls_key_file=key, root_path="/gan")
    with live_server(settings).running() as server:
        url = f"{server.url}/gan/"
        code, said, _ = smoke(url, "--key", "k1", "--ca", str(certificate))
        assert {how for how, _ in said.values()} == {"ok"}, said
        assert code == 0
        code, said, _ = smoke(url, "--key", "k2", "--ca", str(certificate))
        assert code == 1
        assert said["probes"][0] == "ok"
        assert said["sample"] == ("FAIL", said["sample"][1])
        assert "401 in place of 200" in said["sample"][1]
        code, said, _ = smoke(url, "--key", "k1")
        assert {how for how, _ in said.values()} == {"FAIL"}
        assert "certificate" in said["probes"][1]
        assert code == 1


def test_the_limits_of_a_key_and_coarse_last_bits_are_no_failure(
    live_server: Any, tiny_settings: Callable[..., Settings]
) -> None:
    """Where its key may draw little, the test comes back when it is told to; where ETags are weak, bytes may differ."""
    with live_server(tiny_settings(api_keys="k1", key_images_per_s=6, exact=False)).running() as server:
        code, said, _ = smoke(server.url, "--key", "k1")
        series = httpx.get(f"{server.url}/metrics").text.splitlines()
    assert {how for how, _ in said.values()} == {"ok"}, said
    assert "not exact" in said["sample"][1]
    assert code == 0
    assert any('reason="rate_limited"' in line for line in series)


class Anything(BaseHTTPRequestHandler):
    """Answers every request with an empty JSON object."""

    def do_GET(self) -> None:
        """See the class."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_DELETE = do_GET  # noqa: N815 - as http.server calls them

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


def test_what_is_no_deployment_fails() -> None:
    """Another server fails in each check that looks at a reply, and so does a port where nobody listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Anything) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            code, said, err = smoke(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert {name for name, (how, _) in said.items() if how == "FAIL"} == {*CHECKS} - {"probes", "keys"}
    assert (code, err) == (1, "")
    code, said, err = smoke(f"http://127.0.0.1:{server.server_port}")
    assert list(said) == CHECKS
    assert (code, err) == (1, "")


def test_what_speaks_no_http_fails() -> None:
    """Each check fails with a line, as at the port of another protocol."""

    class Greeting(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with ThreadingTCPServer(("127.0.0.1", 0), Greeting) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            code, said, err = smoke(f"http://127.0.0.1:{server.server_address[1]}")
        finally:
            server.shutdown()
            thread.join()
    assert {name for name, (how, _) in said.items() if how == "FAIL"} == {*CHECKS} - {"keys"}
    assert "SSH-2.0" in said["probes"][1]
    assert (code, err) == (1, "")


@pytest.mark.parametrize("arguments", [["localhost:8000"], ["http://localhost", "--ca", "/nowhere"], []])
def test_arguments_that_can_not_be_used_are_code_2(arguments: list[str]) -> None:
    """Nothing is asked."""
    code, said, err = smoke(*arguments)
    assert (code, said) == (2, {})
    assert "error: " in err
