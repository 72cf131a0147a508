"""OpenAI's image API: its clients' requests are answered, and every error has its shape."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from models.bundle import MANIFEST, Bundle
from models.spec import ImageSpec
from service.app import create_app
from service.codecs.time_slices import run_steps
from service.http.v1.messages import MAX_PROMPT
from service.http.v1.routes import find_label
from service.settings import Settings

pytestmark = pytest.mark.anyio

PATH = "/v1/images/generations"
PROMPT = {"prompt": "any"}

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


def pictures(reply: httpx.Response, form: str = "PNG") -> NDArray[np.uint8]:
    """The pictures of a reply, (n, h, w[, c])."""
    assert reply.status_code == 200, reply.text
    files = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in reply.json()["data"]]
    assert {file.format for file in files} == {form}
    return np.stack([np.asarray(file) for file in files])


def refusal(reply: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a reply in that API's shape."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json"), reply.text
    assert reply.headers["cache-control"] == "no-store"
    assert set(reply.json()) == {"error"}
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = {429: "rate_limit_error", 503: "server_error", 504: "server_error"}
    assert (error["code"], error["type"]) == (code, kind.get(status, "invalid_request_error"))
    return error


async def test_open_webui_gets_its_picture(client: httpx.AsyncClient) -> None:
    """Its images router sends free text, a configured size and a version in the query, and reads `b64_json` as PNG."""
    asked = {
        "model": "cond",
        "prompt": "A photograph of an Owl, at night",
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
    }
    headers = {"Authorization": "Bearer ", "X-OpenWebUI-User-Name": "someone"}
    reply = await client.post(f"{PATH}?api-version=2025-04-01-preview", json=asked, headers=headers)
    assert pictures(reply).shape == (1, 512, 512)
    assert all("url" not in one for one in reply.json()["data"])
    assert reply.json()["size"] == "512x512"


async def test_images_are_those_of_sample(client: httpx.AsyncClient) -> None:
    """With the same seed, and the class that the prompt names; `X-Seed` is the seed that draws them again."""
    for bundle, prompt, labels in ("tiny", "a cat", ""), ("cond", "two DOGS and a dog", "&labels=1"):
        first = await client.post(PATH, json={"model": bundle, "prompt": prompt, "n": 3})
        seed = int(first.headers["x-seed"])
        plain = await client.get(f"/sample?bundle={bundle}&count=3&seed={seed}&format=npy{labels}")
        assert first.headers["x-bundle"] == plain.headers["x-bundle"]
        assert {"queue", "compute", "encode"} == {
            part.split(";")[0].strip() for part in first.headers["server-timing"].split(",")
        }
        np.testing.assert_array_equal(pictures(first), np.load(io.BytesIO(plain.content))[..., 0])
        again = await client.post(PATH, json={"model": bundle, "prompt": prompt, "n": 3, "seed": seed})
        assert again.json()["data"] == first.json()["data"]


async def test_a_prompt_without_a_class_draws_any(client: httpx.AsyncClient) -> None:
    """The classes are then drawn from the seed, as where /sample has no labels."""
    asked = {"model": "cond", "prompt": "categories of dogma", "n": 8, "seed": 7}
    plain = await client.get("/sample?bundle=cond&count=8&seed=7&format=npy")
    np.testing.assert_array_equal(
        pictures(await client.post(PATH, json=asked)), np.load(io.BytesIO(plain.content))[..., 0]
    )


@pytest.fixture(scope="module")
async def framed(
    make_tiny: Callable[..., Bundle], start: Start, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application on a grey and a colour bundle whose images were padded with a colour."""
    folder = tmp_path_factory.mktemp("framed")
    declared = {"fit": "pad", "background": "#ff8000", "resampling": "lanczos", "orientation": "exif"}
    images = {"grey": ImageSpec(channels=1, height=6, width=10), "rgb": ImageSpec(channels=3, height=6, width=10)}
    for colour, image in images.items():
        manifest = make_tiny(folder / colour, image, None, None).folder / MANIFEST
        prepared = {"preparation": declared | {"colour": colour}}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | prepared))
    async with start(create_app(Settings.model_validate({"bundles": folder, "device": "cpu"}))) as client:
        yield client


@pytest.mark.parametrize(("bundle", "ground"), [("grey", 151), ("rgb", (255, 128, 0))])
@pytest.mark.parametrize(
    ("size", "scale", "top", "left"),
    [("64x64", 6, 14, 2), ("25x100", 2, 44, 2), ("10x6", 1, 0, 0), ("11x7", 1, 0, 0), ("40x24", 4, 0, 0)],
)
async def test_an_image_is_enlarged_in_the_middle_of_its_background(
    framed: httpx.AsyncClient, bundle: str, ground: Any, size: str, scale: int, top: int, left: int
) -> None:
    """By the largest whole factor that fits; what is left over shows the bundle's background."""
    [own] = pictures(await framed.post(PATH, json=PROMPT | {"model": bundle, "seed": 1}))
    [picture] = pictures(await framed.post(PATH, json=PROMPT | {"model": bundle, "seed": 1, "size": size}))
    width, height = map(int, size.split("x"))
    expected = np.empty((height, width, *own.shape[2:]), np.uint8)
    expected[:] = ground
    expected[top : top + 6 * scale, left : left + 10 * scale] = own.repeat(scale, 0).repeat(scale, 1)
    np.testing.assert_array_equal(picture, expected)


