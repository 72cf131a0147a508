"""Schemathesis finds nothing that the OpenAPI document does not say: run by `make test-clients`.

It sends what the document allows and what it excludes, and compares replies with it: statuses, media types, headers,
bodies, methods and keys. CONTRIBUTING.md says how to have it send more.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

URL, KEY = os.environ["SERVICE_URL"], os.environ["SERVICE_ADMIN_KEY"]
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
# Of what is drawn at random for each operation; the edges of every field come first.
EXAMPLES = os.environ.get("HOSTILE_CASES", "20")


def ask(path: str, method: str = "GET") -> Any:
    """A reply's JSON."""
    request = urllib.request.Request(f"{URL}{path}", method=method, headers=AUTHORIZATION)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
        return json.load(reply)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Path]:
    """The settings, with a version that exists; afterwards every bundle is loaded again."""
    version = ask("/bundles/mnist")["version"]
    text = Path(__file__).with_name("schemathesis.toml").read_text()
    path = tmp_path / "schemathesis.toml"
    path.write_text(text.replace("[parameters]\n", f'[parameters]\n"path.version" = "{version}"\n'))
    yield path
    ask("/v2/repository/models/mnist-mlp/load", "POST")


def test_nothing_is_undocumented(settings: Path, tmp_path: Path) -> None:
    """The same requests in each run, for a minute or two."""
    command = [
        *(Path(sys.executable).with_name("st"), "--config-file", settings, "run", f"{URL}/openapi.json"),
        *("--header", f"Authorization: {AUTHORIZATION['Authorization']}", "--seed", "1", "--generation-deterministic"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--continue-on-failure"),
        *("--no-shrink", "--suppress-health-check", "all", "--no-color", "--warnings", "off"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
