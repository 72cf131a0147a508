"""/sample, /discriminate and /bundles over the whole application: replies, headers and errors."""

import asyncio
import base64
import gzip
import io
import json
import math
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.bundle import Bundle
from models.inference.noise import draw_labels, draw_latents
from models.inference.pixels import UInt8, to_uint8
from service.app import create_app
from service.codecs.encode import MEDIA_TYPES, encode, encoding_bytes
from service.http.requests.request_context import RequestContext
from service.machine.cpu import cpu_limit
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
SLOW_BUT_FINE = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def array(reply: httpx.Response) -> UInt8:
    assert reply.status_code == 200, reply.text
    return np.asarray(np.load(io.BytesIO(reply.content)))


def picture(reply: httpx.Response) -> UInt8:
    assert reply.status_code == 200, reply.text
    with Image.open(io.BytesIO(reply.content)) as image:
        return np.asarray(image)


def png(pixels: UInt8, form: str = "png") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def npy(pixels: UInt8) -> bytes:
    out = io.BytesIO()
    np.save(out, pixels)
    return out.getvalue()


def metric(app: FastAPI, name: str, **labels: str) -> float:
    return app.state.manager.metrics.registry.get_sample_value(name, labels) or 0.0


def computed(app: FastAPI) -> float:
    """Images of the default bundle so far."""
    version = app.state.manager.bundles.version("tiny")
    return metric(app, "gan_images_total", bundle="tiny", version=version, operation="sample")


def batches(app: FastAPI) -> float:
    """Number of sample batches so far."""
    return metric(app, "gan_batch_images_count", bundle="tiny", operation="sample")


NPY = {"Content-Type": "application/x-npy"}
PNG = {"Content-Type": "image/png"}
BLACK = png(np.zeros((8, 8), np.uint8))


# ---------------------------------------------------------------------------------------------------------- /sample


async def test_a_long_accept_is_cut(client: httpx.AsyncClient, problem: Problem) -> None:
    """Only the first MAX_ACCEPT characters are parsed, more than any client needs."""
    for wanted, accept in (("image/webp", "image/webp" + ", a/b" * 9000), ("image/png", "*/*" + ";a" * 30_000)):
        reply = await client.get("/sample?seed=1", headers={"Accept": accept})
        assert (reply.status_code, reply.headers["content-type"]) == (200, wanted)
    problem(await client.get("/sample?seed=1", headers={"Accept": "a/b, " * 9000 + "image/png"}), 406, "not_acceptable")
    assert (await client.get("/metrics", headers={"Accept": "a/b, " * 9000})).status_code == 200


