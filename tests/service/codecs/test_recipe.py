"""Recipes in files: they change no pixel, Pillow finds them too, and hostile files cost no more than a search."""

import base64
import io
import json
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from models.inference.pixels import UInt8
from service.codecs.animation import SequenceFormat, SequenceOptions, encode_sequence
from service.codecs.encode import Format, RenderOptions, SampleMetadata, encode, encode_picture
from service.codecs.recipe import MAX_RECIPE_BYTES, PictureFormat, Recipe, find_recipe, is_animation, mark
from service.codecs.time_slices import run_steps

GREY = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 1), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
RECIPE = Recipe(
    bundle="tiny@0123456789ab",
    seed=2**53 - 1,
    first_index=0,
    count=1,
    labels=[0],
    truncation=0.1,
    layout="grid",
    columns=1,
    scale=1,
    format="png",
)
TEXT = RECIPE.model_dump_json().encode()
TERM = b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def frames(file: bytes) -> list[UInt8]:
    """The pixels of every picture in a file."""
    with Image.open(io.BytesIO(file)) as picture:
        found = []
        for place in range(getattr(picture, "n_frames", 1)):
            picture.seek(place)
            found.append(np.asarray(picture.convert("RGB")))
    return found


def found_in(file: bytes) -> bytes | None:
    return run_steps(find_recipe(file))


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_a_recipe_changes_no_pixel_and_is_found(images: UInt8, form: PictureFormat) -> None:
    """The pixels stay, Pillow reads recipe and IPTC's term, and the recipe comes back as it went in."""
    plain = encode_picture(images[0], form)
    marked = mark(plain, form, TEXT)
    np.testing.assert_array_equal(frames(marked), frames(plain))
    with Image.open(io.BytesIO(marked)) as picture:
        info = picture.info
    assert TERM in info["xmp"]
    if form == "png":
        assert json.loads(info["gan-service"]) == RECIPE.model_dump()
    else:
        assert TEXT.replace(b"&", b"&amp;") in info["xmp"]
    assert found_in(marked) == TEXT
    assert found_in(plain) is None
    assert Recipe.model_validate_json(TEXT) == RECIPE


@pytest.mark.parametrize("form", ["png", "apng", "gif", "webp"])
def test_a_mark_alone_fits_every_file(form: SequenceFormat) -> None:
    """Strips and animations keep all their images, and say that they were generated."""
    for images in (GREY, COLOUR):
        plain = encode_sequence(images, SequenceOptions(form, 2, 500))
        marked = mark(plain, form, None)
        np.testing.assert_array_equal(frames(marked), frames(plain))
        assert len(frames(marked)) == (1 if form == "png" else 5)
        with Image.open(io.BytesIO(marked)) as picture:
            said = picture.info["xmp"] if form != "gif" else marked  # where Pillow does not look for it
        assert TERM in said
        assert found_in(marked) is None
        assert run_steps(is_animation(marked)) == (form in {"apng", "webp"})


def test_a_webp_keeps_its_transparency() -> None:
    """The announcing chunk says that there is some, else readers would leave it out."""
    rgba = np.random.default_rng(2).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(out := io.BytesIO(), "webp", lossless=True, exact=True)
    with Image.open(io.BytesIO(mark(out.getvalue(), "webp", TEXT))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), rgba)


@pytest.mark.parametrize("form", ["json", "zip"])
def test_each_picture_has_its_own_recipe(form: Format) -> None:
    """Of several pictures each says its own index, and its own label."""
    labels = [1, 0, 1, 0, 1]
    metadata = SampleMetadata("tiny", "0123456789ab", 7, 3, labels, list("babab"), truncation=0.5, is_marked=True)
    body = encode(GREY, RenderOptions(form, 3, 2), metadata)
    if form == "json":
        files = [found_in(base64.b64decode(text)) for text in json.loads(body)["images"]]
    else:
        archive = zipfile.ZipFile(io.BytesIO(body))
        files = [found_in(archive.read(name)) for name in archive.namelist()]
    for place, text in enumerate(files):
        recipe = Recipe.model_validate_json(text or b"")
        assert (recipe.first_index, recipe.count, recipe.labels) == (3 + place, 1, [labels[place]])
        assert recipe.model_dump_json().encode() == text
        assert (recipe.seed, recipe.truncation, recipe.scale, recipe.format) == (7, 0.5, 2, "png")


