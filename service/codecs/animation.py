"""Encodes a sequence of images as a strip or as an animation that runs for ever.

WebP and APNG keep every pixel as it is, and so does GIF for grey images; it has 256 colours for each image in colour.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import GifImagePlugin, Image  # noqa: F401 - imported now, so that the first request does not wait for it

from models.inference.pixels import UInt8
from service.codecs.encode import Check, CheckedFile, RenderOptions, encode_picture, lay_out

SequenceFormat = Literal["png", "gif", "webp", "apng"]

# In order of preference, for clients that accept several equally.
SEQUENCE_TYPES: dict[SequenceFormat, str] = {
    "png": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
    "apng": "image/apng",
}
# The longest side in pixels that each allows.
MAX_SEQUENCE_SIDE: dict[SequenceFormat, int] = {"png": 2**31 - 1, "gif": 65535, "webp": 16383, "apng": 2**31 - 1}
CUT_SIDE = 128  # colours of a GIF are chosen from so many pixels squared: from a million it takes a second
NEAREST = Image.Resampling.NEAREST


class SequenceOptions(NamedTuple):
    """How a sequence is encoded.

    Attributes:
        format: Of the file; png is a strip, the others are animations.
        scale: Every pixel becomes scale × scale pixels.
        duration_ms: Of the whole animation.
    """

    format: SequenceFormat
    scale: int
    duration_ms: int


def sequence_size(options: SequenceOptions, count: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of the file's picture, for `count` images of this height and width."""
    return height * options.scale, width * options.scale * (count if options.format == "png" else 1)


def encode_sequence(images: UInt8, options: SequenceOptions, check: Check = bool) -> bytes:
    """Encode images, uint8 (n, h, w, c) with n ≥ 2, in this order."""
    if options.format == "png":
        return encode_picture(lay_out(images, RenderOptions("png", len(images), options.scale)), "png", check)
    out, first = CheckedFile(check), next(iter(_Frames(images[:1], options, check)))
    shown: dict[str, Any] = {
        "save_all": True,
        "append_images": _Frames(images[1:], options, check),
        "duration": _durations(options, len(images)),
        "loop": 0,
    }
    match options.format:
        case "gif":
            first.save(out, "gif", **shown)
        case "webp":
            first.save(out, "webp", lossless=True, quality=20, method=1, **shown)
        case "apng":
            first.save(out, "png", compress_level=1, **shown)
    return out.getvalue()


class _Frames:
    """The images of an animation, made as Pillow takes them; it goes through those of an APNG twice."""

    def __init__(self, images: UInt8, options: SequenceOptions, check: Check) -> None:
        self._images, self._options, self._check = images, options, check

    def __iter__(self) -> Iterator[Image.Image]:
        for image in self._images:
            self._check()
            frame = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
            if self._options.format == "gif" and frame.mode == "RGB":
                frame = _with_palette(frame)
            frame = frame.resize((frame.width * self._options.scale, frame.height * self._options.scale), NEAREST)
            # Those of a WebP are made in a moment, then encoded without a write: Pillow seeks each just before it does.
            frame.seek = self._seek  # type: ignore[method-assign]
            yield frame

    def _seek(self, frame: int) -> None:
        self._check()
        if frame:
            raise EOFError


def _with_palette(image: Image.Image) -> Image.Image:
    """An image in colour with the 256 colours that suit it best, chosen from some of its pixels if there are many."""
    if image.width * image.height <= CUT_SIDE**2:
        return image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    some = image.resize((min(image.width, CUT_SIDE), min(image.height, CUT_SIDE)), NEAREST)
    colours = some.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return image.quantize(palette=colours, dither=Image.Dither.NONE)


def _durations(options: SequenceOptions, count: int) -> list[int]:
    """Milliseconds of each image, all together the whole duration. GIF counts in hundredths of a second."""
    unit_ms = 10 if options.format == "gif" else 1
    ends = np.round(np.linspace(0, options.duration_ms / unit_ms, count + 1)).astype(int)
    return [int(unit_ms * units) for units in np.diff(ends)]