async def test_json_that_holds_no_images_has_a_limit_of_its_own(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """4 MiB for /sample, by Content-Length or by the bytes received; /discriminate has the general limit."""
    body = b'{"bundle": "' + b"x" * 2**22 + b'"}'

    async def in_pieces() -> AsyncIterator[bytes]:
        for begin in range(0, len(body), 2**20):
            yield body[begin : begin + 2**20]

    async with start(create_app(tiny_settings())) as client:
        for content in (body, in_pieces()):
            reply = await client.post("/sample", content=content, headers={"Content-Type": "application/json"})
            assert str(2**22) in problem(reply, 413, "too_large")
        reply = await client.post("/discriminate", content=body, headers={"Content-Type": "application/json"})
        assert "images: " in problem(reply, 422, "invalid")


async def test_a_plain_request_is_one_png_of_a_new_seed(client: httpx.AsyncClient) -> None:
    """Without parameters the reply is one image, and its headers say how to get it again."""
    reply = await client.get("/sample")
    assert reply.headers["content-type"] == "image/png"
    assert picture(reply).shape == (8, 8)
    assert reply.headers["cache-control"] == "no-store"
    assert "etag" not in reply.headers
    again = await client.get("/sample", params={"seed": reply.headers["x-seed"]})
    assert again.content == reply.content
    assert (await client.get("/sample")).headers["x-seed"] != reply.headers["x-seed"]


async def test_a_grid_shows_the_images_in_reading_order(client: httpx.AsyncClient) -> None:
    """Sixty-four images are eight rows of eight."""
    images = array(await client.get("/sample?count=64&seed=7&format=npy"))
    grid = picture(await client.get("/sample?count=64&seed=7"))
    assert grid.shape == (64, 64)
    for place in range(64):
        row, column = divmod(place, 8)
        cell = grid[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        np.testing.assert_array_equal(cell, images[place, ..., 0])


async def test_pixels_are_those_that_the_net_makes(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """The service returns exactly the pixels that the generator makes from the seed's latents."""
    bundle = tiny_bundles["rgb"]
    latents = 0.5 * draw_latents(bundle.manifest.latent, 7, 10, 3)
    with torch.inference_mode():
        expected = to_uint8(bundle.generator(torch.from_numpy(latents)))
    got = array(await client.get("/sample?seed=7&first_index=10&count=3&truncation=0.5&bundle=rgb&format=npy"))
    np.testing.assert_allclose(got.astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
async def test_a_bundle_draws_what_the_service_gives(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], name: str
) -> None:
    """`Bundle.draw` and /sample give the same bytes, also with labels drawn from the seed."""
    reply = await client.get(f"/sample?bundle={name}&count=70&seed=11&first_index=5&format=npy")
    np.testing.assert_array_equal(array(reply), tiny_bundles[name].draw(70, seed=11, first_index=5))
    if name == "cond":
        reply = await client.get("/sample?bundle=cond&seed=11&labels=owl,0,2&format=npy")
        np.testing.assert_array_equal(array(reply), tiny_bundles["cond"].draw(3, seed=11, labels=["owl", 0, 2]))


async def test_the_sixth_image_is_the_sixth_image(client: httpx.AsyncClient) -> None:
    """An image of a seed is the same alone, in a request of eight, and beside other requests."""
    row = array(await client.get("/sample?count=8&seed=7&format=npy"))
    crowd = [client.get(f"/sample?count={n + 1}&seed={n}&format=npy") for n in range(20)]
    alone = client.get("/sample?count=1&first_index=5&seed=7&format=npy")
    *_, reply = await asyncio.gather(*crowd, alone)
    np.testing.assert_array_equal(array(reply)[0], row[5])


async def test_another_process_would_make_the_same_bytes(
    client: httpx.AsyncClient, start: Start, tiny_settings: Callable[..., Settings]
) -> None:
    """A new application with the same bundles gives the same bytes and the same ETag."""
    async with start(create_app(tiny_settings())) as other:
        for query in (
            "count=9&seed=1",
            "seed=2&bundle=cond&format=json&count=5",
            "seed=3&bundle=rgb&format=zip&count=2",
        ):
            first, second = await client.get(f"/sample?{query}"), await other.get(f"/sample?{query}")
            assert first.content == second.content
            assert first.headers["etag"] == second.headers["etag"]


async def test_query_and_body_get_the_same_images(client: httpx.AsyncClient) -> None:
    """POST with JSON gives what GET gives with a query."""
    asked: dict[str, Any] = {"count": 3, "seed": 5, "bundle": "cond", "format": "npy", "truncation": 0.7}
    by_body = await client.post("/sample", json=asked | {"labels": [2, "cat", 1]})
    by_query = await client.get("/sample", params=asked | {"labels": "2,cat,1"})
    np.testing.assert_array_equal(array(by_body), array(by_query))
    assert by_body.headers["cache-control"] == "no-store"
    assert "etag" not in by_body.headers


async def test_every_format_can_be_requested(client: httpx.AsyncClient) -> None:
    """A format is chosen by name or by Accept; the name wins."""
    for name, media_type in MEDIA_TYPES.items():
        by_name = await client.get("/sample", params={"seed": 1, "format": name}, headers={"Accept": "text/html"})
        by_accept = await client.get("/sample?seed=1", headers={"Accept": media_type})
        assert by_name.headers["content-type"] == by_accept.headers["content-type"] == media_type
        assert by_name.content == by_accept.content
        assert by_name.headers["vary"] == "Accept"


async def test_json_names_the_classes_that_were_drawn(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]
) -> None:
    """A bundle with classes draws labels from the seed if the request gives none."""
    reply = (await client.get("/sample?seed=3&count=40&bundle=cond&format=json")).json()
    latent = tiny_bundles["cond"].manifest.latent
    assert reply["labels"] == draw_labels(latent.label_frequencies or (), 3, 0, 40).tolist()
    assert set(reply["labels"]) == {0, 1, 2}
    assert (reply["bundle"], reply["version"]) == ("cond", tiny_bundles["cond"].version)
    named = (await client.get("/sample?seed=3&count=40&bundle=cond&format=json&labels=owl")).json()
    assert named["labels"] == [2] * 40


async def test_a_label_changes_the_image_and_nothing_else(client: httpx.AsyncClient) -> None:
    """An image does not depend on the labels of the others in its request."""
    url = "/sample?seed=3&bundle=cond&format=npy"
    mixed = array(await client.get(f"{url}&labels=0,1,2"))
    for index in range(3):
        single = array(await client.get(f"{url}&labels={index}&first_index={index}"))
        np.testing.assert_array_equal(single[0], mixed[index])
    other = array(await client.get(f"{url}&labels=2,1,2"))
    assert (mixed[0] != other[0]).any()
    np.testing.assert_array_equal(mixed[1:], other[1:])


async def test_a_strip_a_scale_and_columns(client: httpx.AsyncClient) -> None:
    """Layout, columns and scale determine the picture's size."""
    url = "/sample?seed=1&count=6&bundle=rgb"
    assert picture(await client.get(f"{url}&layout=strip")).shape == (6, 60, 3)
    assert picture(await client.get(f"{url}&columns=2")).shape == (18, 20, 3)
    assert picture(await client.get(f"{url}&scale=3")).shape == (36, 90, 3)
    assert array(await client.get(f"{url}&scale=2&format=npy")).shape == (6, 12, 20, 3)


async def test_reply_headers_say_what_and_how_long(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """The headers name seed, index and bundle, and the times of queue, compute and encode."""
    reply = await client.get("/sample?seed=9007199254740991&first_index=4&count=2")
    assert reply.headers["x-seed"] == "9007199254740991"
    assert reply.headers["x-first-index"] == "4"
    assert reply.headers["x-bundle"] == f"tiny@{tiny_bundles['tiny'].version}"
    parts = dict(part.strip().split(";dur=") for part in reply.headers["server-timing"].split(","))
    assert set(parts) == {"queue", "compute", "encode"}
    assert all(float(value) >= 0 for value in parts.values())


async def test_what_browsers_cannot_show_has_a_name_to_be_kept_under(client: httpx.AsyncClient) -> None:
    """The name has the bundle, the seed and the images, so that no two replies get the same; pictures have none."""
    for form in MEDIA_TYPES:
        asked: dict[str, Any] = {"bundle": "cond", "seed": 7, "first_index": 5, "count": 3, "format": form}
        for reply in (await client.get("/sample", params=asked), await client.post("/sample", json=asked)):
            named = f'attachment; filename="cond-seed-7-images-5-7.{form}"' if form in {"npy", "zip"} else None
            assert reply.headers.get("content-disposition") == named


async def test_head_has_the_headers_of_get(client: httpx.AsyncClient) -> None:
    """HEAD has the headers of GET, its Content-Length included, and no body."""
    for path in ("/sample?seed=1&count=5", "/bundles", "/bundles/tiny", "/livez", "/", "/openapi.json"):
        get, head = await client.get(path), await client.head(path)
        assert head.status_code == 200
        assert head.content == b""
        ignored = {"date", "x-request-id", "server-timing"}
        assert {k: v for k, v in head.headers.items() if k not in ignored} == {
            k: v for k, v in get.headers.items() if k not in ignored
        }


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("count=0", 422, "invalid"),
        ("count=4097", 422, "invalid"),
        ("count=1&count=1", 422, "invalid"),
        ("colour=1", 422, "invalid"),
        ("labels=1", 422, "invalid"),
        ("labels=7&bundle=cond", 422, "invalid"),
        ("labels=1,2&count=3&bundle=cond", 422, "invalid"),
        ("format=gif", 422, "invalid"),
        ("bundle=", 422, "invalid"),
        ("bundle=tiny@", 422, "invalid"),
        ("bundle=nope", 404, "unknown_bundle"),
        ("bundle=tiny@000000000000", 404, "unknown_bundle"),
        ("bundle=%2e%2e%2ftiny", 404, "unknown_bundle"),
        ("seed=%ff", 400, "malformed"),
    ],
)
async def test_bad_queries(client: httpx.AsyncClient, problem: Problem, query: str, status: int, code: str) -> None:
    """Each is refused with a problem that caches do not store."""
    problem(await client.get(f"/sample?{query}"), status, code)


async def test_nothing_acceptable_is_406(client: httpx.AsyncClient, problem: Problem) -> None:
    """A client that accepts only HTML gets 406."""
    assert "image/png" in problem(await client.get("/sample", headers={"Accept": "text/html"}), 406, "not_acceptable")


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "malformed"),
        (b'{"count": 0}', "application/json", 422, "invalid"),
        (b'{"colour": 0}', "application/json; charset=utf-8", 422, "invalid"),
        (b"count=3", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"{}", None, 415, "unsupported_media_type"),
    ],
)
async def test_bad_bodies(
    client: httpx.AsyncClient, problem: Problem, body: bytes, content_type: str | None, status: int, code: str
) -> None:
    """Each is refused in the one shape."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem(await client.post("/sample", content=body, headers=headers), status, code)


async def test_an_empty_body_asks_for_the_defaults(client: httpx.AsyncClient) -> None:
    """An empty body without Content-Type gives one image."""
    assert picture(await client.post("/sample")).shape == (8, 8)
    assert picture(await client.post("/sample", headers={"Content-Type": "application/json"})).shape == (8, 8)


async def test_a_query_beside_a_body_is_refused(client: httpx.AsyncClient, problem: Problem) -> None:
    """A count in the query would otherwise be ignored silently."""
    detail = problem(await client.post("/sample?count=3", json={}), 422, "invalid")
    assert detail == "count: belongs in the JSON body, not in the query."
    asked = {"images": [base64.b64encode(BLACK).decode()]}
    assert "bundle: belongs in" in problem(await client.post("/discriminate?bundle=rgb", json=asked), 422, "invalid")
    assert "unknown field" in problem(await client.post("/sample?colour=3", json={}), 422, "invalid")


@SLOW_BUT_FINE
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(-1, 40),
            "seed": st.integers(-1, 2**53),
            "first_index": st.integers(-1, 2**53),
            "labels": st.one_of(
                st.integers(-1, 3), st.sampled_from(["cat", "owl", ""]), st.lists(st.integers(0, 2), max_size=4)
            ),
            "truncation": st.floats(),
            "bundle": st.sampled_from(["tiny", "cond", "rgb", "rgb@", "x"]),
            "format": st.sampled_from([*MEDIA_TYPES, "gif"]),
            "layout": st.sampled_from(["grid", "strip", "heap"]),
            "columns": st.integers(0, 50),
            "scale": st.integers(0, 17),
        },
    )
)
async def test_any_request_is_answered_or_refused(
    client: httpx.AsyncClient, problem: Problem, asked: dict[str, Any]
) -> None:
    """By query and by body, the reply is an array of the right shape or a 4xx problem, never a 500."""
    query = asked | ({"labels": ",".join(map(str, asked["labels"]))} if isinstance(asked.get("labels"), list) else {})
    for reply in (
        await client.get("/sample", params=query),
        await client.post("/sample", content=json.dumps(asked), headers={"Content-Type": "application/json"}),
    ):
        if reply.status_code != 200:
            assert problem(reply, reply.status_code, {404: "unknown_bundle"}.get(reply.status_code, "invalid"))
            continue
        labels = asked.get("labels")
        count = asked.get("count") or (len(labels) if isinstance(labels, list) else 1)
        scale, (h, w) = asked.get("scale", 1), (6, 10) if asked.get("bundle", "").startswith("rgb") else (8, 8)
        match asked.get("format", "png"):
            case "npy":
                assert array(reply).shape[:3] == (count, h * scale, w * scale)
            case "json":
                assert len(reply.json()["images"]) == count
            case "zip":
                with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
                    assert len(archive.namelist()) == count
            case _:
                columns = min(count, asked.get("columns") or math.ceil(math.sqrt(count)))
                columns = count if asked.get("layout") == "strip" else columns
                assert picture(reply).shape[:2] == (math.ceil(count / columns) * h * scale, columns * w * scale)


# ---------------------------------------------------------------------------------------------------------- caching


async def test_a_seed_makes_a_reply_cacheable(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """A named bundle makes it fresh for minutes, a pinned version for a year."""
    short = await client.get("/sample?seed=1")
    assert short.headers["cache-control"] == "public, max-age=300"
    assert short.headers["etag"].startswith('"')
    long = await client.get(f"/sample?seed=1&bundle=tiny@{tiny_bundles['tiny'].version}")
    assert long.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert long.content == short.content


async def test_a_current_copy_is_not_sent_again(client: httpx.AsyncClient, app: FastAPI) -> None:
    """Every form of If-None-Match gets 304, and nothing is computed."""
    etag = (await client.get("/sample?seed=1&count=7")).headers["etag"]
    before = computed(app)
    for tag in (etag, f"W/{etag}", f'"other", {etag}', f'"a,b" , W/{etag},"c"', "*"):
        for method in ("GET", "HEAD"):
            reply = await client.request(method, "/sample?seed=1&count=7", headers={"If-None-Match": tag})
            assert (reply.status_code, reply.content) == (304, b"")
            assert reply.headers["etag"] == etag
            assert reply.headers["vary"] == "Accept"
            assert reply.headers["cache-control"] == "public, max-age=300"
    assert computed(app) == before


@pytest.mark.parametrize("tag", ['"other"', "nonsense", "", 'W/"other", "more"', '"*"'])
async def test_another_tag_gets_the_image(client: httpx.AsyncClient, tag: str) -> None:
    """Another entity tag does not match, so the image is sent."""
    reply = await client.get("/sample?seed=1", headers={"If-None-Match": tag})
    assert picture(reply).shape == (8, 8)


async def test_every_parameter_is_in_the_tag(client: httpx.AsyncClient) -> None:
    """Whatever changes the bytes changes the tag; different spellings of one request share it."""
    queries = ["", "count=2", "first_index=1", "truncation=0.5", "bundle=rgb", "format=npy", "scale=2", "format=webp",
               "bundle=cond", "bundle=cond&labels=1", "count=4&columns=1", "count=4"]  # fmt: skip
    tags = [(await client.get(f"/sample?seed=1&{query}")).headers["etag"] for query in queries]
    assert len(set(tags)) == len(tags)
    negotiated = await client.get("/sample?seed=1", headers={"Accept": "application/x-npy"})
    assert negotiated.headers["etag"] == tags[queries.index("format=npy")]


async def test_without_a_seed_no_tag_ever_matches(client: httpx.AsyncClient) -> None:
    """Without a seed every reply is new, whatever If-None-Match says."""
    reply = await client.get("/sample", headers={"If-None-Match": "*"})
    assert reply.status_code == 200


async def test_inexact_replies_have_weak_tags(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """If the batch may change the last bits, tags are weak."""
    async with start(create_app(tiny_settings(exact=False))) as client:
        etag = (await client.get("/sample?seed=1")).headers["etag"]
        assert etag.startswith('W/"')
        again = await client.get("/sample?seed=1", headers={"If-None-Match": etag})
        assert again.status_code == 304


# ---------------------------------------------------------------------------------------------------- /discriminate


@pytest.fixture
def digits() -> UInt8:
    """Five images of the tiny bundle's shape."""
    return np.random.default_rng(5).integers(0, 256, (5, 8, 8), dtype=np.uint8)


