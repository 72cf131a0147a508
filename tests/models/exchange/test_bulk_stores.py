"""Images in bulk on S3, as moto's server imitates it: whole objects under their final names, and nothing else."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from models.__main__ import main
from models.bundle import Bundle
from models.exchange.bulk.worker import make_shard

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    """fsspec's file system on a bucket, for this process and those that it starts."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = fsspec.filesystem("s3")
        store.mkdir("pictures")
        yield store
    running.stop()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are made in this process."""

    def make(task: Any, numbers: Any, *_: object, **__: object) -> Iterator[Any]:
        return (make_shard(task, number) for number in numbers)

    monkeypatch.setattr("models.commands.bundles.generate.make_by_processes", make)


def generate(bundle: Bundle, out: str, *options: str) -> int:
    return main(["generate", str(bundle.folder), "--out", out, "--count", "25", "--shard-size", "10", *options])


def contents(store: Any, folder: str) -> dict[str, bytes]:
    store.invalidate_cache()
    return {name.rpartition("/")[2]: store.cat_file(name) for name in store.find(folder)}


def test_a_bucket_gets_what_a_folder_gets(tiny_bundles: dict[str, Bundle], store: Any, tmp_path: Any) -> None:
    """By two processes, byte for byte."""
    bundle = tiny_bundles["cond"]
    assert generate(bundle, "s3://pictures/some/where", "--workers", "2") == 0
    assert generate(bundle, f"file://{tmp_path}/folder", "--workers", "1") == 0
    folder = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    assert contents(store, "pictures/some/where") == folder


@pytest.mark.usefixtures("here")
def test_a_bucket_is_gone_on_with(
    tiny_bundles: dict[str, Bundle], store: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is not made again, what is lost is, and other options are refused."""
    bundle, place = tiny_bundles["tiny"], "s3://pictures/again"
    assert generate(bundle, place) == 0
    before = contents(store, "pictures/again")
    store.rm_file("pictures/again/shard-000001.tar")
    assert generate(bundle, place) == 0
    assert "10 of them made" in capsys.readouterr().out
    assert generate(bundle, place) == 0
    assert "all of them were there" in capsys.readouterr().out
    assert generate(bundle, place, "--seed", "1") == 2
    assert contents(store, "pictures/again") == before


@pytest.mark.usefixtures("here")
def test_a_shard_that_fails_leaves_no_object(
    tiny_bundles: dict[str, Bundle], store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody sees half of it; the record of those before it stays."""
    drawn = threading.local()

    def fail(*given: Any) -> Any:
        drawn.times = getattr(drawn, "times", 0) + 1
        if drawn.times == 2:
            raise OSError(28, "No space left on device", "/tmp/somewhere")  # noqa: S108
        return plain(*given)

    plain: Callable[..., Any] = __import__("models.exchange.bulk.worker", fromlist=["draw_latents"]).draw_latents
    monkeypatch.setattr("models.exchange.bulk.worker.draw_latents", fail)
    assert generate(tiny_bundles["tiny"], "s3://pictures/broken") == 1
    assert capsys.readouterr().err == "error: /tmp/somewhere: No space left on device\n"
    assert set(contents(store, "pictures/broken")) == {"shard-000000.tar", "manifest.part.json"}


@pytest.mark.usefixtures("here", "store")
def test_a_bucket_that_is_not_there_is_one_line(
    tiny_bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of whoever was asked, and none is made."""
    assert generate(tiny_bundles["tiny"], "s3://nowhere-at-all/folder") == 1
    line = capsys.readouterr().err
    assert line.startswith("error: s3://nowhere-at-all/folder: ")
    assert line.count("\n") == 1
