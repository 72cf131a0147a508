"""Images in bulk by the tasks of a Ray cluster: the same bytes as by processes of this machine."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.__main__ import main
from models.bundle import Bundle

ray: Any = pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.exchange.bulk.worker import make_shard  # noqa: PLC0415

    def make(task: Any, numbers: Any, *_: object, **__: object) -> Iterator[Any]:
        return (make_shard(task, number) for number in numbers)

    monkeypatch.setattr("models.commands.bundles.generate.make_by_processes", make)


def generate(bundle: Bundle, out: Path, *options: str) -> int:
    return main(["generate", str(bundle.folder), "--out", str(out), "--count", "95", "--shard-size", "10", *options])


def checksums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.mark.usefixtures("here")
def test_ray_gives_the_bytes_of_this_machine(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Every file, the manifest too; and a second run, with or without Ray, has nothing to do."""
    assert generate(tiny_bundles["cond"], tmp_path / "here") == 0
    assert generate(tiny_bundles["cond"], tmp_path / "ray", "--ray", "local", "--workers", "2") == 0
    assert checksums(tmp_path / "ray") == checksums(tmp_path / "here")
    assert generate(tiny_bundles["cond"], tmp_path / "ray") == 0


def test_a_cluster_that_is_not_there_is_one_line(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not Ray's pages of it."""
    assert generate(tiny_bundles["tiny"], tmp_path, "--ray", "no cluster") == 1
    assert "error: no Ray cluster at no cluster" in capsys.readouterr().err


def test_what_a_task_could_not_do_is_one_line(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it would be said of a process."""
    out = tmp_path / "out"
    assert generate(tiny_bundles["tiny"], "memory://nobody/sees/this", "--ray", "local") == 1  # type: ignore[arg-type]
    assert "all who write must reach the same place" in capsys.readouterr().err
    assert not out.exists()