async def test_one_image_gets_one_result(
    client: httpx.AsyncClient, digits: UInt8, tiny_bundles: dict[str, Bundle]
) -> None:
    """Without a calibration the probability is σ(logit), and `calibrated` is false."""
    reply = await client.post("/discriminate", content=png(digits[0]), headers=PNG)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["bundle"], body["version"]) == ("tiny", tiny_bundles["tiny"].version)
    (result,) = body["results"]
    assert set(result) == {"probability_real", "logit", "calibrated"}
    assert result["calibrated"] is False
    assert result["probability_real"] == pytest.approx(1 / (1 + math.exp(-result["logit"])))
    assert "decode;dur=" in reply.headers["server-timing"]


async def test_a_calibrated_bundle_gives_calibrated_probabilities(client: httpx.AsyncClient) -> None:
    """The probability is σ(scale·logit + offset), and `calibrated` is left out."""
    image = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    reply = await client.post("/discriminate?bundle=rgb", content=png(image), headers=PNG)
    (result,) = reply.json()["results"]
    assert set(result) == {"probability_real", "logit"}
    assert result["probability_real"] == pytest.approx(1 / (1 + math.exp(-(0.5 * result["logit"] - 0.25))))


async def test_every_way_to_send_images_gets_the_same_logits(client: httpx.AsyncClient, digits: UInt8) -> None:
    """An array, a form, JSON and single files give the same logits."""
    files = [png(image) for image in digits]
    ways = [
        await client.post("/discriminate", content=npy(digits), headers=NPY),
        await client.post("/discriminate", content=npy(digits[..., None]), headers=NPY),
        await client.post("/discriminate", files=[("images", ("a.png", f, "image/png")) for f in files]),
        await client.post("/discriminate", json={"images": [base64.b64encode(f).decode() for f in files]}),
    ]
    alone = [await client.post("/discriminate", content=f, headers=PNG) for f in files]
    expected = [reply.json()["results"][0]["logit"] for reply in alone]
    assert len(set(expected)) == 5
    for reply in ways:
        assert [result["logit"] for result in reply.json()["results"]] == expected


