"""Which files of a folder count, as images of which class and split, and what is said of those that don't."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.data.dataset import DataError, Dataset, printable
from models.data.folder_listing import (
    COUNTED_SUFFIXES,
    LINKED_FOLDER,
    NO_FILE,
    NO_IMAGE_BY_CONTENT,
    NO_IMAGE_BY_NAME,
    OTHER_SUFFIXES,
    find_images,
    image_suffixes,
    in_label_order,
)
from models.data.load import load_dataset
from models.images.decoding import FORMATS, readable_formats

# What Pillow knows beside the formats that count, and why they don't.
NOT_COUNTED = {
    *("EPS", "IPTC"),  # a program is started, or may be
    *("WMF", "FPX", "MIC"),  # needs Windows, or another package
    *("BUFR", "GRIB", "HDF5", "MPEG"),  # recognised, and not decoded
    *("IMT", "MCIDAS", "SPIDER", "XVTHUMB"),  # no suffix of its own
}


def save(path: Path, grey: int = 0, kind: str = "PNG") -> None:
    """One small image of one grey, whatever its file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), grey).save(path, kind)


def save_many(folder: Path, count: int, grey: int = 0) -> None:
    for index in range(count):
        save(folder / f"{index:02}.png", grey)


def load(folder: Path, *, seed: int = 0, splits: str = "auto", skip_bad: bool = False) -> Dataset:
    return load_dataset(str(folder), None, seed=seed, splits=splits, skip_bad=skip_bad)


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(folder)
    return str(caught.value)


def greys(dataset: Dataset) -> list[list[int]]:
    """The grey of each image of the three splits."""
    return [sorted(split.images[:, 0, 0, 0].tolist()) for split in dataset.splits]


# --- The order of classes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["10", "2", "1", "0", "11"], ["0", "1", "2", "10", "11"]),
        (["1", "-3", "0", "-10"], ["-10", "-3", "0", "1"]),
        (["1", "01", "2", "001"], ["001", "01", "1", "2"]),
        (["9" * 200, "8"], ["8", "9" * 200]),
        (["10", "2", "a"], ["10", "2", "a"]),
        (["1.5", "10", "2"], ["1.5", "10", "2"]),
        (["٣", "10", "2"], ["10", "2", "٣"]),
        (["é", "z", "B", "a"], ["B", "a", "z", "é"]),
    ],
    ids=["numbers", "negative", "leading zeros", "huge", "one word", "fractions", "other digits", "words"],
)
def test_whole_numbers_stand_by_value_and_other_names_by_code_point(names: list[str], ordered: list[str]) -> None:
    """Class 2 of the folders 0 to 11 is index 2; equal numbers are two classes."""
    assert in_label_order(names) == ordered


@given(st.sets(st.integers(-(10**20), 10**20), min_size=1))
def test_folders_of_any_whole_numbers_stand_as_the_numbers_do(numbers: set[int]) -> None:
    """Whatever order they were listed in."""
    assert in_label_order(map(str, numbers)) == [str(number) for number in sorted(numbers)]


def test_numbered_folders_keep_their_images(tmp_path: Path) -> None:
    """The label of every image is the number of its folder."""
    for number in range(12):
        save_many(tmp_path / str(number), 3, grey=20 * number)
    digits = load(tmp_path)
    assert digits.label_names == tuple(map(str, range(12)))
    for split in (digits.train, digits.validation, digits.test):
        assert split.labels is not None
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] // 20, split.labels)


# --- What counts -------------------------------------------------------------------------------------------------


def test_every_format_of_pillow_counts_or_has_a_reason_not_to() -> None:
    """A new release of Pillow that knows more asks for a decision here."""
    Image.init()
    assert set(Image.OPEN) - NOT_COUNTED <= set(FORMATS)
    assert not set(readable_formats()) & NOT_COUNTED
    assert {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".tif", ".tga", ".mpo"} <= image_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".mpg", ".h5", ".txt"} & image_suffixes()


def test_a_postscript_file_under_an_images_name_starts_no_program(tmp_path: Path) -> None:
    """It is told to be no image; Pillow would have run Ghostscript on it."""
    save_many(tmp_path, 12)
    Image.new("L", (4, 3)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    assert "x.png: not an image that Pillow knows" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_files_without_a_suffix_are_told_by_their_content(kind: str, tmp_path: Path) -> None:
    """As a crawler leaves them; a readme beside them is none."""
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    for index in range(12):
        save(tmp_path / f"{index:02}", kind=kind)
    for name, content in (("README", b"Pictures of cats"), ("EMPTY", b""), ("SHORT", b"\x89"), ("LICENSE", b"P5 ...")):
        (tmp_path / name).write_bytes(content)
    found = load(tmp_path)
    assert sum(map(len, greys(found))) == 12
    assert found.files.left_out == {NO_IMAGE_BY_CONTENT: {"": 4}}


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are made otherwise there")
def test_what_is_left_out_is_counted_by_reason_and_suffix(tmp_path: Path) -> None:
    """Nothing vanishes unsaid, but for hidden files; nothing that is no file is opened."""
    save_many(tmp_path / "cats" / "more", 12)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / "cats" / name).write_bytes(b"")
    (tmp_path / "cats" / ".hidden.png").write_bytes(b"")
    (tmp_path / "cats" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "cats" / "around").symlink_to(tmp_path)
    (tmp_path / "cats" / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "cats" / "pipe.png")
    found = load(tmp_path)
    assert found.label_names == ("cats",)
    left_out = {reason: dict(counts) for reason, counts in found.files.left_out.items()}
    assert left_out.pop("not to be opened") == {"": 1}
    assert left_out == {NO_IMAGE_BY_NAME: {".heic": 2, ".txt": 1}, NO_FILE: {".png": 2}, LINKED_FOLDER: {"": 1}}