async def test_formats_are_files_of_their_kind(client: httpx.AsyncClient) -> None:
    """WebP is lossless, as everywhere here; the reply names the format."""
    asked = PROMPT | {"model": "rgb", "seed": 5, "size": "64x64", "output_compression": 30}
    plain = pictures(await client.post(PATH, json=asked))
    for form in "png", "webp", "jpeg":
        reply = await client.post(PATH, json=asked | {"output_format": form})
        assert reply.json()["output_format"] == form
        found = pictures(reply, form.upper())
        assert np.abs(found.astype(int) - plain).mean() < (20 if form == "jpeg" else 1e-9)


async def test_what_means_nothing_here_is_ignored(client: httpx.AsyncClient) -> None:
    """Every other field that the API documents, those it may get, and null for any of ours but the prompt."""
    asked = PROMPT | {
        "quality": "hd",
        "style": "vivid",
        "user": "someone",
        "moderation": "low",
        "partial_images": 0,
        "safety_identifier": "x",
        "svg": {"model": "x", "reasoning": {"effort": "low"}},
        "colour": [1, 2],
        "background": "opaque",
        "stream": False,
        "response_format": "b64_json",
    }
    assert pictures(await client.post(PATH, json=asked)).shape == (1, 8, 8)
    optional = dict.fromkeys(
        ("model", "n", "size", "output_format", "seed", "response_format", "background", "stream", "quality")
    )
    assert pictures(await client.post(PATH, json=PROMPT | optional)).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "prompt": [None, 5, ["a"], "x" * (MAX_PROMPT + 1)],
        "n": [0, -1, 1.5, "2", 4097],
        "size": ["", "large", "8", "8x", "0x8", "8x8x8", "-8x8", "7x8", "8x7", "99999x99999", "100000x8", 8, "８x８"],
        "output_format": ["gif", "svg", "npy", 1],
        "response_format": ["url", "json"],
        "background": ["transparent", True],
        "stream": [True, "false", 0, 0.0],
        "seed": [-1, 2**53, "7", 1.5],
        "model": ["", "@1", 3],
    }.items(),
    ids=str,
)
async def test_what_cannot_be_done_is_400_and_names_the_field(
    client: httpx.AsyncClient, app: FastAPI, field: str, values: list[Any]
) -> None:
    """Before anything is computed."""
    counted = app.state.manager.metrics.registry.get_sample_value
    version = app.state.manager.bundles.version("tiny")
    series = "gan_images_total", {"bundle": "tiny", "version": version, "operation": "sample"}
    before = counted(*series)
    for value in values:
        reply = await client.post(PATH, json=PROMPT | {field: value})
        error = refusal(reply, 400, "invalid")
        assert error["param"] == field, value
        assert error["message"].startswith((f"{field}:", "n, size:")), value
    assert counted(*series) == before


async def test_a_picture_too_wide_for_its_format_is_refused(client: httpx.AsyncClient) -> None:
    """WebP's sides are shorter than the others'."""
    asked = PROMPT | {"size": "16384x8"}
    assert pictures(await client.post(PATH, json=asked)).shape == (1, 8, 16384)
    assert refusal(await client.post(PATH, json=asked | {"output_format": "webp"}), 400, "invalid")["param"] == "size"


