"""Counts what a JSON body holds, on its bytes, before a parser builds objects from it.

Two or three bytes of JSON can take a hundred bytes of memory (`[],`), or cause an error of their own (`"a":1,`), and
the parser builds all of them in one call that blocks the event loop. So the numbers of values, keys and containers and
their depth are bounded first. Invalid JSON is left to the parser, which stops at the first mistake.
"""

import re
from typing import NamedTuple

from service.codecs.time_slices import Steps
from service.errors import Invalid

PIECE_BYTES = 2**14  # counted in one step
LONG_BYTES = 2**14  # by default a string longer than this must be plain ASCII, as base64 is
MAX_ESCAPES, BYTES_OF_ESCAPE = 2**16, 8  # plus one for every 8 bytes: wrapped base64 has fewer line ends
_LONG_NUMBER = re.compile(rb"[0-9]{65}")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class JsonLimits(NamedTuple):
    """The most that a body may hold.

    Attributes:
        values: Elements of arrays and members of objects together.
        keys: Members of objects.
        containers: Arrays and objects together.
        depth: Nesting of arrays and objects.
        text_bytes: Bytes of a string that is not plain ASCII.
    """

    values: int
    keys: int = 64
    containers: int = 64
    depth: int = 8
    text_bytes: int = LONG_BYTES


def json_limits(max_count: int) -> JsonLimits:
    """Limits that fit all fields of a request with an image and a label for each of `max_count` images."""
    return JsonLimits(values=2 * max_count + 64)


def check_json(body: bytes, limits: JsonLimits) -> Steps[None]:
    """Check a JSON body against the limits.

    Raises:
        Invalid: It exceeds them, or has a number, a string or escapes that would take a parser long.
    """
    values = keys = containers = strings = depth = escapes = 0
    in_string, half = False, b""  # a backslash at the end of a piece, whose escape ends in the next piece
    string = _String(limits.text_bytes)
    for start in range(0, len(body), PIECE_BYTES):
        piece = half + body[start : start + PIECE_BYTES]
        half = b""
        if b"\\" in piece:
            escapes += piece.count(b"\\")
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")  # pairs from the left, as a parser reads them
            if piece.endswith(b"\\"):
                piece, half = piece[:-1], b"\\"
        parts = piece.split(b'"')
        if in_string:
            string.extend(parts[0])
        strings += len(parts) - 1  # quotes; a string has two
        outside = b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0
        if in_string and len(parts) > 1:
            string = _String(limits.text_bytes)
            string.extend(parts[-1])
        values += outside.count(b",")
        keys += outside.count(b":")
        containers += outside.count(b"[") + outside.count(b"{")
        _check("values", max(values + 1, strings // 2 - limits.keys), limits.values)
        _check("fields", keys, limits.keys)
        _check("arrays and objects", containers, limits.containers)
        _check("escapes", escapes, MAX_ESCAPES + start // BYTES_OF_ESCAPE)
        if _LONG_NUMBER.search(outside):  # parsing one takes time that grows with its square
            raise Invalid("The body has a number that is longer than any that is needed.")
        depth = _nest(outside, depth, limits.depth)
        if depth < 0:
            return
        yield None


def _check(what: str, count: int, most: int) -> None:
    if count > most:
        raise Invalid(f"The body has more than {most} {what}.")


class _String:
    """A string that continues over several pieces.

    A single non-ASCII character can make Python store a string with four bytes for each character. Base64, the only
    long text that most requests need, is ASCII, so a long string must be ASCII too.
    """

    def __init__(self, most: int) -> None:
        self._length, self._is_wide, self._most = 0, False, most

    def extend(self, part: bytes) -> None:
        """Add the string's next part."""
        self._length += len(part)
        self._is_wide = self._is_wide or not part.isascii() or b"\\u" in part
        if self._is_wide and self._length > self._most:
            raise Invalid(f"The body has a string of over {self._most} bytes that is not plain ASCII.")


def _nest(outside: bytes, depth: int, most: int) -> int:
    """The depth after this text, from the depth before it; negative if more brackets close than were opened."""
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            raise Invalid(f"The body is nested more than {most} deep.")
        if depth < 0:
            break
    return depth
