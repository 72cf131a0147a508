"""Latents that clients send: as JSON or as an array they give the bytes of the seed that drew them, or a reason."""

import io
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.bundle import Bundle
from models.inference.noise import Float32, draw_latents
from service.app import create_app
from service.codecs.time_slices import run_steps
from service.errors import Invalid
from service.http.images.given_latents import MAX_JSON_NUMBERS, latents_of_npy
from service.settings import Settings

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
NPY = {"Content-Type": "application/x-npy"}


def npy(array: Any, **more: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **more)
    return out.getvalue()


def latents(count: int = 3, dim: int = 12) -> Float32:
    return np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)


@pytest.mark.parametrize("truncation", [1, 0.7, 1e-3])
@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
async def test_what_a_seed_drew_gives_the_seeds_bytes(client: httpx.AsyncClient, name: str, truncation: float) -> None:
    """Sent back as JSON and as an array, whole and in part, in every format that holds nothing but images."""
    asked: dict[str, Any] = {"bundle": name, "truncation": truncation}
    seeded = asked | {"seed": 2**53 - 1, "first_index": 9, "count": 70, "format": "json", "latents": True}
    by_query = await client.get("/sample", params=seeded)
    drawn = (await client.post("/sample", json=seeded)).json()
    assert by_query.json() == drawn
    sent = json.loads(json.dumps({"latents": drawn["latents"], "labels": drawn["labels"]}))
    again = await client.post("/sample", json=asked | sent | {"format": "json"})
    assert again.json() == {
        **{key: value for key, value in drawn.items() if key != "latents"}, "seed": None, "first_index": None
    }  # fmt: skip
    array = np.array(drawn["latents"], np.float32)
    labels = {} if name != "cond" else {"labels": ",".join(map(str, drawn["labels"]))}
    for form in ("png", "webp", "zip", "npy"):
        expected = await client.get("/sample", params=seeded | {"format": form, "latents": False})
        as_json = await client.post("/sample", json=asked | sent | {"format": form})
        as_npy = await client.post("/sample", params=asked | labels | {"format": form}, content=npy(array), headers=NPY)
        assert as_json.content == as_npy.content == expected.content
    some = sent | {"latents": sent["latents"][5:7], "labels": sent["labels"] and sent["labels"][5:7]}
    part = await client.post("/sample", json=asked | some | {"format": "npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(part.content)), np.load(io.BytesIO(as_npy.content))[5:7])


async def test_the_latents_are_those_of_the_sampler(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """Before truncation, in the shortest decimals that give each number back; only a JSON reply has them."""
    reply = await client.get("/sample?seed=7&first_index=2&count=40&truncation=0.5&format=json&latents=true")
    expected = draw_latents(tiny_bundles["tiny"].manifest.latent, 7, 2, 40)
    np.testing.assert_array_equal(np.array(reply.json()["latents"], np.float32), expected)
    written = reply.text.partition('"latents": [[')[2].replace("], [", ", ").removesuffix("]]}").split(", ")
    assert written == [str(number) for number in expected.ravel()]
    plain = await client.get("/sample?seed=7&first_index=2&count=40&truncation=0.5&format=json")
    assert "latents" not in plain.json()
    assert plain.headers["etag"] != reply.headers["etag"]
    picture = await client.get("/sample?seed=7&latents=true")
    assert picture.content == (await client.get("/sample?seed=7")).content


async def test_the_reply_names_no_seed(client: httpx.AsyncClient, tiny_bundles: dict[str, Bundle]) -> None:
    """There is none; what bundle it was, it says. POST is not cached."""
    reply = await client.post("/sample", json={"latents": latents().tolist(), "format": "npy"})
    assert reply.headers["x-bundle"] == f"tiny@{tiny_bundles['tiny'].version}"
    assert not {"x-seed", "x-first-index", "etag"} & set(reply.headers)
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["content-disposition"] == 'attachment; filename="tiny-latents-images-0-2.npy"'
    echoed = await client.post("/sample?format=json&latents=true", content=npy(latents()), headers=NPY)
    np.testing.assert_array_equal(np.array(echoed.json()["latents"], np.float32), latents())


ROW = [0.5] * 12


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"latents": []}, "latents: must be rows of numbers"),
        ({"latents": [[]]}, "latents: must be rows of numbers"),
        ({"latents": ROW}, "latents: must be rows of numbers"),
        ({"latents": [["1"] * 12]}, "latents: must be rows of numbers"),
        ({"latents": [[True] * 12]}, "latents: must be rows of numbers"),
        ({"latents": "true"}, "latents: must be rows of numbers"),
        ({"latents": [ROW, ROW[1:]]}, "latents: rows of 11 to 12 numbers"),
        ({"latents": [ROW[1:]]}, "latents: rows of 11 numbers; this bundle's latents have 12"),
        ({"latents": [[1e39] * 12]}, "latents: each has to be a number that float32 can hold"),
        ({"latents": [ROW], "seed": 1}, "seed: latents take its place"),
        ({"latents": [ROW], "first_index": 0}, "first_index: latents take its place"),
        ({"latents": [ROW], "count": 2}, "count: 2 images of 1 latents"),
        ({"latents": [ROW] * 4097}, "4097"),
        ({"latents": [ROW], "labels": 1}, "labels: this bundle has no labels"),
        ({"latents": [ROW], "bundle": "cond"}, "labels: latents draw none"),
        ({"latents": [ROW], "bundle": "cond", "labels": [0, 1]}, "labels: 2 labels for 1 images"),
        ({"latents": [[0] * 10_923] * 12}, "latents: as JSON at most 131072 numbers"),
        ({"latents": [[0] * 100_000] * 2}, "more than"),
        ({"count": 4096, "latents": True, "format": "json", "bundle": "tiny", "seed": 0, "select": "best"}, "select"),
    ],
)
async def test_latents_that_do_not_fit_are_refused(
    client: httpx.AsyncClient, problem: Problem, body: dict[str, Any], reason: str
) -> None:
    """With what is wrong, and with the other field that it goes with."""
    detail = problem(await client.post("/sample", json=body), 422, "invalid")
    assert reason in detail


