"""Makes of a decoded image what a net sees: upright, over its background, grey or RGB, cut and resized.

Training and serving both call `prepare`, so a training image that is uploaded is judged as the very pixels that D saw.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps

Fit = Literal["crop", "pad", "squeeze"]
Resampling = Literal["lanczos", "bilinear"]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COMPARED_PIXELS = 2**16  # at a time, to see whether they are grey


@dataclass(frozen=True)
class Preparation:
    """How a bundle's training images were made of their files, as its manifest records it.

    Attributes:
        fit: What becomes of an image of another shape: `crop` cuts out the middle, `pad` lays bars of the background
            beside it, `squeeze` distorts it.
        background: What shows where an image is transparent or padded: #rrggbb.
        resampling: The filter, as Pillow names it; it averages when it shrinks.
        orientation: `exif`: an image is turned upright by EXIF's orientation tag, and by nothing else.
        colour: What the images have become: `grey` (ITU-R 601 luma) or `rgb`; None before a data set has been read.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    fit: Fit = "crop"
    background: str = "#ffffff"
    resampling: Resampling = "lanczos"
    orientation: Literal["exif"] = "exif"
    colour: Literal["grey", "rgb"] | None = None

    def __post_init__(self) -> None:
        """Check the background, which a manifest may have from anyone."""
        if not re.fullmatch("#[0-9a-f]{6}", self.background):
            raise ValueError(f"the background must be #rrggbb, not {self.background[:40]!r}")


UNDECLARED = Preparation(fit="squeeze", background="#000000", resampling="bilinear")  # of bundles without a preparation


def prepare(
    picture: Image.Image,
    orientation: int,
    preparation: Preparation,
    size: tuple[int, int] | None,
    channels: int | None,
) -> Image.Image:
    """The image in mode L, RGB or RGBA and of one size.

    Args:
        picture: Loaded, in any mode.
        orientation: EXIF's, 1 … 8.
        preparation: What is done to it.
        size: (width, height) of the result; None keeps the image's own.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA, still transparent); None: 1 if each of its pixels is exactly grey.

    Raises:
        ValueError: Its pixels have no fixed range, or no known colours.
    """
    method = _UPRIGHT.get(orientation)
    upright = picture if method is None else picture.transpose(method)
    if channels == 4:
        plain = upright.convert("RGBA")
        return plain if size in {None, plain.size} else plain.resize(size or plain.size, Image.Resampling.BILINEAR)
    plain = _opaque(upright, preparation.background)
    plain = _grey_or_rgb(plain) if channels is None else plain.convert("L" if channels == 1 else "RGB")
    if size is None or size == plain.size:
        return plain
    if preparation.fit == "pad" and channels is None and plain.mode == "L":
        return _grey_or_rgb(_fit(plain.convert("RGB"), size, preparation))  # the bars may be coloured
    return _fit(plain, size, preparation)


def _opaque(picture: Image.Image, background: str) -> Image.Image:
    """With 8 bits a channel, and the background where it was transparent; in any mode that has colours."""
    if picture.mode.startswith("I;16"):
        picture = _eight_bits(picture)
    if picture.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {picture.mode}) have no fixed range: save it with 8 or 16 bits")
    if not picture.has_transparency_data:
        return picture
    ground = Image.new("RGBA", picture.size, background)
    return Image.alpha_composite(ground, picture.convert("RGBA"))


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Of a 16-bit grey image; Pillow would clip it at 255."""
    values = np.asarray(picture)
    grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    key = picture.info.get("transparency")
    if isinstance(key, int):  # the value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _grey_or_rgb(picture: Image.Image) -> Image.Image:
    """In mode L where all pixels are exactly grey, whatever the mode was; else in RGB."""
    if picture.mode in {"1", "L"}:
        return picture.convert("L")
    rgb = picture.convert("RGB")
    return rgb.getchannel(0) if _is_grey(rgb) else rgb


def _is_grey(picture: Image.Image) -> bool:
    """Whether the channels of an RGB image are the same. Of most colour images, only the first rows are looked at."""
    rows = max(1, _COMPARED_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        part = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        red, green, blue = (channel.tobytes() for channel in part.split())
        if not red == green == blue:
            return False
    return True


def _fit(picture: Image.Image, size: tuple[int, int], preparation: Preparation) -> Image.Image:
    """An image in mode L or RGB, of this size."""
    resampling = Image.Resampling[preparation.resampling.upper()]
    if preparation.fit == "crop":
        return ImageOps.fit(picture, size, resampling)
    if preparation.fit == "squeeze":
        return picture.resize(size, resampling)
    scale = min(size[0] / picture.width, size[1] / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    padded = Image.new(picture.mode, size, preparation.background)
    padded.paste(picture.resize((width, height), resampling), ((size[0] - width) // 2, (size[1] - height) // 2))
    return padded
