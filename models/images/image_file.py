"""Parses an image file and removes everything that its pixels do not need, before a decoder sees it.

Decoders read every part of a file, and some take time that grows with the square of parts that are no pixels: text,
profiles, EXIF, empty segments, fill bytes. So the parsers here step from segment (JPEG) or chunk (PNG, WebP) to the
next by their lengths. They keep pixels, palette, transparency, and what defines a JPEG's colours; they read the size
and the orientation, and leave out the rest. The time to decode what is left can be estimated from its pixels, and from
how often each is visited.
"""

import re
from collections.abc import Generator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Steps = Generator[None, Any, T]  # returns T; yields where others may have their turn, after well under a millisecond

BROKEN = "The image is broken or cut short."
MAX_SEGMENTS = 10_000  # of a file up to 40 MB; of a larger one, as many for each byte
_PNG, _JPEG, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"
# A file within these limits is decoded on the event loop, if the codec's time is bounded by the size.
QUICK_BYTES, QUICK_PIXELS, QUICK_SEGMENTS = 2**14, 2**16, 64
PAUSE_SEGMENTS, _PAUSE_BYTES = 64, 2**16  # parsed in one step
# Rough cost of a pixel, relative to other codecs.
_RUN_LENGTH, _LOSSLESS_WEBP, _ARITHMETIC = 50, 4, 10
ORIENTATION, _MAX_TAGS = 0x112, 512

