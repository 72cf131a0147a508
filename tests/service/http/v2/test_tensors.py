"""Tensors come out as they went in, however their JSON is laid out; other bytes are refused, and never cost much."""

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.codecs.time_slices import run_steps
from service.errors import Invalid, Malformed, TooLarge
from service.http.v2.tensors import DTYPES, MAX_JSON_INPUT, PIECE_BYTES, encode_reply, read_request

BOUNDS = {"INT64": (-(2**63), 2**63 - 1), "UINT8": (0, 255)}


@st.composite
def tensors(draw: st.DrawFn) -> tuple[str, NDArray[Any]]:
    """A datatype, and an array of it."""
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(1, 4), max_size=4))
    one = (
        st.integers(*BOUNDS[datatype])
        if datatype in BOUNDS
        else st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
    values = draw(st.lists(one, min_size=math.prod(shape), max_size=math.prod(shape)))
    return datatype, np.array(values, DTYPES[datatype]).reshape(shape)


def read(body: bytes, header: str | None = None) -> dict[str, Any]:
    """The inputs of a body."""
    return {name: one.values for name, one in run_steps(read_request(body, header, 4096)).inputs.items()}


@given(tensors(), st.sampled_from([None, 0, 1, "\r\n\t  "]), st.booleans())
def test_an_array_comes_out_as_it_went_in(
    tensor: tuple[str, NDArray[Any]],
    indent: int | str | None,
    is_flat: bool,  # noqa: FBT001
) -> None:
    """Flat or nested, with any white space between."""
    datatype, array = tensor
    data = array.reshape(-1).tolist() if is_flat else array.tolist()
    data = data if isinstance(data, list) else [data]  # of no axes
    about = {"name": "x", "shape": list(array.shape), "datatype": datatype, "data": data}
    body = json.dumps({"id": '"data": [1', "inputs": [about], "parameters": {"data": "x"}}, indent=indent).encode()
    np.testing.assert_array_equal(read(body)["x"], array)


@given(tensors())
def test_a_reply_can_be_sent_back(tensor: tuple[str, NDArray[Any]]) -> None:
    """What is written in either way is read as the same array."""
    _, array = tensor
    for is_binary in (False, True):
        body, length = run_steps(encode_reply({"model_name": "m"}, {"x": (array, is_binary)}))
        body = body.replace(b'"outputs"', b' "inputs"', 1)
        np.testing.assert_array_equal(read(body, None if length is None else str(length))["x"], array)


@pytest.mark.parametrize("datatype", ["INT64", "FP32", "UINT8"])
def test_a_large_array_is_read_in_pieces(datatype: str) -> None:
    """Up to the limit, and its pieces fit together."""
    array = np.random.default_rng(0).integers(0, 256, (MAX_JSON_INPUT // 64, 8, 8, 1)).astype(DTYPES[datatype])
    about = {"name": "x", "shape": array.shape, "datatype": datatype, "data": array.tolist()}
    body = json.dumps({"inputs": [about]}).encode()
    assert len(body) > 40 * PIECE_BYTES
    np.testing.assert_array_equal(read(body)["x"], array)


VALID = (
    b'{"inputs":[{"name":"x","shape":[2,1],"datatype":"FP32","data":[[1.5],[-2e3]]},{"name":"y","shape":[1],'
    b'"datatype":"BYTES","parameters":{"binary_data_size":5}}],"parameters":{"a":"\\"b"}}'
)


@given(st.integers(0, len(VALID)), st.integers(0, 9), st.binary(max_size=9), st.sampled_from([None, 0, -1, 1]))
def test_any_bytes_are_read_or_refused(start: int, cut: int, noise: bytes, beyond: int | None) -> None:
    """A body with any part of it replaced, and any length of the JSON."""
    text = VALID[:start] + noise + VALID[start + cut :]
    header = None if beyond is None else str(len(text) + beyond)
    with suppress(Malformed, Invalid, TooLarge):
        read(text + b"\x01\x00\x00\x00z", header)
    assert read(VALID + b"\x01\x00\x00\x00z", str(len(VALID)))["y"] == ["z"]
