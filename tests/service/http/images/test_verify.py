"""/verify over the whole application: verdicts on pictures of every kind, and what nobody can order with one."""

import base64
import io
import json
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image, PngImagePlugin

from models.inference.png import chunk, grey_png
from service.app import create_app
from service.codecs.recipe import Recipe, mark
from service.http.images import verify as verify_module
from service.http.images.streaming import WHOLE_BYTES
from service.http.images.verify import PIXEL_BYTES
from service.http.requests.request_context import RequestContext
from service.settings import Settings

pytestmark = pytest.mark.anyio

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Problem = Callable[[httpx.Response, int, str], str]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
TERM = b"trainedAlgorithmicMedia"


async def draw(client: httpx.AsyncClient, **options: Any) -> bytes:
    reply = await client.get("/sample", params={"seed": 7, "recipe": "true", **options})
    assert reply.status_code == 200, reply.text
    return reply.content


async def verify(client: httpx.AsyncClient, *files: bytes) -> list[dict[str, Any]]:
    reply = await client.post("/verify", files=[("images", ("a", file)) for file in files])
    assert reply.status_code == 200, reply.text
    results: list[dict[str, Any]] = reply.json()["results"]
    return results


async def verdict(client: httpx.AsyncClient, file: bytes) -> str:
    return str((await verify(client, file))[0]["verdict"])


def opened(file: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return picture


def recipe_in(file: bytes) -> str:
    return str(opened(file).info["gan-service"])


def saved(picture: Image.Image, recipe: str, **options: Any) -> bytes:
    """A PNG as another program would write it, recipe included."""
    about = PngImagePlugin.PngInfo()
    about.add_text("gan-service", recipe)
    picture.save(out := io.BytesIO(), "png", pnginfo=about, **options)
    return out.getvalue()


def changed(file: bytes, by: int) -> bytes:
    """The picture with one number changed by so many levels, where there is room for it."""
    pixels = np.asarray(opened(file)).copy()
    place = (pixels.size // 2,)
    flat = pixels.reshape(-1)
    flat[place] = flat[place] + by if flat[place] < 128 else flat[place] - by
    return saved(Image.fromarray(pixels), recipe_in(file))


def computed(app: FastAPI) -> float:
    """Images that were drawn so far."""
    registry = app.state.manager.metrics.registry
    found = [one for metric in registry.collect() for one in metric.samples if one.name == "gan_images_total"]
    return float(sum(one.value for one in found if one.labels["operation"] == "sample"))


@pytest.mark.parametrize("bundle", ["tiny", "rgb", "cond"])
@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 5, "first_index": 2**53 - 5},
        {"count": 5, "layout": "strip", "scale": 3, "truncation": 0.3},
        {"count": 7, "columns": 2},
    ],
    ids=str,
)
async def test_what_was_served_is_identical(
    client: httpx.AsyncClient, bundle: str, form: str, options: dict[str, Any]
) -> None:
    """Pictures of every kind, whose pixels are those without a recipe, verify; the recipe says what they are."""
    file = await draw(client, bundle=bundle, format=form, **options)
    plain = await draw(client, bundle=bundle, format=form, **options | {"recipe": "false"})
    np.testing.assert_array_equal(opened(file), opened(plain))
    (result,) = await verify(client, file)
    assert result["verdict"] == "identical"
    recipe = result["recipe"]
    assert recipe["bundle"].startswith(f"{bundle}@")
    shown = {"count": recipe["count"], "first_index": recipe["first_index"], "seed": 7, "format": form}
    assert shown == {"count": 1, "first_index": 0, "seed": 7, "format": form} | {
        name: value for name, value in options.items() if name in shown
    }
    assert (recipe["labels"] is not None) == (bundle == "cond")
    assert await verdict(client, plain) == "no_recipe"


async def test_pictures_of_archives_and_json_verify_one_by_one(client: httpx.AsyncClient) -> None:
    """Each names its own image; all kinds of bodies are understood, and results are in their order."""
    options = {"bundle": "cond", "count": 5, "labels": "0,1,2,1,0", "scale": 2}
    with zipfile.ZipFile(io.BytesIO(await draw(client, format="zip", **options))) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    texts = json.loads(await draw(client, format="json", **options))["images"]
    assert [base64.b64decode(text) for text in texts] == files
    results = await verify(client, *reversed(files))
    assert [one["verdict"] for one in results] == ["identical"] * 5
    assert [one["recipe"]["first_index"] for one in results] == [4, 3, 2, 1, 0]
    assert [one["recipe"]["labels"] for one in results] == [[0], [1], [2], [1], [0]]
    reply = await client.post("/verify", json={"images": [f"data:image/png;base64,{text}" for text in texts]})
    assert reply.json()["results"] == results[::-1]
    alone = await client.post("/verify", content=files[0], headers={"Content-Type": "image/png"})
    assert alone.json()["results"] == results[-1:]
    np.save(array := io.BytesIO(), np.zeros((3, 8, 8), np.uint8))
    reply = await client.post("/verify", content=array.getvalue(), headers={"Content-Type": "application/x-npy"})
    assert reply.json() == {"results": [{"verdict": "no_recipe"}] * 3}  # arrays have no place for one


