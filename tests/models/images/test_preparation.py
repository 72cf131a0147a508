"""What becomes of an image before a net sees it: turned, laid on its background, made grey or RGB, cut and resized."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from models.images.preparation import UNDECLARED, Fit, Preparation, prepare

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (30, 20, 3), dtype=np.uint8))
WIDE = Image.new("RGB", (40, 10), "#204060")


def pixels(
    picture: Image.Image, preparation: Preparation, size: tuple[int, int] | None, channels: int | None
) -> object:
    """What `prepare` makes of an upright image, as nested lists."""
    return np.asarray(prepare(picture, 1, preparation, size, channels)).tolist()


def test_the_default_is_the_central_square_by_lanczos() -> None:
    """As photographs are mostly looked at: nothing is distorted, and nothing is added."""
    expected = ImageOps.fit(NOISE, (8, 8), Image.Resampling.LANCZOS)
    assert pixels(NOISE, Preparation(), (8, 8), 3) == np.asarray(expected).tolist()


def test_an_undeclared_preparation_squeezes_and_lays_on_black() -> None:
    """As uploads were judged before bundles said how their images were made."""
    see_through = NOISE.copy()
    see_through.putalpha(Image.fromarray(RNG.integers(0, 256, (30, 20), dtype=np.uint8)))
    black = Image.alpha_composite(Image.new("RGBA", (20, 30), (0, 0, 0, 255)), see_through)
    for channels, mode in ((1, "L"), (3, "RGB")):
        expected = black.convert(mode).resize((9, 7), Image.Resampling.BILINEAR)
        assert pixels(see_through, UNDECLARED, (9, 7), channels) == np.asarray(expected).tolist()


def test_pad_keeps_all_of_the_image_between_bars() -> None:
    """A wide image gets its background above and below, and keeps its shape."""
    padded = np.asarray(prepare(WIDE, 1, Preparation("pad", "#ff0000"), (8, 8), 3))
    assert (padded[3:5] == (0x20, 0x40, 0x60)).all()
    assert (padded[[0, 1, 2, 5, 6, 7]] == (255, 0, 0)).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("own", [(1, 1), (3000, 1), (1, 3000), (7, 5)])
def test_every_shape_fits(fit: Fit, own: tuple[int, int]) -> None:
    """However thin an image is, one of its pixels can be seen."""
    for size in ((8, 8), (5, 9), (9, 5)):
        made = prepare(Image.new("RGB", own, "#00ff00"), 1, Preparation(fit), size, 3)
        assert made.size == size
        assert (0, 255, 0) in {colour for _, colour in made.getcolors() or []}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_before_it_is_cut(orientation: int) -> None:
    """What is upright for a viewer is upright for a net."""
    held = NOISE.copy()
    held.getexif()[0x0112] = orientation
    upright = ImageOps.fit(ImageOps.exif_transpose(held), (8, 6), Image.Resampling.LANCZOS)
    made = prepare(NOISE, orientation, Preparation(), (8, 6), 3)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(upright))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_is_grey_where_its_pixels_are(mode: str) -> None:
    """The mode of its file says nothing; one pixel of another colour does."""
    grey = NOISE.convert("L")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode)
    if mode == "P":
        picture = Image.merge("RGB", [grey] * 3).quantize(256)
    assert prepare(picture, 1, Preparation(), None, None).mode == "L"
    nearly = Image.merge("RGB", [grey] * 3)
    nearly.putpixel((19, 29), (9, 9, 10))
    assert prepare(nearly, 1, Preparation(), None, None).mode == "RGB"


def test_a_large_image_is_looked_at_to_its_end() -> None:
    """The last pixel of millions may be the one with a colour."""
    large = Image.new("RGB", (3000, 700), "#808080")
    assert prepare(large, 1, Preparation(), (8, 8), None).mode == "L"
    large.putpixel((2999, 699), (128, 128, 129))
    assert prepare(large, 1, Preparation(), (8, 8), None).mode == "RGB"


@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#336699"])
def test_the_background_shows_where_nothing_is(background: str) -> None:
    """By alpha, by a palette's alpha, or by a colour that counts as transparent, in 16 bits too."""
    red, green, blue = (int(background[at : at + 2], 16) for at in (1, 3, 5))
    keyed, keyed16, palette = Image.new("L", (2, 2), 7), Image.new("I;16", (2, 2), 700), Image.new("P", (2, 2), 0)
    for picture, key in ((keyed, 7), (keyed16, 700), (palette, 0)):
        picture.info["transparency"] = key
    for picture in (Image.new("RGBA", (2, 2)), Image.new("LA", (2, 2)), keyed, keyed16, palette):
        assert pixels(picture, Preparation("crop", background), None, 3) == [[[red, green, blue]] * 2] * 2


def test_grey_images_on_a_coloured_background_have_colours() -> None:
    """What shows through is no longer grey; nor are the bars beside it."""
    coloured = Preparation("pad", "#336699")
    assert prepare(Image.new("LA", (2, 2), (9, 128)), 1, coloured, None, None).mode == "RGB"
    assert prepare(Image.new("L", (2, 9)), 1, coloured, (4, 4), None).mode == "RGB"
    assert prepare(Image.new("L", (2, 2)), 1, coloured, (4, 4), None).mode == "L"
    assert prepare(Image.new("L", (2, 9)), 1, Preparation("pad", "#777777"), (4, 4), None).mode == "L"


@pytest.mark.parametrize("background", ["white", "#fff", "#FFFFFF", "#ffffff\n", ""])
def test_a_background_has_one_way_to_be_written(background: str) -> None:
    """So that the same preparation is the same version of a bundle."""
    with pytest.raises(ValueError, match="#rrggbb"):
        Preparation("crop", background)
