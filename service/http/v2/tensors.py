"""Reads and writes tensors: as JSON, or as bytes after the JSON (the protocol's binary-data extension).

A body is JSON, then the binary tensors in the order in which the JSON declares them. Inference-Header-Content-Length
says where the JSON ends.

A JSON parser would build a Python object for each number, in one call that blocks the event loop. So arrays of numbers
are cut out of the JSON before it is parsed (`_cut_numbers`), and then parsed piece by piece into NumPy's.
"""

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json, to_json

from service.codecs.time_slices import OffLoopWork, Steps
from service.errors import Invalid, Malformed, TooLarge
from service.http.requests.json_limits import JsonLimits
from service.http.requests.parsing import parse_body
from service.http.v2.messages import InferRequest, InputTensor

HEADER = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 4 * 2**20
MAX_JSON_INPUT, MAX_JSON_OUTPUT = 2**17, 2**20  # elements of all tensors together
MAX_TEXTS = 2**17  # of BYTES in binary, all tensors together
DTYPES: Mapping[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
BYTES = "BYTES"  # the datatype of text
PIECE_BYTES, PIECE_NUMBERS = 2**14, 2**13  # of JSON, read or written in one step
MAX_PIECE_BYTES = 2**16
CHECKED_NUMBERS = 2**18  # in one step
SMALL_BYTES = 2**20  # replies of up to this many are joined on the event loop
ADVICE = "Send tensors in binary instead: by the protocol's binary-data extension."
_MAX_STRINGS, _MAX_STRING_BYTES = 2**15, 2**14
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_COLON = re.compile(rb"[ \t\r\n]{0,99}+:[ \t\r\n]{0,99}+")
_LONG_NUMBER = re.compile(rb"[0-9]{65}")  # parsing one takes time that grows with its square
_NOT_SKELETON = bytes(set(range(256)) - set(b"[],"))
_NUMERIC = b"0123456789+-.eE, \t\r\n"
_SPACES = bytes.maketrans(b"[]", b"  ")

Array = NDArray[Any]


class Tensor(NamedTuple):
    """An input that was read. `values` are those of BYTES as texts, else an array of the given shape."""

    datatype: str
    values: Array | list[str]


class Request(NamedTuple):
    """A request to run a model. `raw` is the body if it is one tensor and nothing else."""

    head: InferRequest
    inputs: dict[str, Tensor]
    raw: bytes | None = None


def read_request(body: bytes, header: str | None, max_count: int) -> Steps[Request]:
    """Read a body.

    Args:
        body: The whole of it.
        header: Inference-Header-Content-Length, if it was sent.
        max_count: The most labels in one request.

    Raises:
        Malformed, Invalid, TooLarge: It can't be read, or is beyond the limits.
    """
    length = _json_length(header, len(body))
    if length == 0 and header is not None:
        return Request(InferRequest(), {}, body)
    text, arrays = yield from _cut_numbers(body[:length])
    limits = JsonLimits(values=2 * max_count + 1024, keys=512, containers=256)
    head = yield from parse_body(InferRequest, text, limits)
    inputs = yield from _read_inputs(head.inputs, arrays, memoryview(body)[length:])
    return Request(head, inputs)


def _json_length(header: str | None, size: int) -> int:
    length = size
    if header is not None:
        if not re.fullmatch("[0-9]{1,18}", header) or int(header) > size:
            raise Malformed(f"{HEADER}: {header[:100]!r} is not a number of bytes up to the body's {size}.")
        length = int(header)
    if length > MAX_JSON_BYTES:
        raise TooLarge(f"The JSON has {length} bytes; the most is {MAX_JSON_BYTES}. {ADVICE}")
    return length


def _cut_numbers(text: bytes) -> Steps[tuple[bytes, dict[str, bytes]]]:
    """Cut the arrays of numbers out of JSON. In place of each stands a text that no client can know, which finds it.

    Raises:
        Invalid: More strings, or longer ones, than any request needs.
    """
    pieces, arrays, mark = list[bytes](), dict[str, bytes](), secrets.token_hex(8)
    kept = at = 0
    for number in count():
        start = text.find(b'"', at)
        if start < 0:
            break
        string = _STRING.match(text, start, start + _MAX_STRING_BYTES)
        if string is None or number > _MAX_STRINGS:
            raise Invalid(f"The body has over {_MAX_STRINGS} strings, or one of over {_MAX_STRING_BYTES} bytes.")
        at = string.end()
        if string[0] == b'"data"' and (colon := _COLON.match(text, at)) is not None:
            at = colon.end()
            numbers = _numbers_at(text, at)
            if numbers:
                place = f"{mark}-{len(arrays)}"
                pieces += [text[kept:at], to_json(place)]
                arrays[place] = numbers
                kept = at = at + len(numbers)
        if number % 256 == 0:
            yield None
    return b"".join([*pieces, text[kept:]]), arrays


def _numbers_at(text: bytes, start: int) -> bytes:
    """The array that begins here, if it ends before the next string or object; else nothing."""
    if not text.startswith(b"[", start):
        return b""
    quote = text.find(b'"', start)
    end = len(text) if quote < 0 else quote
    brace = text.find(b"}", start, end)
    numbers = text[start : end if brace < 0 else brace].rstrip(b", \t\r\n")
    return numbers if numbers.count(b"[") == numbers.count(b"]") else b""


def _read_inputs(
    given: Sequence[InputTensor], arrays: Mapping[str, bytes], binary: memoryview
) -> Steps[dict[str, Tensor]]:
    """Read each input's values; those in binary follow one another."""
    inputs: dict[str, Tensor] = {}
    in_json, texts, at = 0, 0, 0
    for tensor in given:
        if tensor.name in inputs:
            raise Invalid(f"inputs: {tensor.name[:100]!r} is given twice.")
        elements, size = _elements(tensor), _binary_size(tensor)
        if size is None:
            in_json += elements
            if in_json > MAX_JSON_INPUT:
                raise Invalid(f"inputs: over {MAX_JSON_INPUT} elements as JSON. {ADVICE}")
            values = yield from _from_json(tensor, elements, arrays)
        else:
            if size > len(binary) - at:
                raise Malformed(f"{tensor.name}: {size} bytes are announced; there are {len(binary) - at}.")
            texts += elements * (tensor.datatype == BYTES)
            if texts > MAX_TEXTS:
                raise Invalid(f"inputs: over {MAX_TEXTS} elements of {BYTES}.")
            values = yield from _from_binary(tensor, elements, binary[at : at + size])
            at += size
        inputs[tensor.name] = Tensor(tensor.datatype, values)
        yield None
    if at != len(binary):
        raise Malformed(f"{len(binary) - at} bytes after the JSON belong to no input.")
    return inputs


def _elements(tensor: InputTensor) -> int:
    """How many elements an input's shape says that it has."""
    if tensor.datatype not in {*DTYPES, BYTES}:
        raise Invalid(f"{tensor.name}: datatype {tensor.datatype!r} is not taken; send {', '.join(DTYPES)} or {BYTES}.")
    if not all(1 <= axis < 2**31 for axis in tensor.shape):
        raise Invalid(f"{tensor.name}: every axis of its shape must be 1 or more.")
    return math.prod(tensor.shape)


def _binary_size(tensor: InputTensor) -> int | None:
    """The bytes of an input after the JSON; None if it is in the JSON."""
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise Invalid(f"{tensor.name}: shared memory is not supported; send the data.")
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or size < 0:
        raise Invalid(f"{tensor.name}: binary_data_size must be a number of bytes.")
    if tensor.data is not None:
        raise Invalid(f"{tensor.name}: it has data both in the JSON and after it.")
    return size


def _from_binary(tensor: InputTensor, elements: int, content: memoryview) -> Steps[Array | list[str]]:
    """The values of an input in binary, little-endian; numbers as a view of the body."""
    if tensor.datatype == BYTES:
        return (yield from _texts(tensor, elements, content))
    dtype = DTYPES[tensor.datatype]
    if len(content) != elements * dtype.itemsize:
        raise Invalid(
            f"{tensor.name}: {tensor.datatype} of shape {tensor.shape} needs {elements * dtype.itemsize} bytes; "
            f"binary_data_size is {len(content)}."
        )
    return (yield from _finite(tensor, np.frombuffer(content, dtype)))


def _texts(tensor: InputTensor, elements: int, content: memoryview) -> Steps[list[str]]:
    """The texts of BYTES in binary."""
    texts: list[str] = []
    at = 0
    while at < len(content) and len(texts) < elements:
        text = _text(tensor, content, at)
        at += 4 + len(text)
        texts.append(text.decode(errors="replace"))  # which names no class
        if len(texts) % 256 == 0:
            yield None
    if at != len(content) or len(texts) != elements:
        raise Invalid(f"{tensor.name}: its shape {tensor.shape} says {elements} elements; there are others.")
    return texts


def _text(tensor: InputTensor, content: memoryview, start: int) -> bytes:
    """The text that begins here, after its length in four bytes."""
    size = int.from_bytes(content[start : start + 4], "little")
    if size > min(_MAX_STRING_BYTES, len(content) - start - 4):
        raise Invalid(f"{tensor.name}: a text of {size} bytes is announced, which is not there or too long.")
    return bytes(content[start + 4 : start + 4 + size])


def _from_json(tensor: InputTensor, elements: int, arrays: Mapping[str, bytes]) -> Steps[Array | list[str]]:
    """The values of an input in the JSON, in row-major order, flat or nested as its shape says."""
    data = tensor.data
    if data is None:
        raise Invalid(f"{tensor.name}: it has neither data nor binary_data_size.")
    if tensor.datatype == BYTES and isinstance(data, list):
        texts = data
        while texts and all(type(one) is list for one in texts):
            texts = [text for one in texts for text in one]
        if len(texts) != elements or not all(type(text) is str for text in texts):
            raise Invalid(f"{tensor.name}: {BYTES} of shape {tensor.shape} are {elements} strings.")
        return texts
    if tensor.datatype == BYTES or type(data) is not str or data not in arrays:
        wanted = "strings" if tensor.datatype == BYTES else "numbers"
        raise Invalid(f"{tensor.name}: data must be an array of {wanted}.")
    numbers = yield from _read_numbers(tensor, elements, arrays[data])
    return (yield from _finite(tensor, numbers))


def _read_numbers(tensor: InputTensor, elements: int, text: bytes) -> Steps[Array]:
    """Parse an array of numbers, in pieces that end at commas."""
    skeleton, numbers = list[bytes](), np.empty(elements, DTYPES[tensor.datatype])
    start = filled = 0
    while start <= len(text):
        end = text.find(b",", start + PIECE_BYTES)
        piece = text[start : end if end >= 0 else len(text)]
        if len(piece) > MAX_PIECE_BYTES:
            raise Invalid(f"{tensor.name}: data has {len(piece)} bytes without a comma; no number is so long.")
        skeleton.append(piece.translate(None, _NOT_SKELETON))
        some = _parse(tensor, piece.translate(_SPACES))
        if filled + len(some) > elements:
            break
        numbers[filled : filled + len(some)] = some
        filled += len(some)
        start += len(piece) + 1
        yield None
    if filled != elements or b",".join(skeleton) not in {_skeleton([elements]), _skeleton(tensor.shape)}:
        raise Invalid(f"{tensor.name}: data must hold {elements} elements, flat or nested as its shape {tensor.shape}.")
    return numbers


def _parse(tensor: InputTensor, piece: bytes) -> Array:
    """Parse numbers that commas separate."""
    try:
        if piece.translate(None, _NUMERIC) or _LONG_NUMBER.search(piece):
            raise ValueError("no numbers, or endless ones")  # noqa: TRY301 - handled like the parser's own errors
        values = from_json(b"[%b]" % piece)
    except ValueError:
        raise Invalid(f"{tensor.name}: data must be an array of numbers.") from None
    if tensor.datatype == "FP32":
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            return np.array(values, np.float64).astype(np.float32)
    numbers = np.array(values or np.empty(0, np.int64))
    if numbers.dtype == np.float64 and (abs(numbers) < 2**53).all() and (numbers % 1 == 0).all():
        numbers = numbers.astype(np.int64)  # 5.0 is 5, as elsewhere
    lowest, highest = (0, 255) if tensor.datatype == "UINT8" else (-(2**63), 2**63 - 1)
    if numbers.dtype != np.int64 or (len(numbers) and not lowest <= numbers.min() <= numbers.max() <= highest):
        raise Invalid(f"{tensor.name}: data must be whole numbers within the range of {tensor.datatype}.")
    return numbers


def _skeleton(shape: Sequence[int]) -> bytes:
    """The brackets and commas of an array of this shape in JSON."""
    skeleton = b""
    for axis in reversed(shape):
        skeleton = b"[%b]" % b",".join([skeleton] * axis)
    return skeleton


def _finite(tensor: InputTensor, numbers: Array) -> Steps[Array]:
    """The numbers in their shape, once it is known that all are finite."""
    for start in range(0, len(numbers) if tensor.datatype == "FP32" else 0, CHECKED_NUMBERS):
        if not np.isfinite(numbers[start : start + CHECKED_NUMBERS]).all():
            raise Invalid(f"{tensor.name}: every number must be finite.")
        yield None
    return numbers.reshape(tensor.shape)


def check_json_output(elements: int) -> None:
    """Check that outputs of so many elements may be sent as JSON.

    Raises:
        Invalid: They may not.
    """
    if elements > MAX_JSON_OUTPUT:
        raise Invalid(
            f"outputs: {elements} elements as JSON; the most is {MAX_JSON_OUTPUT}. Ask for them in binary, by the "
            "protocol's binary-data extension: binary_data_output among the parameters, or binary_data of an output."
        )


def encode_reply(head: Mapping[str, Any], outputs: Mapping[str, tuple[Array, bool]]) -> Steps[tuple[bytes, int | None]]:
    """Write a reply: its body, and where its JSON ends if binary follows.

    Args:
        head: All fields but the outputs.
        outputs: By name, each with whether to send it in binary.
    """
    written, binary = list[bytes](), list[Array]()
    for name, (array, is_binary) in outputs.items():
        datatype = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
        about: dict[str, Any] = {"name": name, "datatype": datatype, "shape": array.shape}
        if is_binary:
            written.append(to_json(about | {"parameters": {"binary_data_size": array.nbytes}}))
            binary.append(np.ascontiguousarray(array))
        else:
            data = yield from _write_numbers(array)
            written.append(b'%b,"data":[%b]}' % (to_json(about)[:-1], data))
        yield None
    text = b'%b,"outputs":[%b]}' % (to_json(head)[:-1], b",".join(written))
    join = partial(b"".join, [text, *(array.data.cast("B") for array in binary)])
    is_small = sum(array.nbytes for array in binary) <= SMALL_BYTES
    body = join() if is_small else (yield OffLoopWork(join, 1))
    return body, len(text) if binary else None


def _write_numbers(array: Array) -> Steps[bytes]:
    flat = array.reshape(-1)
    pieces = []
    for start in range(0, len(flat), PIECE_NUMBERS):
        pieces.append(to_json(flat[start : start + PIECE_NUMBERS].tolist())[1:-1])
        yield None
    return b",".join(pieces)