async def test_discriminate_accepts_arrays_of_sample(client: httpx.AsyncClient) -> None:
    """The .npy reply of /sample is a valid body for /discriminate."""
    images = (await client.get("/sample?seed=1&count=6&bundle=rgb&format=npy")).content
    reply = await client.post("/discriminate?bundle=rgb", content=images, headers=NPY)
    assert len(reply.json()["results"]) == 6
    assert not any("converted" in result for result in reply.json()["results"])


async def test_other_sizes_and_colours_are_converted_and_say_so(client: httpx.AsyncClient, digits: UInt8) -> None:
    """A large colour JPEG is brought into the bundle's shape, and `converted` is true."""
    photo = np.kron(np.stack([digits[0]] * 3, axis=2), np.ones((8, 8, 1), np.uint8))
    for form in ("png", "jpeg", "webp", "bmp"):
        reply = await client.post("/discriminate", content=png(photo, form), headers={"Content-Type": f"image/{form}"})
        assert reply.json()["results"][0]["converted"] is True
    two = await client.post("/discriminate", files=[("images", ("a", png(digits[0]))), ("images", ("b", png(photo)))])
    assert [result.get("converted") for result in two.json()["results"]] == [None, True]


async def test_a_blank_image_gets_a_hint_however_it_is_sent(client: httpx.AsyncClient, digits: UInt8) -> None:
    """And it alone, at its place among others and among broken ones; it has its verdict all the same."""
    white = np.full((8, 8), 255, np.uint8)
    array = await client.post("/discriminate", content=npy(np.stack([digits[0], white, digits[1]])), headers=NPY)
    files = [digits[0], None, white]
    form = await client.post(
        "/discriminate", files=[("images", ("a", b"broken" if one is None else png(one))) for one in files]
    )
    for reply, place in ((array, 1), (form, 2)):
        results = reply.json()["results"]
        assert [index for index, result in enumerate(results) if "hint" in result] == [place]
        assert "blank" in results[place]["hint"]
        assert {"probability_real", "logit"} < set(results[place])
    many = await client.post("/discriminate", content=npy(np.zeros((4096, 8, 8), np.uint8)), headers=NPY)
    assert all("hint" in result for result in many.json()["results"])


