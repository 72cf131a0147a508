"""NVIDIA's tritonclient works unchanged: run by `make test-clients`, in an environment of its own."""

import asyncio
import io
import os
import struct
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.http.auth import BasicAuth
from tritonclient.utils import InferenceServerException

URL = os.environ["SERVICE_URL"]
ADDRESS = URL.removeprefix("http://")
BOTH_WAYS = pytest.mark.parametrize("way", ["json", "binary"])


@pytest.fixture(scope="module")
def client() -> Iterator[triton.InferenceServerClient]:
    """A client of the service."""
    with triton.InferenceServerClient(ADDRESS) as one:
        yield one


def key(name: str = "SERVICE_KEY") -> dict[str, str]:
    """Headers with a key. New ones for each request, because the client writes others into them."""
    return {"Authorization": f"Bearer {os.environ[name]}"}


def tensor(name: str, array: Any, *, binary: bool = True) -> triton.InferInput:
    """An input."""
    datatype = {"i": "INT64", "f": "FP32", "u": "UINT8", "O": "BYTES"}[array.dtype.kind]
    one = triton.InferInput(name, list(array.shape), datatype)
    return one.set_data_from_numpy(array, binary_data=binary)


def sampled(query: str) -> Any:
    """What /sample gives."""
    asked = urllib.request.Request(f"{URL}/sample?format=npy&{query}", headers=key())
    return np.load(io.BytesIO(urllib.request.urlopen(asked).read()))


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    """Status and message of the error that the client raises."""
    with pytest.raises(InferenceServerException) as error:
        call()
    return error.value.status(), error.value.message()


def test_probes_need_no_key(client: triton.InferenceServerClient) -> None:
    """Live and ready."""
    assert client.is_server_live()
    assert client.is_server_ready()