@pytest.mark.parametrize("bundle", ["tiny", "rgb"])
async def test_one_changed_pixel_is_seen(client: httpx.AsyncClient, bundle: str) -> None:
    """By two levels it is another picture; one level is what other devices differ by."""
    file = await draw(client, bundle=bundle, count=5)
    assert await verdict(client, changed(file, 0)) == "identical"
    assert await verdict(client, changed(file, 1)) == "within_one_level"
    assert await verdict(client, changed(file, 2)) == "different"


async def test_a_jpeg_is_compared_after_the_same_encoding(client: httpx.AsyncClient) -> None:
    """Its pixels are not the net's, and yet verify, whatever lossless file they have been moved to since."""
    file = await draw(client, format="jpeg", count=5)
    (result,) = await verify(client, file)
    moved = saved(opened(file), json.dumps(result["recipe"]))
    assert await verdict(client, moved) == "identical"
    assert await verdict(client, changed(moved, 2)) == "different"
    exact = await draw(client, count=5)
    assert (np.asarray(opened(exact)) != np.asarray(opened(file))).any()
    assert await verdict(client, saved(opened(exact), json.dumps(result["recipe"]))) == "different"


async def test_other_programs_may_save_it_again(client: httpx.AsyncClient) -> None:
    """What shows the same pixels is the same picture, whatever it is called inside the file."""
    file = await draw(client, count=4)
    picture, recipe = opened(file), recipe_in(file)
    for same in (
        saved(picture, recipe, compress_level=9),
        saved(picture.convert("RGB"), recipe),
        saved(picture.convert("RGBA"), recipe),
        saved(picture.convert("P"), recipe),
        saved(picture.convert("LA"), recipe),
        file.replace(b"trainedAlgorithmicMedia", b"humanEdits.............", 1),
    ):
        assert await verdict(client, same) == "identical"


async def test_what_shows_something_else_is_different(client: httpx.AsyncClient) -> None:
    """Cropped, turned by its metadata, tinted, transparent, or with more pictures behind it."""
    file = await draw(client, count=4)
    picture, recipe = opened(file), recipe_in(file)
    turned = Image.Exif()
    turned[0x112] = 3
    tinted = np.asarray(picture.convert("RGB")).copy()
    tinted[0, 0] = np.where([1, 0, 0], tinted[0, 0] ^ 2, tinted[0, 0])
    transparent = picture.convert("LA")
    transparent.putalpha(128)
    animated = saved(picture, recipe, save_all=True, append_images=[picture.rotate(90)])
    for other in (
        saved(picture.crop((0, 0, 15, 16)), recipe),
        saved(picture.crop((0, 0, 15, 16)).resize((16, 16)), recipe),
        saved(picture, recipe, exif=turned),
        saved(picture.transpose(Image.Transpose.ROTATE_90), recipe),
        saved(Image.fromarray(tinted), recipe),
        saved(transparent, recipe),
        saved(picture, recipe, transparency=int(np.asarray(picture).max())),
        animated,
        *(animated[:33] + chunk(b"tEXt", b"Comment\0" + text) + animated[33:] for text in (b"IDAT", b"a" * 2**21)),
        mark(await draw(client, count=4, first_index=1, recipe="false"), "png", recipe.encode()),
    ):
        assert await verdict(client, other) == "different"


async def test_a_bundle_that_is_not_here_is_unknown(client: httpx.AsyncClient) -> None:
    """Nothing is loaded for a recipe, and nothing said of its pixels; it is shown all the same."""
    file = await draw(client)
    for named in ("elsewhere@0123456789ab", "tiny@0123456789ab"):
        recipe = Recipe.model_validate_json(recipe_in(file)).model_copy(update={"bundle": named})
        (result,) = await verify(client, saved(opened(file), recipe.model_dump_json()))
        assert result == {"verdict": "unknown_bundle", "recipe": recipe.model_dump()}


