"""The small commands, and what all of them have in common."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gan_client.__main__ import main


def test_bundles_are_listed(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, the default one marked."""
    assert main(["bundles", "--url", live.url]) == 0
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line.partition("@")[0] for line in lines] == ["  cond", "  rgb", "* tiny"]
    assert lines[0].endswith("8×8 grey, 3 classes")


def test_files_are_judged(live: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, as text or JSON; one that is no image has its reason, and the exit code says so."""
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    files = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert main(["discriminate", "--url", live.url, "--bundle", "cond", files[0]]) == 0
    assert "a.png as '" in capsys.readouterr().out
    assert main(["discriminate", "--url", live.url, "--json", *files]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["file"], second["file"]) == tuple(files)
    assert 0 < first["probability_real"] < 1
    assert second["error"]["code"] == "invalid"
    assert main(["discriminate", "--url", live.url, *files]) == 1
    assert "b.png: The image is not" in capsys.readouterr().out


def test_the_address_and_the_key_come_from_the_environment_or_a_file(
    live_server: Any, tiny_settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is no flag: everybody on a machine sees the arguments of its programs."""
    with live_server(tiny_settings(api_keys="secret")).running() as server:
        monkeypatch.setenv("GAN_CLIENT_URL", server.url)
        assert main(["bundles"]) == 1
        monkeypatch.setenv("GAN_CLIENT_KEY", "secret")
        assert main(["bundles"]) == 0
        monkeypatch.setenv("GAN_CLIENT_KEY", "other")
        (tmp_path / "key").write_text("secret\n")
        assert main(["bundles", "--key-file", str(tmp_path / "key")]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bundles", "--url", "http://127.0.0.1:9", "--retries", "0"], 1, "127.0.0.1:9"),
        (["bundles", "--url", "nowhere"], 2, "no address"),
        (["bundles", "--timeout", "0"], 2, "timeout"),
        (["discriminate", "missing.png"], 1, "missing.png"),
        (["bundles", "--key-file", "missing.txt"], 1, "missing.txt"),
    ],
)
def test_what_fails_is_one_line(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a person can do something about, there is no traceback."""
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gan-client: ")
    assert said in line
