"""GET /interpolate: its ends are the seeds' own images, and it is cached, bounded and refused as /sample is."""

import asyncio
import io
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image, ImageSequence

from models.bundle import Bundle
from models.experiments.figures import interpolation
from models.inference.noise import draw_labels, draw_latents, latent_path
from models.inference.pixels import UInt8
from service.app import create_app
from service.codecs.animation import SEQUENCE_TYPES
from service.http.requests.request_context import RequestContext
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
WAY = "/interpolate?seed_from=7&seed_to=9"


def strip(reply: httpx.Response, count: int) -> UInt8:
    """The images of a strip: (count, h, w, c)."""
    assert reply.status_code == 200, reply.text
    with Image.open(io.BytesIO(reply.content)) as picture:
        pixels = np.asarray(picture)
    return np.stack(np.split(pixels.reshape(*pixels.shape[:2], -1), count, axis=1))


async def images(client: httpx.AsyncClient, query: str) -> UInt8:
    return np.asarray(np.load(io.BytesIO((await client.get(f"/sample?format=npy&{query}")).content)))


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
@pytest.mark.parametrize("method", ["linear", "spherical"])
async def test_the_ends_are_the_images_of_their_seeds(client: httpx.AsyncClient, name: str, method: str) -> None:
    """Byte for byte, at any index and truncation."""
    reply = await client.get(f"{WAY}&bundle={name}&index_from=5&index_to=2&steps=5&truncation=0.7&method={method}")
    shown = strip(reply, 5)
    label = "&labels=1" if name == "cond" else ""
    if label:
        reply = await client.get(f"{WAY}&bundle=cond&index_from=5&index_to=2&steps=5&truncation=0.7&label=dog")
        shown = strip(reply, 5)
    ends = [f"bundle={name}&seed={seed}&first_index={index}&truncation=0.7{label}" for seed, index in ((7, 5), (9, 2))]
    for place, end in zip((0, -1), ends, strict=True):
        np.testing.assert_array_equal(shown[place], (await images(client, end))[0])


@pytest.mark.parametrize("method", ["linear", "spherical"])
async def test_the_way_is_that_of_the_papers_figure(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], method: str
) -> None:
    """The service gives the images that `python -m models interpolate` draws."""
    for name in ("tiny", "rgb"):
        expected = interpolation(tiny_bundles[name], [7, 9], 8, method)  # type: ignore[arg-type]
        shown = strip(await client.get(f"{WAY}&bundle={name}&steps=8&method={method}"), 8)
        np.testing.assert_array_equal(shown, expected)


