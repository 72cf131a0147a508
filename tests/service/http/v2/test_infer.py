"""Inference by the Open Inference Protocol, in bodies built by hand: what goes in, what comes out, what is refused."""

import asyncio
import gzip
import io
import json
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray

from models.bundle import Bundle
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio

Array = NDArray[Any]
LENGTH = "Inference-Header-Content-Length"
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)


def tensor(name: str, datatype: str, values: Any, shape: list[int] | None = None) -> dict[str, Any]:
    """An input as JSON."""
    return {"name": name, "datatype": datatype, "shape": [len(values)] if shape is None else shape, "data": values}


def binary(
    name: str, datatype: str, values: Array | bytes, shape: list[int] | None = None
) -> tuple[dict[str, Any], bytes]:
    """An input in binary: what the JSON says of it, and its bytes."""
    content = values if isinstance(values, bytes) else values.tobytes()
    axes = list(values.shape) if shape is None and not isinstance(values, bytes) else shape
    return {
        "name": name,
        "datatype": datatype,
        "shape": axes,
        "parameters": {"binary_data_size": len(content)},
    }, content


def body_of(*inputs: tuple[dict[str, Any], bytes], **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A body with binary inputs, and its header."""
    text = json.dumps({"inputs": [about for about, _ in inputs], **fields}).encode()
    return text + b"".join(content for _, content in inputs), {LENGTH: str(len(text))}


async def infer(client: httpx.AsyncClient, model: str, *inputs: Any, **fields: Any) -> dict[str, Any]:
    """The reply to inputs as JSON."""
    reply = await client.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return dict(reply.json())


def outputs(reply: httpx.Response) -> dict[str, Array]:
    """The outputs of a reply, from the JSON or after it."""
    assert reply.status_code == 200, reply.text
    dtypes = {"UINT8": "<u1", "FP32": "<f4"}
    length = int(reply.headers.get(LENGTH, len(reply.content)))
    at, found = length, {}
    for output in json.loads(reply.content[:length])["outputs"]:
        dtype, size = dtypes[output["datatype"]], output.get("parameters", {}).get("binary_data_size")
        data = output["data"] if size is None else np.frombuffer(reply.content[at : at + size], dtype)
        at += size or 0
        found[output["name"]] = np.asarray(data, dtype).reshape(output["shape"])
    assert at == len(reply.content)
    return found


def refusal(reply: httpx.Response, status: int) -> str:
    """The reason of an error in the protocol's shape."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json"), reply.text
    assert set(reply.json()) == {"error"}
    return str(reply.json()["error"])


async def sampled(client: httpx.AsyncClient, query: str) -> Array:
    """What /sample gives."""
    reply = await client.get(f"/sample?format=npy&{query}")
    assert reply.status_code == 200, reply.text
    images: Array = np.load(io.BytesIO(reply.content))
    return images


# ---------------------------------------------------------------------------------------------------- the generator


@pytest.mark.parametrize("is_binary", [False, True])
async def test_a_generator_gives_the_images_of_sample(client: httpx.AsyncClient, is_binary: bool) -> None:  # noqa: FBT001
    """Inputs and outputs, as JSON and in binary, to the bit."""
    given = {"seed": 7, "first_index": 5, "count": 3}
    numbers = [binary(name, "INT64", np.array([value])) for name, value in given.items()]
    numbers += [
        binary("labels", "INT64", np.array([2, 0, 1])),
        binary("truncation", "FP32", np.array([0.7], np.float32)),
    ]
    body, headers = body_of(*numbers, parameters={"binary_data_output": is_binary})
    if not is_binary:
        inputs = [tensor(name, "INT64", [value]) for name, value in given.items()]
        inputs += [tensor("labels", "INT64", [2, 0, 1]), tensor("truncation", "FP32", [0.7])]
        body, headers = json.dumps({"inputs": inputs}).encode(), {}
    reply = await client.post("/v2/models/cond/infer", content=body, headers=headers)
    expected = await sampled(client, "bundle=cond&seed=7&first_index=5&count=3&labels=2,0,1&truncation=0.7")
    np.testing.assert_array_equal(outputs(reply)["images"], expected)
    assert reply.headers["content-type"] == ("application/octet-stream" if is_binary else "application/json")
    assert reply.headers["server-timing"].startswith("decode;dur=")


async def test_scalars_may_be_parameters(client: httpx.AsyncClient) -> None:
    """One element is the same as a parameter; labels also by name, for all images."""
    reply = await client.post(
        "/v2/models/cond/infer",
        json={"parameters": {"seed": 7, "count": 2, "labels": "dog", "truncation": 1, "priority": 3, "other": "x"}},
    )
    expected = await sampled(client, "bundle=cond&seed=7&count=2&labels=dog")
    np.testing.assert_array_equal(outputs(reply)["images"], expected)


async def test_the_reply_says_how_to_ask_again(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """It has the id of the request, the model's version, and the seed that was drawn."""
    first = await infer(client, "tiny", id="mine")
    assert (first["id"], first["model_name"], first["model_version"]) == ("mine", "tiny", tiny_bundles["tiny"].version)
    seed = first["parameters"]["seed"]
    again = await infer(client, f"tiny/versions/{first['model_version']}", tensor("seed", "INT64", [seed]))
    assert again["outputs"] == first["outputs"]
    assert "id" not in again


async def test_labels_may_be_names(client: httpx.AsyncClient) -> None:
    """BYTES hold them, as JSON and in binary."""
    expected = await sampled(client, "bundle=cond&seed=1&labels=owl,cat")
    names = b"".join(struct.pack("<I", len(name)) + name for name in (b"owl", b"cat"))
    body, headers = body_of(binary("labels", "BYTES", names, [2]), parameters={"seed": 1})
    for reply in (
        await client.post("/v2/models/cond/infer", content=body, headers=headers),
        await client.post(
            "/v2/models/cond/infer",
            json={"inputs": [tensor("labels", "BYTES", ["owl", "cat"])], "parameters": {"seed": 1}},
        ),
    ):
        np.testing.assert_array_equal(outputs(reply)["images"], expected)


@pytest.mark.parametrize(
    "content_type", [None, "application/octet-stream", "application/json", "text/plain", "image/png", "nonsense"]
)
async def test_the_content_type_of_a_request_does_not_matter(
    client: httpx.AsyncClient, content_type: str | None
) -> None:
    """The header with the JSON's length decides how a body is read."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    body, length = body_of(binary("seed", "INT64", np.array([4])))
    for content, more in ((body, length), (b'{"parameters": {"seed": 4}}', {})):
        reply = await client.post("/v2/models/tiny/infer", content=content, headers=headers | more)
        np.testing.assert_array_equal(outputs(reply)["images"], await sampled(client, "seed=4"))


async def test_nulls_and_unknown_fields_are_ignored(client: httpx.AsyncClient) -> None:
    """As clients of the protocol expect: some send every field that they know."""
    asked: dict[str, Any] = {
        "model_name": "tiny", "id": None, "outputs": None, "parameters": {"seed": 3, "count": None, "data": 0},
        "inputs": [tensor("count", "INT64", [2]) | {"parameters": None, "comment": "two"}],
    }  # fmt: skip
    asked["inputs"][0]["data"] = [2.0]  # as elsewhere in JSON, this is 2
    nothing = {"shared_memory_region": None, "classification": None, "binary_data_size": None, "binary_data": None}
    for more in ({}, {"outputs": [{"name": "images", "parameters": nothing}]}):
        asked["inputs"][0]["parameters"] = nothing if more else None
        reply = await client.post("/v2/models/tiny/infer?anything=1", json=asked | more)
        np.testing.assert_array_equal(outputs(reply)["images"], await sampled(client, "seed=3&count=2"))


# ------------------------------------------------------------------------------------------------- the discriminator


@pytest.mark.parametrize("labels", [None, [2, 0, 1]])
async def test_a_discriminator_gives_the_verdicts_of_discriminate(
    client: httpx.AsyncClient, labels: list[int] | None
) -> None:
    """Images as JSON, flat and nested, and in binary; the outputs as float32."""
    expected = await client.post(
        "/discriminate?bundle=cond" + ("" if labels is None else f"&labels={','.join(map(str, labels))}"),
        content=npy(IMAGES),
        headers={"Content-Type": "application/x-npy"},
    )
    more = [] if labels is None else [tensor("labels", "INT64", labels)]
    shape = list(IMAGES.shape)
    body, headers = body_of(
        binary("images", "UINT8", IMAGES), *([] if labels is None else [binary("labels", "INT64", np.array(labels))])
    )
    for reply in (
        await client.post("/v2/models/cond.discriminator/infer", content=body, headers=headers),
        *[
            await client.post("/v2/models/cond.discriminator/infer", json={"inputs": [images, *more]})
            for images in (
                tensor("images", "UINT8", IMAGES.tolist(), shape),
                tensor("images", "UINT8", IMAGES.reshape(-1).tolist(), shape),
            )
        ],
    ):
        for name, values in outputs(reply).items():
            verdicts = [result[name] for result in expected.json()["results"]]
            np.testing.assert_array_equal(values, np.array(verdicts, np.float32))
        assert set(outputs(reply)) == {"probability_real", "logit"}


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


async def test_a_body_may_be_one_tensor_alone(client: httpx.AsyncClient) -> None:
    """With 0 as the JSON's length the body is one image, and the outputs come in binary."""
    raw = await client.post("/v2/models/tiny.discriminator/infer", content=IMAGES[0].tobytes(), headers={LENGTH: "0"})
    reply = await client.post(
        "/v2/models/tiny.discriminator/infer",
        json={"inputs": [tensor("images", "UINT8", IMAGES[:1].tolist(), [1, 8, 8, 1])]},
    )
    assert LENGTH in raw.headers
    for name, values in outputs(reply).items():
        np.testing.assert_array_equal(values, outputs(raw)[name])
    post = client.post
    assert "64" in refusal(await post("/v2/models/tiny.discriminator/infer", content=b"1", headers={LENGTH: "0"}), 422)
    assert "one input" in refusal(await post("/v2/models/tiny/infer", content=b"1", headers={LENGTH: "0"}), 400)


async def test_outputs_are_those_that_are_wanted(client: httpx.AsyncClient) -> None:
    """In the order of the request, each as JSON or in binary as it says, else as the request says."""
    images = tensor("images", "UINT8", IMAGES.tolist(), list(IMAGES.shape))
    every = outputs(await client.post("/v2/models/tiny.discriminator/infer", json={"inputs": [images]}))
    cases: list[tuple[list[dict[str, Any]], list[str]]] = [
        ([{"name": "logit"}], []),
        ([{"name": "logit", "parameters": {"binary_data": True}}], ["logit"]),
        ([{"name": "logit", "parameters": {"binary_data": False}}, {"name": "probability_real"}], ["probability_real"]),
        ([{"name": "logit"}, {"name": "probability_real"}], ["logit", "probability_real"]),
        ([], ["probability_real", "logit"]),
    ]
    for wanted, in_binary in cases:
        parameters = {} if in_binary in ([], ["logit"]) else {"binary_data_output": True}
        asked = {"inputs": [images], "outputs": wanted, "parameters": parameters}
        reply = await client.post("/v2/models/tiny.discriminator/infer", json=asked)
        found = outputs(reply)
        assert list(found) == ([one["name"] for one in wanted] or list(every))
        for name, values in found.items():
            np.testing.assert_array_equal(values, every[name])
        head = json.loads(reply.content[: int(reply.headers.get(LENGTH, len(reply.content)))])
        assert [one["name"] for one in head["outputs"] if "data" not in one] == in_binary


# ------------------------------------------------------------------------------------------------------ what is refused

SEED = tensor("seed", "INT64", [1])


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"inputs": [SEED, SEED]}, "'seed' is given twice"),
        ({"inputs": [SEED], "parameters": {"seed": 2}}, "seed: given both"),
        ({"inputs": [tensor("noise", "INT64", [1])]}, "there is no 'noise'"),
        ({"inputs": [tensor("seed", "FP32", [1.0])]}, "seed: is FP32; send INT64"),
        ({"inputs": [tensor("seed", "FP64", [1.0])]}, "datatype 'FP64'"),
        ({"inputs": [tensor("seed", "INT64", [1, 2])]}, "seed: has 2 elements"),
        ({"inputs": [tensor("seed", "INT64", [-1])]}, "seed"),
        ({"inputs": [tensor("seed", "INT64", [2**53])]}, "seed"),
        ({"inputs": [tensor("seed", "INT64", [2**63])]}, "range of INT64"),
        ({"inputs": [tensor("seed", "INT64", [10**60])]}, "range of INT64"),
        ({"inputs": [tensor("seed", "INT64", [1.5])]}, "whole numbers"),
        ({"inputs": [tensor("seed", "INT64", [9007199254740993, 1.0])]}, "whole numbers"),
        ({"inputs": [tensor("seed", "INT64", [1e300])]}, "whole numbers"),
        ({"inputs": [tensor("seed", "INT64", [True])]}, "array of numbers"),
        ({"inputs": [tensor("seed", "INT64", [None])]}, "array of numbers"),
        ({"inputs": [tensor("seed", "INT64", ["1"])]}, "array of numbers"),
        ({"inputs": [tensor("seed", "INT64", [{"a": 1}])]}, "array of numbers"),
        ({"inputs": [SEED | {"data": 1}]}, "array of numbers"),
        ({"inputs": [SEED | {"data": {"a": [1]}}]}, "array of numbers"),
        ({"inputs": [SEED | {"data": []}]}, "1 elements"),
        ({"inputs": [SEED | {"data": [[1]]}]}, "nested as its shape"),
        ({"inputs": [SEED | {"data": None}]}, "neither data nor"),
        ({"inputs": [SEED | {"shape": [-1]}]}, "shape"),
        ({"inputs": [SEED | {"shape": [0], "data": []}]}, "shape"),
        ({"inputs": [SEED | {"shape": [2**40]}]}, "shape"),
        ({"inputs": [SEED | {"shape": [2**30] * 4}]}, "binary-data extension"),
        ({"inputs": [SEED | {"shape": [1] * 9}]}, "shape"),
        ({"inputs": [SEED | {"shape": ["1"]}]}, "shape"),
        ({"inputs": [SEED | {"parameters": {"shared_memory_region": "x"}}]}, "shared memory"),
        ({"inputs": [SEED | {"parameters": {"binary_data_size": 8}}]}, "both"),
        ({"inputs": [tensor("truncation", "FP32", [0])]}, "truncation"),
        ({"inputs": [tensor("truncation", "FP32", [1e39])]}, "finite"),
        ({"inputs": [tensor("labels", "INT64", [0])]}, "no labels"),
        ({"inputs": [{"name": "seed"}]}, "inputs.0.shape"),
        ({"inputs": {}}, "inputs"),
        ({"inputs": [SEED] * 40}, "inputs"),
        ({"parameters": {"seed": "5"}}, "seed"),
        ({"parameters": {"count": 0}}, "count"),
        ({"parameters": {"count": 1e99}}, "count"),
        ({"parameters": {"count": 5000}}, "count"),
        ({"parameters": {"timeout": "soon"}}, "timeout"),
        ({"parameters": {"timeout": -1}}, "timeout"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output"),
        ({"parameters": [1]}, "parameters"),
        ({"outputs": [{"name": "logit"}]}, "there is no 'logit'"),
        ({"outputs": [{"name": "images"}] * 2}, "asked for twice"),
        ({"outputs": [{"name": "images", "parameters": {"classification": 3}}]}, "classification"),
        ({"outputs": [{"name": "images", "parameters": {"shared_memory_region": "x"}}]}, "shared_memory"),
        ({"id": 7}, "id"),
        ({"id": "x" * 2000}, "id"),
        ([], "body"),
        ("text", "body"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_reason(
    client: httpx.AsyncClient, asked: Any, reason: str
) -> None:
    """Each mistake is named in a sentence, in the protocol's shape."""
    assert reason in refusal(await client.post("/v2/models/tiny/infer", json=asked), 422)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "images is missing"),
        ([tensor("images", "UINT8", [0] * 64, [8, 8])], "send [n, 8, 8, 1]"),
        ([tensor("images", "UINT8", [0] * 64, [1, 8, 8, 1]) | {"datatype": "INT64"}], "send UINT8"),
        ([tensor("images", "UINT8", [256] * 64, [1, 8, 8, 1])], "range of UINT8"),
        ([tensor("images", "UINT8", [-1] * 64, [1, 8, 8, 1])], "range of UINT8"),
        ([tensor("images", "UINT8", [0] * 63, [1, 8, 8, 1])], "64 elements"),
        ([tensor("images", "UINT8", [0] * 64, [1, 8, 8, 1]), tensor("seed", "INT64", [1])], "there is no 'seed'"),
        ([tensor("images", "UINT8", [0] * 64, [1, 8, 8, 1]), tensor("labels", "INT64", [9])], "'9' is not one of"),
    ],
)
async def test_images_that_do_not_fit_are_refused(client: httpx.AsyncClient, inputs: Any, reason: str) -> None:
    """The discriminator takes what its metadata says."""
    reply = await client.post("/v2/models/cond.discriminator/infer", json={"inputs": inputs})
    assert reason in refusal(reply, 422)


