"""`select=discriminator`: what passes is what D says, alone and in a crowd; or a reason why D can't choose."""

import asyncio
import base64
import io
import json
import math
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.bundle import Bundle, write_bundle
from models.inference.noise import draw_candidates, draw_chances, draw_latents
from models.spec import ImageSpec, LatentSpec
from service.app import create_app
from service.http.images.selecting import CANDIDATES
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
GREY = ImageSpec(channels=1, height=8, width=8)
# The nets' weights are random and their logits large, so that a small scale decides how strict D is.
CALIBRATION = {"scale": 0.002, "offset": 0.0, "auc": 0.9, "expected_calibration_error": 0.02}
STRICT = CALIBRATION | {"scale": 1e-6, "offset": -40.0}  # which lets nothing pass


@pytest.fixture(scope="module")
async def chooser(
    tmp_path_factory: pytest.TempPathFactory,
    make_tiny: Callable[..., Bundle],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service with calibrated bundles, of which one lets nothing pass, and one that is not calibrated."""
    folder: Path = tmp_path_factory.mktemp("choosers")
    make_tiny(folder / "plain", GREY, None, CALIBRATION)
    make_tiny(folder / "cond", GREY, ("cat", "dog", "owl"), CALIBRATION)
    make_tiny(folder / "strict", GREY, None, STRICT)
    make_tiny(folder / "unsure", GREY, None, None)
    hinge = make_tiny(folder / "source", GREY, None, CALIBRATION)
    facts = hinge.manifest.model_dump(exclude={"format", "files", "signature"})
    facts |= {"name": "hinge", "training": {"options": {"generator_loss": "hinge"}}}
    nets = hinge.generator.state_dict(), hinge.discriminator.state_dict()
    write_bundle(folder / "hinge", facts, *nets, np.zeros((8, 8, 1), np.uint8))
    shutil.rmtree(folder / "source")
    settings = {"bundles": folder, "default_bundle": "plain", "device": "cpu", "scored_share": 0}
    async with start(create_app(Settings.model_validate(settings))) as client:
        yield client


async def chosen(client: httpx.AsyncClient, **asked: Any) -> tuple[dict[str, Any], float]:
    wanted: dict[str, Any] = {"seed": 3, "format": "json", "select": "discriminator"}
    wanted |= asked
    reply = await client.get("/sample", params=wanted)
    assert reply.status_code == 200, reply.text
    assert (await client.post("/sample", json=wanted)).json() == reply.json()
    return reply.json(), float(reply.headers["x-acceptance-rate"])


@pytest.mark.parametrize("bundle", ["plain", "cond"])
async def test_an_image_is_the_same_alone_and_in_a_crowd(chooser: httpx.AsyncClient, bundle: str) -> None:
    """Whatever range of the seed it is asked for in, and whoever else asks; and so are its label and its latent."""
    whole, rate = await chosen(chooser, bundle=bundle, count=300, latents=True)
    assert 0 < rate < 1
    asked = [chosen(chooser, bundle=bundle, first_index=n, latents=True) for n in range(0, 300, 37)]
    for n, (one, _) in zip(range(0, 300, 37), await asyncio.gather(*asked), strict=True):
        for name in ("images", "latents", *(["labels", "label_names"] if bundle == "cond" else [])):
            assert one[name] == whole[name][n : n + 1]
    again = {"bundle": bundle, "format": "json", "latents": whole["latents"]}
    again |= {"labels": whole["labels"]} if bundle == "cond" else {}
    assert (await chooser.post("/sample", json=again)).json()["images"] == whole["images"]


async def test_what_passes_is_what_the_discriminator_says(chooser: httpx.AsyncClient) -> None:
    """The first candidate whose chance is below a quarter of the ratio p/(1 − p); the reply says how many did."""
    found, rate = await chosen(chooser, count=6, latents=True)
    latent = LatentSpec.model_validate_json(json.dumps((await chooser.get("/bundles/plain")).json()["latent"]))
    candidates = np.stack([draw_candidates(latent, 3, 0, 6, k) for k in range(CANDIDATES)], axis=1)
    np.testing.assert_array_equal(candidates[:, 0], draw_latents(latent, 3, 0, 6))
    chances, tried = draw_chances(3, 0, 6, CANDIDATES), 0
    for image in range(6):
        drawn = {"latents": candidates[image].tolist(), "format": "npy"}
        array = (await chooser.post("/sample", json=drawn)).content
        verdicts = await chooser.post("/discriminate", content=array, headers={"Content-Type": "application/x-npy"})
        logits = CALIBRATION["scale"] * np.array([one["logit"] for one in verdicts.json()["results"]])
        passes = chances[image] < np.exp(logits) / 4
        at = int(passes.argmax()) if passes.any() else int(logits.argmax())
        tried += at + 1 if passes.any() else CANDIDATES
        np.testing.assert_array_equal(np.float32(found["latents"][image]), candidates[image, at])
    assert rate == pytest.approx(6 / tried, abs=1e-4)


async def test_where_nothing_passes_the_best_is_given(chooser: httpx.AsyncClient) -> None:
    """Of 64 candidates, by D's logit; and the rate is 0."""
    found, rate = await chosen(chooser, bundle="strict", count=2)
    assert rate == 0
    plain = (await chooser.get("/sample", params={"seed": 3, "count": 2, "bundle": "strict", "format": "json"})).json()
    logits = []
    for images in (found["images"], plain["images"]):
        reply = await chooser.post("/discriminate", json={"images": images, "bundle": "strict"})
        logits.append([one["logit"] for one in reply.json()["results"]])
    assert all(best >= first for best, first in zip(*logits, strict=True))


async def test_every_format_and_recipe_has_the_chosen_images(chooser: httpx.AsyncClient) -> None:
    """A picture's recipe says how it was chosen, and is verified so; large arrays are whole replies with their rate."""
    asked: dict[str, Any] = {"seed": 5, "count": 5, "select": "discriminator", "bundle": "cond"}
    as_npy = await chooser.get("/sample", params=asked | {"format": "npy"})
    as_json = await chooser.get("/sample", params=asked | {"format": "json"})
    first = base64.b64decode(as_json.json()["images"][0])
    assert np.load(io.BytesIO(as_npy.content)).shape == (5, 8, 8, 1)
    alone = await chooser.get("/sample", params=asked | {"count": 1})
    assert alone.content == first
    without = await chooser.get("/sample", params=asked | {"select": "none", "format": "npy"})
    assert without.headers["etag"] != as_npy.headers["etag"]
    assert "x-acceptance-rate" not in without.headers
    picture = (await chooser.get("/sample", params=asked | {"recipe": True})).content
    reply = await chooser.post("/verify", content=picture, headers={"Content-Type": "image/png"})
    (verified,) = reply.json()["results"]
    assert (verified["verdict"], verified["recipe"]["select"]) == ("identical", "discriminator")
    large = await chooser.get("/sample", params=asked | {"count": 4096, "scale": 4, "format": "npy"})
    assert "content-length" in large.headers
    assert 0 < float(large.headers["x-acceptance-rate"]) < 1


async def test_who_can_not_choose_is_refused(chooser: httpx.AsyncClient, problem: Problem) -> None:
    """With the reason: not calibrated, the hinge loss, given latents, more images than candidates find room."""
    asked: dict[str, Any] = {"select": "discriminator"}

    async def told(**more: Any) -> str:
        return problem(await chooser.post("/sample", json=asked | more), 422, "invalid")

    assert "no calibrated discriminator" in await told(bundle="unsure")
    assert "hinge" in await told(bundle="hinge")
    assert "latents" in await told(latents=[[0.5] * 12])
    assert "4096" in await told(count=4097)
    assert "select" in await told(select="best")
    assert "pixels" in await told(count=4096, scale=16, format="npy")


def test_chances_are_uniform() -> None:
    """And each image's own, wherever a range begins."""
    chances = draw_chances(7, 10, 500, CANDIDATES)
    np.testing.assert_array_equal(draw_chances(7, 12, 3, CANDIDATES), chances[2:5])
    assert math.isclose(chances.mean(), 0.5, abs_tol=0.01)
    assert 0 < chances.min() < chances.max() <= 1
