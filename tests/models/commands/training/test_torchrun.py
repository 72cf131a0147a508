"""`torchrun -m models train`: one run by two processes or machines, what stops it, ranks that die or fall silent."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.__main__ import main
from models.bundle import read_bundle
from models.commands.training.followers import own_device
from models.spec import PRESETS
from models.training.run_folder import RunDir, RunError
from models.training.torchrun.ranks import Alone

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[4]

# The command, with a preset of small nets; each rank writes down its process's id.
PROGRAM = """
import os, sys
from pathlib import Path
from models.__main__ import main
from models.spec import PRESETS, TrainingOptions
from models.training import health, publishing, report, trainer
from models.training.torchrun import heartbeat, ranks
small = TrainingOptions.model_validate_json(Path(__file__).with_name("small.json").read_text())
PRESETS["small"] = small
report.page = lambda _: ""
RANK = int(os.environ["RANK"])
Path(__file__).with_name(f"pid-{RANK}.part").write_text(str(os.getpid()))
Path(__file__).with_name(f"pid-{RANK}.part").rename(Path(__file__).with_name(f"pid-{RANK}"))
"""
ALARM = """
health.Probe.every = lambda self, steps: steps
health.HealthMonitor.see = lambda self, step, now: [health.Alarm("collapse", 9, 8, "no more variety")]
"""
DIVERGED = """
PRESETS["small"] = small.model_copy(update={"generator_optimiser": small.generator_optimiser.model_copy(
    update={"lr": 1e38})})
"""
HASTY = """
heartbeat.BEAT_S, heartbeat.SILENT_BEATS = 0.2, 15
"""
# A score that outlasts what silence is allowed three times over.
LONG_SCORE = """
import time
heartbeat.BEAT_S, heartbeat.SILENT_BEATS = 0.2, 50
beats, beat, score = [], heartbeat.Heartbeat.beat, publishing.score

def counted(self):
    found = beat(self)
    beats.append(found)
    return found

def long_score(*arguments):
    until = len(beats) + 3 * heartbeat.SILENT_BEATS
    while len(beats) < until:
        time.sleep(0.01)
    return score(*arguments)

heartbeat.Heartbeat.beat, publishing.score = counted, long_score
heartbeat.BEAT_S = 0.02
"""
OTHER_DATA = """
if RANK == 1:
    sys.argv[sys.argv.index("--data") + 1] += ".other.npz"
