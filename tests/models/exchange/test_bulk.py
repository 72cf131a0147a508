"""Images in bulk: what is in the shards, whoever makes them and in whichever order, and what is refused."""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.__main__ import main
from models.bundle import Bundle
from models.exchange.bulk.formats import tar_member
from models.exchange.bulk.plan import BulkError, BulkOptions, Made, OptionsError, resolve_labels
from models.exchange.bulk.worker import MOST_BLOCK_IMAGES, Task, make_shard
from models.inference.noise import draw_labels
from service.codecs.encode import encode_picture

pytestmark = pytest.mark.usefixtures("one_thread")


class Here:
    """Makes shards in this process. `order` of the numbers, and how many it makes until it is stopped or fails."""

    def __init__(self) -> None:
        self.backwards = False
        self.most: int | None = None
        self.fails = False
        self.made: list[int] = []

    def __call__(self, task: Task, numbers: Iterable[int], *_: object, **__: object) -> Iterator[Made]:
        """As `make_by_processes`."""
        self.made = []
        for number in sorted(numbers, reverse=self.backwards)[: self.most]:
            self.made.append(number)
            yield make_shard(task, number)
        if self.fails:
            raise BulkError("the disk is full")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    maker = Here()
    monkeypatch.setattr("models.commands.bundles.generate.make_by_processes", maker)
    return maker


def generate(bundle: Bundle, out: Path | str, *options: str, count: int = 25) -> int:
    return main(
        ["generate", str(bundle.folder), "--out", str(out), "--count", str(count), "--shard-size", "10", *options]
    )


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]


def manifest_of(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return manifest


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
def test_a_tar_holds_the_services_pngs_and_the_labels(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, name: str
) -> None:
    """Members are named by index; PNGs are the bytes that the service sends, labels those that the seed draws."""
    bundle = tiny_bundles[name]
    assert generate(bundle, tmp_path, "--seed", "5") == 0
    expected: dict[str, bytes] = {}
    frequencies = bundle.manifest.latent.label_frequencies
    for index, image in enumerate(bundle.draw(25, seed=5)):
        expected[f"{index:012d}.png"] = encode_picture(image, "png")
        if frequencies is not None:
            expected[f"{index:012d}.cls"] = str(draw_labels(frequencies, 5, index, 1)[0]).encode()
    found = [members(tmp_path / f"shard-00000{shard}.tar") for shard in range(3)]
    assert [next(iter(one)) for one in found] == ["000000000000.png", "000000000010.png", "000000000020.png"]
    assert {name: content for one in found for name, content in one.items()} == expected
    assert list(found[0]) == sorted(found[0], key=lambda name: (name[:12], name[13:] != "png"))


def test_a_tar_is_what_tarfile_writes(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Byte for byte, with USTAR's heads and without dates."""
    assert generate(tiny_bundles["cond"], tmp_path, count=3) == 0
    path, plain = tmp_path / "shard-000000.tar", io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members(path).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert path.read_bytes() == plain.getvalue()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 70_000])
def test_a_member_of_any_size_is_what_tarfile_writes(size: int) -> None:
    """Its head has the right checksum, and it fills whole blocks."""
    info = tarfile.TarInfo("a" * 99)
    info.size = size
    expected = info.tobuf(tarfile.USTAR_FORMAT) + bytes(size) + bytes(-size % 512)
    assert b"".join(tar_member("a" * 99, bytes(size))) == expected


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
def test_npy_holds_the_images_and_the_labels(tiny_bundles: dict[str, Bundle], tmp_path: Path, name: str) -> None:
    """An array of images for each shard, and one of labels beside it where there are some."""
    bundle = tiny_bundles[name]
    assert generate(bundle, tmp_path, "--format", "npy", "--seed", "7") == 0
    images = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("shard-??????.npy"))])
    np.testing.assert_array_equal(images, bundle.draw(25, seed=7))
    labels = [np.load(path) for path in sorted(tmp_path.glob("*.labels.npy"))]
    frequencies = bundle.manifest.latent.label_frequencies
    if frequencies is None:
        assert not labels
    else:
        np.testing.assert_array_equal(np.concatenate(labels), draw_labels(frequencies, 7, 0, 25))


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_parquet_holds_the_images_and_the_labels(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, name: str, encoding: str
) -> None:
    """As pixels, which the metadata say how to lay out, or as PNGs; a small shard has one row group."""
    pq = pytest.importorskip("pyarrow.parquet")
    bundle = tiny_bundles[name]
    assert generate(bundle, tmp_path, "--format", "parquet", "--encoding", encoding) == 0
    paths = sorted(tmp_path.glob("*.parquet"))
    tables = [pq.read_table(path) for path in paths]
    layout = json.loads(tables[0].schema.metadata[b"gan-service"])
    assert layout["encoding"] == encoding
    stored = [value for table in tables for value in table["image"].to_pylist()]
    images = [
        np.frombuffer(one, np.uint8) if encoding == "raw" else np.asarray(Image.open(io.BytesIO(one))) for one in stored
    ]
    expected = bundle.draw(25)
    np.testing.assert_array_equal(np.stack([one.reshape(layout["shape"]) for one in images]), expected)
    assert [index for table in tables for index in table["index"].to_pylist()] == list(range(25))
    assert all(pq.ParquetFile(path).num_row_groups == 1 for path in paths)
    frequencies = bundle.manifest.latent.label_frequencies
    assert ("label" in tables[0].column_names) == (frequencies is not None)
    if frequencies is not None:
        labels = [label for table in tables for label in table["label"].to_pylist()]
        np.testing.assert_array_equal(labels, draw_labels(frequencies, 0, 0, 25))