@pytest.mark.parametrize(
    ("body", "length", "status", "reason"),
    [
        (b"{}", "3", 400, "is not a number of bytes"),
        (b"{}", "-1", 400, "is not a number of bytes"),
        (b"{}", "2x", 400, "is not a number of bytes"),
        (b"{}", "", 400, "is not a number of bytes"),
        (b"{}", "9" * 30, 400, "is not a number of bytes"),
        (b"{}", "1", 400, "not JSON"),
        (b"{}more", "2", 400, "4 bytes after the JSON belong to no input"),
        (b"{", None, 400, "not JSON"),
        (b'{"inputs":[{"name":"seed","shape":[1],"datatype":"INT64","data":[NaN]}]}', None, 422, "array of numbers"),
        (b'{"inputs":[{"name":"seed","shape":[1],"datatype":"INT64","data":[1,]}]}', None, 422, "array of numbers"),
        (b'{"inputs":[{"name":"seed","shape":[1],"datatype":"INT64","data":[1]]}]}', None, 400, "not JSON"),
        (b'{"inputs":[{"name":"seed","shape":[2],"datatype":"INT64","data":[[1],[2]', None, 400, "not JSON"),
        (b'{"inputs":[{"name":"seed","shape":[1],"datatype":"INT64","d\\u0061ta":9}]}', None, 422, "array of numbers"),
        (
            b'{"inputs":[{"name":"s","shape":[1],"datatype":"INT64","data":[' + b"9" * 99 + b"]}]}",
            None,
            422,
            "array",
        ),
        (b'{"id":"' + b"x" * 2**20 + b'"}', None, 422, "strings"),
        (b'{"inputs":[{"name":"seed","shape":[1],"datatype":"INT64","data":[1e400]}]}', None, 422, "whole numbers"),
        (b'{"inputs":[{"name":"truncation","shape":[1],"datatype":"FP32","data":[1e400]}]}', None, 422, "finite"),
        (b'{"id":"unclosed', None, 422, "strings"),
        (
            b'{"inputs":[{"name":"s","shape":[1],"datatype":"INT64","data":[1' + b" " * 2**20 + b"]}]}",
            None,
            422,
            "comma",
        ),
        (b'{"inputs":[' + b'"",' * 2**18 + b"1]}", None, 422, "strings"),
        (b'{"inputs":[' + b"[" * 2**20, None, 422, "arrays and objects"),
        (b'{"parameters":{"x":[' + b"1," * 2**18 + b"1]}}", None, 422, "values"),
        (b" " * (2**22 + 1), None, 413, "4194304"),
    ],
    ids=range(23),
)
async def test_bodies_of_another_kind_are_refused(
    client: httpx.AsyncClient, body: bytes, length: str | None, status: int, reason: str
) -> None:
    """Truncated, endless, nested without end, or with a length that lies."""
    headers = {} if length is None else {LENGTH: length}
    assert reason in refusal(await client.post("/v2/models/tiny/infer", content=body, headers=headers), status)


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        (binary("seed", "INT64", np.array([1], np.int32), [1]), 422, "needs 8 bytes"),
        (binary("seed", "INT64", b"12345678" * 2, [1]), 422, "needs 8 bytes"),
        (binary("seed", "INT64", b"12345678", [2**31 - 1] * 8), 422, "needs"),
        (({"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}}, b"1"), 400, "1."),
        (
            ({"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": -8}}, b""),
            422,
            "size",
        ),
        (
            ({"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": "8"}}, b""),
            422,
            "size",
        ),
        (binary("labels", "INT64", np.zeros(2**21, np.int64)), 422, "2097152 labels; one request may bring 4096"),
        (binary("truncation", "FP32", np.array([np.nan], np.float32)), 422, "finite"),
        (binary("truncation", "FP32", np.array([np.inf], np.float32)), 422, "finite"),
        (binary("labels", "BYTES", b"\xff\xff\xff\xffx", [1]), 422, "announced"),
        (binary("labels", "BYTES", b"\x01\x00", [1]), 422, "announced"),
        (binary("labels", "BYTES", b"\x01\x00\x00\x00\xff", [1]), 422, "no labels"),
        (binary("labels", "BYTES", b"\x00\x00\x00\x00" * 2**18, [2**18]), 422, "over 131072"),
        (binary("labels", "BYTES", b"\x00\x00\x00\x00" * 2, [1]), 422, "others"),
        (binary("labels", "BYTES", b"\x01\x00\x00\x00x", [2]), 422, "others"),
    ],
    ids=range(15),
)
async def test_binary_tensors_that_lie_are_refused(
    client: httpx.AsyncClient, given: tuple[dict[str, Any], bytes], status: int, reason: str
) -> None:
    """Sizes that differ from the shape's, from what is there, and text that is none."""
    body, headers = body_of(given)
    assert reason in refusal(await client.post("/v2/models/tiny/infer", content=body, headers=headers), status)