async def test_one_broken_image_among_many_gets_its_own_problem(client: httpx.AsyncClient, digits: UInt8) -> None:
    """The other images get the scores that they get without it."""
    good = png(digits[1])
    reply = await client.post(
        "/discriminate", files=[("images", ("a", b"broken")), ("images", ("b", good)), ("images", ("c", good[:50]))]
    )
    assert reply.status_code == 200
    first, second, third = reply.json()["results"]
    for entry in (first, third):
        assert set(entry) == {"error"}
        assert (entry["error"]["status"], entry["error"]["code"]) == (422, "invalid")
        assert entry["error"]["request_id"] == reply.headers["x-request-id"]
    alone = await client.post("/discriminate", content=good, headers=PNG)
    assert second == alone.json()["results"][0]
    none = await client.post("/discriminate", json={"images": ["!", "?"]})
    assert [set(entry) for entry in none.json()["results"]] == [{"error"}, {"error"}]


async def test_a_bundle_with_classes_is_asked_about_a_class(
    client: httpx.AsyncClient, digits: UInt8, problem: Problem
) -> None:
    """One label for all or one for each, by query or in JSON; results do not repeat given labels."""
    url = "/discriminate?bundle=cond"
    all_cats = (await client.post(f"{url}&labels=cat", content=npy(digits), headers=NPY)).json()["results"]
    mixed = (await client.post(f"{url}&labels=0,1,2,owl,cat", content=npy(digits), headers=NPY)).json()["results"]
    assert all_cats[0] == mixed[0]
    assert not any("label" in result for result in all_cats + mixed)
    assert all_cats[4] == mixed[4]
    assert all_cats[1] != mixed[1]
    asked = {"images": [base64.b64encode(png(d)).decode() for d in digits], "labels": [0, 1, 2, 2, 0], "bundle": "cond"}
    by_json = (await client.post("/discriminate", json=asked)).json()["results"]
    assert [r["logit"] for r in by_json] == [r["logit"] for r in mixed]
    problem(await client.post(f"{url}&labels=0,1", content=npy(digits), headers=NPY), 422, "invalid")
    problem(await client.post("/discriminate?labels=0", content=npy(digits), headers=NPY), 422, "invalid")


