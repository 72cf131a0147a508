"""Walks an uploaded image file and keeps what its pixels need, before any decoder sees it.

Decoders read every part of a file, and some take time that grows with the square of what is nobody's pixels: text,
profiles, EXIF, empty segments, fill bytes. So a file's segments (JPEG) or chunks (PNG, WebP) are visited by their
lengths, in steps; kept are those with pixels, palette, transparency, and what says how a JPEG's colours are meant; read
are the size and the orientation; all else is cut out. What then remains to be done can be told: so many pixels, so
often.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from service.codecs.time_slices import Steps
from service.errors import Invalid

MAX_SEGMENTS = 10_000
# Decoded at once where a file is as small as this, and in one go by a codec whose time its size bounds.
QUICK_BYTES, QUICK_PIXELS, QUICK_SEGMENTS = 2**14, 2**16, 64
_PAUSE_SEGMENTS, _PAUSE_BYTES = 64, 2**16  # between two steps
# How much longer than others these take for a pixel, and what may be slower than that, roughly.
_RUN_LENGTH, _LOSSLESS_WEBP, _ARITHMETIC = 50, 4, 10
_ORIENTATION, _MAX_TAGS = 0x112, 512

_NO_FILL = re.compile(rb"[^\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte nor a restart nor fill
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 … SOF15
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xD9)})  # a stuffed byte, TEM, restarts, the start
# Tables, the frame, its lines, restarts and scans; and of what applications may say, what colours mean. With how each
# begins.
_KEPT_SEGMENTS = {
    **dict.fromkeys({0xC4, 0xCC, 0xDB, 0xDC, 0xDD, _SCAN, *_FRAMES}, b""),
    0xE0: b"JFIF\0",
    0xEE: b"Adobe",
}
_KEPT_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_KEPT_WEBP = frozenset({b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"})


class ImageFile(NamedTuple):
    """An image file without what its pixels do not need.

    Attributes:
        format: PNG, JPEG, WEBP or BMP; or L or RGB, where the content is the pixels alone.
        pieces: The file, one after the other; views of the one that was uploaded.
        width, height: As it says itself, before it is turned.
        orientation: 1 … 8, as EXIF has it.
        cost: About how long it takes to decode, in pixels of the quickest.
        is_quick: Whether that is known to be under a millisecond or two.
    """

    format: str
    pieces: Sequence[bytes | memoryview]
    width: int
    height: int
    orientation: int
    cost: int
    is_quick: bool

    @property
    def content(self) -> bytes:
        """The file in one."""
        return b"".join(self.pieces)


def walk(file: bytes | bytearray) -> Steps[ImageFile]:
    """What of a file its pixels need.

    Raises:
        Invalid: It is no PNG, JPEG, WebP or BMP, or has over `MAX_SEGMENTS` segments or chunks.
    """
    if file.startswith(b"\x89PNG\r\n\x1a\n"):
        return (yield from _walk_png(file))
    if file.startswith(b"\xff\xd8\xff"):
        return (yield from _walk_jpeg(file))
    if file[:4] == b"RIFF" and file[8:12] == b"WEBP":
        return (yield from _walk_webp(file))
    if file.startswith(b"BM"):
        return _look_at_bmp(file)
    raise Invalid("The image is not PNG, JPEG, WebP or BMP.")


def broken() -> Invalid:
    """What is said of a file that can't be decoded."""
    return Invalid("The image is broken or cut short.")


class _Segments:
    """Those of a file that were visited, and those that are kept."""

    def __init__(self, head: bytes | bytearray) -> None:
        self.kept: list[bytes | memoryview] = [memoryview(head)]
        self.visited = 0

    def visit(self) -> bool:
        """Count one more; whether it is time for a pause."""
        self.visited += 1
        if self.visited > MAX_SEGMENTS:
            raise Invalid(f"The image file has more than {MAX_SEGMENTS} segments.")
        return self.visited % _PAUSE_SEGMENTS == 0

    def image(
        self, form: str, size: tuple[int, int], orientation: int, *, cost_of_pixel: int, is_bounded: bool
    ) -> ImageFile:
        """The file that they make."""
        length, pixels = sum(map(len, self.kept)), size[0] * size[1]
        is_small = length <= QUICK_BYTES and pixels <= QUICK_PIXELS and len(self.kept) <= QUICK_SEGMENTS
        cost = length + pixels * cost_of_pixel
        return ImageFile(form, self.kept, *size, orientation, cost, is_quick=is_small and is_bounded)


