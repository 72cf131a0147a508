"""POST /encode while no bundle has an encoder."""

from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from service.http.openapi.examples import PIXEL

pytestmark = pytest.mark.anyio

Problem = Callable[[httpx.Response, int, str], str]


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
