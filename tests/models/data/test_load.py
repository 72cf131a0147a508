"""Data sets are read whole or refused in one line that names the file; splits are what they promise."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from models.data.dataset import Images
from models.data.folder_listing import image_suffixes
from models.data.idx import PUBLISHED, PublishedSet, read_idx
from models.data.load import DataError, Dataset, load_dataset
from models.images.preparation import Fit, Preparation

SAMPLE = Path(__file__).parents[2] / "data" / "mnist-2000.npz"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"

FITS: tuple[Fit, ...] = ("crop", "pad", "squeeze")

no_deadline = settings(deadline=None, max_examples=40)  # files on a busy machine have no steady speed


def load(
    source: Path | str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    data_dir: Path | None = None,
    skip_bad: bool = False,
    **more: Any,
) -> Dataset:
    return load_dataset(str(source), data_dir, seed=seed, image_size=image_size, skip_bad=skip_bad, **more)


def refusal(source: Path | str, *, image_size: int | None = None, data_dir: Path | None = None) -> str:
    """Why a data set is refused: always one line."""
    with pytest.raises(DataError) as caught:
        load(source, image_size=image_size, data_dir=data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(dataset: Dataset) -> Images:
    return np.concatenate([dataset.train.images, dataset.validation.images, dataset.test.images])


def sorted_rows(images: Images) -> Images:
    """The rows in an order that depends on nothing but what is in them."""
    flat = images.reshape(len(images), -1)
    return flat[np.lexsort(flat.T[::-1])]


def noise(*shape: int) -> Images:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


# --- The sample and splits ----------------------------------------------------------------------------------------


def test_the_sample_is_two_thousand_real_digits() -> None:
    """Tests that train on digits get 200 of each, grey, 28 x 28, in three parts that make up the whole."""
    sample = load(SAMPLE)
    assert sample.name == "mnist-2000"
    assert sample.label_names == tuple("0123456789")
    assert [len(part.images) for part in (sample.train, sample.validation, sample.test)] == [1600, 200, 200]
    assert sample.train.images.shape[1:] == (28, 28, 1)
    parts = [part.labels for part in (sample.train, sample.validation, sample.test) if part.labels is not None]
    assert [part.dtype for part in parts] == [np.int64] * 3
    np.testing.assert_array_equal(np.bincount(np.concatenate(parts)), [200] * 10)
    with np.load(SAMPLE) as file:
        np.testing.assert_array_equal(sorted_rows(everything(sample)), sorted_rows(file["images"]))


def test_labels_stay_with_their_images() -> None:
    """After dividing, each image still has the label that it had in the file."""
    with np.load(SAMPLE) as file:
        labels = {image.tobytes(): label for image, label in zip(file["images"], file["labels"], strict=True)}
    train = load(SAMPLE).train
    assert train.labels is not None
    assert [labels[image.tobytes()] for image in train.images] == train.labels.tolist()


def test_the_seed_decides_the_split() -> None:
    """The same seed divides alike, on every machine and numpy version; another seed divides otherwise."""
    known = "39cfa95ff1e2"  # a run resumed after an upgrade must not train on images that it is scored with
    assert load(SAMPLE, seed=0).checksum.startswith(known)
    other = load(SAMPLE, seed=1)
    assert other.checksum != load(SAMPLE, seed=0).checksum
    assert not np.array_equal(other.test.images, load(SAMPLE, seed=0).test.images)


def test_the_checksum_is_of_the_content_not_of_the_file(tmp_path: Path) -> None:
    """A folder of PNGs and an .npz with the same content have the same checksum; one other pixel changes it."""
    images, labels = noise(12, 5, 4), np.repeat([0, 1], 6)
    for index, image in enumerate(images):
        path = tmp_path / "folder" / "ab"[labels[index]] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez(tmp_path / "arrays.npz", images=images, labels=labels.astype(np.int16))
    assert load(tmp_path / "folder").checksum == load(tmp_path / "arrays.npz").checksum
    images[3, 2, 1] ^= 1
    np.savez(tmp_path / "changed.npz", images=images, labels=labels)
    np.savez(tmp_path / "unlabelled.npz", images=images)
    names = ("arrays", "changed", "unlabelled")
    assert len({load(tmp_path / f"{name}.npz").checksum for name in names}) == 3


def test_digits_come_with_scikit_learn() -> None:
    """A first try without a download: 1,797 grey digits of 8 x 8, the darkest ink 255."""
    digits = load("digits", seed=3)
    assert everything(digits).shape == (1797, 8, 8, 1)
    assert everything(digits).max() == 255
    assert digits.label_names == tuple("0123456789")


@pytest.mark.parametrize("name", ["minst", "no/such/folder", "no-such.npz", "", "\0", "x" * 5000])
def test_an_unknown_name_is_answered_with_what_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip of the pen is told which names and kinds of files are known."""
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    if "too long" in message:  # the file system's own words, in some versions of Python
        return
    for known in ("mnist", "fashion-mnist", "digits", "folder", ".npz"):
        assert known in message


def test_a_file_of_another_kind_is_refused() -> None:
    """A file that exists but is nothing that can be read is named."""
    assert "test_load.py is neither a folder nor an .npz or IDX file" in refusal(__file__)


@pytest.mark.parametrize("size", [-1, 0, 99_999])
def test_an_image_size_out_of_range_is_refused(size: int) -> None:
    """No image has no pixels, and a slip of the finger does not fill the memory."""
    assert "image size" in refusal(SAMPLE, image_size=size)


def test_any_set_can_be_resized() -> None:
    """Digits become 14 x 14 with about the brightness they had, and stay grey."""
    small, full = load(SAMPLE, image_size=14), load(SAMPLE)
    assert small.train.images.shape == (1600, 14, 14, 1)
    assert small.train.images.mean() == pytest.approx(full.train.images.mean(), rel=0.06)  # ringing is cut off at black
    assert small.checksum != full.checksum


