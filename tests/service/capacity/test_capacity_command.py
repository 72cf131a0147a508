"""`python -m service capacity`: real services, driven for fractions of a second."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.bundle import Bundle
from service.__main__ import start
from service.capacity.command import run
from service.capacity.measure import Plan
from service.settings import Settings

SHORT = Plan(warm_seconds=0.1, seconds=0.2, requests=20, most_seconds=0.5, steps=2, rounds=1, connections=200)
HEAD = "time_s,requests_per_s,count\n"


@pytest.fixture
def measure(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> Callable[..., int]:
    """Measure the tiny bundles with these flags, for a traffic of these lines or without one."""

    def make(p99_ms: float, traffic: str | None = None, **flags: str) -> int:
        flags = {"bundles": str(tiny_bundles["tiny"].folder.parent), "default_bundle": "tiny", "device": "cpu"} | flags
        file = None
        if traffic is not None:
            file = tmp_path / "traffic.csv"
            file.write_text(HEAD + traffic)
        asked = argparse.Namespace(p99_ms=p99_ms, traffic=file, json=True)
        return run(Settings.model_validate(flags), flags, [1], asked, SHORT)

    return make


@pytest.mark.slow
def test_it_says_what_a_traffic_needs(
    measure: Callable[..., int],
    make_certificate: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Settings, latencies, replicas and cost fit together, with TLS, keys and limits by key that we must get around."""
    certificate, key = make_certificate(tmp_path, "one")
    flags = {
        "tls_cert_file": str(certificate),
        "tls_key_file": str(key),
        "api_keys": "operators-own",
        "key_images_per_s": "1",
        "drain_delay_s": "60",
        "max_deadline_s": "60",
    }
    assert measure(20_000, "0,50000,1\n60,100000,2\n120,100000,2\n", **flags) == 0
    printed = capsys.readouterr()
    assert "capacity: 1 worker: " in printed.err
    told = json.loads(printed.out)
    assert told["bundle"].startswith("tiny@")
    assert told["device"] == "cpu"
    assert told["counts"] == [2]  # the busiest
    assert told["load"] == {"requests_per_s": 100_000, "images_per_s": 200_000, "seconds": 180}
    assert told["settings"]["GAN_WORKERS"] == 1
    assert told["settings"]["GAN_DEADLINE_S"] == 60  # and no more than the operator allows
    assert told["settings"]["GAN_MAX_QUEUED_IMAGES"] >= 4096
    knee = told["knee"]
    assert 0 < knee["p50_ms"] <= knee["p95_ms"] <= knee["p99_ms"] <= 20_000
    assert knee["images_per_s"] == pytest.approx(2 * knee["requests_per_s"], rel=0.01)
    assert told["replicas"] == pytest.approx(100_000 / knee["requests_per_s"], abs=1.1)
    assert told["replicas_with_a_spare"] == told["replicas"] + 1
    assert told["machine_hours_per_million_images"] == pytest.approx(1e6 / knee["images_per_s"] / 3600, rel=0.01)
    assert told["machine_hours_per_million_images_of_this_traffic"] > 0
    assert [point["requests_per_s"] for point in told["curve"]] == sorted(p["requests_per_s"] for p in told["curve"])
    assert set(told["checked"]) == {"requests_per_s", "images_per_s", "expected", "seen"}
    assert told["goodput_kept"] > 0
    assert set(told["client"]) == {"cores", "late_p99_ms"}


@pytest.mark.slow
def test_what_can_not_be_measured_is_said(
    measure: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A latency that no rate keeps is exit code 1; of a service that does not start, its own code and last words."""
    assert measure(0.001) == 1
    assert "no rate keeps a p99 of 0.001 ms" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert measure(50, bundles=str(tmp_path / "none")) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "the service did not start:" in told.err
    assert "none" in told.err


@pytest.mark.slow
def test_a_signal_ends_the_service_too(tiny_bundles: dict[str, Bundle]) -> None:
    """SIGTERM in the midst of it: exit code 143, and nothing is left running."""
    folder = str(tiny_bundles["tiny"].folder.parent)
    command = [sys.executable, "-m", "service", "capacity", "--p99-ms", "1000", "--bundles", folder, "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "1 worker: " in process.stderr.readline()
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120)[0] == ""
        assert process.returncode == 128 + signal.SIGTERM
    assert len(children) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the following arguments are required: --p99-ms"),
        (["--p99-ms", "x"], "argument --p99-ms: 'x' is no number of milliseconds"),
        (["--p99-ms", "0"], "argument --p99-ms: '0' is no number of milliseconds"),
        (["--p99-ms", "nan"], "argument --p99-ms: 'nan' is no number of milliseconds"),
        (["--p99-ms", "50", "--max-count", "x"], "GAN_MAX_COUNT (or --max-count) is 'x'"),
        (["--p99-ms", "50", "--wrkers", "2"], "unrecognized arguments: --wrkers"),
        (["--p99-ms", "50", "--traffic", "/nowhere.csv"], "/nowhere.csv: No such file or directory"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, before anything is started."""
    monkeypatch.setattr("service.capacity.command.ServiceProcess", None)
    try:
        code: Any = start(["capacity", *arguments])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    told = capsys.readouterr().err
    assert reason in told
    assert told.count("\n") == 1