async def test_text_that_is_no_recipe_of_ours(client: httpx.AsyncClient) -> None:
    """Whatever else stands there, the picture has no recipe."""
    file = await draw(client)
    whole = json.loads(recipe_in(file))
    for text in (
        "", "null", "{}", "[]", "{", '{"bundle":', "[" * 5000, "1" * 60_000, '{"a":1,' * 5000, json.dumps(whole)[:-1],
        json.dumps(whole | {"more": 1}), json.dumps(whole | {"bundle": "tiny"}),
        json.dumps(whole | {"labels": [0] * 9000}),
        *(json.dumps({name: value for name, value in whole.items() if name != left}) for left in ("seed", "scale")),
    ):  # fmt: skip
        assert await verdict(client, saved(opened(file), text)) == "no_recipe", text[:80]


async def test_recipes_order_no_more_than_their_pictures_are(app: FastAPI, client: httpx.AsyncClient) -> None:
    """A recipe for another size, or for a picture that its file only claims to hold, is not computed."""
    file = await draw(client)
    recipe = Recipe.model_validate_json(recipe_in(file))
    large = recipe.model_copy(update={"count": 4095, "columns": 64, "scale": 4})
    side = 8 * 64 * 4
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0")
    text = chunk(b"tEXt", b"gan-service\0" + large.model_dump_json().encode())
    empty = head + text + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    before = computed(app)
    for other in (
        large,
        recipe.model_copy(update={"scale": 2}),
        recipe.model_copy(update={"count": 4, "columns": 2}),
        recipe.model_copy(update={"labels": [0]}),  # tiny has none
    ):
        assert await verdict(client, saved(opened(file), other.model_dump_json())) == "different"
    wide = recipe.model_copy(update={"count": 2100, "columns": 2100, "layout": "strip", "format": "webp"})
    assert (
        await verdict(
            client, mark(grey_png(np.zeros((8, 16_800, 1), np.uint8)), "png", wide.model_dump_json().encode())
        )
        == "different"
    )
    results = await verify(client, empty, file)
    assert results[0]["error"]["code"] == "invalid"
    assert results[1]["verdict"] == "identical"
    assert computed(app) - before == 1


async def test_recipes_together_are_one_request(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem
) -> None:
    """More images or pixels than a request to /sample may ask for are refused before any is computed."""
    app = create_app(tiny_settings(max_count=6, max_output_pixels=400))
    async with start(app) as client:
        two, four = await draw(client, count=2), await draw(client, count=4)
        before = computed(app)
        for files, told in (([two, four, two], "the recipes ask for 8 images"), ([four, four[:-1]], "8 images")):
            reply = await client.post("/verify", files=[("images", ("a", file)) for file in files])
            assert told in problem(reply, 422, "invalid")
        one = await draw(client, scale=2)
        reply = await client.post("/verify", files=[("images", ("a", one))] * 2)
        assert "512 pixels" in problem(reply, 422, "invalid")
        assert computed(app) - before == 1
        assert [one["verdict"] for one in await verify(client, two, four)] == ["identical"] * 2


async def test_recipes_wait_in_the_queue(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem, hold_engine: Hold
) -> None:
    """Behind too much other work they get 429, and past their deadline 504, as any request."""
    app = create_app(tiny_settings(max_count=4, max_queued_images=4))
    async with start(app) as client:
        file = await draw(client, count=4)
        async with hold_engine(app):
            late = await client.post("/verify", files=[("images", ("a", file))], headers={"X-Timeout-Ms": "50"})
            problem(late, 504, "deadline_exceeded")
        assert await verdict(client, file) == "identical"


async def test_many_pictures_at_once(client: httpx.AsyncClient) -> None:
    """More than are computed together, of several bundles, with errors among them: results are in order."""
    files: list[bytes] = []
    expected: list[str | None] = []
    for place in range(150):
        files.append(await draw(client, bundle=("tiny", "rgb", "cond")[place % 3], first_index=place))
        expected.append("identical")
        if place % 10 == 0:
            files.append(b"junk")
            expected.append(None)
    results = await verify(client, *files)
    assert [one.get("verdict") for one in results] == expected
    assert [("error" in one) for one in results] == [verdict is None for verdict in expected]


