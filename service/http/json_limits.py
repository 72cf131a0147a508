"""Counts what a JSON body holds, on its bytes, before a parser makes objects of it.

A byte or two of JSON can become a hundred of memory (`[],`) and an error of its own (`"a":1,`), all made in one call
that lets nobody else run. So a body's values, keys, arrays and objects, and their depth are bounded first. What is no
JSON is left to the parser, which stops where that begins: nothing after it counts.
"""

import re
from typing import NamedTuple

from service.codecs.time_slices import Steps
from service.errors import Invalid

PIECE_BYTES = 2**14  # looked at in one step
LONG_BYTES = 2**14  # of a string that only an image needs
MAX_ESCAPES, BYTES_OF_ESCAPE = 2**16, 8  # and one more for each so many bytes: line ends in base64 are fewer
_LONG_NUMBER = re.compile(rb"[0-9]{65}")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class JsonLimits(NamedTuple):
    """The most that a body may hold.

    Attributes:
        values: Elements of arrays and members of objects, all together.
        keys: Members of objects.
        containers: Arrays and objects.
        depth: Of arrays and objects in one another.
    """

    values: int
    keys: int = 64
    containers: int = 64
    depth: int = 8


def json_limits(max_count: int) -> JsonLimits:
    """Room for all fields of a request, and for an image and a label of each that it may have."""
    return JsonLimits(values=2 * max_count + 64)


def check_json(body: bytes, limits: JsonLimits) -> Steps[None]:
    """Return where the body keeps to the limits.

    Raises:
        Invalid: It does not; or it has a number, a long string or escapes that take a parser long.
    """
    values = keys = containers = strings = depth = escapes = 0
    in_string, half = False, b""  # half an escape, whose other half comes with the next piece
    string = _String()
    for start in range(0, len(body), PIECE_BYTES):
        piece = half + body[start : start + PIECE_BYTES]
        half = b""
        if b"\\" in piece:
            escapes += piece.count(b"\\")
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")  # in pairs from the left, as a parser reads them
            if piece.endswith(b"\\"):
                piece, half = piece[:-1], b"\\"
        parts = piece.split(b'"')
        if in_string:
            string.go_on(parts[0])
        strings += len(parts) - 1  # its two quotes are counted one by one
        outside = b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0
        if in_string and len(parts) > 1:
            string = _String()
            string.go_on(parts[-1])
        values += outside.count(b",")
        keys += outside.count(b":")
        containers += outside.count(b"[") + outside.count(b"{")
        _check("values", max(values + 1, strings // 2 - limits.keys), limits.values)
        _check("fields", keys, limits.keys)
        _check("arrays and objects", containers, limits.containers)
        _check("escapes", escapes, MAX_ESCAPES + start // BYTES_OF_ESCAPE)
        if _LONG_NUMBER.search(outside):  # to read it takes time that grows with its square
            raise Invalid("The body has a number that is longer than any that is needed.")
        depth = _nest(outside, depth, limits.depth)
        if depth < 0:
            return
        yield None


def _check(what: str, count: int, most: int) -> None:
    if count > most:
        raise Invalid(f"The body has more than {most} {what}.")


class _String:
    """One that goes on over several pieces.

    With a single wide character in it Python keeps it with four bytes for each, and base64, the only long text that
    anybody needs, has none.
    """

    def __init__(self) -> None:
        self._length, self._is_wide = 0, False

    def go_on(self, part: bytes) -> None:
        """There is more of it."""
        self._length += len(part)
        self._is_wide = self._is_wide or not part.isascii() or b"\\u" in part
        if self._is_wide and self._length > LONG_BYTES:
            raise Invalid(f"The body has a string of over {LONG_BYTES} bytes that is not plain ASCII.")


def _nest(outside: bytes, depth: int, most: int) -> int:
    """How deep it is after this, having been so deep before; negative where more ends than has begun."""
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            raise Invalid(f"The body is nested more than {most} deep.")
        if depth < 0:
            break
    return depth
