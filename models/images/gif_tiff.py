"""The parsers of image_file.py for two more formats, which only training reads.

Without them a file of a few MB can hold Pillow for hours by its comments (GIF), or fill the memory by its tags (TIFF),
and a tag about the camera can keep a TIFF from being read at all.
"""

from typing import Literal

from models.images.image_file import (
    BROKEN,
    ORIENTATION,
    PAUSE_SEGMENTS,
    ImageFile,
    ImageFileError,
    Segments,
    Steps,
    orientation_of,
)

_IMAGE, _EXTENSION, _GRAPHIC_CONTROL, _END = 0x2C, 0x21, 0xF9, 0x3B  # GIF's blocks
# The tags that pixels need: size, kind, bits, compression, photometric interpretation; strips; planes, T.4 and T.6
# options; predictor, colour map; tiles; inks; extra samples and the samples' format; JPEG's tables; YCbCr.
_NEEDED_TAGS = frozenset(
    {
        *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 318, 319, 320),
        *(322, 323, 324, 325, 332, 338, 339, 347, 529, 530, 531, 532),
    }
)
_OLD_JPEG_TAGS = frozenset(range(512, 522))  # those of compression 6
_WIDTH, _HEIGHT, _COMPRESSION = 256, 257, 259
_TYPE_BYTES = {1: 1, 3: 2, 4: 4, 16: 8}  # of TIFF's unsigned integers
_MAX_TAGS, _MAX_VALUES = 4096, 2**20  # of a directory; of a tag
_TYPICAL_COST = 2  # of a pixel, relative to the fastest codec


def parse_gif(file: bytes) -> Steps[ImageFile]:
    """Keep the first frame, its palette and its transparency.

    Raises:
        ImageFileError: There is no frame, or far too many other blocks.
    """
    at = 13 + _palette_bytes(file, 10)
    segments, view = Segments(file[:at], len(file)), memoryview(file)
    width, height = _number(file, 6), _number(file, 8)
    control = b""
    while at < len(file) and file[at] != _END:
        if segments.visit():
            yield None
        if file[at] == _IMAGE:
            end = yield from _after_blocks(file, at + 11 + _palette_bytes(file, at + 9))
            segments.kept += control, view[at:end], bytes([_END])
            width = max(width, _number(file, at + 1) + _number(file, at + 5))
            height = max(height, _number(file, at + 3) + _number(file, at + 7))
            return segments.image("GIF", (width, height), 1, pixel_cost=_TYPICAL_COST, is_bounded=False)
        if file[at] == _EXTENSION:
            end = yield from _after_blocks(file, at + 2)
            if file[at + 1 : at + 3] == bytes([_GRAPHIC_CONTROL, 4]):
                control = bytes(view[at : at + 7]) + b"\0"
            at = end
        else:
            at += 1
    raise ImageFileError(BROKEN)


def _palette_bytes(file: bytes, flags_at: int) -> int:
    flags = int.from_bytes(file[flags_at : flags_at + 1])
    return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


def _number(file: bytes, at: int) -> int:
    return int.from_bytes(file[at : at + 2], "little")


def _after_blocks(file: bytes, at: int) -> Steps[int]:
    """The position after GIF's sub-blocks, the last of which is empty."""
    count = 0
    while at < len(file) and file[at]:
        at += 1 + file[at]
        count += 1
        if count % PAUSE_SEGMENTS == 0:
            yield None
    return min(at + 1, len(file))


def parse_tiff(file: bytes) -> Steps[ImageFile]:
    """Leave in the first directory what pixels need. All else of the file stays where it is.

    Raises:
        ImageFileError: The directory is not within the file, or has far too many tags or values.
    """
    order: Literal["little", "big"] = "little" if file.startswith(b"II") else "big"
    is_big = 43 in file[2:4]
    word, entry_bytes, count_bytes = (8, 20, 8) if is_big else (4, 12, 2)

    def number(start: int, size: int) -> int:
        return int.from_bytes(file[start : start + size], order)

    directory = number(8 if is_big else 4, word)
    first, count = directory + count_bytes, number(directory, count_bytes)
    end = first + count * entry_bytes + word
    if end > len(file) or count > _MAX_TAGS:
        raise ImageFileError(BROKEN)
    segments, view = Segments(b"", len(file)), memoryview(file)
    entries: dict[int, bytes] = {}
    found, orientation = {_WIDTH: 0, _HEIGHT: 0, _COMPRESSION: 0}, b""
    for at in range(first, end - word, entry_bytes):
        if segments.visit():
            yield None
        tag, kind, values = number(at, 2), number(at + 2, 2), number(at + 4, word)
        is_needed = tag in _NEEDED_TAGS or (tag in _OLD_JPEG_TAGS and found[_COMPRESSION] == 6)
        if is_needed and tag not in entries:
            if values > _MAX_VALUES and kind in {3, 4, 13, 16}:
                raise ImageFileError(BROKEN)
            entries[tag] = bytes(view[at : at + entry_bytes])
            if tag in found:
                found[tag] = number(at + 4 + word, _TYPE_BYTES.get(kind, 0))
        elif tag == ORIENTATION and not orientation:
            value = bytes(view[at + 4 + word : at + 8 + word])
            orientation = bytes(view[at : at + 4]) + (1).to_bytes(4, order) + value
    needed = len(entries).to_bytes(count_bytes, order) + b"".join(entries.values()) + bytes(word)
    segments.kept += view[:directory], needed, view[directory + len(needed) :]
    upright = _orientation_in(orientation, order)
    return segments.image("TIFF", (found[_WIDTH], found[_HEIGHT]), upright, pixel_cost=_TYPICAL_COST, is_bounded=False)


def _orientation_in(entry: bytes, order: Literal["little", "big"]) -> int:
    """The orientation in a directory's entry, read as EXIF's."""
    head = b"II*\0" if order == "little" else b"MM\0*"
    directory = (8).to_bytes(4, order) + (len(entry) // 12).to_bytes(2, order)
    return orientation_of(memoryview(head + directory + entry))