async def test_large_pictures_are_few_at_a_time(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is reserved for those that are held together, not for all of a request: its pictures may be very large."""
    reserved: list[int] = []
    monkeypatch.setattr(verify_module, "TOGETHER_PIXELS", 150)
    monkeypatch.setattr(RequestContext, "reserve_reply", lambda _, size: reserved.append(size))
    small = [await draw(client, first_index=place) for place in range(5)]  # of 64 pixels
    large = await draw(client, scale=2)
    reserved.clear()
    assert [one["verdict"] for one in await verify(client, *small)] == ["identical"] * 5
    assert [one["verdict"] for one in await verify(client, *small, large, *small)] == ["identical"] * 11
    assert await verdict(client, small[0]) == "identical"
    assert reserved == [PIXEL_BYTES * pixels for pixels in (150, 256, 64)]


async def test_a_request_that_has_begun_is_not_refused(
    app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its later pictures are computed though the queue is full by then."""
    files = [await draw(client, first_index=place) for place in range(3)]
    monkeypatch.setattr(verify_module, "TOGETHER", 1)
    batcher = app.state.manager.batcher
    submit = batcher.submit

    async def fill_afterwards(*args: Any, **options: Any) -> Any:
        result = await submit(*args, **options)
        monkeypatch.setattr(batcher, "_max_queued_rows", 0)
        return result

    monkeypatch.setattr(batcher, "submit", fill_afterwards)
    assert [one["verdict"] for one in await verify(client, *files)] == ["identical"] * 3
    assert (await client.post("/verify", files={"images": files[0]})).status_code == 429


async def test_a_picture_that_cannot_be_read_is_an_error(client: httpx.AsyncClient, problem: Problem) -> None:
    """Alone it is the reply; so are bodies that bring no pictures."""
    file = await draw(client, count=9)
    for broken in (b"junk", file[:-30]):
        problem(await client.post("/verify", content=broken, headers={"Content-Type": "image/png"}), 422, "invalid")
    problem(
        await client.post("/verify", content=file, headers={"Content-Type": "text/plain"}),
        415,
        "unsupported_media_type",
    )
    problem(await client.post("/verify", json={"images": []}), 422, "invalid")
    problem(await client.post("/verify?bundle=tiny", json={"images": ["QQ=="]}), 422, "invalid")
    problem(await client.post("/verify", json={"images": ["QQ==", "QQ"], "bundle": "tiny"}), 422, "invalid")


@pytest.fixture(scope="module")
async def marking(tiny_settings: Callable[..., Settings], start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that marks its pictures."""
    async with start(create_app(tiny_settings(recipe=True))) as client:
        yield client


async def test_the_setting_is_what_requests_may_change(client: httpx.AsyncClient, marking: httpx.AsyncClient) -> None:
    """GAN_RECIPE=on is recipe=true on each request; recipe=false gives what a service without it gives."""
    for form in ("png", "jpeg", "webp", "zip", "json", "npy"):
        asked = f"/sample?seed=7&count=2&format={form}"
        plain, with_it = await client.get(asked), await client.get(f"{asked}&recipe=true")
        on, off = await marking.get(asked), await marking.get(f"{asked}&recipe=false")
        posted = await marking.post("/sample", json={"seed": 7, "count": 2, "format": form})
        assert plain.content == off.content
        assert with_it.content == on.content == posted.content
        assert (plain.headers["etag"], with_it.headers["etag"]) == (off.headers["etag"], on.headers["etag"])
        assert (plain.content == on.content) == (plain.headers["etag"] == on.headers["etag"]) == (form == "npy")


async def test_what_has_no_recipe_has_the_mark_alone(marking: httpx.AsyncClient) -> None:
    """Images of given latents, on a canvas, or on the way between two say that they were generated, and no more."""
    latents = {"latents": [[0.5] * 12]}
    asked = {"prompt": "one", "size": "32x32"}
    files = [(await marking.post("/sample", json=latents)).content]
    files.append(
        base64.b64decode((await marking.post("/v1/images/generations", json=asked)).json()["data"][0]["b64_json"])
    )
    ways = [
        await marking.get(f"/interpolate?seed_from=1&seed_to=2&steps=3&format={form}")
        for form in ("png", "apng", "webp", "gif")
    ]
    files += [way.content for way in ways]
    for file in files:
        assert TERM in file
        assert b"gan:recipe" not in file
        assert b"gan-service" not in file
    assert await verdict(marking, files[0]) == "no_recipe"


async def test_a_streamed_archive_has_recipes_too(client: httpx.AsyncClient) -> None:
    """Also the pictures of later pieces name their own image, with the label that was drawn for it."""
    body = await draw(client, bundle="cond", count=600, scale=8, format="zip", first_index=3)
    assert WHOLE_BYTES < 600 * (8 * 8) ** 2
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        names = archive.namelist()
        results = await verify(client, *(archive.read(names[place]) for place in (0, 511, 512, 599)))
    assert [(one["verdict"], one["recipe"]["first_index"]) for one in results] == [
        ("identical", 3 + place) for place in (0, 511, 512, 599)
    ]
    assert all(len(one["recipe"]["labels"]) == 1 for one in results)
