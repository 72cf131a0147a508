"""Encodes images in the formats of a reply.

With one build of the encoders the bytes depend on the images and the arguments alone: they hold no dates and no host
names. `ENCODERS` identifies the build, for cache validators.

Pillow writes all formats but grey PNGs, which most requests ask for. Those are assembled here around one call of
zlib-ng, in a fifth of Pillow's time for a 28×28 digit and for a large grid (benchmarks/serving/pieces.py).
"""

import base64
import io
import json
import math
import struct
import zipfile
from functools import lru_cache
from itertools import chain
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features  # noqa: F401 - imported now, so that the first request does not wait for it
from PIL import __version__ as pillow_version
from zlib_ng import zlib_ng

from models.inference.noise import Float32
from models.inference.pixels import UInt8, grid

Format = Literal["png", "webp", "jpeg", "json", "zip", "npy"]

# In order of preference, for clients that accept several equally.
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "json": "application/json",
    "zip": "application/zip",
    "npy": "application/x-npy",
}
# Formats that hold a single picture, with the longest side in pixels that each allows.
MAX_SIDE: dict[Format, int] = {"png": 2**31 - 1, "webp": 16383, "jpeg": 65500}

_VERSIONS = " ".join(
    [f"pillow-{pillow_version}", f"numpy-{np.__version__}", f"zlib-ng-{zlib_ng.ZLIBNG_VERSION}"]
    + [f"{name}-{features.version(name)}" for name in ("zlib", "libjpeg_turbo", "webp")]
    + ["json-2"]  # counts the changes to what our JSON says
)
# A constant date, so that the same request always gives the same archive. ZIP can express none earlier.
_NO_DATE = (1980, 1, 1, 0, 0, 0)


class RenderOptions(NamedTuple):
    """How images are laid out and encoded.

    Attributes:
        format: Of the file.
        columns: Images in each row of the grid, for formats that hold a single picture.
        scale: Every pixel becomes scale × scale pixels.
    """

    format: Format
    columns: int
    scale: int


class SampleMetadata(NamedTuple):
    """What images were drawn from; the JSON format says it beside them, latents only where there are some."""

    bundle: str
    version: str
    seed: int | None
    first_index: int | None
    labels: list[int] | None
    label_names: list[str] | None = None
    latents: Float32 | None = None


def picture_size(render: RenderOptions, count: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of the picture that holds `count` images of this height and width."""
    return math.ceil(count / render.columns) * height * render.scale, render.columns * width * render.scale


def encode(images: UInt8, render: RenderOptions, metadata: SampleMetadata) -> bytes:
    """Encode images, uint8 (n, h, w, c) with n ≥ 1, as the body of a reply."""
    scaled = images.repeat(render.scale, axis=1).repeat(render.scale, axis=2) if render.scale > 1 else images
    match render.format:
        case "png" | "webp" | "jpeg":
            return encode_picture(grid(scaled, render.columns) if len(scaled) > 1 else scaled[0], render.format)
        case "json":
            return _json(scaled, metadata)
        case "zip":
            return _zip(scaled)
        case "npy":
            return _npy(scaled)


def encode_picture(image: UInt8, form: Literal["png", "webp", "jpeg"]) -> bytes:
    """One image (h, w, c) as a file."""
    if form == "png" and image.shape[2] == 1:
        return _grey_png(image)
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    out = io.BytesIO()
    match form:
        case "png":  # level 1: higher levels take ten times as long and save little on noise-like pixels
            picture.save(out, "png", compress_level=1)
        case "webp":  # lossless, so that the pixels are exact; effort balances time and size
            picture.save(out, "webp", lossless=True, quality=20, method=1)
        case "jpeg":
            picture.save(out, "jpeg", quality=90)
    return out.getvalue()


def _grey_png(image: UInt8) -> bytes:
    """One image (h, w, 1) as a PNG of one IDAT chunk with unfiltered rows (PNG specification, 9.2: filter type 0)."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + width), np.uint8)  # each row begins with its filter type, 0
    lines[:, 1:] = image[:, :, 0]
    return b"".join([_png_head(height, width), _chunk(b"IDAT", zlib_ng.compress(lines, 1)), _PNG_END])


@lru_cache
def _png_head(height: int, width: int) -> bytes:
    """Signature and IHDR of a grey PNG with 8 bits a pixel."""
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib_ng.crc32(data, zlib_ng.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)])


_PNG_END = _chunk(b"IEND", b"")
# zlib-ng may compress differently on another processor, so a checksum of its output here is part of the build's name.
_SAMPLE = (np.arange(64 * 64) ** 2 % 251 % 17).astype(np.uint8).reshape(64, 64, 1)
ENCODERS = f"{_VERSIONS} png-{zlib_ng.crc32(_grey_png(_SAMPLE)):08x}"


def _json(images: UInt8, metadata: SampleMetadata) -> bytes:
    text = json.dumps(
        {
            "bundle": metadata.bundle,
            "version": metadata.version,
            "seed": metadata.seed,
            "first_index": metadata.first_index,
            "labels": metadata.labels,
            "label_names": metadata.label_names,
            "images": [base64.b64encode(encode_picture(image, "png")).decode() for image in images],
        }
    )
    if metadata.latents is not None:
        text = f'{text[:-1]}, "latents": {_rows_as_json(metadata.latents)}}}'
    return text.encode()


def _rows_as_json(rows: Float32) -> str:
    """An array (n, m) in the shortest decimals that give each float32 back."""
    numbers = rows.ravel()
    # NumPy keeps the interpreter for as long as it writes numbers: a thousand take it a millisecond.
    pieces = [numbers[start : start + 1024].astype(str).tolist() for start in range(0, numbers.size, 1024)]
    texts, dim = list(chain.from_iterable(pieces)), rows.shape[1]
    lines = [f"[{', '.join(texts[start : start + dim])}]" for start in range(0, len(texts), dim)]
    return f"[{', '.join(lines)}]"


def _zip(images: UInt8) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number, image in enumerate(images):
            archive.writestr(zipfile.ZipInfo(f"{number:06d}.png", _NO_DATE), encode_picture(image, "png"))
    return out.getvalue()


def _npy(images: UInt8) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(images), version=(1, 0), allow_pickle=False)
    return out.getvalue()
