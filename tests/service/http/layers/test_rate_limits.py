"""Limits of keys as clients meet them: on every route that computes, with what they need to know to come again."""

import asyncio
import base64
import io
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from gan_client import Client
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Make = Callable[..., Settings]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
Problem = Callable[[httpx.Response, int, str], str]

A, B = {"X-API-Key": "alpha"}, {"X-API-Key": "beta"}
ONE_IN_AN_HOUR = 1 / 3600  # so no test is slow enough for a second one


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The file of two clients' keys."""
    file = tmp_path / "keys"
    file.write_text("team-a alpha\nteam-b beta\n")
    return file


def pixels(count: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((count, 8, 8, 1), np.uint8))
    return file.getvalue()


def infer(model: str, name: str, datatype: str, shape: list[int], data: list[int]) -> tuple[str, dict[str, Any]]:
    tensor = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    return f"/v2/models/{model}/infer", {"json": {"inputs": [tensor]}}


def seconds_without_images(reply: httpx.Response) -> int:
    """How long there will be none, by the reply's fields."""
    left = re.fullmatch('"images";r=0;t=([0-9]+)', reply.headers["ratelimit"])
    assert left is not None, reply.headers
    return int(left[1])


# Each asks for two images.
ROUTES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sample by query": ("GET", "/sample?count=2", {}),
    "sample by body": ("POST", "/sample", {"json": {"count": 2}}),
    "stream": ("GET", "/sample?count=2&format=npy", {}),
    "interpolate": ("GET", "/interpolate?seed_from=1&seed_to=2&steps=2", {}),
    "discriminate": ("POST", "/discriminate", {"content": pixels(2)}),
    "v1": ("POST", "/v1/images/generations", {"json": {"prompt": "", "n": 2}}),
    "v2 generator": ("POST", *infer("tiny", "count", "INT64", [1], [2])),
    "v2 discriminator": ("POST", *infer("tiny.discriminator", "images", "UINT8", [2, 8, 8, 1], [0] * 128)),
}


@pytest.mark.parametrize("route", ROUTES)
async def test_every_route_that_computes_counts_its_images(
    start: Start, tiny_settings: Make, keys: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """The reply says what is left; the next is refused in the route's own shape, and another key's is answered."""
    if route == "stream":
        monkeypatch.setattr("service.http.images.streaming.WHOLE_BYTES", 0)
    method, url, options = ROUTES[route]
    kind = {"Content-Type": "application/x-npy"} if "content" in options else {}
    async with start(create_app(tiny_settings(api_keys_file=keys, key_images_per_s=2 / 3600))) as client:
        reply = await client.request(method, url, headers=A | kind, **options)
        assert reply.status_code == 200, reply.text
        assert reply.headers["ratelimit-policy"] == '"images";q=1;qu="images";w=1800'
        assert seconds_without_images(reply) == pytest.approx(3600, abs=300)
        refused = await client.request(method, url, headers=A | kind, **options)
        assert refused.status_code == 429
        assert "rate_limit" in refused.text or set(refused.json()) == {"error"}
        assert int(refused.headers["retry-after"]) == seconds_without_images(refused)
        assert (await client.request(method, url, headers=B | kind, **options)).status_code == 200
        page = (await client.get("/metrics")).text
        assert 'gan_key_images_total{key="team-a"} 2.0' in page
        assert 'gan_key_rejected_total{key="team-a"} 1.0' in page
        assert 'reason="rate_limited"' in page


async def test_a_recipe_is_counted_as_the_images_that_it_gives(
    start: Start, tiny_settings: Make, keys: Path, problem: Problem
) -> None:
    """All recipes of a request together, and once; a picture without one costs nothing."""
    async with start(create_app(tiny_settings(api_keys_file=keys, key_images_per_s=20 / 3600))) as client:
        picture = (await client.get("/sample?count=4&recipe=true", headers=B)).content
        asked = {"images": [base64.b64encode(picture).decode()] * 3}
        reply = await client.post("/verify", json=asked, headers=A)
        assert {one["verdict"] for one in reply.json()["results"]} == {"identical"}
        assert seconds_without_images(reply) == pytest.approx(2160, abs=300)
        problem(await client.post("/verify", json=asked, headers=A), 429, "rate_limited")
        assert 'gan_key_images_total{key="team-a"} 12.0' in (await client.get("/metrics")).text


async def test_what_is_not_computed_is_not_counted(start: Start, tiny_settings: Make, keys: Path) -> None:
    """A current copy, a bad request and other routes are answered, also where the limit is used up."""
    async with start(create_app(tiny_settings(api_keys_file=keys, key_images_per_s=ONE_IN_AN_HOUR))) as client:
        assert (await client.get("/sample?count=5000", headers=A)).status_code == 422
        first = await client.get("/sample?seed=7", headers=A)
        assert first.status_code == 200
        current = {"If-None-Match": first.headers["etag"]}
        again = await client.get("/sample?seed=7", headers=A | current)
        assert (again.status_code, again.headers["ratelimit"].startswith('"images";r=0')) == (304, True)
        bundles = await client.get("/bundles", headers=A)
        assert (bundles.status_code, "ratelimit" in bundles.headers) == (200, False)
        assert (await client.get("/sample?seed=7", headers=A)).status_code == 429


async def test_the_body_of_a_key_without_images_is_not_read(
    start: Start, tiny_settings: Make, keys: Path, problem: Problem
) -> None:
    """So that uploads that will be refused cost nothing to decode."""
    async with start(create_app(tiny_settings(api_keys_file=keys, key_images_per_s=ONE_IN_AN_HOUR))) as client:
        assert (await client.get("/sample", headers=A)).status_code == 200

        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("it was read")
            yield b""

        problem(await client.post("/discriminate", content=body(), headers=A), 429, "rate_limited")


async def test_images_in_flight_are_those_of_all_requests_of_a_key(
    start: Start, tiny_settings: Make, keys: Path, problem: Problem, hold_engine: Hold, until: Until
) -> None:
    """Until they are computed or their client has left; and more than may ever be is 422."""
    app = create_app(tiny_settings(api_keys_file=keys, key_images_in_flight=5))
    read = app.state.manager.metrics.registry.get_sample_value
    async with start(app) as client:
        async with hold_engine(app):
            asked = [asyncio.create_task(client.get("/sample?count=2", headers=A)) for _ in range(2)]
            await until(lambda: read("gan_key_images_in_flight", {"key": "team-a"}) == 4)
            refused = await client.get("/sample?count=2", headers=A)
            assert "5 images in flight" in problem(refused, 429, "rate_limited")
            assert refused.headers["ratelimit"] == '"in-flight";r=1'
            asked.pop().cancel()
            await until(lambda: read("gan_key_images_in_flight", {"key": "team-a"}) == 2)
            asked.append(asyncio.create_task(client.get("/sample?count=3", headers=A)))
            await until(lambda: read("gan_key_images_in_flight", {"key": "team-a"}) == 5)
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200, 200]
        assert (await client.get("/sample?count=5", headers=A)).status_code == 200
        problem(await client.get("/sample?count=6", headers=A), 422, "invalid")


