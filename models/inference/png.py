"""Writes PNGs fast, grey ones without Pillow, around one call of zlib-ng; and chunks of any PNG."""

import io
import struct
from functools import lru_cache
from typing import IO

import numpy as np
from PIL import Image
from zlib_ng import zlib_ng

from models.inference.pixels import UInt8

HEAD_BYTES = 33  # signature and IHDR, with which every PNG begins


def fast_png(image: UInt8) -> bytes:
    """One image (h, w, c) as the PNG that the service gives."""
    if image.shape[2] == 1:
        return grey_png(image)
    write_colour_png(Image.fromarray(image), out := io.BytesIO())
    return out.getvalue()


def write_colour_png(picture: Image.Image, file: IO[bytes]) -> None:
    """A picture in colour, at level 1: higher levels take ten times as long and save little on noise-like pixels."""
    picture.save(file, "png", compress_level=1)


def grey_png(image: UInt8) -> bytes:
    """One image (h, w, 1) as a PNG of one IDAT chunk with unfiltered rows (PNG specification, 9.2: filter type 0)."""
    height, width, _ = image.shape
    lines = np.zeros((height, 1 + width), np.uint8)  # each row begins with its filter type, 0
    lines[:, 1:] = image[:, :, 0]
    return b"".join([_head(height, width), chunk(b"IDAT", zlib_ng.compress(lines, 1)), _END])


@lru_cache
def _head(height: int, width: int) -> bytes:
    """Signature and IHDR of a grey PNG with 8 bits a pixel."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    checksum = zlib_ng.crc32(data, zlib_ng.crc32(kind))
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", checksum)])


_END = chunk(b"IEND", b"")