def test_sets_of_arrays_lie_on_what_their_edges_are(tmp_path: Path) -> None:
    """Digits of light on dark lie on black, sketches on paper and photographs on white; unless it is said."""
    for name, images, ground in (
        ("sketches", np.where(noise(12, 8, 8) > 200, 0, 255).astype(np.uint8), "#ffffff"),
        ("photographs", np.zeros((12, 8, 8, 3), np.uint8), "#ffffff"),
    ):
        np.savez(tmp_path / f"{name}.npz", images=images)
        found = load(tmp_path / f"{name}.npz").preparation
        assert found == Preparation("crop", ground, colour="grey" if images.ndim == 3 else "rgb")
    for digits in (SAMPLE, "digits"):
        assert load(digits).preparation == Preparation("crop", "#000000", colour="grey")
    how = load(SAMPLE, image_size=16, fit="squeeze", background="#123456").preparation
    assert how == Preparation("squeeze", "#123456", colour="grey")


def test_arrays_of_another_shape_are_fitted(tmp_path: Path) -> None:
    """Cut, between bars of their own background, or squeezed."""
    images = np.zeros((12, 20, 40), np.uint8)
    images[:, 4:16, 4:36] = 200
    np.savez(tmp_path / "wide.npz", images=images)
    crop, pad, squeeze = (load(tmp_path / "wide.npz", image_size=10, fit=fit).train.images[0] for fit in FITS)
    assert crop[5].min() > 180
    assert (pad[:2].max(), pad[-2:].max()) == (0, 0)
    assert pad[5, 2:8].min() > 150
    assert squeeze[5, 0] < 60
    assert squeeze[3:7, 2:8].min() > 150


# --- IDX files ---------------------------------------------------------------------------------------------------


def idx_bytes(array: Images) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def header(*sizes: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + np.array(sizes, ">u4").tobytes()


def same(raw: bytes) -> bytes:
    return raw


idx_arrays = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
packings = st.sampled_from([gzip.compress, same])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that each example writes anew."""
    return tmp_path_factory.mktemp("scratch")


def written(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


@no_deadline
@given(array=idx_arrays, pack=packings)
@example(
    array=np.arange(8, dtype=np.uint8), pack=gzip.compress
)  # 16 bytes: ends where the first step of unpacking does
def test_an_idx_file_is_read_back_as_it_was_written(
    scratch: Path, array: Images, pack: Callable[[bytes], bytes]
) -> None:
    """One to three dimensions of any size come back, gzipped or not, whatever the file is called."""
    np.testing.assert_array_equal(read_idx(written(scratch / "whole.gz", pack(idx_bytes(array)))), array)


def test_what_is_read_can_be_given_to_torch(tmp_path: Path) -> None:
    """The array owns its memory: over the file's own bytes, torch would warn that it cannot be written."""
    array = read_idx(written(tmp_path / "images", idx_bytes(noise(2, 3, 4))))
    assert array.flags.writeable
    torch.from_numpy(array)


@no_deadline
@given(array=idx_arrays, pack=packings, draw=st.data())
def test_a_truncated_idx_file_is_refused(
    scratch: Path, array: Images, pack: Callable[[bytes], bytes], draw: st.DataObject
) -> None:
    """Wherever a download stopped, even within gzip's last eight bytes, the file is named."""
    raw = pack(idx_bytes(array))
    kept = draw.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(DataError, match=r"cut\.gz"):
        read_idx(written(scratch / "cut.gz", raw[:kept]))


@no_deadline
@given(array=idx_arrays, packed=st.booleans(), within=st.booleans(), surplus=st.binary(min_size=1, max_size=20))
@example(array=np.arange(8, dtype=np.uint8), packed=True, within=False, surplus=b"\0")  # padding to the gzip module
def test_surplus_bytes_are_refused(scratch: Path, array: Images, packed: bool, within: bool, surplus: bytes) -> None:  # noqa: FBT001
    """Bytes after the end, inside the gzip stream or behind it, mean that the file isn't what its header says."""
    raw = idx_bytes(array)
    if packed:
        raw = gzip.compress(raw + surplus) if within else gzip.compress(raw) + surplus
    else:
        raw += surplus
    with pytest.raises(DataError, match=r"long\.gz"):
        read_idx(written(scratch / "long.gz", raw))


idx_like = st.builds(lambda head, rest: head + rest, st.sampled_from([b"\0\0\x08\x01", b"\0\0\x08\x03"]), st.binary())


@settings(no_deadline, max_examples=150)
@given(
    st.one_of(st.binary(), idx_like, st.binary().map(lambda raw: b"\x1f\x8b\x08" + raw), idx_like.map(gzip.compress))
)
def test_random_bytes_are_an_array_or_a_data_error(scratch: Path, raw: bytes) -> None:
    """Whatever is in the file, the reader answers in its own words."""
    with suppress(DataError):
        array = read_idx(written(scratch / "random", raw))
        assert idx_bytes(array) == (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"", "not an IDX file", id="empty file"),
        pytest.param(b"<!DOCTYPE html>", "not an IDX file", id="a web page"),
        pytest.param(header(1, kind=13) + bytes(4), "type 13", id="floats"),
        pytest.param(header(1, 1, 1, 1) + bytes(1), "in 4", id="four dimensions"),
        pytest.param(header() + bytes(1), "in 0", id="no dimensions"),
        pytest.param(header(60_000, 28, 28)[:9], "within the IDX header", id="half a header"),
        pytest.param(header(0, 28, 28), "empty", id="no images"),
        pytest.param(header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(9), "truncated", id="a header that lies"),
        pytest.param(gzip.compress(header(2**32 - 1, 2**32 - 1, 2**32 - 1)), "truncated", id="the same, gzipped"),
        pytest.param(gzip.compress(header(1) + bytes(2**20)), "more bytes than the 9", id="a gzip bomb"),
        pytest.param(gzip.compress(header(2) + b"ab")[:-8] + bytes(8), "damaged gzip", id="wrong gzip checksum"),
    ],
)
def test_a_damaged_idx_file_says_how(raw: bytes, reason: str, tmp_path: Path) -> None:
    """The message has the file's name and what is wrong with it, and huge promises cost no memory."""
    with pytest.raises(DataError, match=reason) as caught:
        read_idx(written(tmp_path / "images", raw))
    assert str(tmp_path / "images") in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "."])