_NO_FILL = re.compile(rb"[^\xff]")
_END_OF_SCAN = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # a marker that is neither a stuffed byte nor a restart nor fill
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 … SOF15
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # a stuffed byte, TEM, restart markers, start of image
# Segments that are kept: tables, frame, number of lines, restart interval and scans.
_KEPT_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SCAN, *_FRAMES})
# Of the application segments, two define the colours. All that does not is left out: it may be odd.
_COLOUR_SEGMENTS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_JFIF, _ADOBE_BYTES = b"JFIF\0\1\1\0\0\1\0\1\0\0", 12
_KEPT_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_KEPT_WEBP = frozenset({b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"})


class ImageFileError(ValueError):
    """The file can't be decoded; the message is for whoever made it."""


class ImageFile(NamedTuple):
    """An image file reduced to what its pixels need.

    Attributes:
        format: PNG, JPEG, WEBP or BMP; or L or RGB for raw pixels without a file format.
        pieces: The file's bytes in order, mostly views of the whole file.
        width, height: In pixels, from the header, before the orientation is applied.
        orientation: EXIF's, 1 … 8; 1 is upright.
        cost: Estimated time to decode, in units of one pixel of the fastest codec.
        is_quick: Whether decoding surely takes no longer than a millisecond or two.
    """

    format: str
    pieces: Sequence[bytes | memoryview]
    width: int
    height: int
    orientation: int
    cost: int
    is_quick: bool

    @property
    def data(self) -> bytes:
        """The file's bytes."""
        return b"".join(self.pieces)


def parse_image_file(file: bytes | bytearray) -> Steps[ImageFile]:
    """Recognize the format by the first bytes, parse the file, and keep only what its pixels need.

    Raises:
        ImageFileError: It is not a PNG, JPEG, WebP or BMP, or has too many segments or chunks.
    """
    if file.startswith(_PNG):
        return (yield from _parse_png(file))
    if file.startswith(_JPEG):
        return (yield from _parse_jpeg(file))
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return (yield from _parse_webp(file))
    if file.startswith(_BMP):
        return _parse_bmp(file)
    raise ImageFileError("The image is not PNG, JPEG, WebP or BMP.")


def is_parsed(file: bytes) -> bool:
    """Whether a file is of a format that `parse_image_file` knows, by its first bytes."""
    return file.startswith((_PNG, _JPEG, _BMP)) or (file[:4] == b"RIFF" and file[8:12] == b"WEBP")


def run_through(steps: Steps[T]) -> T:
    """Take all steps without a pause and return their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


class Segments:
    """Counts the segments of a file that were visited, and collects those that are kept."""

    def __init__(self, head: bytes | bytearray, length: int) -> None:
        self.kept: list[bytes | memoryview] = [memoryview(head)]
        self.visited = 0
        self._most = max(MAX_SEGMENTS, length // 4096)

    def visit(self) -> bool:
        """Count one more segment. Returns True when it is time for a pause."""
        self.visited += 1
        if self.visited > self._most:
            raise ImageFileError(f"The image file has more than {self._most} segments.")
        return self.visited % PAUSE_SEGMENTS == 0

    def image(
        self, form: str, size: tuple[int, int], orientation: int, *, pixel_cost: int, is_bounded: bool
    ) -> ImageFile:
        """The file that the kept segments make.

        `pixel_cost` is relative to the fastest codec; `is_bounded` says that the codec's time is bounded by the size.
        """
        length, pixels = sum(map(len, self.kept)), size[0] * size[1]
        is_small = length <= QUICK_BYTES and pixels <= QUICK_PIXELS and len(self.kept) <= QUICK_SEGMENTS
        cost = length + pixels * pixel_cost
        return ImageFile(form, self.kept, *size, orientation, cost, is_quick=is_small and is_bounded)


def _parse_png(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, seen, view = Segments(file[:8], len(file)), set[bytes](), memoryview(file)
    width, height, orientation, at = 0, 0, 1, 8
    while at + 8 <= len(file):
        if segments.visit():
            yield None
        kind, start = bytes(file[at + 4 : at + 8]), at + 8
        end = start + int.from_bytes(file[at : at + 4], "big")
        if kind in _KEPT_CHUNKS and (kind == b"IDAT" or kind not in seen):
            segments.kept.append(view[at : end + 4])  # with its checksum
        if kind == b"IHDR" and kind not in seen:
            width, height = (int.from_bytes(file[place : place + 4], "big") for place in (start, start + 4))
        elif kind == b"eXIf" and kind not in seen:
            orientation = orientation_of(view[start:end])
        elif kind == b"IEND":
            break
        seen.add(kind)
        at = end + 4
    return segments.image("PNG", (width, height), orientation, pixel_cost=1, is_bounded=True)


def _parse_jpeg(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, view = Segments(file[:2], len(file)), memoryview(file)
    width = height = scans = 0
    frame, orientation, at = 0, 0, 2
    while (at := file.find(b"\xff", at)) >= 0:
        if segments.visit():
            yield None
        at = yield from _search(_NO_FILL, file, at)
        if at >= len(file) or file[at] == _END:
            segments.kept.append(view[at - 1 : at + 1])
            break
        code, start = file[at], at + 1
        if code in _WITHOUT_LENGTH:
            at = start
            continue
        end = start + int.from_bytes(file[start : start + 2], "big")
        if end < start + 2:
            raise ImageFileError(BROKEN)
        end = min(end, len(file))
        if code == _SCAN:
            scans += 1
            end = yield from _search(_END_OF_SCAN, file, end)
        elif code in _FRAMES and not frame:
            frame = code
            height, width = (int.from_bytes(file[place : place + 2], "big") for place in (start + 3, start + 5))
        elif code == _EXIF and not orientation and file.startswith(b"Exif\0\0", start + 2):
            orientation = orientation_of(view[start + 2 : end])
        if kept := _kept_segment(code, view[at - 1 : end]):
            segments.kept.append(kept)
        at = end
    is_arithmetic = frame >= 0xC9
    return segments.image(
        "JPEG",
        (width, height),
        orientation or 1,
        pixel_cost=max(1, scans) * (_ARITHMETIC if is_arithmetic else 1),
        is_bounded=frame in {0xC0, 0xC1} and scans <= 1,
    )


def _kept_segment(code: int, segment: "memoryview[int]") -> "bytes | memoryview[int]":
    """What is kept of a segment: all, nothing, or of JFIF's and Adobe's what defines the colours."""
    if code in _KEPT_SEGMENTS:
        return segment
    data = segment[4:]
    if code not in _COLOUR_SEGMENTS or bytes(data[:5]) != _COLOUR_SEGMENTS[code]:
        return b""
    kept = _JFIF if code == 0xE0 else bytes(data[:_ADOBE_BYTES])
    is_whole = len(data) >= len(kept) >= _ADOBE_BYTES  # too short, decoders do not know it
    return bytes([0xFF, code, 0, 2 + len(kept)]) + kept if is_whole else b""


def _parse_webp(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, seen, view = Segments(b"RIFF????WEBP", len(file)), set[bytes](), memoryview(file)
    size, orientation, at, is_lossy = (0, 0), 1, 12, True
    while at + 8 <= len(file):
        if segments.visit():
            yield None
        kind, start = bytes(file[at : at + 4]), at + 8
        end = start + int.from_bytes(file[at + 4 : start], "little")
        if kind == b"EXIF" and kind not in seen:
            orientation = orientation_of(view[start:end])
        elif kind in _KEPT_WEBP and kind not in seen:  # of an animation, only the first frame
            segments.kept.append(view[at : end + end % 2])
            if kind == b"VP8X":  # clear its flags for profile, EXIF and XMP, which are removed
                flags = bytes(flag & 0xD3 for flag in file[start : start + 1])
                segments.kept[-1:] = view[at:start], flags, view[start + 1 : end + end % 2]
            width, height = _webp_size(kind, file[start : start + 12])
            size = max(size[0], width), max(size[1], height)
            is_lossy = is_lossy and kind in {b"VP8 ", b"VP8X"}
        seen.add(kind)
        at = end + end % 2
    segments.kept[0] = b"RIFF%bWEBP" % (sum(map(len, segments.kept)) - 8).to_bytes(4, "little")
    pixel_cost = 1 if is_lossy else _LOSSLESS_WEBP
    return segments.image("WEBP", size, orientation, pixel_cost=pixel_cost, is_bounded=is_lossy)


def _webp_size(kind: bytes, data: bytes | bytearray) -> tuple[int, int]:
    """(width, height) from a chunk's first bytes; (0, 0) for a chunk that does not hold them."""

    def number(start: int, stop: int) -> int:
        return int.from_bytes(data[start:stop], "little")

    match kind:
        case b"VP8X":
            return 1 + number(4, 7), 1 + number(7, 10)
        case b"ANMF":
            return 1 + number(6, 9), 1 + number(9, 12)
        case b"VP8 ":
            return number(6, 8) & 0x3FFF, number(8, 10) & 0x3FFF
        case b"VP8L":
            return 1 + (number(1, 5) & 0x3FFF), 1 + (number(1, 5) >> 14 & 0x3FFF)
        case _:
            return 0, 0


def _parse_bmp(file: bytes | bytearray) -> ImageFile:
    segments = Segments(file, len(file))  # BMP has no segments: all of the file is kept
    if file[14:18] == b"\x0c\0\0\0":  # the 12-byte header of OS/2
        width, height, compression = int.from_bytes(file[18:20], "little"), int.from_bytes(file[20:22], "little"), 0
    else:
        width = int.from_bytes(file[18:22], "little")
        height = abs(int.from_bytes(file[22:26], "little", signed=True))  # negative where rows go from top to bottom
        compression = int.from_bytes(file[30:34], "little")
    is_run_length = compression in {1, 2}  # Pillow decodes these in Python
    pixel_cost = _RUN_LENGTH if is_run_length else 1
    return segments.image("BMP", (width, height), 1, pixel_cost=pixel_cost, is_bounded=not is_run_length)


def _search(pattern: re.Pattern[bytes], file: bytes | bytearray, start: int) -> Steps[int]:
    """Position of the first match; the file's length if there is none."""
    for begin in range(start, len(file), _PAUSE_BYTES):
        if begin > start:
            yield None
        if found := pattern.search(file, begin, begin + _PAUSE_BYTES + 1):  # one byte more: a match may span two pieces
            return found.start()
    return len(file)


def orientation_of(exif: "memoryview[int]") -> int:
    """The orientation in EXIF's first directory; 1, upright, if it is missing or out of range."""
    if bytes(exif[:6]) == b"Exif\0\0":
        exif = exif[6:]
    order: Literal["little", "big"] = "little" if bytes(exif[:2]) == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)

    directory = number(4, 4)
    for tag in range(min(number(directory, 2), _MAX_TAGS)):
        entry = directory + 2 + 12 * tag
        if number(entry, 2) == ORIENTATION:
            value = number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)  # the standard says SHORT; some write LONG
            return value if 1 <= value <= 8 else 1
    return 1