async def test_json_without_finite_numbers_is_refused(client: httpx.AsyncClient, problem: Problem) -> None:
    """NaN and Infinity are not JSON, and a number of a thousand digits is nobody's latent."""
    headers = {"Content-Type": "application/json"}
    for number in (b"NaN", b"Infinity", b"1e999", b"9" * 999):
        content = b'{"latents": [[%b]]}' % b",".join([number] * 12)
        problem(await client.post("/sample", content=content, headers=headers), 422, "invalid")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (latents().astype(np.float64), "float64; send float32"),
        (latents().astype(">f4"), "send float32"),
        (np.zeros(1, ",".join(["f4"] * 99)), "('f6', '<; send float32"),  # which is long
        (latents()[0], "send (n, dim)"),
        (latents()[None], "send (n, dim)"),
        (np.zeros((0, 12), np.float32), "send (n, dim)"),
        (latents(3, 11), "rows of 11 numbers"),
        (np.full((1, 12), np.nan, np.float32), "float32 can hold"),
        (np.full((1, 12), np.inf, np.float32), "float32 can hold"),
        (np.zeros((4097, 12), np.float32), "4097"),
    ],
    ids=lambda value: value if isinstance(value, str) else "array",
)
async def test_arrays_that_do_not_fit_are_refused(
    client: httpx.AsyncClient, problem: Problem, array: Any, reason: str
) -> None:
    """Another type or shape, too many rows, or what is no number."""
    assert reason in problem(await client.post("/sample", content=npy(array), headers=NPY), 422, "invalid")


async def test_an_array_has_its_options_in_the_query(client: httpx.AsyncClient, problem: Problem) -> None:
    """All but the seed; JSON has its own, and none are ignored."""
    content = npy(np.asfortranarray(latents()))
    reply = await client.post("/sample?count=3&scale=2&format=npy", content=content, headers=NPY)
    assert np.load(io.BytesIO(reply.content)).shape == (3, 16, 16, 1)
    problem(await client.post("/sample?seed=1", content=content, headers=NPY), 422, "invalid")
    problem(await client.post("/sample?colour=1", content=content, headers=NPY), 422, "invalid")
    assert "JSON body" in problem(await client.post("/sample?scale=2", json={}), 422, "invalid")
    for broken in (b"", content[:-1], content + b"0", b"\x93NUMPY"):
        problem(await client.post("/sample", content=broken, headers=NPY), 400, "malformed")
    assert "latents" in problem(await client.get("/sample?latents=[[1]]"), 422, "invalid")
    assert "latents" in problem(await client.get("/sample?latents=1"), 422, "invalid")


async def test_a_reply_shows_no_more_latents_than_could_be_sent_back(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """As many as JSON may bring, which are then taken."""
    most = MAX_JSON_NUMBERS // 12
    app = create_app(tiny_settings(max_count=most + 1))
    async with start(app) as roomy:
        url = "/sample?seed=1&format=json&latents=true&count="
        assert "Ask for fewer" in problem(await roomy.get(f"{url}{most + 1}"), 422, "invalid")
        drawn = (await roomy.get(f"{url}{most}")).json()
        again = await roomy.post("/sample", json={"latents": drawn["latents"], "format": "json"})
        assert again.json()["images"] == drawn["images"]


async def test_an_array_may_be_larger_than_json(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """JSON has a limit of 4 MiB, an array the setting's, both also where no length is announced."""
    app = create_app(tiny_settings(max_body_bytes=5 * 2**20, max_count=100_000, max_queued_images=100_000))
    async with start(app) as client:
        large = npy(np.zeros((4, 262_144), np.float32))
        assert 2**22 < len(large) < 5 * 2**20
        assert "rows of 262144" in problem(await client.post("/sample", content=large, headers=NPY), 422, "invalid")
        too_large = npy(np.zeros((6, 262_144), np.float32))
        problem(await client.post("/sample", content=too_large, headers=NPY), 413, "too_large")


def test_an_array_is_copied_once_it_is_checked() -> None:
    """On another thread where it is large; the body is not kept."""
    small = run_steps(latents_of_npy(npy(latents())))
    large = run_steps(latents_of_npy(npy(latents(9000, 12))))
    for array in (small, large):
        assert array.base is None
        assert array.flags.c_contiguous
        assert array.flags.aligned
    np.testing.assert_array_equal(large, latents(9000, 12))
    with pytest.raises(Invalid):
        run_steps(latents_of_npy(npy(np.full((9000, 12), np.nan, np.float32))))
    with pytest.raises(Invalid):
        run_steps(latents_of_npy(npy(np.array([[object()]]), allow_pickle=True)))