def test_an_idx_path_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    """A missing file and a folder are data errors too."""
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / name)


# --- Published sets and downloads --------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and keeps no log on the console."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 — the base class's name
        """Say nothing."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real HTTP server on this machine: its URL, and the folder that it serves."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Thirty real digits in MNIST's layout stand in for the published set. The unpacked files by name."""
    with np.load(SAMPLE) as sample:
        images, labels = sample["images"][:30], sample["labels"][:30]
    arrays = (images[:20], labels[:20], images[20:], labels[20:])
    files = dict(zip(PUBLISHED["mnist"].sha256, map(idx_bytes, arrays), strict=True))
    sha256 = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    tiny = replace(PUBLISHED["mnist"], mirrors=(), sha256=sha256, validation_images=4)
    monkeypatch.setitem(PUBLISHED, "mnist", tiny)
    return files


def publish(monkeypatch: pytest.MonkeyPatch, *mirrors: str) -> None:
    monkeypatch.setitem(PUBLISHED, "mnist", replace(PUBLISHED["mnist"], mirrors=mirrors))


def write_idx_files(folder: Path, files: dict[str, bytes], *, packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / f"{name}.gz" if packed else folder / name).write_bytes(gzip.compress(raw) if packed else raw)


@pytest.mark.parametrize("packed", [True, False], ids=["gzipped", "unpacked"])
def test_a_published_set_keeps_its_order_and_its_split(
    tiny_mnist: dict[str, bytes], tmp_path: Path, *, packed: bool
) -> None:
    """The last training images are for validation, the published test images for test, and the seed changes nothing."""
    write_idx_files(tmp_path / "mnist", tiny_mnist, packed=packed)
    mnist = load("mnist", data_dir=tmp_path)
    with np.load(SAMPLE) as sample:
        np.testing.assert_array_equal(everything(mnist)[..., 0], sample["images"][:30])
        assert mnist.validation.labels is not None
        np.testing.assert_array_equal(mnist.validation.labels, sample["labels"][16:20])
    assert [len(part.images) for part in (mnist.train, mnist.validation, mnist.test)] == [16, 4, 10]
    assert (mnist.name, mnist.label_names) == ("mnist", tuple("0123456789"))
    assert load("mnist", data_dir=tmp_path, seed=9).checksum == mnist.checksum


