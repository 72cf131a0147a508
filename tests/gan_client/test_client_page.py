"""docs/client.md says what is so: its examples run, in order, against the embedded bundles."""

import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import gan_client
from gan_client.__main__ import COMMANDS, main
from gan_client.core.calls import FileOptions

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's examples in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
def test_the_examples_run(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as one program; what their comments say is so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    names: dict[str, Any] = {}
    for example in blocks("python"):
        exec(example.replace("http://localhost:8000", embedded.url), names)  # noqa: S102 - our own page
    names["client"].close()
    assert len(names["images"]) == 64
    assert names["array"].shape == (5000, 28, 28, 1)
    assert names["batch"].shape == (500, 28, 28, 1)
    assert [len(names[name]) for name in ("threes", "chosen", "steps")] == [4, 3, 10]
    assert names["images"].shape == (64, 1, 28, 28)
    assert names["labels"].tolist()[:4] == [0, 1, 2, 0]
    assert names["animation"].startswith(b"GIF")


@pytest.mark.slow
def test_the_commands_run(embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each that there is has its words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("GAN_CLIENT_URL", embedded.url)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("gan-client")]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0
    assert len(list((tmp_path / "digits").glob("*.png"))) == 1000
    assert len(list((tmp_path / "arrays").glob("*.npy"))) == 3
    assert all(f"gan-client {name}" in PAGE for name in COMMANDS)


def test_every_option_and_error_is_on_the_page() -> None:
    """By its name."""
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(get_type_hints(FileOptions)) <= named
    errors = {name for name in gan_client.__all__ if name.endswith("Error")}
    assert errors <= named