async def test_a_label_stays_or_changes_half_way(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """Without `label` it is the first image's own; `label_to` is that of the second half."""
    bundle = tiny_bundles["cond"]
    latent = bundle.manifest.latent
    first, last = (draw_latents(latent, seed, 0, 1)[0] for seed in (7, 9))
    path = latent_path(first, last, 5, "linear")
    own = int(draw_labels(latent.label_frequencies or (), 7, 0, 1)[0])
    for query, labels in (
        ("", [own] * 5),
        ("&label=owl", [2] * 5),
        ("&label=2&label_to=cat", [2, 2, 0, 0, 0]),
        ('&label_to=%22dog%22&label=["cat"]', [0, 0, 1, 1, 1]),
        ("&label_to=2", [own, own, 2, 2, 2]),
    ):
        shown = strip(await client.get(f"{WAY}&bundle=cond&steps=5{query}"), 5)
        np.testing.assert_array_equal(shown, bundle.images(path, np.array(labels)))


async def test_every_format_is_chosen_by_name_or_by_accept(client: httpx.AsyncClient) -> None:
    """The name wins; an animation has all images, at the scale and for the time that were asked for."""
    for form, media_type in SEQUENCE_TYPES.items():
        query = f"{WAY}&steps=6&scale=2&duration_ms=900"
        by_name = await client.get(f"{query}&format={form}", headers={"Accept": "text/html"})
        by_accept = await client.get(query, headers={"Accept": media_type})
        assert by_name.headers["content-type"] == by_accept.headers["content-type"] == media_type
        assert by_name.content == by_accept.content
        assert (
            by_name.headers["content-disposition"] == f'inline; filename="tiny-seed-7-image-0-to-seed-9-image-0.{form}"'
        )
        if form != "png":
            with Image.open(io.BytesIO(by_name.content)) as picture:
                shown = [frame.copy().info["duration"] for frame in ImageSequence.Iterator(picture)]
                assert (picture.size, len(shown), sum(shown)) == ((16, 16), 6, 900)


async def test_it_is_cached_as_a_sample_is(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """A strong tag over everything that makes the bytes, 304, a year where the version is pinned; HEAD as GET."""
    version = tiny_bundles["cond"].version
    asked = f"{WAY}&bundle=cond@{version}&steps=4"
    first = await client.get(asked)
    assert first.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert first.headers["vary"] == "Accept"
    assert first.headers["x-bundle"] == f"cond@{version}"
    assert "encode;dur=" in first.headers["server-timing"]
    again = await client.get(asked, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    head = await client.head(asked)
    assert (head.headers["etag"], head.headers["content-length"]) == (first.headers["etag"], str(len(first.content)))
    others = ("index_to=1", "method=spherical", "label=0", "label_to=0", "truncation=0.5", "scale=2", "format=gif")
    tags = [(await client.get(f"{asked}&{other}")).headers["etag"] for other in others]
    tags += [(await client.get(f"{asked}&format=gif&duration_ms={ms}")).headers["etag"] for ms in (90, 900)]
    assert len({first.headers["etag"], *tags}) == 1 + len(tags)
    assert (await client.get(f"{asked}&duration_ms=900")).headers["etag"] == first.headers["etag"]
    assert "max-age=300" in (await client.get(WAY)).headers["cache-control"]


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("seed_from=7", "seed_to"),
        ("seed_to=7", "seed_from"),
        ("steps=1", "steps"),
        ("steps=257", "steps"),
        ("index_to=9007199254740992", "index_to"),
        ("method=round", "method"),
        ("format=jpeg", "format"),
        ("label=1", "label: this bundle has no labels"),
        ("label_to=1", "label_to: this bundle has no labels"),
        ("bundle=cond&label=bird", "label: 'bird' is not one of"),
        ("bundle=cond&label_to=cat,dog", "label_to: 'cat,dog' is not one of"),
        ('bundle=cond&label=["cat","dog"]', "label: 2 labels"),
        ('bundle=cond&label="', "label: begins as JSON"),
        ("format=gif&steps=10&duration_ms=199", "duration_ms: 10 images take at least 200 ms"),
        ("duration_ms=600001", "duration_ms"),
        ("truncation=0", "truncation"),
        ("seed=1", "unknown field"),
        ("layout=strip", "unknown field"),
    ],
)
async def test_what_is_out_of_range_is_refused(
    client: httpx.AsyncClient, problem: Problem, query: str, reason: str
) -> None:
    """With the field's name, before anything is computed."""
    url = f"/interpolate?{query}" if query.startswith("seed_") else f"{WAY}&{query}"
    assert reason in problem(await client.get(url), 422, "invalid")


async def test_limits_hold_before_anything_is_computed(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """Pixels of all images together, a format's longest side, the most images, and other methods and routes' errors."""
    app = create_app(tiny_settings(max_output_pixels=64 * 16 * 4, max_count=20))
    async with start(app) as client:
        assert (await client.get(f"{WAY}&steps=16&scale=2")).status_code == 200
        problem(await client.get(f"{WAY}&steps=17&scale=2"), 422, "invalid")
        assert "21 images" in problem(await client.get(f"{WAY}&steps=21"), 422, "invalid")
        problem(await client.get(f"{WAY}&bundle=nope"), 404, "unknown_bundle")
        problem(await client.get(WAY, headers={"Accept": "text/html"}), 406, "not_acceptable")
        assert problem(await client.post(WAY), 405, "method_not_allowed")
        computed = app.state.manager.metrics.registry.get_sample_value
        labels = {"bundle": "tiny", "version": app.state.manager.bundles.version("tiny"), "operation": "sample"}
        assert computed("gan_images_total", labels) == 16


async def test_a_full_queue_and_a_deadline_are_those_of_a_sample(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem, hold_engine: Hold, until: Until
) -> None:
    """Images count against the queue, and what is too late is never computed."""
    app = create_app(tiny_settings(max_queued_images=8, max_count=8))
    async with start(app) as client:
        async with hold_engine(app):
            problem(await client.get(f"{WAY}&steps=8", headers={"X-Timeout-Ms": "50"}), 504, "deadline_exceeded")
            waiting = asyncio.create_task(client.get(f"{WAY}&steps=8"))
            await until(lambda: app.state.manager.batcher.queued_rows == 8)
            problem(await client.get(f"{WAY}&steps=2"), 429, "queue_full")
        assert (await waiting).status_code == 200


async def test_a_webp_reserves_what_its_encoder_takes(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bytes for each pixel of one of its pictures; other formats take no more than latents and images."""
    reserved: list[int] = []
    monkeypatch.setattr(RequestContext, "reserve_reply", lambda _, size: reserved.append(size))
    for form in ("gif", "webp"):
        assert (await client.get(f"{WAY}&bundle=tiny&steps=2&scale=2&format={form}")).status_code == 200
    latents = 4 * 2 * tiny_bundles["tiny"].manifest.latent.dim
    assert reserved == [latents + 2 * 16 * 16, latents + 4 * 16 * 16]