def test_data_lies_in_the_current_folder_unless_told_otherwise(
    tiny_mnist: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a data folder, `data/` here is where IDX files are looked for."""
    write_idx_files(tmp_path / "data" / "mnist", tiny_mnist)
    monkeypatch.chdir(tmp_path)
    assert len(load("mnist").train.images) == 16


def test_a_file_that_was_never_published_is_refused(tiny_mnist: dict[str, bytes], tmp_path: Path) -> None:
    """One other pixel in a well-formed file: the message names the file, what was expected, and what was found."""
    changed = tiny_mnist[TRAIN_IMAGES][:-1] + bytes([tiny_mnist[TRAIN_IMAGES][-1] ^ 1])
    write_idx_files(tmp_path / "mnist", tiny_mnist | {TRAIN_IMAGES: changed})
    message = refusal("mnist", data_dir=tmp_path)
    assert str(tmp_path / "mnist" / f"{TRAIN_IMAGES}.gz") in message
    assert hashlib.sha256(changed).hexdigest() in message
    assert PUBLISHED["mnist"].sha256[TRAIN_IMAGES] in message


def test_a_truncated_published_file_is_not_downloaded_over(tiny_mnist: dict[str, bytes], tmp_path: Path) -> None:
    """The user's file is named, and left as it is for the user to look at."""
    write_idx_files(tmp_path / "mnist", tiny_mnist)
    broken = tmp_path / "mnist" / f"{TRAIN_LABELS}.gz"
    broken.write_bytes(broken.read_bytes()[:-5])
    message = refusal("mnist", data_dir=tmp_path)
    assert str(broken) in message
    assert "truncated" in message


def test_missing_files_are_downloaded_once(
    tiny_mnist: dict[str, bytes],
    mirror: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the first mirror that has them, with a line each; present files are kept, and no other file is left."""
    url, served = mirror
    write_idx_files(served, tiny_mnist)
    folder = tmp_path / "sets" / "mnist"
    write_idx_files(folder, {TRAIN_LABELS: tiny_mnist[TRAIN_LABELS]}, packed=False)
    publish(monkeypatch, f"{url}not-here/", url)
    first = load("mnist", data_dir=tmp_path / "sets")
    expected = {TRAIN_LABELS} | {f"{name}.gz" for name in tiny_mnist if name != TRAIN_LABELS}
    assert {path.name for path in folder.iterdir()} == expected
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6  # three files, each asked for at both mirrors
    assert f"Downloading {url}{TRAIN_IMAGES}.gz to {folder / TRAIN_IMAGES}.gz" in said
    publish(monkeypatch)
    assert load("mnist", data_dir=tmp_path / "sets").checksum == first.checksum


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda _: b"<html>Sign in</html>"], ids=["cut", "web page"])
def test_a_mirror_that_sends_something_else_is_not_believed(
    damage: Callable[[bytes], bytes],
    tiny_mnist: dict[str, bytes],
    mirror: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not verify is never stored, and the message has the reason."""
    url, served = mirror
    write_idx_files(served, tiny_mnist)
    packed = served / f"{TRAIN_IMAGES}.gz"
    packed.write_bytes(damage(packed.read_bytes()))
    publish(monkeypatch, url)
    message = refusal("mnist", data_dir=tmp_path)
    assert f"{url}{TRAIN_IMAGES}.gz: " in message
    assert not (tmp_path / "mnist").exists()


def test_where_no_mirror_answers_the_error_says_what_to_put_where(
    tiny_mnist: dict[str, bytes], mirror: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All missing files, the folder for them, and the checksum of each: enough to fetch them by hand."""
    publish(monkeypatch, mirror[0], "http://127.0.0.1:9/")  # 404, and no one listens
    write_idx_files(tmp_path / "mnist", {TRAIN_IMAGES: tiny_mnist[TRAIN_IMAGES]})
    message = refusal("mnist", data_dir=tmp_path)
    assert f"put into {tmp_path / 'mnist'} these files" in message
    wanted = message.partition("when unpacked): ")[2]
    for name, sha256 in PUBLISHED["mnist"].sha256.items():
        assert (f"{name}.gz ({sha256})" in wanted) == (name != TRAIN_IMAGES)
    assert "404" in message
    assert "127.0.0.1:9" in message


def test_a_download_that_cannot_be_written_is_a_data_error(
    tiny_mnist: dict[str, bytes], mirror: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data folder that is a file: said in one line, not by a traceback."""
    write_idx_files(mirror[1], tiny_mnist)
    publish(monkeypatch, mirror[0])
    assert "not-a-folder" in refusal("mnist", data_dir=written(tmp_path / "not-a-folder", b""))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_published_sets_are_known_by_four_checksums(name: str) -> None:
    """Each set has its four files, sixty-four hex digits for each, two mirrors and ten names."""
    published: PublishedSet = PUBLISHED[name]
    assert len(published.sha256) == len(set(published.sha256.values())) == 4
    assert {len(bytes.fromhex(sha256)) for sha256 in published.sha256.values()} == {32}
    assert len(published.mirrors) == 2
    assert len(set(published.label_names)) == 10


@pytest.mark.parametrize(
    ("name", "mean", "train_counts"),
    [
        ("mnist", 0.13066, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion-mnist", 0.28604, [6000] * 10),
    ],
)
def test_the_full_published_sets(name: str, mean: float, train_counts: list[int]) -> None:
    """The real files verify, and have the paper's split and the published label counts and mean pixel."""
    folder = Path(os.environ.get("GAN_DATA_DIR", "")) / name
    if not os.environ.get("GAN_DATA_DIR") or not folder.is_dir():
        pytest.skip(f"GAN_DATA_DIR names no folder with {name}/: the full set is not checked")
    full = load(name, data_dir=folder.parent)
    assert [len(part.images) for part in (full.train, full.validation, full.test)] == [50_000, 10_000, 10_000]
    assert full.train.images.shape[1:] == full.test.images.shape[1:] == (28, 28, 1)
    assert full.train.labels is not None
    assert full.validation.labels is not None
    np.testing.assert_array_equal(np.bincount(full.train.labels) + np.bincount(full.validation.labels), train_counts)
    known = np.concatenate([full.train.images, full.validation.images])
    assert known.mean() / 255 == pytest.approx(mean, abs=1e-5)


# --- .npz files --------------------------------------------------------------------------------------------------


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


@no_deadline
@given(
    images=hnp.arrays(
        np.uint8, st.tuples(st.integers(10, 15), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 3]))
    ),
    flat=st.booleans(),
    kind=st.sampled_from(["u1", "i2", ">i4", "<i8", "u8", None]),
    seed=st.integers(0, 2**63),
)
def test_any_npz_of_images_comes_back_whole(
    scratch: Path, images: Images, kind: str | None, seed: int, *, flat: bool
) -> None:
    """Grey with or without a channel axis, or RGB; labels of any integer type or none: every row ends in one split."""
    arrays = {"images": images[..., 0] if flat and images.shape[-1] == 1 else images}
    labels = {} if kind is None else {"labels": (np.arange(len(images)) % 3).astype(kind)}
    (scratch / "any.npz").write_bytes(npz(**arrays, **labels))
    loaded = load(scratch / "any.npz", seed=seed)
    np.testing.assert_array_equal(sorted_rows(everything(loaded)), sorted_rows(images))
    assert everything(loaded).shape == images.shape
    assert loaded.label_names == (None if kind is None else ("0", "1", "2"))
    assert (len(loaded.validation.images), len(loaded.test.images)) == (1, 1)
    if kind is None:
        assert loaded.train.labels is None


def zipped(name: str, raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, raw)
    return file.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    return file.getvalue()


GREY = noise(12, 4, 4)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(b"", "not an .npz file", id="empty file"),
        pytest.param(pickle.dumps([1]), "not an .npz file", id="a pickle"),
        pytest.param(npy_header((1,)) + b"\0", "not an .npz file", id="a single array"),
        pytest.param(npz(x=GREY), "no array called images", id="other arrays"),
        pytest.param(zipped("images", b"text"), "images must be uint8", id="images that is no array"),
        pytest.param(npz(images=GREY / 255), "found float64", id="floats"),
        pytest.param(npz(images=GREY.astype(np.int64)), "found int64", id="wide integers"),
        pytest.param(npz(images=GREY.astype(object)), "cannot be read as .npz", id="objects"),
        pytest.param(npz(images=GREY[0]), "(4, 4)", id="one image"),
        pytest.param(npz(images=noise(12, 2, 2, 3, 1)), "(12, 2, 2, 3, 1)", id="five dimensions"),
        pytest.param(npz(images=noise(12, 0, 4)), "none of them 0", id="no height"),
        pytest.param(npz(images=noise(12, 4, 4, 2)), "1 channel (grey) or 3 (RGB), found 2", id="two channels"),
        pytest.param(npz(images=GREY[:9]), "9 images are too few", id="nine images"),
        pytest.param(npz(images=GREY, labels=np.arange(11)), "shape (11,)", id="a label too few"),
        pytest.param(npz(images=GREY, labels=np.zeros((12, 1), int)), "shape (12, 1)", id="a column of labels"),
        pytest.param(npz(images=GREY, labels=np.zeros(12)), "labels must be integers", id="float labels"),
        pytest.param(npz(images=GREY, labels=np.zeros(12, bool)), "labels must be integers", id="bool labels"),
        pytest.param(npz(images=GREY, labels=np.arange(12) + 1), "0 ... K-1", id="labels from one"),
        pytest.param(npz(images=GREY, labels=np.arange(12) - 1), "found -1, 0, 1", id="negative labels"),
        pytest.param(npz(images=GREY, labels=np.arange(12) * 2), "and 2 more", id="labels with holes"),
        pytest.param(npz(images=GREY)[:-1], "not an .npz file", id="truncated"),
        pytest.param(
            zipped("images.npy", npy_header((2**40, 9, 9))), "cannot be read as .npz", id="a header that lies"
        ),
    ],
)
def test_an_npz_of_something_else_is_refused(raw: bytes, reason: str, tmp_path: Path) -> None:
    """Every fault has its own reason, beside the name of the file; nothing is unpickled."""
    message = refusal(written(tmp_path / "wrong.npz", raw))
    assert reason in message
    assert "wrong" in message


