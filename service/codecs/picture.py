"""Decodes one image file and brings it into a bundle's shape.

Small files are decoded on the event loop, others in a decoder process (decoder.py). To keep that process small and
quick to start, this module imports little.
"""

import io
import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.images.image_file import BROKEN, ImageFile
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
    """The shape that an image is brought into, and `max_pixels`, the most that it may have before."""

    height: int
    width: int
    channels: int
    max_pixels: int


class Decoded(NamedTuple):
    """One uploaded image in a bundle's shape.

    Attributes:
        pixels: uint8 (h, w, c).
        converted: Whether its size or colour mode was changed.
    """

    pixels: NDArray[np.uint8]
    converted: bool


def decode_picture(file: ImageFile, shape: Shape) -> Decoded:
    """Decode a file; of an animation, the first frame.

    Raises:
        Invalid: It can't be decoded.
        TooLarge: It has too many pixels.
    """
    check_pixels(file.width, file.height, shape.max_pixels)
    try:
        with _open(file) as picture:
            if picture.size != (
                file.width,
                file.height,
            ):  # our own parser found another size, so its cost was misjudged
                raise Invalid(BROKEN)  # noqa: TRY301 - handled like a decoder's own errors
            picture.load()
            method = _UPRIGHT.get(file.orientation)
            return _fit(picture if method is None else picture.transpose(method), shape)
    except ServiceError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"The image has far more than {shape.max_pixels} pixels.") from None
    except MemoryError:
        raise Invalid("Decoding the image takes too much memory.") from None
    except Exception as error:  # decoders raise nearly any error on broken or hostile bytes
        if not isinstance(error, UnidentifiedImageError):
            log.debug("undecodable image", exc_info=error)
        raise Invalid(BROKEN) from None


def _open(file: ImageFile) -> Image.Image:
    if file.format in {"L", "RGB"}:
        return Image.frombytes(file.format, (file.width, file.height), file.data)
    return Image.open(io.BytesIO(file.data), formats=[file.format])


def check_pixels(width: int, height: int, most: int) -> None:
    """Check an image's size before it is decoded.

    Raises:
        TooLarge: It has more than `most` pixels.
    """
    if width * height > most:
        raise TooLarge(f"The image has {width}×{height} pixels; the most is {most}.")


def _fit(picture: Image.Image, shape: Shape) -> Decoded:
    """Convert a loaded picture to the bundle's colour mode and size. One that has both keeps its pixels."""
    mode = "L" if shape.channels == 1 else "RGB"
    size = (shape.width, shape.height)
    fitted = picture if picture.mode == mode else _opaque(picture).convert(mode)
    if fitted.size != size:
        fitted = fitted.resize(size, Image.Resampling.BILINEAR)  # averages when shrinking, and never overshoots
    pixels = np.asarray(fitted, dtype=np.uint8).reshape(shape.height, shape.width, shape.channels)
    return Decoded(pixels, converted=picture.mode != mode or picture.size != size)


def _opaque(picture: Image.Image) -> Image.Image:
    """Convert to 8 bits a channel, and replace transparency by black, the background of most training images."""
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scale
        grey = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    if picture.has_transparency_data:
        with_alpha = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), with_alpha)
    return picture
