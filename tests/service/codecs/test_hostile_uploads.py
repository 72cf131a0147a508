"""Arrays and forms that are drawn at random: valid ones are read as they were written, others end in our own errors."""

import ast
import io
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from service.codecs.decode import split_multipart
from service.codecs.npy import read_npy
from service.codecs.time_slices import run_steps
from service.errors import Invalid, Malformed

MAX_PARTS = 8
PEAK_BYTES = 2**23  # of Python's and NumPy's memory, other threads' too; a lying header asks for gigabytes

# Array files

DTYPES = ("|u1", "<f4", ">f4", "<f8", "|b1", "<U9", "<M8[s]", "|V3", "|O", "<c16")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 12)
    | st.floats()
    | st.sampled_from(DTYPES)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**63 - 1, 2**64, -1, True]), max_size=5).map(tuple)
HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(DTYPES) | VALUES,
        "fortran_order": st.booleans() | VALUES,
        "shape": SHAPES | VALUES,
    }
) | st.dictionaries(st.sampled_from(["descr", "fortran_order", "shape", "x"]), VALUES)
# What stands in a header that is no literal, and what Python's parser might be slow at or run.
TEXTS = st.lists(
    st.sampled_from([*"(){}[],:'\"\\\n\0 -+*", "descr", "9", "0x", "1e9", "'|u1'", "lambda: 0", "f'{1}'", "é"]),
    max_size=60,
).map("".join)


def with_header(text: str, version: int = 1, data: bytes = b"", length: int | None = None) -> bytes:
    """An .npy file of this header, or one that claims to be of another length."""
    written = text.encode("latin-1", "replace")
    said = len(written) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", said) + written + data


def read(body: bytes, dtype: str = "u1") -> Any:
    """As a route would that takes any shape."""
    return read_npy(body, dtype, lambda _: True, "an array")


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail where the block takes more than `PEAK_BYTES`."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


@given(
    shape=array_shapes(max_dims=5, max_side=5),
    dtype=st.sampled_from(["u1", "<f4", "<i8"]),
    version=st.sampled_from([(1, 0), (2, 0)]),
    order=st.sampled_from("CF"),
    data=st.data(),
)
def test_an_array_is_read_as_numpy_wrote_it(
    shape: tuple[int, ...], dtype: str, version: tuple[int, int], order: Any, data: st.DataObject
) -> None:
    """In both versions and orders; with a byte more or less it is refused."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    array = np.frombuffer(raw, dtype).reshape(shape, order=order)
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version)
    found = read(out.getvalue(), dtype)
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert found.tobytes() == array.tobytes()
    for damaged in (out.getvalue()[:-1], out.getvalue() + b"\0"):
        with suppress(Malformed):
            read(damaged, dtype)
            raise AssertionError(damaged)


@given(
    header=HEADERS.map(repr) | TEXTS | st.integers(1, 4000).map(lambda depth: "(" * depth + ")" * depth),
    version=st.integers(0, 4),
    length=st.none() | st.sampled_from([0, 1, 4096, 4097, 65_535]),
    data=st.binary(max_size=20),
)
def test_any_header_of_an_array_is_read_or_refused(header: str, version: int, length: int | None, data: bytes) -> None:
    """Whatever it claims, no memory is taken for it, and an array that is read has the bytes that it says."""
    with bounded_memory(), suppress(Malformed, Invalid):
        array = read(with_header(header, version, data, length))
        assert array.tobytes() in {data, np.asfortranarray(array).tobytes("A")}
        assert tuple(ast.literal_eval(header.strip())["shape"]) == array.shape


# Forms

# RFC 2046's characters, of which one that ends in a space would be no boundary.
BOUNDARIES = st.text("0123456789abcXYZ'()+_,-./:=?", min_size=1, max_size=70)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["C"], exclude_characters='"\\'), max_size=20)


@st.composite
def forms(draw: st.DrawFn) -> tuple[bytes, str, list[bytes]]:
    """A form's body, its Content-Type, and the files in it, which may look like boundaries."""
    boundary = draw(BOUNDARIES)
    alike = [f"\r\n--{boundary}"[:-1], f"--{boundary}--", boundary, "\r\n", "\r", "\n", "--", "\r\n\r\n"]
    content = st.lists(st.sampled_from([text.encode() for text in alike]) | st.binary(max_size=30), max_size=6)
    files = draw(st.lists(content.map(b"".join), min_size=1, max_size=MAX_PARTS))
    delimiter = b"\r\n--" + boundary.encode()
    files = [file for file in files if delimiter not in b"\r\n" + file + b"\r\n"] or [b""]
    body = b""
    for file in files:
        name, head = draw(NAMES), draw(st.sampled_from([b"Content-Type: image/png\r\n", b"X-Note: a: b;c\r\n", b""]))
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n'.encode()
        body += head + b"\r\n" + file + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"', files


def split(body: bytes, content_type: str) -> list[bytes]:
    return [bytes(file) for file in run_steps(split_multipart(body, content_type, MAX_PARTS, lambda: None))]


@given(forms())
def test_a_form_gives_its_files(form: tuple[bytes, str, list[bytes]]) -> None:
    """Whatever its boundary and its files' names are, and however much a file looks like its end."""
    body, content_type, files = form
    assert split(body, content_type) == files


@given(forms(), st.data())
def test_a_damaged_form_is_read_or_refused(form: tuple[bytes, str, list[bytes]], data: st.DataObject) -> None:
    """With parts of it removed, doubled, or replaced, it holds no more than its bytes."""
    body, content_type, _ = form
    tricky = st.sampled_from([b"\r\n", b"--", b"\r", b":", b";", b'"', b"\0", b"\xff", content_type[30:-1].encode()])
    for _ in range(data.draw(st.integers(1, 4))):
        at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(body))] * 2)))
        body = body[:at] + data.draw(tricky | st.binary(max_size=10) | st.just(body[at:end] * 2)) + body[end:]
    with bounded_memory(), suppress(Malformed, Invalid):
        assert sum(map(len, split(body, content_type))) < len(body)