@no_deadline
@given(draw=st.data())
def test_a_damaged_npz_is_refused_or_unharmed(scratch: Path, draw: st.DataObject) -> None:
    """Any byte changed anywhere: either that is a data error, or the images are what they were."""
    raw = bytearray(npz(images=GREY))
    position = draw.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= draw.draw(st.integers(1, 255))
    with suppress(DataError):
        loaded = load(written(scratch / "damaged.npz", bytes(raw)))
        np.testing.assert_array_equal(sorted_rows(everything(loaded)), sorted_rows(GREY))


# --- Folders of images -------------------------------------------------------------------------------------------


def save_many(folder: Path, count: int = 10, *, mode: str = "L", size: tuple[int, int] = (4, 3)) -> Path:
    """Write plain images `00.png`, `01.png` ..., each of one grey of its own: 0, 10, 20 ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("L", size, 10 * index).convert(mode).save(folder / f"{index:02}.png")
    return folder


def one_of_a_folder(image: Image.Image, folder: Path, suffix: str = ".png", **options: object) -> Images:
    """The first image of a folder of ten copies of this one."""
    for index in range(10):
        image.save(folder / f"{index}{suffix}", **options)  # type: ignore[arg-type]
    first: Images = load(folder).train.images[0]
    return first


def test_a_flat_folder_is_a_set_without_labels(tmp_path: Path) -> None:
    """Images directly in the folder, wider than high: all are there, and no labels are made up."""
    cats = load(save_many(tmp_path / "cats", 12))
    assert cats.name == "cats"
    assert (cats.label_names, cats.train.labels, cats.validation.labels, cats.test.labels) == (None,) * 4
    assert everything(cats).shape == (12, 3, 4, 1)
    assert sorted(everything(cats)[:, 0, 0, 0].tolist()) == list(range(0, 120, 10))


def test_subfolders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Images at any depth belong to the sub-folder at the top; empty ones are no class; strangers are not read."""
    save_many(tmp_path / "dog", 6)
    save_many(tmp_path / "cat" / "deeper", 8, size=(4, 3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "dog" / "._00.png").write_bytes(b"metadata of another system")
    save_many(tmp_path / ".cache")
    pets = load(tmp_path)
    assert pets.label_names == ("cat", "dog")
    parts = [part.labels for part in (pets.train, pets.validation, pets.test) if part.labels is not None]
    assert np.bincount(np.concatenate(parts)).tolist() == [8, 6]
    assert pets.train.labels is not None
    greys = {grey: pets.train.labels[pets.train.images[:, 0, 0, 0] == grey].tolist() for grey in (60, 70)}
    assert all(label == 0 for labels in greys.values() for label in labels)  # only cats are as light as that


def test_images_and_subfolders_together_are_refused(tmp_path: Path) -> None:
    """Half labelled would be wrong either way."""
    save_many(tmp_path)
    save_many(tmp_path / "cat")
    message = refusal(tmp_path)
    assert "00.png" in message
    assert "cat" in message


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    """The message says which suffixes count as images."""
    (tmp_path / "notes.txt").write_text("nothing")
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert ".webp" in message


def test_nine_images_are_too_few(tmp_path: Path) -> None:
    """A tenth of nine is no image to validate with."""
    assert "9 images are too few" in refusal(save_many(tmp_path / "few", 9))


def test_images_of_several_sizes_need_an_image_size(tmp_path: Path) -> None:
    """Without one, the sizes found are listed; with one, all are cut and resized to it."""
    save_many(tmp_path, 12)
    Image.new("L", (7, 9)).save(tmp_path / "00.png")
    message = refusal(tmp_path)
    assert "4x3 (11), 7x9 (1)" in message
    assert "--image-size" in message
    assert everything(load(tmp_path, image_size=5)).shape == (12, 5, 5, 1)


def test_resizing_keeps_the_middle(tmp_path: Path) -> None:
    """Of a wide picture, the central square is kept: its dark ends go."""
    wide = np.zeros((8, 40), np.uint8)
    wide[:, 8:32] = 200  # wider than the square, because the filter sees a little of what is beside it
    for index in range(10):
        Image.fromarray(wide).save(tmp_path / f"{index}.png")
    np.testing.assert_array_equal(load(tmp_path, image_size=4).test.images, np.full((1, 4, 4, 1), 200))


def test_shrinking_averages(tmp_path: Path) -> None:
    """A fine chequerboard becomes even grey instead of whichever pixels were hit."""
    chequers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for index in range(10):
        Image.fromarray(chequers).save(tmp_path / f"{index}.png")
    middle = load(tmp_path, image_size=8).test.images[0, 2:6, 2:6, 0]
    assert np.abs(middle.astype(int) - 127).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "gif", "jpg"])
