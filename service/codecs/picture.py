"""Decodes one image file and brings it into a bundle's shape.

On the event loop for small files, in a process of its own for others (decoder.py), which has little else in it: so this
imports nothing that takes long.
"""

import io
import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from service.codecs.image_file import ImageFile, broken
from service.errors import Invalid, ServiceError, TooLarge

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What an image becomes, and how many pixels it may have before."""

    height: int
    width: int
    channels: int
    max_pixels: int


class Decoded(NamedTuple):
    """One uploaded image in a bundle's shape.

    Attributes:
        pixels: uint8 (h, w, c).
        converted: Whether size or colour had to be changed to get there.
    """

    pixels: NDArray[np.uint8]
    converted: bool


def decode_picture(file: ImageFile, shape: Shape) -> Decoded:
    """A file's first picture in the bundle's shape.

    Raises:
        Invalid: It can't be decoded.
        TooLarge: It has too many pixels.
    """
    check_pixels(file.width, file.height, shape.max_pixels)
    try:
        with _open(file) as picture:
            if picture.size != (file.width, file.height):  # by which it was told what it costs
                raise broken()  # noqa: TRY301 - as a decoder would
            picture.load()  # of an animation, the first frame
            method = _UPRIGHT.get(file.orientation)
            return _fit(picture if method is None else picture.transpose(method), shape)
    except ServiceError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"The image has far more than {shape.max_pixels} pixels.") from None
    except MemoryError:
        raise Invalid("Decoding the image takes too much memory.") from None
    except Exception as error:  # decoders raise nearly anything on broken or hostile bytes
        if not isinstance(error, UnidentifiedImageError):
            log.debug("undecodable image", exc_info=error)
        raise broken() from None


def _open(file: ImageFile) -> Image.Image:
    if file.format in {"L", "RGB"}:
        return Image.frombytes(file.format, (file.width, file.height), file.content)
    return Image.open(io.BytesIO(file.content), formats=[file.format])


def check_pixels(width: int, height: int, most: int) -> None:
    """Return where an image is no larger than this.

    Raises:
        TooLarge: It is.
    """
    if width * height > most:
        raise TooLarge(f"The image has {width}×{height} pixels; the most is {most}.")


def _fit(picture: Image.Image, shape: Shape) -> Decoded:
    """A loaded picture in the bundle's mode and size; a picture that has them already keeps its pixels."""
    mode = "L" if shape.channels == 1 else "RGB"
    size = (shape.width, shape.height)
    fitted = picture if picture.mode == mode else _opaque(picture).convert(mode)
    if fitted.size != size:
        fitted = fitted.resize(size, Image.Resampling.BILINEAR)  # averages when it shrinks, and never overshoots
    pixels = np.asarray(fitted, dtype=np.uint8).reshape(shape.height, shape.width, shape.channels)
    return Decoded(pixels, converted=picture.mode != mode or picture.size != size)


def _opaque(picture: Image.Image) -> Image.Image:
    """A picture of 8 bits a channel without transparency: what shines through is black, like these images' ground."""
    if picture.mode.startswith("I"):  # 16 bits of grey, whose conversion by Pillow would only clip
        grey = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), with_alpha)
    return picture