def _walk_png(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, seen, view = _Segments(file[:8]), set[bytes](), memoryview(file)
    width, height, orientation, at = 0, 0, 1, 8
    while at + 8 <= len(file):
        if segments.visit():
            yield None
        kind, start = bytes(file[at + 4 : at + 8]), at + 8
        end = start + int.from_bytes(file[at : at + 4], "big")
        if kind in _KEPT_CHUNKS and (kind == b"IDAT" or kind not in seen):
            segments.kept.append(view[at : end + 4])  # its checksum included
        if kind == b"IHDR" and kind not in seen:
            width, height = (int.from_bytes(file[place : place + 4], "big") for place in (start, start + 4))
        elif kind == b"eXIf" and kind not in seen:
            orientation = _orientation(view[start:end])
        elif kind == b"IEND":
            break
        seen.add(kind)
        at = end + 4
    return segments.image("PNG", (width, height), orientation, cost_of_pixel=1, is_bounded=True)


def _walk_jpeg(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, view = _Segments(file[:2]), memoryview(file)
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
            raise broken()
        if code == _SCAN:
            scans += 1
            end = yield from _search(_END_OF_SCAN, file, end)
        elif code in _FRAMES and not frame:
            frame = code
            height, width = (int.from_bytes(file[place : place + 2], "big") for place in (start + 3, start + 5))
        elif code == _EXIF and not orientation and file.startswith(b"Exif\0\0", start + 2):
            orientation = _orientation(view[start + 8 : end])
        if code in _KEPT_SEGMENTS and file.startswith(_KEPT_SEGMENTS[code], start + 2):
            segments.kept.append(view[at - 1 : end])
        at = end
    is_arithmetic = frame >= 0xC9
    return segments.image(
        "JPEG",
        (width, height),
        orientation or 1,
        cost_of_pixel=max(1, scans) * (_ARITHMETIC if is_arithmetic else 1),
        is_bounded=frame in {0xC0, 0xC1} and scans <= 1,
    )


def _walk_webp(file: bytes | bytearray) -> Steps[ImageFile]:
    segments, seen, view = _Segments(b"RIFF????WEBP"), set[bytes](), memoryview(file)
    size, orientation, at, is_lossy = (0, 0), 1, 12, True
    while at + 8 <= len(file):
        if segments.visit():
            yield None
        kind, start = bytes(file[at : at + 4]), at + 8
        end = start + int.from_bytes(file[at + 4 : start], "little")
        if kind == b"EXIF" and kind not in seen:
            orientation = _orientation(view[start + (6 if file.startswith(b"Exif\0\0", start) else 0) : end])
        elif kind in _KEPT_WEBP and kind not in seen:  # of an animation's frames the first
            segments.kept.append(view[at : end + end % 2])
            if kind == b"VP8X":  # it says that there are a profile, EXIF and XMP, which is no longer so
                flags = bytes(flag & 0xD3 for flag in file[start : start + 1])
                segments.kept[-1:] = view[at:start], flags, view[start + 1 : end + end % 2]
            width, height = _webp_size(kind, file[start : start + 12])
            size = max(size[0], width), max(size[1], height)
            is_lossy = is_lossy and kind in {b"VP8 ", b"VP8X"}
        seen.add(kind)
        at = end + end % 2
    segments.kept[0] = b"RIFF%bWEBP" % (sum(map(len, segments.kept)) - 8).to_bytes(4, "little")
    cost_of_pixel = 1 if is_lossy else _LOSSLESS_WEBP
    return segments.image("WEBP", size, orientation, cost_of_pixel=cost_of_pixel, is_bounded=is_lossy)


def _webp_size(kind: bytes, data: bytes | bytearray) -> tuple[int, int]:
    """Width and height, as far as this chunk says."""

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


def _look_at_bmp(file: bytes | bytearray) -> ImageFile:
    segments = _Segments(file)  # it has no others
    if file[14:18] == b"\x0c\0\0\0":  # OS/2's
        width, height, compression = int.from_bytes(file[18:20], "little"), int.from_bytes(file[20:22], "little"), 0
    else:
        width = int.from_bytes(file[18:22], "little")
        height = abs(int.from_bytes(file[22:26], "little", signed=True))  # negative: from the top
        compression = int.from_bytes(file[30:34], "little")
    is_run_length = compression in {1, 2}  # decoded in Python
    cost_of_pixel = _RUN_LENGTH if is_run_length else 1
    return segments.image("BMP", (width, height), 1, cost_of_pixel=cost_of_pixel, is_bounded=not is_run_length)


def _search(pattern: re.Pattern[bytes], file: bytes | bytearray, start: int) -> Steps[int]:
    """Where this is found first; the file's end where it is not."""
    for begin in range(start, len(file), _PAUSE_BYTES):
        if begin > start:
            yield None
        if found := pattern.search(file, begin, begin + _PAUSE_BYTES + 1):  # it may lie across two pieces
            return found.start()
    return len(file)


def _orientation(exif: "memoryview[int]") -> int:
    """The tag's value in the first directory of EXIF; 1, upright, where there is none that makes sense."""
    order: Literal["little", "big"] = "little" if bytes(exif[:2]) == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(exif[start : start + size], order)

    directory = number(4, 4)
    for tag in range(min(number(directory, 2), _MAX_TAGS)):
        entry = directory + 2 + 12 * tag
        if number(entry, 2) == _ORIENTATION:
            value = number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)  # LONG, or SHORT as it should be
            return value if 1 <= value <= 8 else 1
    return 1