def test_grey_files_make_a_grey_set(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One channel for the net to learn, not three that are the same, whatever mode the files are in; and it is said."""
    suffix = f".{mode}" if mode in {"gif", "jpg"} else ".png"
    image = Image.new("L", (3, 2), 255).convert({"gif": "P", "jpg": "RGB"}.get(mode, mode))
    np.testing.assert_array_equal(one_of_a_folder(image, tmp_path, suffix), np.full((2, 3, 1), 255))
    assert "All 10 images are grey: one channel" in capsys.readouterr().err
    assert load(tmp_path).preparation == Preparation("crop", "#ffffff", colour="grey")
    assert "All 10 images are grey: one channel" in capsys.readouterr().err


def test_a_grey_set_can_be_asked_for_in_colour(tmp_path: Path) -> None:
    """As a run was begun that goes on: by its files' modes, or in RGB."""
    Image.new("RGB", (4, 3), "#808080").save(save_many(tmp_path, 12) / "00.png")
    for colour, channels in (("pixels", 1), ("mode", 3), ("rgb", 3)):
        found = load(tmp_path, colour=colour)
        assert everything(found).shape == (12, 3, 4, channels)
        assert found.preparation == Preparation(colour="grey" if channels == 1 else "rgb")
        assert found.files.coloured == (None if colour == "mode" else 0)  # by their modes, files are not looked at


def test_a_folder_is_prepared_as_it_is_asked_for(tmp_path: Path) -> None:
    """Each preparation is another set, and is kept beside the others."""
    picture = Image.new("LA", (40, 20))
    picture.paste((200, 255), (4, 4, 36, 16))
    for index in range(10):
        picture.save(tmp_path / f"{index}.png")
    for _ in range(2):
        crop, pad, squeeze = (load(tmp_path, image_size=10, fit=fit, background="#0a0a0a") for fit in FITS)
        assert [found.preparation for found in (crop, pad, squeeze)] == [
            Preparation(fit, "#0a0a0a", colour="grey") for fit in FITS
        ]
        assert crop.train.images[0, 5].min() > 180
        assert set(pad.train.images[0, [0, 1, 8, 9]].ravel().tolist()) == {10}
        assert len({found.checksum for found in (crop, pad, squeeze, load(tmp_path, image_size=10))}) == 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_files_make_an_rgb_set(mode: str, tmp_path: Path) -> None:
    """Palettes and alpha channels are resolved; the colours stay."""
    image = Image.new("RGB", (3, 2), (255, 0, 51)).convert(mode)
    np.testing.assert_array_equal(one_of_a_folder(image, tmp_path)[0, 0], [255, 0, 51])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_print_and_video_colours_are_converted(mode: str, tmp_path: Path) -> None:
    """JPEGs from print shops and TIFFs from video are RGB in the end."""
    image = Image.new("RGB", (3, 2), (250, 5, 5)).convert(mode)
    pixel = one_of_a_folder(image, tmp_path, ".tif")[0, 0].astype(int)
    assert np.abs(pixel - [250, 5, 5]).max() <= 3


def test_one_colour_file_makes_the_whole_set_rgb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey images among colour ones have their grey in all three channels."""
    save_many(tmp_path, 12)
    Image.new("RGB", (4, 3), (0, 0, 255)).save(tmp_path / "00.png")
    firsts = {tuple(pixel) for pixel in everything(load(tmp_path))[:, 0, 0].tolist()}
    assert firsts == {(0, 0, 255)} | {(grey, grey, grey) for grey in range(10, 120, 10)}
    assert "RGB because of 1 among 12: 00.png" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_greys_are_scaled_to_eight(suffix: str, tmp_path: Path) -> None:
    """65,535 becomes 255 and the middle stays the middle, instead of everything above 255 turning white."""
    values = np.array([[0, 257, 32_896, 65_535, 40_000 * 257 // 256]], np.uint16)
    found = one_of_a_folder(Image.fromarray(values), tmp_path, suffix)
    np.testing.assert_array_equal(found[..., 0], np.rint(values / 257))


def test_pixels_without_a_fixed_range_are_refused(tmp_path: Path) -> None:
    """A 32-bit TIFF may hold heights or probabilities: guessing its white would be wrong."""
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "heights.tif")
    message = refusal(tmp_path)
    assert "heights.tif" in message
    assert "32-bit" in message


def see_through(mode: str) -> Image.Image:
    if mode == "L with a key":
        return Image.new("L", (1, 1), 7)
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
    return image if mode == "RGBA" else image.convert(mode)


def test_a_file_too_large_to_be_read_is_named(tmp_path: Path) -> None:
    """A sparse file takes no room on the disk, and would fill the memory."""
    save_many(tmp_path)
    with (tmp_path / "03.png").open("r+b") as file:
        file.truncate(2**40)
    assert "03.png: larger than 256 MiB" in refusal(tmp_path)


def test_hostile_files_are_named_and_do_not_hold_up_the_others(tmp_path: Path) -> None:
    """Each would keep a decoder busy for many minutes: a JPEG of thousands of passes, a GIF of comments."""
    save_many(tmp_path / "good")
    large, small = io.BytesIO(), io.BytesIO()
    Image.new("L", (4000, 4000)).save(large, "jpeg", progressive=True)
    Image.new("L", (4, 3)).save(small, "gif")
    jpeg, gif = large.getvalue(), small.getvalue()
    scan, frame = jpeg.rindex(b"\xff\xda"), 13 + (3 << 1 + (gif[10] & 7))  # which comes after the palette
    (tmp_path / "good" / "passes.jpg").write_bytes(jpeg[:scan] + jpeg[scan:-2] * 2000 + jpeg[-2:])
    (tmp_path / "good" / "comments.gif").write_bytes(gif[:frame] + b"\x21\xfe\1x\0" * 10**6 + gif[frame:])
    message = refusal(tmp_path)
    assert "passes.jpg: 4000×4000 pixels of this kind take too long to decode" in message
    assert "comments.gif: The image file has more than" in message
    assert len(everything(load(tmp_path, skip_bad=True))) == 10


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "L with a key"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    """As on a page, however the file says that it can be seen through."""
    suffix = ".tif" if mode == "PA" else ".png"
    options = {"transparency": 7} if mode == "L with a key" else {}
    found = one_of_a_folder(see_through(mode), tmp_path, suffix, **options)
    assert set(found.ravel().tolist()) == {255}


def test_photos_stand_upright(tmp_path: Path) -> None:
    """A camera's note of how it was held is followed: the dark half ends at the top."""
    sideways = np.zeros((16, 16), np.uint8)
    sideways[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned a quarter to the left: what was right is at the top
    found = one_of_a_folder(Image.fromarray(sideways), tmp_path, ".jpg", exif=exif, quality=95)[..., 0]
    assert found[:6].min() > 200
    assert found[10:].max() < 50


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    """One file is one image."""
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("#ff0000", "#00ff00")]
    found = one_of_a_folder(frames[0], tmp_path, ".gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(found[0, 0], [255, 0, 0])


def test_every_suffix_is_read_in_any_case(tmp_path: Path) -> None:
    """All the listed kinds of files, in capitals too, are images."""
    modes = {"MSP": "1", "XBM": "1", "BLP": "P", "GBR": "L", "AVIF": "RGB", "QOI": "RGB"}
    written = [suffix for suffix in sorted(image_suffixes()) if Image.EXTENSION[suffix] in Image.SAVE]
    assert len(written) > 20
    for index, suffix in enumerate(written):
        path, kind = tmp_path / f"{index}{suffix.upper() if index % 2 else suffix}", Image.EXTENSION[suffix]
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # they are there for now
            Image.new("L", (16, 16), 9).convert(modes.get(kind, "L")).save(path, kind)
    save_many(tmp_path, 10, size=(16, 16))
    assert len(everything(load(tmp_path, image_size=16))) == 10 + len(written)


def test_unreadable_images_are_all_named_up_to_ten(tmp_path: Path) -> None:
    """One look at the message is enough to clean up, and it stays readable when everything is broken."""
    save_many(tmp_path, 20)
    Image.fromarray(noise(3, 4)).save(tmp_path / "03.png")
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:50])
    (tmp_path / "07.png").write_bytes(b"<html>")
    (tmp_path / "11.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "3 of 20 images" in message
    assert [name in message for name in ("03.png", "07.png", "11.png", "04.png")] == [True, True, True, False]
    for index in range(12):
        (tmp_path / f"{index:02}.png").write_bytes(b"")
    message = refusal(tmp_path)
    assert "12 of 20 images" in message
    assert "09.png" in message
    assert message.endswith("and 2 more")


def test_unreadable_images_are_left_out_where_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named every time; the labels of the others stay theirs, and a class that lost all its images is none."""
    save_many(tmp_path / "ant", 1)
    save_many(tmp_path / "bee", 8)
    save_many(tmp_path / "cow", 6)
    for name in ("ant/00.png", "bee/07.png"):
        (tmp_path / name).write_bytes(b"")
    assert "--skip-bad" in refusal(tmp_path)
    for _ in range(2):
        farm = load(tmp_path, skip_bad=True)
        told = capsys.readouterr().err
        assert "Left out 2 of 15 images" in told
        assert "ant/00.png: not an image" in told
        assert farm.label_names == ("bee", "cow")
        parts = [part.labels for part in (farm.train, farm.validation, farm.test) if part.labels is not None]
        labels, greys = np.concatenate(parts), everything(farm)[:, 0, 0, 0]
        assert [np.sort(greys[labels == label]).tolist() for label in (0, 1)] == [
            list(range(0, 70, 10)),
            list(range(0, 60, 10)),
        ]
    for index in range(6):
        (tmp_path / "cow" / f"{index:02}.png").write_bytes(b"")
    with pytest.raises(DataError, match="7 images are too few"):
        load(tmp_path, skip_bad=True)


@pytest.mark.parametrize("limit", [20, 14], ids=["Pillow would warn", "Pillow would refuse"])
def test_decompression_bombs_are_refused_by_name(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of more pixels than Pillow's limit is named before it is decoded."""
    save_many(tmp_path, 12)
    Image.new("L", (6, 5)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = refusal(tmp_path)
    assert "bomb.png" in message
    assert "decompression bomb" in message


@no_deadline
@given(draw=st.data(), suffix=st.sampled_from([".png", ".jpg", ".webp", ".bmp", ".gif", ".tif"]))
def test_a_damaged_image_is_refused_or_read(scratch: Path, draw: st.DataObject, suffix: str) -> None:
    """Any byte changed, or the end missing: the folder's reader never fails in words that aren't its own."""
    folder = scratch / suffix[1:]
    if not folder.exists():
        save_many(folder, 10, mode="RGB", size=(6, 6))
        Image.fromarray(noise(6, 6, 3)).save(folder / f"whole{suffix}")
    raw = bytearray((folder / f"whole{suffix}").read_bytes())
    position = draw.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= draw.draw(st.integers(0, 255))
    damaged = folder / f"damaged{suffix}"
    damaged.write_bytes(raw[: draw.draw(st.integers(position, len(raw)))])
    with suppress(DataError):
        assert everything(load(folder)).shape == (12, 6, 6, 3)


# --- What is kept between starts ---------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("gan-service/images/*/*"))


def test_images_are_decoded_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start maps what the first wrote, decodes nothing, and has the same set."""
    first = load(save_many(tmp_path / "cats", 20), image_size=8)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_: pytest.fail("decoded again"))
        again = load(tmp_path / "cats", image_size=8)
    assert isinstance(again.train.images.base, np.memmap) or isinstance(again.train.images, np.memmap)
    np.testing.assert_array_equal(everything(first), everything(again))
    assert (again.checksum, again.name, again.label_names) == (first.checksum, "cats", None)
    assert len(entries(cache)) == 1
    torch.from_numpy(again.train.images)  # warns of arrays that cannot be written, and warnings are errors


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: Image.new("L", (4, 3), 255).save(folder / "20.png"), id="a new file"),
        pytest.param(lambda folder: (folder / "03.png").unlink(), id="a file less"),
        pytest.param(lambda folder: Image.new("L", (4, 3), 250).save(folder / "03.png"), id="other pixels"),
        pytest.param(lambda folder: (folder / "03.png").rename(folder / "x.png"), id="another name"),
    ],
)
def test_a_changed_folder_is_read_again(cache: Path, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Whatever the change is, the set is the new one; the old entry goes."""
    folder = save_many(tmp_path / "cats", 20)
    before = load(folder)
    change(folder)
    after = load(folder)
    expected = np.sort([Image.open(path).getpixel((0, 0)) for path in folder.iterdir()])
    np.testing.assert_array_equal(np.sort(everything(after)[:, 0, 0, 0]), expected)
    assert after.checksum != before.checksum
    assert len(entries(cache)) == 1
    assert len(everything(before)) == 20  # what is mapped stays


def test_a_folder_that_changes_while_it_is_read_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry is of one state of the folder, or there is none."""
    folder = save_many(tmp_path / "cats", 20)
    plain = Image.open

    def meddle(file: io.BytesIO, formats: list[str]) -> Image.Image:
        (folder / "19.png").touch()
        return plain(file, formats=formats)

    monkeypatch.setattr(Image, "open", meddle)
    assert "changed while it was read" in refusal(folder)
    assert not entries(cache)


@pytest.mark.parametrize("name", ["images.npy", "metadata.json"])
@pytest.mark.parametrize("kept", [0, 100], ids=["emptied", "cut off"])
def test_a_damaged_entry_is_made_again(cache: Path, tmp_path: Path, name: str, kept: int) -> None:
    """It can always be made again, so nobody is bothered with it."""
    folder = save_many(tmp_path / "cats", 20)
    before = load(folder)
    path = entries(cache)[0] / name
    path.write_bytes(path.read_bytes()[:kept])
    assert load(folder).checksum == before.checksum


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_a_run_names_that_goes_on_is_decoded_once_too(cache: Path, tmp_path: Path, mode: str) -> None:
    """It names the background and colour that it was begun with; the set is the same, and what is said of it."""
    folder = save_many(tmp_path / "cats", 12, mode=mode)
    Image.new("RGB", (4, 3), "red").save(folder / "00.png")
    first, again = load(folder), load(folder, background="#ffffff", colour="rgb")
    assert len(entries(cache)) == 1
    assert (again.checksum, again.preparation, again.files) == (first.checksum, first.preparation, first.files)


def test_seed_and_size_have_entries_of_their_own(cache: Path, tmp_path: Path) -> None:
    """Evaluating with another seed does not throw away the training run's."""
    folder = save_many(tmp_path / "cats", 20)
    checksums = {load(folder, seed=seed, image_size=size).checksum for seed in (0, 1) for size in (None, 4)}
    assert len(checksums) == len(entries(cache)) == 4


def test_resized_arrays_are_kept_too(cache: Path, tmp_path: Path) -> None:
    """An .npz is resized once; a new one under the same name is read."""
    np.savez(tmp_path / "a.npz", images=noise(12, 9, 9), labels=np.arange(12) % 2)
    first = load(tmp_path / "a.npz", image_size=4)
    again = load(tmp_path / "a.npz", image_size=4)
    assert first.checksum == again.checksum
    assert len(entries(cache)) == 1
    np.savez(tmp_path / "a.npz", images=255 - noise(12, 9, 9))
    changed = load(tmp_path / "a.npz", image_size=4)
    assert (changed.checksum != first.checksum, changed.label_names) == (True, None)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with the path: the disk is full, or the folder is somebody else's."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refusal(save_many(tmp_path / "cats"))


def test_a_full_disk_of_the_cache_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system does not say which disk it was that a write found full."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.data.load.write_folder", full)
    reason = refusal(save_many(tmp_path / "cats"))
    assert "No space left on device" in reason
    assert str(cache) in reason


@pytest.mark.slow
def test_memory_stays_bounded_while_a_folder_is_read(cache: Path, tmp_path: Path) -> None:
    """A folder of 48 MB of pixels, read by a process that may allocate half of that."""
    del cache
    folder = tmp_path / "large"
    folder.mkdir()
    for index in range(64):
        Image.new("RGB", (512, 512), (index, 0, 0)).save(folder / f"{index}.png")
    program = """
import sys, tracemalloc
from models.data import image_folder as imagefolder
from models.data.load import load_dataset
imagefolder.DECODED_AT_ONCE = 8
tracemalloc.start()
dataset = load_dataset(sys.argv[1], None, seed=0)
print(dataset.train.images.shape, tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, _, peak = done.stdout.rpartition(" ")
    assert shape == "(52, 512, 512, 3)"
    assert int(peak) < 24e6


# --- Someone's own IDX files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["gzipped", "unpacked"])
def test_own_idx_files_bring_their_labels_from_beside_them(tmp_path: Path, *, packed: bool) -> None:
    """Letters numbered 3, 5 and 9: classes by those names, on the right images."""
    images, labels = noise(30, 5, 4), np.array([3, 5, 9], np.uint8)[np.arange(30) % 3]
    files = {"letters-images-idx3-ubyte": idx_bytes(images), "letters-labels-idx1-ubyte": idx_bytes(labels)}
    write_idx_files(tmp_path, files, packed=packed)
    name = "letters-images-idx3-ubyte" + (".gz" if packed else "")
    letters = load(tmp_path / name)
    assert (letters.name, letters.label_names) == ("letters", ("3", "5", "9"))
    by_bytes = {image.tobytes(): label for image, label in zip(images, np.arange(30) % 3, strict=True)}
    for part in (letters.train, letters.validation, letters.test):
        assert part.labels is not None
        assert [by_bytes[image.tobytes()] for image in part.images] == part.labels.tolist()
    assert name in refusal(tmp_path)  # the folder is no folder of images: the message says what to name


def test_own_idx_files_need_no_labels_but_refuse_wrong_ones(tmp_path: Path) -> None:
    """Without a file beside it the set has none; with one of another length, somebody mixed files up."""
    write_idx_files(tmp_path, {"x-images-idx3-ubyte": idx_bytes(noise(12, 3, 3))}, packed=False)
    assert load(tmp_path / "x-images-idx3-ubyte", image_size=6).label_names is None
    write_idx_files(tmp_path, {"x-labels-idx1-ubyte": idx_bytes(noise(11))}, packed=False)
    assert "expected 12 labels" in refusal(tmp_path / "x-images-idx3-ubyte")
    assert "three dimensions" in refusal(tmp_path / "x-labels-idx1-ubyte")
