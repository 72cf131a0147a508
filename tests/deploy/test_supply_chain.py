"""The list of packages has what serving installs; the audit fails for vulnerable pins, and for nothing else."""

import http.server
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deploy.audit.audit import main
from deploy.torch_index import pinned_version

ROOT = Path(__file__).parents[2]


def test_the_list_has_what_serving_installs_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    """With what its packages need themselves, all pinned; nothing of training and tests."""
    runpy.run_path(str(ROOT / "deploy/sbom/serving_pins.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    assert set(lines) <= set((ROOT / "constraints.txt").read_text().splitlines())
    names = {line.partition("==")[0].lower() for line in lines}
    assert {"torch", "fastapi", "starlette", "onnxruntime", "numpy"} <= names
    assert not names & {"pytest", "ruff", "matplotlib", "tensorboard"}


@contextmanager
def database(status: int) -> Iterator[str]:
    """A data base that has an answer for torch's pinned version, or has none."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == f"/torch/{pinned_version()}" else 404)
            self.end_headers()
            self.wfile.write(b'{"vulnerabilities": []}')

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/torch/{{}}"
        finally:
            server.shutdown()


@pytest.fixture
def audit_that_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the audit with a pip-audit that says this; the exit code, and what people read."""

    def run(said: str, status: int = 200) -> tuple[int, str]:
        program = tmp_path / "bin" / "pip-audit"
        program.parent.mkdir()
        program.write_text(f"#!{sys.executable}\nprint({said!r}, end='')\n")
        program.chmod(0o755)
        with database(status) as address:
            return main(address, tmp_path), capsys.readouterr().out

    return run


def package(name: str, *vulnerabilities: str, **others: str) -> dict[str, object]:
    """What pip-audit says of a package."""
    found = [{"id": one, "fix_versions": ["1.1"]} for one in vulnerabilities]
    return {"name": name, "version": "1.0", "vulns": found, **others}


def test_a_vulnerable_pin_fails(audit_that_says: Any) -> None:
    """Each is named, with the version that mends it."""
    code, said = audit_that_says(json.dumps({"dependencies": [package("good"), package("bad", "PYSEC-1")]}))
    assert (code, said) == (1, "bad 1.0: PYSEC-1, mended in 1.1\n")


def test_pins_without_known_vulnerabilities_pass(audit_that_says: Any) -> None:
    """Those that the data base does not have are named: nothing is known of them."""
    code, said = audit_that_says(json.dumps({"dependencies": [package("good"), package("new", skip_reason="no")]}))
    assert code == 0
    assert "does not know the pinned versions of: new." in said


def test_a_data_base_that_is_not_there_is_no_failure(audit_that_says: Any) -> None:
    """As on a machine without internet, or behind a mirror of the index alone."""
    code, said = audit_that_says("nobody runs it", status=404)
    assert code == 0
    assert said.startswith("The pins were not audited: http://127.0.0.1:")


@pytest.mark.parametrize("said", ["", "no JSON"])
def test_an_audit_that_breaks_off_is_no_failure(audit_that_says: Any, said: str) -> None:
    """A connection that is lost says nothing of the pins."""
    code, read = audit_that_says(said)
    assert code == 0
    assert read.startswith("The pins were not audited: ")
