"""`make` takes torch's small build where there is no NVIDIA driver, and says first what it installs."""

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.torch_index import SIZES, choose, has_driver, offers, pinned_version

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on


@contextmanager
def index_with(page: str) -> Iterator[str]:
    """A package index that has this page for torch."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/whl/torch/" else 404)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/whl"
        finally:
            server.shutdown()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A PC with Linux and without a driver; the tests change it."""
    monkeypatch.setattr("deploy.torch_index.default_has_cuda", lambda: True)
    monkeypatch.setattr("deploy.torch_index.has_driver", lambda: False)
    return monkeypatch


@pytest.mark.usefixtures("machine")
def test_without_a_driver_the_build_without_cuda_is_taken() -> None:
    """From PyTorch's own index where that answers and has the pinned version, else from the default one."""
    with index_with(f'<a href="torch-{pinned_version()}%2Bcpu-cp311-cp311-linux_x86_64.whl">') as index:
        chosen = choose("", cpu_index=index)
    assert chosen.url == index
    assert SIZES["cpu"] in chosen.words
    with index_with("<html>Please log in to this network</html>") as index:
        assert choose("", cpu_index=index).url == ""
    unreachable = choose("", cpu_index=NOWHERE)
    assert unreachable.url == ""
    assert SIZES["cuda"] in unreachable.words
    assert NOWHERE in unreachable.words


def test_with_a_driver_the_default_index_is_taken(machine: pytest.MonkeyPatch) -> None:
    """Without asking any other."""
    machine.setattr("deploy.torch_index.has_driver", lambda: True)
    chosen = choose("", cpu_index="nobody asks it")
    assert chosen.url == ""
    assert "NVIDIA" in chosen.words


@pytest.mark.parametrize("has_one", [True, False])
def test_a_build_that_is_named_is_taken_whatever_this_machine_has(machine: pytest.MonkeyPatch, has_one: bool) -> None:  # noqa: FBT001 (a row of the table above)
    """An image is built on one machine and runs on another."""
    machine.setattr("deploy.torch_index.has_driver", lambda: has_one)
    with index_with(f"torch-{pinned_version()}") as index:
        assert choose("", "cpu", cpu_index=index).url == index
    assert choose("", "cpu", cpu_index=NOWHERE).url == ""
    assert choose("", "cuda", cpu_index="nobody asks it").url == ""
    assert choose("http://mine/whl", "cpu").url == "http://mine/whl"


def test_a_build_that_there_is_not_is_refused() -> None:
    """A misspelled `TORCH` stops the image's build."""
    script = [sys.executable, "deploy/torch_index.py", "/opt/venv", "", "gpu"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "torch comes as cpu or cuda, not as 'gpu'.\n"


def test_systems_whose_torch_is_small_anyway_take_it(machine: pytest.MonkeyPatch) -> None:
    """On macOS and on ARM the default index has builds without CUDA."""
    machine.setattr("deploy.torch_index.default_has_cuda", lambda: False)
    chosen = choose("", cpu_index="nobody asks it")
    assert chosen.url == ""
    assert SIZES["cpu"] in chosen.words


@pytest.mark.usefixtures("machine")
def test_torch_index_overrules() -> None:
    """Whatever the machine has."""
    assert choose("http://mine/whl").url == "http://mine/whl"


def test_an_index_that_does_not_answer_in_time_has_nothing() -> None:
    """It takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not offers(f"http://127.0.0.1:{silent.getsockname()[1]}", pinned_version(), within_s=0.1)


@pytest.mark.parametrize("found", ["tool", "module", "library", "none"])
def test_a_driver_is_known_by_any_of_its_parts(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tool, its kernel module, or its library, as containers have one of them at times."""
    monkeypatch.setenv("PATH", str(tmp_path))
    proc = tmp_path / "version"
    if found == "tool":
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    if found == "module":
        proc.touch()
    library = "libc.so.6" if found == "library" else "libnobody.so.1"
    if found == "library" and sys.platform != "linux":
        pytest.skip("no library by this name")
    assert has_driver(proc, library) is (found != "none")


def test_make_says_first_what_it_installs_and_takes_the_index_that_is_printed(tmp_path: Path) -> None:
    """The index and nothing else is on standard output; people read the rest. The recipe asks this script."""
    script = [sys.executable, "deploy/torch_index.py", ".venv", "http://mine/whl"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "http://mine/whl\n"
    assert done.stderr.startswith("Installing what serving needs into .venv: torch from http://mine/whl: ")
    make = ["make", "--dry-run", "--always-make", "serve", "TORCH_INDEX=http://mine/whl", f"VENV={tmp_path}"]
    recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ).stdout
    saying = recipe.index(f'deploy/torch_index.py "{tmp_path}" "http://mine/whl"')
    assert saying < recipe.index("-m pip install")