async def test_other_errors_have_their_status_and_the_shape(client: httpx.AsyncClient) -> None:
    """Those of routes, of the body and of middleware."""
    post = client.post
    kind = {"Content-Type": "application/json"}
    refusal(await post(PATH, json=PROMPT | {"model": "dall-e-2"}), 404, "unknown_bundle")
    refusal(await client.get("/v1/models/dall-e-2"), 404, "unknown_bundle")
    refusal(await client.get("/v1/chat/completions"), 404, "not_found")
    reply = await client.get(PATH)
    refusal(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    refusal(await post(PATH, content=b"{", headers=kind), 400, "malformed")
    refusal(await post(PATH, content=b"", headers=kind), 400, "invalid")
    refusal(await post(PATH, json=PROMPT | {"x": [[[[[[[[[]]]]]]]]]}), 400, "invalid")
    refusal(await post(PATH, content=b"{}"), 415, "unsupported_media_type")
    refusal(await post(PATH, content=b"{}", headers=kind | {"Content-Length": str(2**30)}), 413, "too_large")
    refusal(await post(PATH, json=PROMPT, headers={"X-Timeout-Ms": "soon"}), 400, "invalid")


async def test_a_busy_service_says_so_in_the_shape(
    start: Start, tiny_settings: Callable[..., Settings], hold_engine: Any, until: Any
) -> None:
    """429 with `Retry-After`, which its clients honour; 504 and 503 too."""
    app = create_app(tiny_settings(max_queued_images=4, max_count=4))
    async with start(app) as client:
        async with hold_engine(app):
            running = asyncio.create_task(client.post(PATH, json=PROMPT))
            await until(lambda: app.state.manager.batcher.busy_s() > 0)
            late = await client.post(PATH, json=PROMPT, headers={"X-Timeout-Ms": "20"})
            refusal(late, 504, "deadline_exceeded")
            waiting = asyncio.create_task(client.post(PATH, json=PROMPT | {"n": 4}))
            await until(lambda: app.state.manager.batcher.queued_rows == 4)
            busy = await client.post(PATH, json=PROMPT)
            refusal(busy, 429, "queue_full")
            assert int(busy.headers["retry-after"]) >= 1
        assert (await running).status_code == (await waiting).status_code == 200
        await app.state.manager.stop()
        draining = await client.post(PATH, json=PROMPT)
        refusal(draining, 503, "draining")
        assert draining.headers["retry-after"]


async def test_a_key_is_a_bearer_token(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """As that API's clients send it; without one, or with a wrong one, 401 in the shape."""
    async with start(create_app(tiny_settings(api_keys="alpha"))) as client:
        for headers in {}, {"Authorization": "Bearer beta"}:
            drawn = await client.post(PATH, json=PROMPT, headers=headers)
            for reply in drawn, await client.get("/v1/models", headers=headers):
                refusal(reply, 401, "unauthorized")
                assert reply.headers["www-authenticate"].startswith("Bearer")
        assert (await client.post(PATH, json=PROMPT, headers={"Authorization": "Bearer alpha"})).status_code == 200


async def test_the_list_is_not_empty_while_bundles_are_loaded(tiny_settings: Callable[..., Settings]) -> None:
    """Pages that ask for it once, when they start, would show no model."""
    app = create_app(tiny_settings())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for path in ("/v1/models", "/v1/models/tiny"):
            refusal(await client.get(path), 503, "not_ready")


async def test_bundles_are_models(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """Each can be asked for by the id that the list has, and by its version."""
    listed = (await client.get("/v1/models?limit=5")).json()
    assert listed["object"] == "list"
    assert [one["id"] for one in listed["data"]] == sorted(tiny_bundles)
    for one in listed["data"]:
        assert one == {"id": one["id"], "object": "model", "created": 1767323045, "owned_by": "gan-service"}
        assert (await client.get(f"/v1/models/{one['id']}")).json() == one
        assert (await client.post(PATH, json=PROMPT | {"model": one["id"]})).headers["x-bundle"].startswith(one["id"])
    pinned = f"rgb@{tiny_bundles['rgb'].version}"
    assert (await client.get(f"/v1/models/{pinned}")).json()["id"] == pinned
    assert (await client.post(PATH, json=PROMPT | {"model": pinned})).headers["x-bundle"] == pinned


NAMES = ("0", "1", "10", "dog", "hot dog", "T-shirt/top", "golden_retriever", "Straße", "+", "e\u0301lan", "  ", "Dog")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a handwritten 1", "1"),
        ("10 of them", "10"),
        ("a DOG.", "dog"),
        ("a hot dog, or a dog", "hot dog"),
        ("a dog eating a hot dog", "dog"),
        ("hot\n dogs", None),
        ("(dog)", "dog"),
        ("the dog's bone", "dog"),
        ("underdog 101 1st", None),
        ("one t-shirt/Top please", "T-shirt/top"),
        ("a t-shirt", None),
        ("a golden retriever", "golden_retriever"),
        ("a Golden_Retriever", "golden_retriever"),
        ("in der STRASSE", "Straße"),
        ("a + sign", "+"),
        ("an \u00c9lan", "e\u0301lan"),
        ("", None),
        ("   ", None),
        ("hot", None),
    ],
)
def test_a_prompt_names_a_class_by_whole_words(prompt: str, name: str | None) -> None:
    """The first one, in any case; of those that begin at the same word the longest."""
    assert run_steps(find_label(prompt, NAMES)) == (None if name is None else NAMES.index(name))


def test_a_long_prompt_is_read_in_steps() -> None:
    """With many classes too, no step takes long."""
    names = [" ".join(["a"] * length) + f" {length}" for length in range(1, 20)]
    assert len(list(find_label("a " * 16_000, names))) > 50


async def test_the_longest_prompt_may_be_in_any_script(client: httpx.AsyncClient) -> None:
    """Its characters count, not the bytes that JSON takes for them."""
    for prompt in "\U0001f415" * MAX_PROMPT, "字 " * (MAX_PROMPT // 2):
        for escaped in True, False:
            content = json.dumps({"prompt": prompt}, ensure_ascii=escaped)
            reply = await client.post(PATH, content=content, headers={"Content-Type": "application/json"})
            assert reply.status_code == 200, reply.text[:200]