"""


CABLE, ADDRESSES = "cable", ("10.0.0.1", "10.0.0.2")


class Together:
    """Two processes of the command under torchrun, which end with the block if they have not before."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data, self.out = folder, data, folder / "run"
        self.stats = self.out / "stats.jsonl"

    def start(self, *more: str, patch: str = "") -> "subprocess.Popen[str]":
        """Begin, or go on."""
        self.write_program(patch)
        self.process = self.torchrun([], ["--standalone", "--nproc-per-node", "2"], *more)
        return self.process

    def start_on(self, machine: int, hosts: Sequence[str], *more: str) -> "subprocess.Popen[str]":
        """Begin one of two machines' part."""
        how = ["--nnodes", "2", "--node-rank", str(machine), "--master-addr", ADDRESSES[0], "--master-port", "29500"]
        on = ["ip", "netns", "exec", hosts[machine]]
        self.process = self.torchrun(on, how, *more, GLOO_SOCKET_IFNAME=CABLE)
        return self.process

    def write_program(self, patch: str = "") -> None:
        """What all ranks run."""
        self.folder.joinpath("program.py").write_text(f"{PROGRAM}{patch}\nsys.exit(main())\n")
        self.folder.joinpath("small.json").write_text(PRESETS["small"].model_dump_json())
        for rank in range(2):
            self.folder.joinpath(f"pid-{rank}").unlink(missing_ok=True)

    def torchrun(
        self, before: Sequence[str], how: Sequence[str], *more: str, **variables: str
    ) -> "subprocess.Popen[str]":
        """torchrun with these options, behind these words."""
        return subprocess.Popen(
            [
                *(*before, sys.executable, "-m", "torch.distributed.run", *how, "--shutdown-timeout", "10"),
                *(str(self.folder / "program.py"), *self.arguments(*more)),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def arguments(self, *more: str) -> list[str]:
        """Of the train command."""
        words = ["train", "--preset", "small", "--data", str(self.data), "--out", str(self.out), "--unconditional"]
        return [*words, "--device", "cpu", "--score-every", "30", *more]

    def finish(self, *more: str, patch: str = "") -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a run to its end."""
        process = self.start(*more, patch=patch)
        out, err = process.communicate()
        return process.returncode, out, err

    def until_it_steps(self) -> None:
        """Wait until there are figures."""
        self.wait_for(lambda: self.stats.exists() and self.stats.stat().st_size > 0)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds, as long as torchrun lives."""
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        return int(self.folder.joinpath(f"pid-{rank}").read_text())

    def record(self) -> dict[str, Any]:
        """What options.json says."""
        found: dict[str, Any] = json.loads((self.out / "options.json").read_text())
        return found

    def goes_on_alone(self) -> None:
        """One process resumes the run, and makes a bundle of it."""
        found = RunDir(self.out).newest_checkpoint()
        step = found[1]["step"] if found else 0
        assert main([*self.arguments("--resume", "--steps", str(step + 2))]) == 0
        assert read_bundle(self.out / "bundle").manifest.training["steps"] == step + 2


@pytest.fixture
def together(tmp_path: Path, small_preset: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Together]:  # noqa: ARG001
    """With 60 images of random pixels."""
    monkeypatch.setattr("models.training.report.page", lambda _: "")
    random = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", images=random.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "data.npz.other.npz", images=random.integers(0, 256, (60, 8, 8), dtype=np.uint8))
    made = Together(tmp_path, tmp_path / "data.npz")
    yield made
    if hasattr(made, "process") and made.process.poll() is None:
        made.process.kill()
        for rank in range(2):
            if made.folder.joinpath(f"pid-{rank}").exists():
                os.kill(made.pid(rank), signal.SIGKILL)
        made.process.communicate()


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two machines, which are network namespaces with a cable between them."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"gan-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                switch_off(name)
                ip("netns", "delete", name)


def ip(*words: str) -> str:
    """What iproute2 says."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def switch_off(host: str) -> None:
    """Kill all processes of the machine."""
    for pid in ip("netns", "pids", host).split():
        os.kill(int(pid), signal.SIGKILL)


def errors(err: str) -> list[str]:
    """What the ranks say of why they end; torchrun adds words of its own."""
    return [line for line in err.splitlines() if line.startswith("error:")]


def exit_code(err: str) -> int:
    """That of the rank that ended first, from torchrun's table; it sends the others a signal then."""
    found = re.search(r"Root Cause.*?exitcode +: (-?\d+)", err, flags=re.DOTALL)
    assert found, err
    return int(found[1])


@pytest.mark.slow
def test_two_processes_make_one_run_and_one_goes_on_with_it(
    together: Together, capsys: pytest.CaptureFixture[str]
) -> None:
    """One record, one bundle, each line said once; another number of processes goes on, and says and records it."""
    code, out, err = together.finish("--steps", "60")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("Training small")]
    assert len(lines) == 1
    assert "cpu, 2 processes" in lines[0]
    assert errors(err) == []
    assert together.record()["world_size"] == 2
    bundle = read_bundle(together.out / "bundle")
    assert bundle.manifest.training["world_size"] == 2
    both = [json.loads(line) for line in together.stats.read_text().splitlines()]
    assert [row["step"] for row in both] == [30, 50, 60]

    assert main([*together.arguments("--resume", "--steps", "70")]) == 0
    said = capsys.readouterr().out
    assert "Going on from step 60" in said
    assert "by 1 process, after 2 processes" in said
    changes = together.record()["overrides"][-1]
    assert (changes["step"], changes["changes"]["world_size"]) == (60, [2, 1])

    alone = together.out.with_name("alone")
    assert main([*together.arguments("--steps", "60", "--out", str(alone))]) == 0
    one = [json.loads(line) for line in (alone / "stats.jsonl").read_text().splitlines()]
    assert [row["d_loss"] for row in both] == pytest.approx([row["d_loss"] for row in one], abs=1e-5)
    assert main([*together.arguments("--steps", "3", "--out", str(alone), "--resume", "--seed", "3")]) == 1
    assert "seed was 0 and is 3" in capsys.readouterr().err  # other changes do need a word


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one rank"])
def test_a_signal_to_any_saves_the_work_of_all(together: Together, to: str) -> None:
    """All finish the same step and leave with the shell's code; the run goes on from there."""
    process = together.start("--steps", "1000000")
    together.until_it_steps()
    os.kill(process.pid if to == "torchrun" else together.pid(1), signal.SIGTERM)
    out, err = process.communicate()
    said = re.search(r"Stopped at step (\d+) of 1000000; --resume goes on", out)
    assert said, (out, err)
    assert errors(err) == []
    assert to == "torchrun" or exit_code(err) == 130
    found = RunDir(together.out).newest_checkpoint()
    assert found is not None
    assert found[1]["step"] == int(said[1])
    together.goes_on_alone()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_resumes(together: Together, rank: int) -> None:
    """The other one says in a line that it is alone; nothing that was saved is lost."""
    process = together.start("--steps", "1000000")
    together.wait_for(lambda: any((together.out / "checkpoints").glob("step-*")))
    os.kill(together.pid(rank), signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 1
    if rank == 0 or "Stopped at step" not in out:  # torchrun's signal may reach rank 0 between two steps, to save
        (line,) = errors(err)
        assert "another process of this run has died, or its machine" in line
        assert "--resume goes on from the last checkpoint" in line
    together.goes_on_alone()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_all_and_the_run_resumes(together: Together, rank: int) -> None:
    """Who is silent is named; torchrun then ends it."""
    process = together.start("--steps", "1000000", patch=HASTY)
    together.wait_for(lambda: any((together.out / "checkpoints").glob("step-*")))
    os.kill(together.pid(rank), signal.SIGSTOP)
    together.wait_for(lambda: f"rank {rank}" in line_of(process))
    together.wait_for(lambda: f"{together.pid(rank)} closing signal" in line_of(process))
    os.kill(together.pid(rank), signal.SIGKILL)  # as torchrun does after half a minute
    _, err = process.communicate()
    assert process.returncode == 1
    assert exit_code(err) == 1
    together.goes_on_alone()


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line of stderr."""
    assert process.stderr is not None
    return process.stderr.readline()


@pytest.mark.slow
def test_a_machine_that_is_gone_ends_the_other_and_the_run_resumes(together: Together, hosts: list[str]) -> None:
    """Two machines train one run. The cable is cut, so nobody says that one has died: silence does."""
    together.write_program(HASTY)
    lost = together.start_on(1, hosts, "--steps", "1000000", "--out", "nowhere")
    process = together.start_on(0, hosts, "--steps", "1000000")
    together.wait_for(lambda: any((together.out / "checkpoints").glob("step-*")))
    assert together.record()["world_size"] == 2
    ip("-n", hosts[1], "link", "set", CABLE, "down")
    switch_off(hosts[1])
    lost.communicate()
    _, err = process.communicate()
    assert process.returncode == 1
    (line,) = errors(err)
    assert "no word from rank 1" in line
    assert not Path("nowhere").exists()
    together.goes_on_alone()


@pytest.mark.slow
def test_two_go_on_with_the_run_of_one_and_work_of_any_length_is_no_silence(together: Together) -> None:
    """While rank 0 scores for three times as long as silence may last, the other waits, and both go on."""
    assert main([*together.arguments("--steps", "10")]) == 0
    code, out, err = together.finish("--steps", "30", "--resume", patch=LONG_SCORE)
    assert code == 0, err
    assert "Going on from step 10" in out
    assert "by 2 processes, after 1 process" in out
    assert together.record()["overrides"][-1]["changes"]["world_size"] == [1, 2]
    assert read_bundle(together.out / "bundle").manifest.training["steps"] == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "words", "code"),
    [
        (ALARM, "stopped at step 50: collapse: no more variety", 4),
        (DIVERGED, "training diverged by step 30", 4),
        (OTHER_DATA, "rank 1 is not like rank 0, with data", 1),
    ],
    ids=["alarm", "diverged", "other data"],
)
def test_all_end_alike_and_rank_0_says_why(together: Together, patch: str, words: str, code: int) -> None:
    """One line for all of them, and one exit code."""
    returned, _, err = together.finish("--steps", "100", patch=patch)
    assert returned == 1  # torchrun's
    (line,) = errors(err)
    assert words in line
    assert exit_code(err) == code
    assert "models/commands" not in err  # no traceback of ours beside torchrun's own


@pytest.mark.slow
def test_a_dry_run_measures_what_all_do_together(together: Together) -> None:
    """One table, and a step of both processes."""
    code, out, err = together.finish("--dry-run")
    assert code == 0, err
    assert out.count("2 processes together") == 1
    assert not together.out.exists()


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two takes the second; a single GPU, or one named by its number, is not for two."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks: Any = Alone()
    ranks.rank = ranks.local_rank = 1
    ranks.size = ranks.local_size = 2

    class Arguments:
        device = "auto"

    arguments: Any = Arguments()
    assert own_device(arguments, ranks) == torch.device("cuda", 1)
    arguments.device = "cuda:1"
    with pytest.raises(RunError, match="--device cuda gives it to them"):
        own_device(arguments, ranks)
    assert own_device(arguments, Alone()) == torch.device("cuda", 1)
    arguments.device = "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="2 processes on this machine need one each, and there are 1"):
        own_device(arguments, ranks)
