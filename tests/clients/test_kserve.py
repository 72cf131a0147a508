"""KServe's Python client works unchanged: run by `make test-clients`, in an environment of its own."""

import asyncio
import io
import os
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
import yaml
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig, models
from kserve.protocol.infer_type import RequestedOutput

URL = os.environ["SERVICE_URL"]
KEY = {"Authorization": f"Bearer {os.environ['SERVICE_KEY']}"}
BOTH_WAYS = pytest.mark.parametrize("way", ["json", "binary"])

T = TypeVar("T")


def call(work: Callable[[InferenceRESTClient], Awaitable[T]]) -> T:
    """What a client of the service gets."""

    async def connected() -> T:
        async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=60)) as client:
            return await work(client)

    return asyncio.run(connected())


def infer(model: str, inputs: list[InferInput], **more: Any) -> Any:
    """The reply to these inputs."""
    request = InferRequest(model_name=model, infer_inputs=inputs, **more)
    return call(lambda client: client.infer(URL, request, model_name=model, headers=dict(KEY)))


def tensor(name: str, array: Any, *, binary: bool) -> InferInput:
    """An input."""
    datatype = {"i": "INT64", "f": "FP32", "u": "UINT8"}[array.dtype.kind]
    one = InferInput(name, list(array.shape), datatype, parameters={})
    one.set_data_from_numpy(array, binary_data=binary)
    return one


def sampled(query: str) -> Any:
    """What /sample gives."""
    asked = urllib.request.Request(f"{URL}/sample?format=npy&{query}", headers=KEY)
    return np.load(io.BytesIO(urllib.request.urlopen(asked).read()))


def test_probes() -> None:
    """Live, ready, and ready of a model."""
    assert call(lambda client: client.is_server_live(URL)) is True
    assert call(lambda client: client.is_server_ready(URL)) is True
    assert call(lambda client: client.is_model_ready(URL, "mnist", headers=KEY)) is True
    assert call(lambda client: client.is_model_ready(URL, "nobody", headers=KEY)) is False


@BOTH_WAYS
def test_images_are_those_of_sample(way: str) -> None:
    """Inputs as tensors, in both ways, to the bit."""
    numbers = [tensor(name, np.array([value]), binary=way == "binary") for name, value in (("seed", 7), ("count", 3))]
    numbers += [
        tensor("labels", np.array([3, 1, 4]), binary=way == "binary"),
        tensor("truncation", np.float32([0.5]), binary=way == "binary"),
    ]
    reply = infer("mnist", numbers)
    expected = sampled("seed=7&count=3&labels=3,1,4&truncation=0.5")
    np.testing.assert_array_equal(reply.outputs[0].as_numpy(), expected)
    assert reply.model_name == "mnist"


@BOTH_WAYS
def test_outputs_in_both_ways(way: str) -> None:
    """As the request's parameter says, and with scalars as parameters."""
    reply = infer("mnist", [], parameters={"seed": 7, "count": 2, "binary_data_output": way == "binary"})
    np.testing.assert_array_equal(reply.outputs[0].as_numpy(), sampled("seed=7&count=2"))


@BOTH_WAYS
def test_verdicts(way: str) -> None:
    """The discriminator is a model of its own; an output that is not asked for does not come."""
    images = tensor("images", sampled("seed=7&count=4"), binary=way == "binary")
    wanted = RequestedOutput("probability_real", parameters={"binary_data": way == "binary"})
    (output,) = infer("mnist.discriminator", [images], request_outputs=[wanted]).outputs
    probabilities = output.as_numpy()
    assert output.name == "probability_real"
    assert probabilities.shape == (4,)
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_nested_data_as_the_documents_show_it() -> None:
    """Lists within lists."""
    images = sampled("seed=7&count=2")
    nested = InferInput("images", list(images.shape), "UINT8", data=images.tolist())
    assert len(infer("mnist.discriminator", [nested]).outputs) == 2


def test_a_request_as_a_dictionary() -> None:
    """The client sends it as it is."""
    asked = {"inputs": [{"name": "seed", "shape": [1], "datatype": "INT64", "data": [7]}]}
    reply = call(lambda client: client.infer(URL, asked, model_name="mnist", headers=KEY))
    np.testing.assert_array_equal(reply.outputs[0].as_numpy(), sampled("seed=7"))


def test_errors_say_why() -> None:
    """The client's error has the status and our reason."""
    for model, parameters, words in (("nobody", {}, "404"), ("mnist", {"count": 0}, "count")):
        with pytest.raises(httpx.HTTPStatusError, match=words):
            infer(model, [], parameters=parameters)


def test_the_manifest_has_the_fields_of_kserve() -> None:
    """Those of an InferenceService and its predictor, with values of their types; tests/deploy checks the pod's."""
    path = Path(__file__).parents[2] / "deploy/kubernetes/kserve/inferenceservice.yaml"
    manifest = yaml.safe_load(path.read_text())
    assert manifest["apiVersion"] == "serving.kserve.io/v1beta1"
    for model, fields in (
        (models.V1beta1InferenceService, manifest),
        (models.V1beta1InferenceServiceSpec, manifest["spec"]),
        (models.V1beta1PredictorSpec, manifest["spec"]["predictor"]),
    ):
        types = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
        assert fields.keys() <= types.keys()
        for name, value in fields.items():
            assert types[name] not in {"bool", "int", "str"} or types[name] == type(value).__name__
