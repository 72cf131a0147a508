"""Strips and animations hold every image of a sequence, and last as long as they should."""

import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from models.inference.pixels import UInt8
from service.codecs.animation import SEQUENCE_TYPES, SequenceFormat, SequenceOptions, encode_sequence, sequence_size

GREY = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 1), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
ANIMATIONS = [form for form in SEQUENCE_TYPES if form != "png"]


def frames(file: bytes) -> tuple[list[UInt8], float]:
    """The images as RGB, and how long all of them are shown, in milliseconds."""
    with Image.open(io.BytesIO(file)) as picture:
        shown, duration_ms = [], 0.0
        for frame in ImageSequence.Iterator(picture):
            shown.append(np.asarray(frame.convert("RGB")))
            duration_ms += frame.info.get("duration", 0)
        return shown, duration_ms


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("form", ANIMATIONS)
def test_an_animation_shows_every_image(images: UInt8, form: SequenceFormat) -> None:
    """Pixel for pixel (GIF too, where an image has no more than 256 colours), and in the time that was asked for."""
    options = SequenceOptions(form, 3, 1000)
    file = encode_sequence(images, options)
    assert file == encode_sequence(images, options)
    shown, duration_ms = frames(file)
    assert (len(shown), duration_ms) == (7, 1000)
    for frame, image in zip(shown, images, strict=True):
        assert frame.shape[:2] == sequence_size(options, 7, 4, 6)
        np.testing.assert_array_equal(frame, np.broadcast_to(image, (4, 6, 3)).repeat(3, axis=0).repeat(3, axis=1))


@pytest.mark.parametrize("form", ANIMATIONS)
def test_images_that_are_the_same_may_be_one_frame(form: SequenceFormat) -> None:
    """The rest is shown all the same, after the same time."""
    shown, duration_ms = frames(encode_sequence(GREY[[0, 0, 1, 1, 1, 2]], SequenceOptions(form, 1, 601)))
    assert duration_ms == (600 if form == "gif" else 601)
    np.testing.assert_array_equal(shown[-1], np.broadcast_to(GREY[2], (4, 6, 3)))
    assert encode_sequence(GREY[[0, 0]], SequenceOptions(form, 1, 100))


def test_colours_of_a_gif_are_near_those_of_the_image() -> None:
    """Where an image has more than 256; the other formats keep them all."""
    ramp = np.linspace(0, 255, 140 * 150).reshape(140, 150)
    image = np.stack([ramp, ramp.T.reshape(140, 150), 255 - ramp], axis=2).astype(np.uint8)
    [first, _], _ = frames(encode_sequence(np.stack([image, image[::-1]]), SequenceOptions("gif", 2, 100)))
    assert np.abs(first[::2, ::2].astype(int) - image).mean() < 8


class Patience:
    """Asked whether anybody waits, it says yes so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.asked = times, 0

    def check(self) -> None:
        """Ask."""
        self.asked += 1
        if self.asked > self.times:
            raise TimeoutError


@pytest.mark.parametrize("form", SEQUENCE_TYPES)
def test_whoever_waits_no_longer_can_end_the_work(form: SequenceFormat) -> None:
    """While the images of an animation are made, and while the file is: that takes longer."""
    noise = np.random.default_rng(2).integers(0, 256, (7, 200, 200, 3), dtype=np.uint8)
    options, patient = SequenceOptions(form, 1, 700), Patience(10**6)
    encode_sequence(noise, options, patient.check)
    assert patient.asked > len(noise) * (1 if form == "png" else 2)
    for times in (2, patient.asked - 1):
        leaving = Patience(times)
        with pytest.raises(TimeoutError):
            encode_sequence(noise, options, leaving.check)
        assert leaving.asked == times + 1


def test_a_strip_is_one_line() -> None:
    """From left to right."""
    options = SequenceOptions("png", 2, 0)
    with Image.open(io.BytesIO(encode_sequence(COLOUR, options))) as picture:
        strip = np.asarray(picture)
    assert strip.shape[:2] == sequence_size(options, 7, 4, 6) == (8, 84)
    np.testing.assert_array_equal(strip[::2, ::2], np.concatenate(COLOUR, axis=1))
