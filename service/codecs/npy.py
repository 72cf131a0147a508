"""Reads arrays in NumPy's .npy format: the size in the header is compared with the body's before anything else."""

import io
import logging
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from service.errors import Invalid, Malformed

NPY = "application/x-npy"
_MAX_HEADER_BYTES, _MAX_LENGTH = 4096, 2**63

log = logging.getLogger(__name__)


def read_npy(body: bytes, dtype: DTypeLike, fits: Callable[[tuple[int, ...]], bool], wanted: str) -> NDArray[Any]:
    """The array, as a view of the body.

    Args:
        body: The file.
        dtype: What the array has to be of.
        fits: Whether its shape is one that is `wanted`, as the client is told. No length is 0.
        wanted: Shapes in words.

    Raises:
        Malformed: Not an .npy file, or its size differs from what its header says.
        Invalid: The array is of another type, or has another shape.
    """
    start = _header_bytes(body)
    shape, fortran, found = _read_header(body[:start])
    if found != np.dtype(dtype):
        raise Invalid(f"The array is of {str(found)[:100]}; send {np.dtype(dtype)}.")
    whole = all(type(n) is int for n in shape)  # NumPy's reader accepts True as a length
    if not whole or min(shape, default=0) < 1 or not fits(shape):
        raise Invalid(f"The array has shape {shape}; send {wanted}.")
    needed, there = math.prod(shape) * found.itemsize, len(body) - start
    if there != needed:
        raise Malformed(f"The array of shape {shape} needs {needed} bytes of data; there are {there}.")
    return np.frombuffer(body, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _header_bytes(body: bytes) -> int:
    """Offset of an .npy file's data, by the header length that it states; at most that of the longest we read."""
    start, number = (10, body[8:10]) if body[6:7] == b"\x01" else (12, body[8:12])
    return min(len(body), start + int.from_bytes(number, "little"), start + _MAX_HEADER_BYTES + 1)


@lru_cache(maxsize=64)  # clients mostly send one shape, and NumPy parses each header with Python's compiler
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether the data is in Fortran order, and dtype.

    Raises:
        Malformed: Not a valid header.
    """
    file = io.BytesIO(header)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        reader = readers[np.lib.format.read_magic(file)]  # version 3 exists for field names, which ours do not have
        shape, fortran, dtype = reader(file, max_header_size=_MAX_HEADER_BYTES)
        # Written in hexadecimal, a length can be too long for Python to print it in our error message.
        if any(abs(n) > _MAX_LENGTH for n in shape):
            raise ValueError("a length beyond any array's")  # noqa: TRY301 - handled like the reader's own errors
    except Exception as error:  # NumPy evaluates the header as a literal, which can raise nearly anything
        log.debug("unreadable npy header", exc_info=error)
        raise Malformed("The body is not an array in NumPy's .npy format (1.0 or 2.0).") from None
    return shape, fortran, dtype