def test_numbered_suffixes_are_not_thousands_of_counts(tmp_path: Path) -> None:
    """`scan.0001` and its like are counted together after the first of them."""
    save_many(tmp_path, 12)
    for index in range(COUNTED_SUFFIXES + 7):
        (tmp_path / f"scan.{index:04}").write_bytes(b"")
    counts = find_images(tmp_path).left_out[NO_IMAGE_BY_NAME]
    assert len(counts) == COUNTED_SUFFIXES + 1
    assert counts[OTHER_SUFFIXES] == 7


def test_a_folder_of_other_files_says_what_they_are(tmp_path: Path) -> None:
    """Whoever has a folder of .heic learns that these are the reason."""
    (tmp_path / "a.heic").write_bytes(b"")
    assert "1 file left out, no image by its name: .heic (1)" in refusal(tmp_path)


# --- Splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val"])
def test_train_val_and_test_are_splits(validation: str, tmp_path: Path) -> None:
    """Each image is in the split of its folder, under its class; the order is shuffled by the seed."""
    for split, folder in enumerate(("train", validation, "test")):
        for label, name in enumerate(("cat", "dog")):
            save_many(tmp_path / folder / name, 10 + split, grey=100 * label + split)
    pets = load(tmp_path)
    assert (pets.label_names, pets.files.by_folders) == (("cat", "dog"), True)
    assert greys(pets) == [[0] * 10 + [100] * 10, [1] * 11 + [101] * 11, [2] * 12 + [102] * 12]
    assert pets.train.labels is not None
    np.testing.assert_array_equal(pets.train.labels, pets.train.images[:, 0, 0, 0] // 100)
    assert sorted(pets.train.labels.tolist()) != pets.train.labels.tolist()
    assert load(tmp_path, seed=1).checksum != pets.checksum


@pytest.mark.parametrize(("there", "missing"), [("val", "test"), ("test", "validation")])
def test_a_missing_split_is_a_tenth_of_the_training_images(
    there: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said at every start; the split that is there stays whole."""
    save_many(tmp_path / "train", 25, grey=1)
    save_many(tmp_path / there, 3, grey=2)
    for _ in range(2):
        train, validation, test = greys(load(tmp_path))
        assert (train, *sorted([validation, test])) == ([1] * 23, [1] * 2, [2] * 3)
        assert f"No {missing} images in a folder of their own: 2 of those in train" in capsys.readouterr().err


def test_splits_can_be_classes_and_have_entries_of_their_own(tmp_path: Path) -> None:
    """Somebody's classes may be called so: `--splits none` reads them, and the cache keeps the two apart."""
    save_many(tmp_path / "train", 15)
    save_many(tmp_path / "test", 15, grey=9)
    for _ in range(2):
        assert load(tmp_path).label_names is None
        assert load(tmp_path, splits="none").label_names == ("test", "train")


@pytest.mark.parametrize(
    "folders", [("train",), ("val", "test"), ("train", "val", "other")], ids=["alone", "no train", "another"]
)
def test_other_folders_are_classes(folders: tuple[str, ...], tmp_path: Path) -> None:
    """Only train with one more, and nothing else, can mean splits; a folder without images is no folder of these."""
    for folder in folders:
        save_many(tmp_path / folder, 10)
    (tmp_path / "test").mkdir(exist_ok=True)
    assert load(tmp_path).label_names == tuple(sorted(folders))


def test_splits_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    """Two folders for one split; classes in one and none in the other; too few to train with."""
    save_many(tmp_path / "train", 9)
    save_many(tmp_path / "val", 9)
    assert "9 images in train are too few: 10 is the least" in refusal(tmp_path)
    save_many(tmp_path / "train", 12)
    save_many(tmp_path / "valid", 9)
    assert "two of these are the same split" in refusal(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "test")
    save_many(tmp_path / "test" / "cat", 3)
    assert "both directly in a split (test/00.png) and in sub-folders (test/cat)" in refusal(tmp_path)


# --- Names -------------------------------------------------------------------------------------------------------


def bytes_named(folder: Path, name: bytes) -> Path:
    """A path with a name of any bytes, where the disk has such names."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    try:
        path.mkdir(parents=True)
    except OSError:
        pytest.skip("this disk has no names that are not UTF-8")
    return path


def test_class_folders_whose_names_are_no_utf_8_are_refused(tmp_path: Path) -> None:
    """The manifest could not hold such a name, and that would show after hours."""
    save_many(bytes_named(tmp_path, b"caf\xe9"), 12)
    assert r"class folder caf\xe9 is no UTF-8: rename it" in refusal(tmp_path)


def test_other_names_that_are_no_utf_8_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data's folder gives the set its name; a file's stands in messages only."""
    folder = bytes_named(tmp_path, b"caf\xe9")
    save_many(folder, 12)
    Path(os.fsdecode(os.fsencode(folder) + b"/b\xe4d.png")).write_bytes(b"")
    found = load(folder, skip_bad=True)
    assert found.name == r"caf\xe9"
    assert r"b\xe4d.png: not an image" in capsys.readouterr().err
    assert r"b\xe4d.png: not an image" in found.files.notes[0]


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_is_printable_can_be_printed(text: str) -> None:
    """One line of UTF-8 that moves no cursor, and unchanged where it was that already."""
    shown = printable(text)
    assert shown.isprintable()
    print(shown, file=io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert shown == text or not text.isprintable()