def test_a_shard_of_several_blocks_is_whole(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are drawn in blocks, and row groups of Parquet end where they get large; neither shows in the images."""
    pq, count = pytest.importorskip("pyarrow.parquet"), 2 * MOST_BLOCK_IMAGES + 7
    monkeypatch.setattr("models.exchange.bulk.formats.GROUP_BYTES", 64 * MOST_BLOCK_IMAGES)
    size = ["--shard-size", str(count)]
    assert generate(tiny_bundles["tiny"], tmp_path / "npy", "--format", "npy", *size, count=count) == 0
    assert generate(tiny_bundles["tiny"], tmp_path / "pq", "--format", "parquet", *size, count=count) == 0
    images = np.load(tmp_path / "npy" / "shard-000000.npy")
    np.testing.assert_array_equal(images, tiny_bundles["tiny"].draw(count))
    file = pq.ParquetFile(tmp_path / "pq" / "shard-000000.parquet")
    assert file.num_row_groups == 3
    assert b"".join(file.read()["image"].to_pylist()) == images.tobytes()


def test_the_manifest_says_what_is_there(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Every file with its size and checksum, the options, and nothing of when and where; no other files are there."""
    bundle = tiny_bundles["cond"]
    assert generate(bundle, tmp_path, "--format", "npy") == 0
    manifest = manifest_of(tmp_path)
    files = {name: record for shard in manifest["shards"] for name, record in shard["files"].items()}
    assert {*files, "manifest.json"} == {path.name for path in tmp_path.iterdir()}
    for name, record in files.items():
        content = (tmp_path / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert [(one["first_index"], one["images"]) for one in manifest["shards"]] == [(0, 10), (10, 10), (20, 5)]
    assert manifest["options"]["bundle"] == f"cond@{bundle.version}"
    assert manifest["labels"] == ["cat", "dog", "owl"]


def test_order_and_interruption_leave_no_trace(tiny_bundles: dict[str, Bundle], tmp_path: Path, here: Here) -> None:
    """Shards made in another order, in two runs with an error between, are the same files with the same manifest."""
    assert generate(tiny_bundles["cond"], tmp_path / "one") == 0
    here.backwards, here.most, here.fails = True, 2, True
    assert generate(tiny_bundles["cond"], tmp_path / "two") == 1
    assert not (tmp_path / "two" / "manifest.json").exists()
    here.most, here.fails = None, False
    assert generate(tiny_bundles["cond"], tmp_path / "two") == 0
    assert here.made == [0]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_what_is_lost_is_made_again(tiny_bundles: dict[str, Bundle], tmp_path: Path, here: Here) -> None:
    """A finished folder has nothing to do; a file that is missing or cut short comes back, and no other is touched."""
    assert generate(tiny_bundles["tiny"], tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    here.made = []
    assert generate(tiny_bundles["tiny"], tmp_path) == 0
    assert here.made == []
    (tmp_path / "shard-000000.tar").unlink()
    (tmp_path / "shard-000002.tar").write_bytes(b"short")
    assert generate(tiny_bundles["tiny"], tmp_path) == 0
    assert here.made == [0, 2]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    "options",
    [["--seed", "1"], ["--format", "npy"], ["--labels", "cat"], ["--shard-size", "9"], ["--count", "26"]],
    ids=" ".join,
)
def test_other_options_are_refused(
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    here: Here,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    is_whole: bool,  # noqa: FBT001
) -> None:
    """A folder that was begun or finished with others stays as it is: exit code 2, and the line says which."""
    here.most, here.fails = (None, False) if is_whole else (1, True)
    generate(tiny_bundles["cond"], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert generate(tiny_bundles["cond"], tmp_path, *options) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert f"{options[0].strip('-').replace('-', '_')} is " in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folders_with_other_things_are_refused(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """A bundle, a broken record, and shards that nobody knows: nothing is written into them."""
    for name, content in (
        ("manifest.json", b'{"format": 1}'),
        ("manifest.part.json", b"\xff"),
        ("shard-000009.tar", b""),
    ):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        assert generate(tiny_bundles["tiny"], folder) == 2
        assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--encoding", "png", "--format", "npy"], "images in npy are raw"),
        (["--labels", "cat"], "this bundle has no labels"),
        (["--count", str(10**9)], "larger --shard-size"),
        (["--count", str(2**53 + 1)], "2⁵³"),
        (["--out", "nobody://knows/this"], "nobody"),
    ],
)
def test_wrong_options_are_one_line(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    """Exit code 2, and what is wrong."""
    assert generate(tiny_bundles["tiny"], tmp_path, *options) == 2
    line = capsys.readouterr().err
    assert words in line
    assert line.count("\n") == 1


def test_shards_that_are_not_where_they_were_written_are_missed(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with machines that share no folder: the data set is not called whole."""

    def elsewhere(task: Task, numbers: Iterable[int], *_: object, **__: object) -> Iterator[Made]:
        for number in numbers:
            yield make_shard(task._replace(place=str(tmp_path / "elsewhere")), number)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("models.commands.bundles.generate.make_by_processes", elsewhere)
    assert generate(tiny_bundles["tiny"], tmp_path / "here") == 1
    assert "3 shards are not in" in capsys.readouterr().err
    assert not (tmp_path / "here" / "manifest.json").exists()


def test_another_bundle_at_the_same_path_is_refused(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """As on a machine of a cluster that has an older copy."""
    assert generate(tiny_bundles["tiny"], tmp_path) == 0
    asked = BulkOptions.model_validate_json(json.dumps(manifest_of(tmp_path)["options"]))
    with pytest.raises(BulkError, match="not tiny@"):
        make_shard(Task(tiny_bundles["rgb"].folder, str(tmp_path), asked), 0)


NAMES = ("cat", "dog", "1", "cat, small")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frequency", "frequency"),
        ("balance", (0, 1, 2, 3)),
        ("2", (2,)),
        ("dog,0,0", (1, 0, 0)),
        ('["cat, small", 1, "1"]', (3, 1, 2)),
        ('"1"', (2,)),
    ],
)
def test_labels_mean_what_they_mean_in_a_query(text: str, expected: object) -> None:
    """Digits are an index, other words a name, JSON what it says."""
    assert resolve_labels(text, NAMES) == expected


@pytest.mark.parametrize("text", ["4", "-1", "bird", "1", "", "[]", "[true]", "[[0]]", "[" * 5000, "9" * 5000, "{}"])
def test_labels_that_are_none_are_refused(text: str) -> None:
    """Also digits that are an index and the name of another class."""
    with pytest.raises(OptionsError, match="labels: "):
        resolve_labels(text, NAMES)


def test_labels_take_turns(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Image i has label i modulo their number, from one shard to the next; its latent stays the seed's."""
    assert generate(tiny_bundles["cond"], tmp_path, "--labels", "balance", "--format", "npy") == 0
    labels = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("*.labels.npy"))])
    np.testing.assert_array_equal(labels, np.arange(25) % 3)
    images = np.concatenate([np.load(path) for path in sorted(tmp_path.glob("shard-??????.npy"))])
    np.testing.assert_array_equal(images, tiny_bundles["cond"].draw(25, labels=(np.arange(25) % 3).tolist()))


def test_an_extra_that_is_missing_is_named(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parquet, URIs and Ray need packages of their own, and say which extra has them."""
    for name in ("pyarrow", "fsspec", "fsspec.core", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    for options, extra in (
        (["--format", "parquet"], "bulk"),
        (["--out", "s3://a/b"], "bulk"),
        (["--ray", "auto"], "ray"),
    ):
        assert generate(tiny_bundles["tiny"], tmp_path, *options) == 1
        assert f"the {extra} extra" in capsys.readouterr().err