async def test_the_class_head_names_the_label_that_was_not_given(client: httpx.AsyncClient, digits: UInt8) -> None:
    """Each result names the predicted class; with that class as the label the logit is the same."""
    url = "/discriminate?bundle=cond"
    named = (await client.post(url, content=npy(digits), headers=NPY)).json()["results"]
    assert {result["label"] for result in named} <= {"cat", "dog", "owl"}
    labels = ",".join(result.pop("label") for result in named)
    asked = (await client.post(f"{url}&labels={labels}", content=npy(digits), headers=NPY)).json()["results"]
    assert asked == named
    files = [("images", base) for base in (png(digits[2]), b"broken", png(digits[0]))]
    beside = (await client.post(url, files=files)).json()["results"]
    assert [result.get("label") for result in beside] == [labels.split(",")[2], None, labels.split(",")[0]]
    plain = (await client.post("/discriminate?bundle=tiny", content=npy(digits), headers=NPY)).json()["results"]
    assert not any("label" in result for result in plain)


async def test_labels_stay_with_their_images_when_one_is_broken(client: httpx.AsyncClient, digits: UInt8) -> None:
    """The label of a broken image is dropped with it."""
    files = [("images", ("a", png(digits[0]))), ("images", ("b", b"broken")), ("images", ("c", png(digits[2])))]
    reply = (await client.post("/discriminate?bundle=cond&labels=0,1,2", files=files)).json()["results"]
    third = await client.post("/discriminate?bundle=cond&labels=2", content=png(digits[2]), headers=PNG)
    assert reply[2] == third.json()["results"][0]


