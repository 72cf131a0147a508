"""Images in bulk by processes of this machine: as many as one likes, killed, stopped, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.__main__ import main
from models.bundle import Bundle
from models.exchange.bulk.plan import SHARD_NAME, Made
from models.exchange.bulk.worker import Task, make_shard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
COUNT, SHARD = 100_000, 2_500  # some seconds of work, so that it can be interrupted


def command(bundle: Bundle, out: Path, workers: int) -> list[str]:
    options = f"--count {COUNT} --shard-size {SHARD} --format npy --workers {workers}".split()
    return [sys.executable, "-m", "models", "generate", str(bundle.folder), "--out", str(out), *options]


def finish(bundle: Bundle, out: Path, workers: int) -> str:
    done = subprocess.run(command(bundle, out, workers), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def begun(bundle: Bundle, out: Path, workers: int = 2) -> Iterator["subprocess.Popen[str]"]:
    """The command, in a group of its own, once it has a first shard."""
    with subprocess.Popen(
        command(bundle, out, workers),
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        wait_for(lambda: running.poll() is not None or bool(shards(out)))
        assert running.poll() is None, "it was faster than the test"
        yield running


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def shards(out: Path) -> list[str]:
    return [path.name for path in out.glob("shard-*") if SHARD_NAME.fullmatch(path.name)] if out.exists() else []


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def expected(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is made in this process, in one go."""

    def make(task: Task, numbers: Iterable[int], *_: object, **__: object) -> Iterator[Made]:
        return (make_shard(task, number) for number in numbers)

    out = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.commands.bundles.generate.make_by_processes", make)
        assert main(command(tiny_bundles["cond"], out, 1)[3:]) == 0
    return contents(out)


def test_kill_9_loses_nothing_but_time(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """The processes that are left end by themselves, and a second run, by two, gives the bytes of a single one."""
    bundle, out = tiny_bundles["cond"], tmp_path / "out"
    with begun(bundle, out) as running:
        group = running.pid
        running.kill()

    def is_gone() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return False

    wait_for(is_gone)
    assert not (out / "manifest.json").exists()
    finish(bundle, out, workers=2)
    assert contents(out) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, expected: dict[str, bytes], number: signal.Signals
) -> None:
    """Sent to all of its processes, as a terminal does: it says how far it came, and leaves whole shards alone."""
    bundle, out = tiny_bundles["cond"], tmp_path / "out"
    with begun(bundle, out) as running:
        os.killpg(running.pid, number)
        said, complained = running.communicate()
    assert running.returncode == 130
    assert "the same command goes on" in said
    assert complained.strip() == "Stopping: what is whole stays, and the same command goes on."
    recorded = json.loads((out / "manifest.part.json").read_bytes())["shards"]
    names = [name for shard in recorded for name in shard["files"]]
    assert set(shards(out)) >= set(names)
    assert {path.name for path in out.iterdir()} == {*shards(out), "manifest.part.json"}
    assert f"{len(recorded) * SHARD:,} of {COUNT:,} images" in said
    finish(bundle, out, workers=1)
    assert contents(out) == expected


def test_a_process_that_is_killed_is_said(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """As by a system that is short of memory: one line, exit code 1, and what is whole stays."""
    out = tmp_path / "out"
    with begun(tiny_bundles["cond"], out, workers=1) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        makers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        for pid in makers:
            os.kill(int(pid), signal.SIGKILL)
        _, complained = running.communicate()
    assert running.returncode == 1
    assert complained.count("\n") == 1
    assert "exit code -9" in complained
    assert shards(out)


def test_two_runs_do_not_share_a_folder(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """The second is refused while the first is at work."""
    bundle, out = tiny_bundles["cond"], tmp_path / "out"
    with begun(bundle, out) as running:
        running.send_signal(signal.SIGSTOP)  # so that it is still at work when the second begins
        second = subprocess.run(command(bundle, out, 1), cwd=ROOT, capture_output=True, text=True, check=False)
        running.terminate()
        running.send_signal(signal.SIGCONT)
        running.communicate()
    assert second.returncode == 1
    assert "another process is at work here" in second.stderr
