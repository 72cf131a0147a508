"""Hints name images that can't be what was meant, and leave all others alone."""

from pathlib import Path

import numpy as np
import pytest

from models.bundle import read_bundle
from models.inference.pixels import UInt8
from service.engine.hints import BLANK, DARK_ON_LIGHT, LIGHT_ON_DARK, Hints

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def real_digits() -> UInt8:
    """2,000 of MNIST, light on dark."""
    images: UInt8 = np.load(ROOT / "tests" / "data" / "mnist-2000.npz")["images"].reshape(-1, 28, 28, 1)
    return images


def noise(n: int, channels: int = 3) -> UInt8:
    """Images without any ground, as photos are."""
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, channels), dtype=np.uint8)


def squares(ground: tuple[int, int, int], figure: tuple[int, int, int], n: int = 64) -> UInt8:
    """A square of one colour in the middle of another."""
    images = np.full((n, 16, 16, 3), ground, np.uint8)
    images[:, 4:12, 4:12] = figure
    return images


@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
def test_embedded_bundles_tell_inverted_and_blank_images_from_real_ones(name: str, real_digits: UInt8) -> None:
    """No real digit gets a hint, every inverted one does, and so do images without a digit."""
    hints = Hints.of(read_bundle(ROOT / "bundles" / name).draw(64))
    assert hints.find(real_digits) == {}
    assert hints.find(255 - real_digits) == dict.fromkeys(range(len(real_digits)), DARK_ON_LIGHT)
    blank = np.stack([np.full((28, 28, 1), level, np.uint8) for level in (0, 100, 255)])
    assert hints.find(blank) == dict.fromkeys(range(3), BLANK)


def test_a_hint_is_found_at_its_place(real_digits: UInt8) -> None:
    """Among others, each image is looked at for itself."""
    images = real_digits[:5].copy()
    images[1], images[4] = 255 - images[1], 0
    assert Hints.of(real_digits).find(images) == {1: DARK_ON_LIGHT, 4: BLANK}


@pytest.mark.parametrize(("paper", "ink"), [(205, 55), (165, 45), (120, 30)])
def test_a_photo_of_a_drawing_is_dark_on_light(paper: int, ink: int, real_digits: UInt8) -> None:
    """Also in a dim room and unevenly lit, where paper is grey; what is light on a grey ground needs no inverting."""
    drawn = real_digits.astype(np.float64) / 255
    shade = np.linspace(0.85, 1.15, 28).reshape(28, 1, 1)
    photos = ((paper + (ink - paper) * drawn) * shade).astype(np.uint8)
    hints = Hints.of(real_digits)
    assert hints.find(photos) == dict.fromkeys(range(len(photos)), DARK_ON_LIGHT)
    assert hints.find(255 - photos) == {}
    assert Hints.of(255 - real_digits).find(255 - photos) == dict.fromkeys(range(len(photos)), LIGHT_ON_DARK)


def test_colour_has_an_opposite_ground_too() -> None:
    """Only black and white grounds are opposite: of a coloured one nobody knows what was meant."""
    red, white, black, blue = (200, 20, 20), (250, 250, 250), (5, 5, 5), (0, 0, 255)
    on_white = Hints.of(squares(white, red))
    assert on_white.find(squares(black, red, 1)) == {0: LIGHT_ON_DARK}
    assert on_white.find(squares(blue, red, 1)) == on_white.find(squares(white, blue, 1)) == {}
    assert on_white.find(np.full((1, 16, 16, 3), red, np.uint8)) == {0: BLANK}
    on_blue = Hints.of(squares(blue, red))
    assert on_blue.find(np.concatenate([squares(white, red, 1), squares(black, red, 1)])) == {}


def test_images_without_a_ground_of_their_own_find_none_odd() -> None:
    """A bundle of photos, or one with as many dark as light grounds, says nothing of either."""
    mixed = np.concatenate([squares((0, 0, 0), (255, 0, 0)), squares((255, 255, 255), (255, 0, 0))])
    for usual in (noise(64), mixed):
        assert Hints.of(usual).find(mixed) == {}
    assert Hints.of(squares((0, 0, 0), (255, 255, 255))).find(noise(64)) == {}


def test_a_bundle_that_draws_blank_images_finds_none_odd() -> None:
    """As one does whose training has just begun."""
    grey = np.full((64, 16, 16, 1), 127, np.uint8)
    assert Hints.of(grey).find(grey) == {}


def test_what_a_lossy_file_makes_of_one_colour_is_blank() -> None:
    """A few levels up and down; a faint drawing is more."""
    usual = Hints.of(noise(64, 1))
    nearly = np.random.default_rng(0).integers(250, 256, (1, 16, 16, 1), dtype=np.uint8)
    assert usual.find(nearly) == {0: BLANK}
    nearly[0, 3:9, 8] = 200
    assert usual.find(nearly) == {}


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_images_of_any_size_are_looked_at(shape: tuple[int, int]) -> None:
    """Also such as are nothing but border; one of a single pixel is always of one colour."""
    dark, light = (np.full((8, *shape, 3), level, np.uint8) for level in (5, 250))
    dark[:, 0, 0] = 60
    assert Hints.of(dark).find(dark) == {}
    assert Hints.of(dark).find(light)[0] == (DARK_ON_LIGHT if shape == (1, 1) else BLANK)