@pytest.mark.parametrize(("url", "kind"), [("/sample", "application/json"), ("/discriminate", "image/png")])
async def test_compressed_bodies_are_refused(client: httpx.AsyncClient, problem: Problem, url: str, kind: str) -> None:
    """A Content-Encoding is refused by name, instead of an error about unreadable content."""
    headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
    reply = await client.post(url, content=gzip.compress(b"{}"), headers=headers)
    assert "gzip" in problem(reply, 415, "unsupported_media_type")
    assert reply.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("url", "body", "content_type", "status", "code"),
    [
        ("/discriminate", b"x", None, 415, "unsupported_media_type"),
        ("/discriminate", b"x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        ("/discriminate", b"GIF89a", "image/gif", 415, "unsupported_media_type"),
        ("/discriminate", b"", "image/png", 422, "invalid"),
        ("/discriminate", b"broken", "image/png", 422, "invalid"),
        ("/discriminate", png(np.zeros((5000, 5000), np.uint8)), "image/png", 413, "too_large"),
        ("/discriminate", b"x", "application/x-npy", 400, "malformed"),
        ("/discriminate", npy(np.zeros((4097, 8, 8), np.uint8)), "application/x-npy", 422, "invalid"),
        ("/discriminate", b"x", "multipart/form-data; boundary=b", 400, "malformed"),
        ("/discriminate", b"x", "multipart/form-data", 400, "malformed"),
        ("/discriminate", b"{", "application/json", 400, "malformed"),
        ("/discriminate", b"{}", "application/json", 422, "invalid"),
        ("/discriminate", b'{"images": []}', "application/json", 422, "invalid"),
        ("/discriminate", b'{"images": ["x"]}', "application/json", 422, "invalid"),
        ("/discriminate", b'{"images": ["x"], "more": 1}', "application/json", 422, "invalid"),
        ("/discriminate", json.dumps({"images": [""] * 4097}).encode(), "application/json", 422, "invalid"),
        ("/discriminate", b'{"images": ["x"], "bundle": "no"}', "application/json", 404, "unknown_bundle"),
        ("/discriminate?bundle=tiny", b'{"images": ["x"]}', "application/json", 422, "invalid"),
        ("/discriminate?bundle=no", b"", "image/png", 404, "unknown_bundle"),
        ("/discriminate?format=png", b"", "image/png", 422, "invalid"),
    ],
)
async def test_bad_uploads(
    client: httpx.AsyncClient,
    problem: Problem,
    url: str,
    body: bytes,
    content_type: str | None,
    status: int,
    code: str,
) -> None:
    """Each is refused in the one shape."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    problem(await client.post(url, content=body, headers=headers), status, code)


@SLOW_BUT_FINE
@given(
    st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: BLACK[:-20] + tail)),
    st.sampled_from(
        ["image/png", "image/jpeg", "image/webp", "image/bmp", "application/x-npy", "application/json",
         "multipart/form-data; boundary=b", "multipart/form-data", "text/plain", "image/png;", ";"]
    ),
)  # fmt: skip
async def test_random_bytes_never_break_anything(client: httpx.AsyncClient, body: bytes, content_type: str) -> None:
    """Any bytes of any Content-Type get a result or a 4xx."""
    reply = await client.post("/discriminate", content=body, headers={"Content-Type": content_type})
    assert reply.status_code in {200, 400, 413, 415, 422}


# ------------------------------------------------------------------------------------------------- under pressure


async def test_a_deadline_that_passes_is_504(
    client: httpx.AsyncClient, app: FastAPI, hold_engine: Hold, until: Until, problem: Problem
) -> None:
    """Behind a busy engine a request with a short deadline gets 504, and its images are never computed."""
    async with hold_engine(app):
        # The first batch waits on the engine's thread, so the second stays in the queue.
        started = batches(app)
        first = asyncio.create_task(client.get("/sample?seed=1"))
        await until(lambda: batches(app) > started)
        before = computed(app)
        late = await client.get("/sample?count=50", headers={"X-Timeout-Ms": "20"})
        assert "The deadline of 20 ms passed" in problem(late, 504, "deadline_exceeded")
        late = await client.post("/discriminate", content=BLACK, headers=PNG | {"X-Timeout-Ms": "30"})
        assert "The deadline of 30 ms passed" in problem(late, 504, "deadline_exceeded")
    assert (await first).status_code == 200
    assert computed(app) == before + 1
    assert metric(app, "gan_rejected_total", route="/sample", reason="deadline") >= 1


async def test_a_full_queue_is_429_and_says_when_to_come_back(
    start: Start, tiny_settings: Callable[..., Settings], hold_engine: Hold, until: Until, problem: Problem
) -> None:
    """A request that exceeds the queue's capacity is refused at once, and none of it is queued."""
    app = create_app(tiny_settings(max_count=10, max_queued_images=10))
    async with start(app) as client:
        async with hold_engine(app):
            running = asyncio.create_task(client.get("/sample"))
            await until(lambda: batches(app) == 1)
            waiting = asyncio.create_task(client.get("/sample?count=10"))
            await until(lambda: metric(app, "gan_queue_images", device="cpu") == 10)
            refused = await client.get("/sample")
            problem(refused, 429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            problem(await client.post("/discriminate", content=BLACK, headers=PNG), 429, "queue_full")
        assert (await running).status_code == (await waiting).status_code == 200
        assert (await client.get("/sample")).status_code == 200


async def test_a_failing_engine_is_500_without_its_reasons(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets the request id, under which the log has the traceback."""
    app = create_app(tiny_settings())
    async with start(app) as client:

        def explode(*_: object) -> None:
            raise RuntimeError("secret of the house")

        (await app.state.manager.find("tiny", 60)).sample.tiles.run = explode
        reply = await client.get("/sample", headers={"X-Request-ID": "find-me"})
        assert "secret" not in problem(reply, 500, "internal")
        assert reply.headers["x-request-id"] == "find-me"
    assert "secret of the house" in caplog.text


# -------------------------------------------------------------------------------------------------------- /bundles


async def test_bundles_are_listed_with_their_metadata(
    client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]
) -> None:
    """The reply has the metadata of the manifest."""
    body = (await client.get("/bundles")).json()
    assert body["default"] == "tiny"
    assert {facts["name"] for facts in body["bundles"]} == {"tiny", "rgb", "cond"}
    cond = (await client.get("/bundles/cond")).json()
    assert cond in body["bundles"]
    assert cond["version"] == tiny_bundles["cond"].version
    assert cond["image"] == {"channels": 1, "height": 8, "width": 8}
    assert cond["labels"] == ["cat", "dog", "owl"]
    assert cond["calibration"]["scale"] == 0.5
    assert cond["training"] == {"preset": "none", "steps": 0}
    assert (await client.get(f"/bundles/cond@{cond['version']}")).json() == cond


async def test_an_unknown_bundle_is_404(client: httpx.AsyncClient, problem: Problem) -> None:
    """The problem lists the loaded bundles."""
    assert "cond@" in problem(await client.get("/bundles/nope"), 404, "unknown_bundle")


async def test_what_waits_for_an_encoder_ends_at_its_deadline(
    tiny_settings: Callable[..., Settings], start: Start, problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for an encoder ends at the deadline, and encoding that has not begun by then is skipped."""
    gate, begun = threading.Event(), []

    def slow_encode(*arguments: Any) -> bytes:
        begun.append(arguments)
        gate.wait(60)
        return encode(*arguments)

    monkeypatch.setattr("service.http.images.sample.encode", slow_encode)
    async with start(create_app(tiny_settings())) as client:
        asked = [client.get("/sample?count=64&scale=16", headers={"X-Timeout-Ms": "300"}) for _ in range(8)]
        try:
            for reply in await asyncio.gather(*asked):
                problem(reply, 504, "deadline_exceeded")
        finally:
            gate.set()
        assert len(begun) == cpu_limit()
        assert (await client.get("/sample?count=64&scale=16")).status_code == 200
        assert len(begun) == cpu_limit() + 1


async def test_a_reply_reserves_memory_for_its_pictures(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its images, and in WebP by the pixels of one picture."""
    reserved: list[int] = []
    monkeypatch.setattr(RequestContext, "reserve_reply", lambda _, size: reserved.append(size))
    for form in ("png", "webp"):
        assert (await client.get(f"/sample?bundle=tiny&count=3&columns=2&scale=2&format={form}")).status_code == 200
        asked = {"model": "tiny", "prompt": "", "n": 2, "size": "32x16", "output_format": form}
        assert (await client.post("/v1/images/generations", json=asked)).status_code == 200
    assert reserved == [
        *(encoding_bytes("png", 3 * 16 * 16, 32 * 32), encoding_bytes("png", 2 * 32 * 16, 32 * 16)),
        *(encoding_bytes("webp", 3 * 16 * 16, 32 * 32), encoding_bytes("webp", 2 * 32 * 16, 32 * 16)),
    ]
    reply = await client.get("/sample?bundle=tiny&count=4096&scale=16&format=webp")
    assert "16777216 pixels" in reply.json()["detail"]  # nobody could end such a call


async def test_a_current_copy_of_a_version_that_has_left_memory_loads_nothing(
    start: Start, tiny_settings: Callable[..., Settings]
) -> None:
    """Its tag is remembered; another one loads the version, as a request for its images does."""
    app = create_app(tiny_settings(max_resident_bundles=2))
    bundles = app.state.manager.bundles
    async with start(app) as client:
        asked = ("/sample?seed=1&bundle=rgb", "/interpolate?seed_from=1&seed_to=2&steps=2&bundle=rgb")
        tags = [(await client.get(path)).headers["etag"] for path in asked]
        assert (await client.get("/sample?bundle=cond")).status_code == 200
        for path, tag in zip(asked, tags, strict=True):
            reply = await client.get(path, headers={"If-None-Match": tag})
            assert (reply.status_code, reply.headers["etag"]) == (304, tag)
            assert "rgb" not in {one.name for one in bundles.loaded()}
        other = await client.get(asked[0], headers={"If-None-Match": '"other"'})
        assert (other.status_code, other.headers["etag"]) == (200, tags[0])
        assert "rgb" in {one.name for one in bundles.loaded()}
