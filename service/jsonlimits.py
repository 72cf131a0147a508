"""Counts what a JSON body holds, on its bytes, before a parser makes objects of it.

A byte or two of JSON can become a hundred of memory (`[],`) and an error of its own (`"a":1,`), all made in one call
that lets nobody else run. So a body's values, keys, arrays and objects, and their depth are bounded first. What is no
JSON is left to the parser, which stops where that begins: nothing after it counts.
"""

import re
from typing import NamedTuple

from service.errors import Invalid
from service.slices import Steps

PIECE_BYTES = 2**14  # looked at in one step
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


def check_json(body: bytes, limits: JsonLimits) -> Steps[None]:
    """Return where the body keeps to the limits.

    Raises:
        Invalid: It does not.
    """
    values = keys = containers = strings = depth = 0
    in_string, half = False, b""  # half an escape, whose other half comes with the next piece
    for start in range(0, len(body), PIECE_BYTES):
        piece = half + body[start : start + PIECE_BYTES]
        half = b""
        if b"\\" in piece:  # in pairs from the left, as a parser reads them
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
            if piece.endswith(b"\\"):
                piece, half = piece[:-1], b"\\"
        parts = piece.split(b'"')
        strings += len(parts) - 1  # its two quotes are counted one by one
        outside = b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0
        values += outside.count(b",")
        keys += outside.count(b":")
        containers += outside.count(b"[") + outside.count(b"{")
        if values >= limits.values or strings > 2 * (limits.values + limits.keys):
            raise Invalid(f"The body has more than {limits.values} values.")
        if keys > limits.keys:
            raise Invalid(f"The body has more than {limits.keys} fields.")
        if containers > limits.containers:
            raise Invalid(f"The body has more than {limits.containers} arrays and objects.")
        if _LONG_NUMBER.search(outside):  # to read it takes time that grows with its square
            raise Invalid("The body has a number that is longer than any that is needed.")
        depth = _nest(outside, depth, limits.depth)
        if depth < 0:
            return
        yield None


def _nest(outside: bytes, depth: int, most: int) -> int:
    """How deep it is after this, having been so deep before; negative where more ends than has begun."""
    for bracket in outside.translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > most:
            raise Invalid(f"The body is nested more than {most} deep.")
        if depth < 0:
            break
    return depth
