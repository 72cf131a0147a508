"""Decodes one image file and prepares it as the bundle's training images were.

Small files are decoded on the event loop, others in a decoder process (decoder.py). To keep that process small and
quick to start, this module imports little.
"""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.images.decoding import decode
from models.images.image_file import BROKEN, ImageFile
from models.images.preparation import UNDECLARED, Preparation, prepare
from service.errors import Invalid, TooLarge

log = logging.getLogger(__name__)


class Shape(NamedTuple):
    """The shape that an image is brought into, `max_pixels`, the most that it may have before, and how it is done."""

    height: int
    width: int
    channels: int
    max_pixels: int
    preparation: Preparation = UNDECLARED


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
        with decode(file) as picture:
            return _prepared(picture, file.orientation, shape)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"The image has far more than {shape.max_pixels} pixels.") from None
    except MemoryError:
        raise Invalid("Decoding the image takes too much memory.") from None
    except Exception as error:  # decoders raise nearly any error on broken or hostile bytes
        if not isinstance(error, UnidentifiedImageError):
            log.debug("undecodable image", exc_info=error)
        raise Invalid(BROKEN) from None


def check_pixels(width: int, height: int, most: int) -> None:
    """Check an image's size before it is decoded.

    Raises:
        TooLarge: It has more than `most` pixels.
    """
    if width * height > most:
        raise TooLarge(f"The image has {width}×{height} pixels; the most is {most}.")


def _prepared(picture: Image.Image, orientation: int, shape: Shape) -> Decoded:
    """Bring a loaded picture into the bundle's shape. One that has it already keeps its pixels."""
    mode, size = {1: "L", 3: "RGB", 4: "RGBA"}[shape.channels], (shape.width, shape.height)
    if shape.preparation == UNDECLARED and picture.mode in {mode, "I;16"}:
        picture.info.pop("transparency", None)  # bundles of that time judge a transparent colour as any other
    fitted = prepare(picture, orientation, shape.preparation, size, shape.channels)
    was_upright_size = picture.size[::-1] if orientation >= 5 else picture.size
    is_composed = picture.has_transparency_data and mode != "RGBA"
    converted = picture.mode != mode or was_upright_size != size or is_composed
    pixels = np.asarray(fitted, dtype=np.uint8).reshape(shape.height, shape.width, shape.channels)
    return Decoded(pixels, converted)
