"""Writes grey PNGs without Pillow, around one call of zlib-ng, and chunks of any PNG."""

import struct
from functools import lru_cache

import numpy as np
from zlib_ng import zlib_ng

from models.inference.pixels import UInt8

HEAD_BYTES = 33  # signature and IHDR, with which every PNG begins


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