def test_metadata_of_the_server_and_its_models(client: triton.InferenceServerClient) -> None:
    """Names, versions, inputs and outputs, with and without a version."""
    assert "binary_tensor_data" in client.get_server_metadata(headers=key())["extensions"]
    model = client.get_model_metadata("mnist", headers=key())
    (version,) = model["versions"]
    assert client.get_model_metadata("mnist", version, headers=key()) == model
    assert model["outputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}]
    for name in ("mnist", "mnist.discriminator", "mnist-mlp"):
        assert client.is_model_ready(name, headers=key())
    assert client.is_model_ready("mnist", version, headers=key())
    assert not client.is_model_ready("mnist", "1", headers=key())
    assert not client.is_model_ready("nobody", headers=key())
    config = client.get_model_config("mnist.discriminator", version, headers=key())
    assert [one["name"] for one in config["input"]] == ["images", "labels"]


@BOTH_WAYS
def test_images_are_those_of_sample(client: triton.InferenceServerClient, way: str) -> None:
    """Inputs and outputs as JSON and in binary, to the bit."""
    result = client.infer(
        "mnist",
        [
            tensor("seed", np.array([7]), binary=way == "binary"),
            tensor("first_index", np.array([5]), binary=way == "binary"),
            tensor("count", np.array([3]), binary=way == "binary"),
            tensor("labels", np.array([3, 1, 4]), binary=way == "binary"),
            tensor("truncation", np.float32([0.7]), binary=way == "binary"),
        ],
        outputs=[triton.InferRequestedOutput("images", binary_data=way == "binary")],
        request_id="mine",
        headers=key(),
    )
    expected = sampled("seed=7&first_index=5&count=3&labels=3,1,4&truncation=0.7")
    np.testing.assert_array_equal(result.as_numpy("images"), expected)
    assert result.get_response()["id"] == "mine"


def test_scalars_may_be_parameters(client: triton.InferenceServerClient) -> None:
    """Without any input; with no outputs named, the client asks for binary."""
    asked = {"seed": 7, "count": 2, "labels": "3", "truncation": 0.5}
    result = client.infer("mnist", [], parameters=asked, headers=key(), priority=1, timeout=10_000_000)
    np.testing.assert_array_equal(result.as_numpy("images"), sampled('seed=7&count=2&labels="3"&truncation=0.5'))
    again = client.infer("mnist", [], parameters={"count": 2}, headers=key())
    seed = again.get_response()["parameters"]["seed"]
    np.testing.assert_array_equal(again.as_numpy("images"), sampled(f"seed={seed}&count=2"))


@BOTH_WAYS
def test_labels_may_be_names(client: triton.InferenceServerClient, way: str) -> None:
    """As BYTES."""
    labels = tensor("labels", np.array([b"4", b"2"], dtype=np.object_), binary=way == "binary")
    result = client.infer("mnist", [labels], parameters={"seed": 1}, headers=key())
    np.testing.assert_array_equal(result.as_numpy("images"), sampled("seed=1&labels=4,2"))


@BOTH_WAYS
def test_images_of_latents(client: triton.InferenceServerClient, way: str) -> None:
    """The same whichever way they are sent, and by a mlp."""
    latents = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    inputs = [
        tensor("latents", latents, binary=way == "binary"),
        tensor("labels", np.array([3, 4]), binary=way == "binary"),
    ]
    images = client.infer("mnist", inputs, headers=key()).as_numpy("images")
    assert images.shape == (2, 28, 28, 1)
    alone = client.infer("mnist", [tensor("latents", latents[1:])], parameters={"labels": 4}, headers=key())
    np.testing.assert_array_equal(images[1:], alone.as_numpy("images"))


@BOTH_WAYS
def test_verdicts(client: triton.InferenceServerClient, way: str) -> None:
    """The discriminator is a model of its own."""
    images = sampled("seed=7&count=5")
    outputs = [triton.InferRequestedOutput(name, binary_data=way == "binary") for name in ("logit", "probability_real")]
    result = client.infer(
        "mnist.discriminator", [tensor("images", images, binary=way == "binary")], outputs=outputs, headers=key()
    )
    assert [one["name"] for one in result.get_response()["outputs"]] == ["logit", "probability_real"]
    probabilities = result.as_numpy("probability_real")
    assert probabilities.shape == (5,)
    assert probabilities.dtype == np.float32
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_many_images_need_no_json(client: triton.InferenceServerClient) -> None:
    """4,096 images come in binary; as JSON they are refused, and the refusal says how to get them."""
    images = client.infer("mnist", [], parameters={"seed": 1, "count": 4096}, headers=key()).as_numpy("images")
    assert images.shape == (4096, 28, 28, 1)
    verdicts = client.infer("mnist.discriminator", [tensor("images", images)], headers=key())
    assert verdicts.as_numpy("logit").shape == (4096,)
    wanted = [triton.InferRequestedOutput("images", binary_data=False)]
    status, reason = refusal(
        lambda: client.infer("mnist", [], outputs=wanted, parameters={"count": 4096}, headers=key())
    )
    assert status == "422"
    assert "binary-data extension" in reason


def test_requests_side_by_side() -> None:
    """`async_infer` sends them over several connections."""
    with triton.InferenceServerClient(ADDRESS, concurrency=4) as client:
        waiting = [client.async_infer("mnist", [], parameters={"seed": seed}, headers=key()) for seed in range(8)]
        images = np.concatenate([one.get_result().as_numpy("images") for one in waiting])
    np.testing.assert_array_equal(images, np.concatenate([sampled(f"seed={seed}") for seed in range(8)]))


def test_the_asyncio_client() -> None:
    """The same calls."""

    async def calls() -> Any:
        async with aio.InferenceServerClient(ADDRESS) as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("mnist", headers=key())
            assert (await client.get_model_metadata("mnist", headers=key()))["name"] == "mnist"
            results = await asyncio.gather(
                *(client.infer("mnist", [], parameters={"seed": seed}, headers=key()) for seed in range(4))
            )
            with pytest.raises(InferenceServerException, match="404"):
                await client.infer("nobody", [], headers=key())
            return np.concatenate([result.as_numpy("images") for result in results])

    expected = np.concatenate([sampled(f"seed={seed}") for seed in range(4)])
    np.testing.assert_array_equal(asyncio.run(calls()), expected)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@BOTH_WAYS
def test_requests_may_be_compressed(client: triton.InferenceServerClient, way: str, algorithm: str) -> None:
    """The images are those of the seed."""
    seed = tensor("seed", np.array([7]), binary=way == "binary")
    reply = client.infer("mnist", [seed], request_compression_algorithm=algorithm, headers=key())
    assert np.array_equal(reply.as_numpy("images"), sampled("seed=7&bundle=mnist"))


def test_replies_that_may_be_compressed_are_understood(client: triton.InferenceServerClient) -> None:
    """The client allows it; the service sends them as they are."""
    for algorithm in ("gzip", "deflate"):
        result = client.infer(
            "mnist", [], parameters={"seed": 3}, response_compression_algorithm=algorithm, headers=key()
        )
        np.testing.assert_array_equal(result.as_numpy("images"), sampled("seed=3"))


def test_statistics(client: triton.InferenceServerClient) -> None:
    """Of one model, of one version, and of all."""
    client.infer("mnist-mlp", [], parameters={"count": 3}, headers=key())
    (one,) = client.get_inference_statistics("mnist-mlp", headers=key())["model_stats"]
    assert one["inference_count"] >= 3
    assert one["inference_stats"]["success"]["count"] >= one["execution_count"] >= 1
    every = client.get_inference_statistics(headers=key())["model_stats"]
    assert {"mnist", "mnist.discriminator", "mnist-mlp", "mnist-mlp.discriminator"} <= {one["name"] for one in every}
    versioned = client.get_inference_statistics("mnist-mlp", one["version"], headers=key())["model_stats"]
    assert [stats["version"] for stats in versioned] == [one["version"]]


def test_bundles_go_and_come_back(client: triton.InferenceServerClient) -> None:
    """Index, unload and load: the last two by an administrator alone, and without a configuration of the client's."""
    assert {one["name"]: one["state"] for one in client.get_model_repository_index(headers=key())}["mnist"] == "READY"
    assert refusal(lambda: client.unload_model("mnist-mlp", headers=key()))[0] == "403"
    client.unload_model("mnist-mlp", headers=key("SERVICE_ADMIN_KEY"))
    try:
        assert not client.is_model_ready("mnist-mlp", headers=key())
        index = {one["name"]: one for one in client.get_model_repository_index(headers=key())}
        assert index["mnist-mlp"]["state"] == "UNAVAILABLE"
        for more in ({"config": "{}"}, {"config": "{}", "files": {"file:1/model.onnx": b"x"}}):
            status, reason = refusal(
                lambda more=more: client.load_model("mnist-mlp", headers=key("SERVICE_ADMIN_KEY"), **more)
            )
            assert status == "422"
            assert "is not taken" in reason
    finally:
        client.load_model("mnist-mlp", headers=key("SERVICE_ADMIN_KEY"))
    assert client.is_model_ready("mnist-mlp", headers=key())
    client.unload_model("mnist-mlp", headers=key("SERVICE_ADMIN_KEY"), unload_dependents=True)
    client.load_model("mnist-mlp", headers=key("SERVICE_ADMIN_KEY"))


def test_errors_say_why(client: triton.InferenceServerClient) -> None:
    """The client reads status and message of every one of them."""
    seed, classes = tensor("seed", np.array([1])), triton.InferRequestedOutput("images", class_count=3)
    for call, status, words in (
        (lambda: client.infer("mnist", []), "401", "key"),
        (lambda: client.infer("mnist", [], headers={"Authorization": "Bearer wrong"}), "401", "not known"),
        (lambda: client.infer("nobody", [], headers=key()), "404", "nobody"),
        (lambda: client.infer("mnist", [], model_version="7", headers=key()), "404", "7"),
        (lambda: client.infer("mnist", [seed, seed], headers=key()), "422", "twice"),
        (lambda: client.infer("mnist", [], parameters={"count": 10**6}, headers=key()), "422", "count"),
        (lambda: client.infer("mnist.discriminator", [], headers=key()), "422", "images"),
        (lambda: client.infer("mnist", [], timeout=1, headers=key()), "504", "deadline"),
        (lambda: client.get_system_shared_memory_status(headers=key()), "404", "route"),
        (lambda: client.get_log_settings(headers=key()), "404", "route"),
        (lambda: client.get_trace_settings(headers=key()), "404", "route"),
        (
            lambda: client.infer("mnist", [], outputs=[classes], headers=key()),
            "422",
            "classification",
        ),
    ):
        found, reason = refusal(call)
        assert found == status, reason
        assert words in reason


def test_shared_memory_is_refused(client: triton.InferenceServerClient) -> None:
    """For inputs and for outputs."""
    seed = triton.InferInput("seed", [1], "INT64")
    seed.set_shared_memory("region", 8)
    images = triton.InferRequestedOutput("images")
    images.set_shared_memory("region", 784)
    for inputs, outputs in (([seed], None), ([], [images])):
        status, reason = refusal(lambda i=inputs, o=outputs: client.infer("mnist", i, outputs=o, headers=key()))
        assert status == "422"
        assert "shared" in reason


def test_a_plugin_that_adds_headers_works(client: triton.InferenceServerClient) -> None:
    """The client's own way to send credentials: ours are no basic ones, and so refused."""
    client.register_plugin(BasicAuth("name", "word"))
    try:
        assert refusal(lambda: client.infer("mnist", []))[0] == "401"
    finally:
        client.unregister_plugin()


def test_bodies_that_the_client_writes_itself() -> None:
    """`generate_request_body` and `parse_response_body`, for those who send by other means."""
    body, length = triton.InferenceServerClient.generate_request_body([tensor("seed", np.array([9]))])
    assert struct.unpack("<q", body[length:]) == (9,)
    headers = key() | {"Inference-Header-Content-Length": str(length)}
    reply = urllib.request.urlopen(urllib.request.Request(f"{URL}/v2/models/mnist/infer", body, headers))
    at = int(reply.headers["Inference-Header-Content-Length"])
    result = triton.InferenceServerClient.parse_response_body(reply.read(), header_length=at)
    np.testing.assert_array_equal(result.as_numpy("images"), sampled("seed=9"))
