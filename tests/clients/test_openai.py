"""OpenAI's own package works unchanged: run by `make test-clients`, in an environment of its own."""

import asyncio
import base64
import io
import os
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import ImagesResponse
from PIL import Image

URL, KEY = f"{os.environ['SERVICE_URL']}/v1", os.environ["SERVICE_KEY"]


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    """A client of the service."""
    with OpenAI(base_url=URL, api_key=KEY, max_retries=0) as one:
        yield one


def pictures(reply: ImagesResponse) -> list[Image.Image]:
    """The pictures of a reply."""
    return [Image.open(io.BytesIO(base64.b64decode(one.b64_json or ""))) for one in reply.data or ()]


def test_models_are_listed_and_found(client: OpenAI) -> None:
    """The embedded bundles, each by the id that the list has."""
    found = list(client.models.list())
    assert {"mnist", "mnist-mlp"} <= {model.id for model in found}
    for model in found:
        assert client.models.retrieve(model.id) == model
        assert model.object == "model"


def test_a_prompt_and_a_size_are_enough(client: OpenAI) -> None:
    """Pictures come in the size that was asked for, and the response has the fields that its type has."""
    reply = client.images.generate(model="mnist", prompt="a handwritten 3", n=2, size="512x512")
    assert [(one.format, one.size) for one in pictures(reply)] == [("PNG", (512, 512))] * 2
    assert (reply.output_format, reply.size, reply.background) == ("png", "512x512", "opaque")
    assert reply.created > 1_700_000_000


def test_every_field_of_the_package_is_accepted(client: OpenAI) -> None:
    """Those that mean nothing here too."""
    reply = client.images.generate(
        model="mnist",
        prompt="",
        background="opaque",
        complexity="low",
        moderation="low",
        n=1,
        output_compression=50,
        output_format="webp",
        partial_images=0,
        quality="high",
        response_format="b64_json",
        safety_identifier="someone",
        size="1024x1536",
        stream=False,
        style="vivid",
        user="someone",
    )
    assert [(one.format, one.size) for one in pictures(reply)] == [("WEBP", (1024, 1536))]


def test_a_seed_gives_the_same_pictures(client: OpenAI) -> None:
    """It is a field of ours; the reply's header names a new one."""
    first = client.images.with_raw_response.generate(model="mnist", prompt="a 7", n=3)
    seed = {"seed": int(first.headers["x-seed"])}
    again = client.images.generate(model="mnist", prompt="a 7", n=3, extra_body=seed)
    assert [one.tobytes() for one in pictures(again)] == [one.tobytes() for one in pictures(first.parse())]


def test_mistakes_are_its_exceptions(client: OpenAI) -> None:
    """Each of the right kind, with the field and the code."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="mnist", prompt="a 3", size="20x20")
    assert (caught.value.param, caught.value.code) == ("size", "invalid")
    assert caught.value.type == "invalid_request_error"
    assert "28x28" in caught.value.message
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="background"):
        client.images.generate(model="mnist", prompt="a 3", background="transparent")
    with pytest.raises(openai.BadRequestError, match="stream"):
        client.images.generate(model="mnist", prompt="a 3", stream=True)
    with pytest.raises(openai.NotFoundError, match="dall-e-2"):
        client.images.generate(model="dall-e-2", prompt="a 3")
    with pytest.raises(openai.NotFoundError, match="route"):
        client.chat.completions.create(model="mnist", messages=[{"role": "user", "content": "hello"}])
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="another").models.list()


def test_the_asynchronous_client_works_too() -> None:
    """Several requests at once."""

    async def ask() -> list[ImagesResponse]:
        async with AsyncOpenAI(base_url=URL, api_key=KEY) as client:
            asked = [client.images.generate(model="mnist", prompt=f"a {digit}", n=4) for digit in range(10)]
            return await asyncio.gather(*asked)

    assert [len(pictures(reply)) for reply in asyncio.run(ask())] == [4] * 10
