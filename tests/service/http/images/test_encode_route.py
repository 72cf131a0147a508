"""POST /encode: latents that draw the images of the reply, alone and in a crowd; or why there are none."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from models.bundle import Bundle
from models.inference.pixels import UInt8
from models.spec import EncoderSpec, ImageSpec
from service.app import create_app
from service.http.openapi.examples import PIXEL
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
NPY = {"Content-Type": "application/x-npy"}
ENCODER = EncoderSpec(width=2, hidden=8)
SHAPES = {"grey": ImageSpec(channels=1, height=8, width=8), "rgb": ImageSpec(channels=3, height=6, width=10)}


@pytest.fixture(scope="module")
async def finder(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., Bundle],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service whose bundles have encoders: grey; in colour; grey with classes."""
    folder: Path = tmp_path_factory.mktemp("finders")
    for name, image in (*SHAPES.items(), ("cond", SHAPES["grey"])):
        make_tiny(folder / name, image, ("cat", "dog", "owl") if name == "cond" else None, None, encoder=ENCODER)
    settings = {"bundles": folder, "default_bundle": "grey", "device": "cpu", "scored_share": 0}
    async with start(create_app(Settings.model_validate(settings))) as client:
        yield client


def some_images(name: str, count: int) -> UInt8:
    image = SHAPES["rgb" if name == "rgb" else "grey"]
    shape = (count, image.height, image.width, image.channels)
    return np.random.default_rng(count).integers(0, 256, shape, np.uint8)


async def encoded(client: httpx.AsyncClient, name: str, images: UInt8, **more: str) -> list[dict[str, Any]]:
    np.save(body := io.BytesIO(), images)
    reply = await client.post("/encode", params={"bundle": name, **more}, content=body.getvalue(), headers=NPY)
    assert reply.status_code == 200, reply.text
    results: list[dict[str, Any]] = reply.json()["results"]
    assert len(results) == len(images)
    return results


def pixels_of(result: dict[str, Any]) -> UInt8:
    with Image.open(io.BytesIO(base64.b64decode(result["image"]))) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("name", ["grey", "rgb", "cond"])
async def test_the_latents_draw_the_images_of_the_reply(finder: httpx.AsyncClient, name: str) -> None:
    """Sent to /sample they give the same files; the error is the images' own; a class is named where none was given."""
    images = some_images(name, 5)
    results = await encoded(finder, name, images)
    sent = {"bundle": name, "latents": [one["latent"] for one in results], "format": "json"}
    if name == "cond":
        sent["labels"] = [one["label"] for one in results]
        assert set(sent["labels"]) <= {"cat", "dog", "owl"}
        given = await encoded(finder, name, images, labels="owl")
        assert all("label" not in one for one in given)
        assert [one["latent"] for one in given] == sent["latents"]
        again = await finder.post("/sample", json=sent | {"labels": "owl"})
        assert again.json()["images"] == [one["image"] for one in given]
    else:
        assert all("label" not in one for one in results)
    assert (await finder.post("/sample", json=sent)).json()["images"] == [one["image"] for one in results]
    for image, one in zip(images, results, strict=True):
        off = (image.squeeze().astype(float) - pixels_of(one)) / 255
        assert one["error"] == pytest.approx(np.square(off).mean())


@pytest.mark.parametrize("name", ["grey", "rgb", "cond"])
async def test_an_image_has_the_same_latent_alone_and_in_a_crowd(finder: httpx.AsyncClient, name: str) -> None:
    """In one request and in many that share batches, to the last bit."""
    images = some_images(name, 70)
    whole = await encoded(finder, name, images)
    alone = await asyncio.gather(*(encoded(finder, name, images[n : n + 1]) for n in range(0, 70, 7)))
    assert [one for (one,) in alone] == whole[::7]


async def test_an_image_that_can_not_be_read_has_its_problem(finder: httpx.AsyncClient, problem: Problem) -> None:
    """In its place among others; alone it is the reply."""
    junk = base64.b64encode(b"no image").decode()
    reply = await finder.post("/encode", json={"images": [junk, PIXEL, junk]})
    first, second, third = reply.json()["results"]
    assert first["error"]["code"] == third["error"]["code"] == "invalid"
    assert set(second) == {"latent", "error", "image"}
    neither = (await finder.post("/encode", json={"images": [junk, junk]})).json()["results"]
    assert [set(one) for one in neither] == [{"error"}, {"error"}]
    problem(await finder.post("/encode", json={"images": [junk]}), 422, "invalid")
    problem(await finder.post("/encode", json={"images": [PIXEL], "labels": "cat"}), 422, "invalid")
    wrong = await finder.post("/encode", json={"images": [PIXEL], "labels": "cow", "bundle": "cond"})
    assert "cow" in problem(wrong, 422, "invalid")


async def test_what_was_encoded_is_counted_and_told(finder: httpx.AsyncClient) -> None:
    """By operation in the metrics, in Server-Timing, and among a bundle's networks."""
    reply = await finder.post("/encode?bundle=rgb", json={"images": [PIXEL] * 3, "bundle": "rgb"})
    assert reply.status_code == 422  # in the query and in the body
    reply = await finder.post("/encode", json={"images": [PIXEL] * 3, "bundle": "rgb"})
    assert [one.split(";")[0] for one in reply.headers["server-timing"].split(", ")] == [
        *("decode", "queue", "compute", "encode")
    ]
    assert json.loads(reply.content)["bundle"] == "rgb"
    metrics = (await finder.get("/metrics")).text
    assert 'operation="encode"' in metrics
    assert (await finder.get("/bundles/rgb")).json()["networks"] == ["generator", "discriminator", "encoder"]


async def test_a_bundle_without_an_encoder_is_refused(client: httpx.AsyncClient, problem: Problem) -> None:
    """For each kind of body; what is wrong with the request itself is said first."""
    png = {"Content-Type": "image/png"}
    assert "'tiny'" in problem(await client.post("/encode", content=b"x", headers=png), 422, "no_encoder")
    form = await client.post("/encode?bundle=cond", files={"images": b"x"})
    assert "'cond'" in problem(form, 422, "no_encoder")
    problem(await client.post("/encode", json={"images": [PIXEL], "bundle": "rgb"}), 422, "no_encoder")
    problem(await client.post("/encode", json={"images": []}), 422, "invalid")
    problem(await client.post("/encode?bundle=nope", content=b"x", headers=png), 404, "unknown_bundle")
    problem(await client.post("/encode?colour=1", content=b"x", headers=png), 422, "invalid")
    problem(
        await client.post("/encode", content=b"x", headers={"Content-Type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    problem(await client.get("/encode"), 405, "method_not_allowed")


async def test_images_are_not_waited_for(client: httpx.AsyncClient, problem: Problem) -> None:
    """Which bundle is meant, the query says."""

    async def never_read() -> AsyncIterator[bytes]:
        raise AssertionError
        yield b""

    problem(
        await client.post("/encode", content=never_read(), headers={"Content-Type": "image/png"}), 422, "no_encoder"
    )
