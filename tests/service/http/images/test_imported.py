"""A generator that was trained elsewhere is served like every other bundle."""

import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.bundle import read_bundle, write_bundle
from models.spec import GraphInput, GraphNode, GraphSpec, ImageSpec, LatentSpec
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio
LABELS = ("cat", "dog")


def node(op: str, inputs: str, output: str, **attributes: Any) -> GraphNode:
    return GraphNode(op=op, inputs=tuple(inputs.split()), output=output, attributes=attributes)


NETWORK = GraphSpec(
    family="graph",
    inputs=(
        GraphInput(name="z", role="latent", shape=(4,)),
        GraphInput(name="y", role="onehot", shape=(2,)),
        GraphInput(name="noise", role="noise", shape=(1, 6, 5)),
    ),
    weights={"dense": (6, 4 * 6 * 5), "bias": (120,)},
    nodes=(
        node("Concat", "z y", "both", axis=1),
        node("Gemm", "both dense bias", "flat"),
        node("Reshape", "flat", "square", shape=(-1, 4, 6, 5)),
        node("Add", "square noise", "noisy"),
        node("Sigmoid", "noisy", "image"),
    ),
)


@pytest.fixture(scope="module")
async def client(
    tmp_path_factory: pytest.TempPathFactory, tiny_settings: Callable[..., Settings], start: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose only bundle is a graph: RGBA, of a class and of noise, without a judge."""
    folder: Path = tmp_path_factory.mktemp("graphs")
    rng = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=rng) for name, shape in NETWORK.weights.items()}
    facts = {
        "name": "alien",
        "created": "2026-01-02T03:04:05Z",
        "network": NETWORK,
        "image": ImageSpec(channels=4, height=6, width=5),
        "latent": LatentSpec(dim=4, distribution="normal", noise=30, label_frequencies=(0.5, 0.5)),
        "labels": LABELS,
        "calibration": None,
        "training": {},
        "evaluation": {},
    }
    write_bundle(folder / "alien", facts, weights, None, np.zeros((6, 5, 4), np.uint8))
    async with start(create_app(tiny_settings(bundles=folder, default_bundle="alien", scored_share=1))) as one:
        one.headers["x-folder"] = str(folder / "alien")
        yield one


async def sampled(client: httpx.AsyncClient, **query: Any) -> np.ndarray[Any, Any]:

    reply = await client.get("/sample", params={"format": "npy", **query})
    assert reply.status_code == 200, reply.text
    found: np.ndarray[Any, Any] = np.load(io.BytesIO(reply.content))
    return found


async def test_its_images_are_those_of_the_bundle(client: httpx.AsyncClient) -> None:
    """Alone and among others, with its noise; other noise for another index."""
    bundle = read_bundle(client.headers["x-folder"])
    many = await sampled(client, seed=7, count=20, labels="dog")
    assert np.array_equal(many, bundle.draw(20, seed=7, labels="dog"))
    assert np.array_equal((await sampled(client, seed=7, first_index=5, labels="dog"))[0], many[5])
    still = await sampled(client, seed=7, count=20, labels="dog", truncation=1e-6)
    assert len(np.unique(still.reshape(20, -1), axis=0)) == 20


@pytest.mark.parametrize("form", ["png", "webp", "jpeg", "json", "zip"])
async def test_every_format_takes_transparency(client: httpx.AsyncClient, form: str) -> None:
    """JPEG has none, and gets the pixels over a ground."""
    reply = await client.get("/sample", params={"format": form, "seed": 1, "count": 3})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("form", ["png", "gif", "webp", "apng"])
async def test_the_way_between_two_images_is_shown(client: httpx.AsyncClient, form: str) -> None:
    """As a strip and as animations."""
    reply = await client.get("/interpolate", params={"format": form, "seed_from": 1, "seed_to": 2, "steps": 4})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
async def test_a_picture_with_transparency_is_verified(client: httpx.AsyncClient, form: str) -> None:
    """It gives the pixels of its recipe."""
    picture = await client.get("/sample", params={"format": form, "seed": 1, "count": 3, "recipe": "true"})
    kind = picture.headers["content-type"]
    reply = await client.post("/verify", content=picture.content, headers={"Content-Type": kind})
    assert reply.json()["results"][0]["verdict"] == "identical"


async def test_nobody_judges(client: httpx.AsyncClient) -> None:
    """There is no discriminator, which is said before a body is read; and the metadata say so."""
    for headers in ({"Content-Type": "image/png"}, {"Content-Type": "application/json"}):
        reply = await client.post("/discriminate", content=b'{"images": ["AAAA"]}', headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (422, "no_discriminator")
    assert (await client.get("/bundles/alien")).json()["networks"] == ["generator"]
    assert (await client.get("/v2/models/alien.discriminator")).status_code == 404