async def test_all_texts_of_a_request_are_bounded_together(client: httpx.AsyncClient) -> None:
    """Each is an object in Python, and a request may have many tensors."""
    content, headers = body_of(*(binary(name, "BYTES", bytes(2**18), [2**16]) for name in ("a", "b", "c")))
    reply = await client.post("/v2/models/tiny/infer", content=content, headers=headers)
    assert "over 131072 elements of BYTES" in refusal(reply, 422)


async def test_the_refusal_of_large_tensors_as_json_names_binary(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]
) -> None:
    """2^17 elements in and 2^20 out; in binary there is no such bound."""
    size = tiny_bundles["tiny"].manifest.image.size
    most = 2**20 // size
    assert most <= 4096 * 4
    count = 4096
    images = tensor("images", "UINT8", [0] * (2**17 + size), [2**17 // size + 1, 8, 8, 1])
    reply = await client.post("/v2/models/tiny.discriminator/infer", json={"inputs": [images]})
    assert "binary-data extension" in refusal(reply, 422)
    reply = await client.post("/v2/models/rgb/infer", json={"parameters": {"count": count * 2}})
    assert "count" in refusal(reply, 422)
    for body in (b" " * (2**22 + 1), sent_in_pieces()):
        reply = await client.post("/v2/models/tiny/infer", content=body)
        assert "binary-data extension" in refusal(reply, 413)


async def sent_in_pieces() -> AsyncIterator[bytes]:
    """A body that is too long for JSON, and does not say so beforehand."""
    for _ in range(65):
        yield b" " * 2**16


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_body_means_the_same(
    client: httpx.AsyncClient, encoding: str, compress: Callable[[bytes], bytes]
) -> None:
    """JSON alone, and JSON with tensors after it, whose header counts plain bytes."""
    headers = {"Content-Encoding": encoding}
    plain = json.dumps({"parameters": {"seed": 7}}).encode()
    sent = await client.post("/v2/models/tiny/infer", content=compress(plain), headers=headers)
    asked = await client.post("/v2/models/tiny/infer", content=plain)
    assert np.array_equal(outputs(sent)["images"], outputs(asked)["images"])
    body, length = body_of(binary("images", "UINT8", IMAGES))
    model = "/v2/models/tiny.discriminator/infer"
    sent = await client.post(model, content=compress(body), headers=headers | length)
    asked = await client.post(model, content=body, headers=length)
    assert np.array_equal(outputs(sent)["logit"], outputs(asked)["logit"])


async def test_what_is_no_compressed_body_is_refused_in_the_protocols_shape(client: httpx.AsyncClient) -> None:
    """Cut, changed, followed by more, or compressed in another way; an empty body is none."""
    whole = gzip.compress(b"{}")
    for body in (whole[:-1], b"x" + whole, whole + b"x", whole + whole, b"", zlib.compress(b"{}")):
        reply = await client.post("/v2/models/tiny/infer", content=body, headers={"Content-Encoding": "gzip"})
        assert "gzip" in refusal(reply, 400)
    reply = await client.post("/v2/models/tiny/infer", content=b"x", headers={"Content-Encoding": "br"})
    assert "br" in refusal(reply, 415)
    assert reply.headers["accept-encoding"] == "identity, gzip, deflate"


async def test_a_compressed_body_is_bounded_by_its_plain_bytes(client: httpx.AsyncClient) -> None:
    """A few kilobytes that would become gigabytes are refused at the bound."""
    bomb = gzip.compress(bytes(2**26))
    for headers, words in (({}, "binary-data extension"), ({LENGTH: "2"}, "decompressed")):
        reply = await client.post("/v2/models/tiny/infer", content=bomb, headers={"Content-Encoding": "gzip"} | headers)
        assert words in refusal(reply, 413)


# ---------------------------------------------------------------------------------------------- limits of the service


async def test_a_timeout_shortens_the_deadline(
    app: FastAPI, client: httpx.AsyncClient, hold_engine: Callable[[FastAPI], AbstractAsyncContextManager[None]]
) -> None:
    """The parameter is in microseconds; a longer one than the service's changes nothing."""
    async with hold_engine(app):
        reply = await client.post("/v2/models/tiny/infer", json={"parameters": {"timeout": 2000}})
        assert "2 ms" in refusal(reply, 504)
    for timeout in (0, 10**12):
        await infer(client, "tiny", parameters={"timeout": timeout})


async def test_a_full_queue_refuses_with_the_time_to_wait(
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
    tiny_settings: Callable[..., Settings],
    hold_engine: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    until: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    """As for the service's own routes, and for both models."""
    app = create_app(tiny_settings(max_queued_images=4, max_count=4))
    async with start(app) as client, asyncio.TaskGroup() as group, hold_engine(app):
        manager, labels = app.state.manager, {"bundle": "tiny", "operation": "sample"}
        batches = partial(manager.metrics.registry.get_sample_value, "gan_batch_images_count", labels)
        group.create_task(infer(client, "tiny"))
        await until(lambda: batches() == 1)
        group.create_task(infer(client, "tiny", parameters={"count": 4}))
        await until(lambda: manager.batcher.queued_rows == 4)
        body, headers = body_of(binary("images", "UINT8", IMAGES))
        for reply in (
            await client.post("/v2/models/tiny/infer", json={"parameters": {"count": 4}}),
            await client.post("/v2/models/tiny.discriminator/infer", content=body, headers=headers),
        ):
            assert "busy" in refusal(reply, 429)
            assert int(reply.headers["retry-after"]) >= 1


# ------------------------------------------------------------------------------------------------------------- latents


async def test_images_of_given_latents(client: httpx.AsyncClient) -> None:
    """As JSON and in binary, to the bit; a class for each, and truncation, apply."""
    latents = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32)
    labels, halved = np.array([0, 2, 1]), [{"truncation": 0.5}, {}]
    found = []
    for parameters, scale in zip(halved, (1, 0.5), strict=True):
        body, headers = body_of(
            binary("latents", "FP32", latents * np.float32(scale)),
            binary("labels", "INT64", labels),
            parameters=parameters,
        )
        found.append(outputs(await client.post("/v2/models/cond/infer", content=body, headers=headers))["images"])
    asked = [tensor("latents", "FP32", latents.tolist(), [3, 12]), tensor("labels", "INT64", [0, 2, 1])]
    reply = await client.post(
        "/v2/models/cond/infer", json={"inputs": asked, "parameters": {"truncation": 0.5, "count": 3}}
    )
    for images in (found[1], outputs(reply)["images"]):
        np.testing.assert_array_equal(images, found[0])
    assert not reply.json()["parameters"], "there is no seed"
    one = await infer(
        client, "cond", tensor("latents", "FP32", (latents[1] / 2).tolist(), [1, 12]), tensor("labels", "INT64", [2])
    )
    np.testing.assert_array_equal(np.uint8(one["outputs"][0]["data"]).reshape(8, 8, 1), found[0][1])


@pytest.mark.parametrize(
    ("model", "shape", "parameters", "reason"),
    [
        ("tiny", [1, 11], {}, "have 12"),
        ("tiny", [12], {}, "send [n, dim]"),
        ("tiny", [1, 12], {"seed": 1}, "seed: latents take its place"),
        ("tiny", [1, 12], {"first_index": 1}, "first_index: latents take its place"),
        ("tiny", [2, 12], {"count": 1}, "1 images of 2 latents"),
        ("tiny", [4097, 12], {}, "4097 rows"),
        ("cond", [1, 12], {}, "labels: latents draw none"),
        ("tiny", [1, 12], {"labels": 0}, "no labels"),
    ],
)
async def test_latents_that_do_not_fit_are_refused(
    client: httpx.AsyncClient, model: str, shape: list[int], parameters: dict[str, Any], reason: str
) -> None:
    """Their number, their length, and what they take the place of."""
    body, headers = body_of(binary("latents", "FP32", np.zeros(shape, np.float32)), parameters=parameters)
    assert reason in refusal(await client.post(f"/v2/models/{model}/infer", content=body, headers=headers), 422)
