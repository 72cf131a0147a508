"""Decodes an image file that a parser has reduced; and, for training, one of any format that Pillow knows."""

import io
from functools import cache

from PIL import Image, UnidentifiedImageError

from models.images.gif_tiff import parse_gif, parse_tiff
from models.images.image_file import (
    BROKEN,
    ImageFile,
    ImageFileError,
    Steps,
    is_parsed,
    orientation_of,
    parse_image_file,
    run_through,
)

# The raster formats that Pillow decodes by itself, as they are tried: last those that have no beginning of their own.
# Of the others that it knows, EPS starts a program, IPTC may hold an EPS, WMF is drawn by Windows alone, FPX and MIC
# need another package, and BUFR, GRIB, HDF5 and MPEG are recognised, no more.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO"),
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GBR", "ICNS", "ICO", "MSP", "PCX", "PIXAR", "PPM"),
    *("PSD", "QOI", "SGI", "SUN", "XBM", "XPM", "IM", "PCD", "TGA"),
)
# Of one image: some twenty seconds at worst, and twice as much as a progressive JPEG of 100 million pixels takes.
MAX_COST = 2**31
_PYTHON = 50  # cost of a byte or pixel of the files whose decoder is written in Python


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow opens: older ones lack AVIF."""
    Image.init()  # registers all that Pillow has; done lazily in threads, it can race and miss one
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(file: ImageFile) -> Image.Image:
    """The loaded image; of an animation, the first frame. It is not turned upright yet.

    Raises:
        ImageFileError: The decoder finds another size than the parser did, so that its cost was misjudged.
        Exception: Decoders raise nearly any error on broken or hostile bytes.
    """
    if file.format in {"L", "RGB"}:
        return Image.frombytes(file.format, (file.width, file.height), file.data)
    picture = Image.open(io.BytesIO(file.data), formats=[file.format])
    if picture.size != (file.width, file.height):
        raise ImageFileError(BROKEN)
    picture.load()
    return picture


def decode_any(content: bytes) -> tuple[Image.Image, int]:
    """A file of any raster format: its loaded image, or first frame, and its orientation.

    Whatever it holds beside pixels is not looked at, in PNG, JPEG, WebP, BMP, GIF and TIFF; of AVIF's EXIF, nothing.

    Raises:
        ImageFileError: It is broken, or would take minutes to decode.
        UnidentifiedImageError: It is no image, or of no format that Pillow decodes by itself.
        Exception: Decoders raise nearly any error on broken or hostile bytes.
    """
    file = _parsed(content)
    if file is None:
        picture = Image.open(io.BytesIO(_without_avif_exif(content)), formats=readable_formats())
        if _is_slow(picture) and (len(content) + picture.width * picture.height) * _PYTHON > MAX_COST:
            raise _too_long(*picture.size)
        picture.load()
        exif = picture.info.get("exif")
        return picture, orientation_of(memoryview(exif)) if isinstance(exif, bytes) else 1
    if file.cost > MAX_COST:
        raise _too_long(file.width, file.height)
    try:
        return decode(file), file.orientation
    except UnidentifiedImageError:
        raise ImageFileError(BROKEN) from None


def _is_slow(picture: Image.Image) -> bool:
    """Whether an image that was opened is decoded in Python, as are some kinds of PPM and DDS."""
    return any(tile[0] in Image.DECODERS for tile in getattr(picture, "tile", ()))


def _too_long(width: int, height: int) -> ImageFileError:
    return ImageFileError(f"{width}×{height} pixels of this kind take too long to decode.")


def _without_avif_exif(content: bytes) -> bytes:
    """An AVIF whose EXIF has a name that nobody knows: Pillow stumbles over broken ones, and AVIF turns by itself."""
    at = 0
    while content[4:8] == b"ftyp" and at + 8 <= len(content):
        end = at + max(8, int.from_bytes(content[at : at + 4]))
        if content[at + 4 : at + 8] == b"meta":
            return content[:at] + content[at:end].replace(b"Exif", b"none") + content[end:]
        at = end
    return content


def _parsed(content: bytes) -> ImageFile | None:
    """The file as its format's parser leaves it; None if there is none for its format."""
    steps: Steps[ImageFile]
    if content.startswith((b"GIF87a", b"GIF89a")):
        steps = parse_gif(content)
    elif content.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        steps = parse_tiff(content)
    elif is_parsed(content):
        steps = parse_image_file(content)
    else:
        return None
    return run_through(steps)