def test_a_recipe_is_short_where_one_label_is_for_all() -> None:
    """A grid's recipe has a label for each image, or one for all; layout and columns are as they came out."""
    for labels, shown, columns, layout in (([2] * 5, [2], 3, "grid"), ([0, 1, 0, 0, 0], [0, 1, 0, 0, 0], 5, "strip")):
        metadata = SampleMetadata("tiny", "0123456789ab", 7, 0, labels, is_marked=True)
        recipe = Recipe.model_validate_json(found_in(encode(GREY, RenderOptions("png", columns, 1), metadata)) or b"")
        assert (recipe.labels, recipe.columns, recipe.layout, recipe.count) == (shown, columns, layout, 5)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: b'<rdf:Description gan:recipe="%b"/>' % text.replace(b'"', b"&quot;"),
        lambda text: b"<rdf:Description gan:recipe='%b'/>" % text,
        lambda text: b"<gan:recipe>\n  %b\n</gan:recipe>" % text.replace(b'"', b"&quot;"),
    ],
    ids=["attribute", "apostrophes", "entities"],
)
def test_xmp_that_another_program_rewrote_is_understood(rewrite: Callable[[bytes], bytes]) -> None:
    """XML says the same in several ways."""
    assert found_in(b"\xff\xd8" + rewrite(TEXT)) == TEXT


def test_a_recipe_is_found_wherever_it_stands() -> None:
    """Also where the search goes on from one piece of the file to the next."""
    for before in (0, 2**16 - 20, 2**16 - 10, 2**16 - 1, 2**17 + 3):
        for file in (b"<gan:recipe>{}<", b"\0\0\0\x0etEXtgan-service\0{}"):
            assert found_in(b"x" * before + file) == b"{}"


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"tEXtgan-service\0",
        b"\0tEXtgan-service\0{}",
        b"\xff\xff\xff\xfftEXtgan-service\0{}",
        b"\0\0\0\x0ctEXtgan-service\0{}",
        (MAX_RECIPE_BYTES + 13).to_bytes(4, "big") + b"tEXtgan-service\0" + b" " * (MAX_RECIPE_BYTES + 1),
        b"gan:recipe",
        b"gan:recipe>",
        b"gan:recipe>{}",
        b'gan:recipe="{}',
        b"gan:recipes>{}<",
        b"gan:recipe>" + b" " * (2 * MAX_RECIPE_BYTES) + b"<",
        b"gan:recipe>x" + b"x" * MAX_RECIPE_BYTES + b"<",
    ],
)
def test_what_is_cut_short_or_too_long_is_no_recipe(file: bytes) -> None:
    """Lengths are compared with the file and the bound before anything is read."""
    assert found_in(file) is None


def test_a_long_search_has_pauses() -> None:
    """A file as large as they come is searched in steps."""
    assert sum(1 for _ in find_recipe(bytes(2**22))) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"bundle": "tiny"}, {"bundle": "tiny@canary"}, {"seed": -1}, {"seed": 2**53}, {"seed": 1.0}, {"seed": "1"},
        {"count": 0}, {"count": 8193, "labels": None}, {"first_index": 2**53 - 1, "count": 2}, {"labels": []},
        {"labels": [-1]}, {"labels": [0, 1, 2]}, {"labels": [0.5]}, {"labels": 3}, {"truncation": 0.0},
        {"truncation": 1.5}, {"columns": 2}, {"columns": 0}, {"scale": 17}, {"format": "zip"}, {"select": "best"},
        {"layout": "heap"}, {"colour": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_says_what_a_request_could_have_asked_for(change: dict[str, object]) -> None:
    """Anything else is none of ours."""
    Recipe.model_validate_json(TEXT)
    with pytest.raises(ValueError, match="validation error"):
        Recipe.model_validate_json(json.dumps(RECIPE.model_dump() | change))