async def test_what_a_full_queue_refuses_is_given_back(
    start: Start, tiny_settings: Make, keys: Path, problem: Problem, hold_engine: Hold, until: Until
) -> None:
    """The key has as many images as before."""
    app = create_app(tiny_settings(api_keys_file=keys, max_queued_images=8, max_count=8, key_images_per_s=1000))
    batcher, limits = app.state.manager.batcher, app.state.manager.key_limits
    async with start(app) as client:
        async with hold_engine(app):
            waiting = [asyncio.create_task(client.get("/sample?count=8", headers=B))]
            await until(lambda: batcher.busy_s() > 0 and not batcher.queued_rows)
            waiting.append(asyncio.create_task(client.get("/sample?count=4", headers=B)))
            await until(lambda: batcher.queued_rows == 4)
            # Which is not refused before it is counted, as its answer might be 304.
            refused = await client.get("/sample?seed=7&count=8", headers=A | {"If-None-Match": '"another"'})
            problem(refused, 429, "queue_full")
            assert "ratelimit" not in refused.headers
            assert limits.fields("team-a") == limits.fields("nobody")
        assert {reply.status_code for reply in await asyncio.gather(*waiting)} == {200}


async def test_without_keys_there_are_no_limits_by_key(start: Start, tiny_settings: Make) -> None:
    """An open service can't tell its clients apart."""
    async with start(create_app(tiny_settings(key_images_per_s=ONE_IN_AN_HOUR))) as client:
        for _ in range(3):
            reply = await client.get("/sample")
            assert (reply.status_code, "ratelimit" in reply.headers) == (200, False)


async def test_without_limits_nothing_is_said_of_them(start: Start, tiny_settings: Make, keys: Path) -> None:
    """They are off by default."""
    app = create_app(tiny_settings(api_keys_file=keys))
    assert app.state.manager.key_limits is None
    async with start(app) as client:
        assert "ratelimit" not in (await client.get("/sample", headers=A)).headers


@pytest.mark.slow
def test_a_client_that_is_limited_gets_all_its_images_in_the_end(
    live_server: Any, tiny_settings: Make, keys: Path
) -> None:
    """gan_client waits as long as it is told, over a real connection, and then has the images of its seed."""
    settings = tiny_settings(api_keys_file=keys, key_images_per_s=32, max_count=64)
    with (
        live_server(settings).running() as server,
        Client(server.url, "alpha") as limited,
        Client(server.url, "beta") as b,
    ):
        images = limited.sample_array(128, seed=7)
        assert server.metric("gan_rejected_total", route="/sample", reason="rate_limited") > 0
        np.testing.assert_array_equal(images[:8], b.sample_array(8, seed=7))
