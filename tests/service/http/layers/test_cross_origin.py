"""Pages of origins that the operator names may call the service from a browser and read every reply; others may not."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.http.layers.cross_origin import EXPOSED
from service.settings import Settings, SettingsError, read_settings

ORIGIN, OTHER = "https://pages.example:8443", "https://elsewhere.example"
KEY = {"X-API-Key": "alpha"}
ALLOWED, VARY = "access-control-allow-origin", "vary"

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture(scope="module")
def keyed(tiny_settings: Callable[..., Settings]) -> FastAPI:
    """An application that needs keys and lets two origins call."""
    origins = f"{ORIGIN},http://localhost:3000"
    return create_app(tiny_settings(cors_origins=origins, api_keys="alpha", max_count=64, max_queued_images=64))


@pytest.fixture(scope="module")
async def page(keyed: FastAPI, start: Start) -> AsyncIterator[httpx.AsyncClient]:
    """A page of one of these origins, as its requests arrive."""
    async with start(keyed) as client:
        client.headers["Origin"] = ORIGIN
        yield client


def may_read(reply: httpx.Response, origin: str = ORIGIN) -> bool:
    """Whether a browser gives this reply to a page of this origin. Caches are told that it depends on the origin."""
    assert "Origin" in reply.headers[VARY].split(", ")
    return reply.headers.get(ALLOWED) in {origin, "*"}


@pytest.mark.anyio
async def test_a_page_may_read_replies_and_their_headers(page: httpx.AsyncClient) -> None:
    """All that the service says in headers of its own; an origin that is not named reads nothing."""
    for reply in (
        await page.get("/sample?seed=1&format=npy", headers=KEY),
        await page.post("/sample", json={"seed": 1}, headers=KEY),
        await page.get("/sample?seed=1", headers=KEY | {"If-None-Match": "*"}),
        await page.get("/bundles", headers=KEY),
        await page.get("/readyz"),
        await page.get("/"),
    ):
        assert reply.status_code in {200, 304}
        assert may_read(reply)
        exposed = reply.headers["access-control-expose-headers"].split(", ")
        assert exposed == list(EXPOSED)
        own = {name for name in reply.headers if name.startswith("x-")} - {"x-content-type-options"}
        assert own <= {name.lower() for name in exposed}
    cached = await page.get("/sample?seed=1", headers=KEY)
    assert set(cached.headers[VARY].split(", ")) == {"Accept", "Origin"}
    for other in (OTHER, "null", ORIGIN + ".example", "*", ""):
        assert not may_read(await page.get("/sample?seed=1", headers=KEY | {"Origin": other}), other)


@pytest.mark.anyio
async def test_a_page_may_read_errors(page: httpx.AsyncClient, keyed: FastAPI, hold_engine: Hold, until: Until) -> None:
    """Whichever layer refuses, so that the page can say why."""
    json = KEY | {"Content-Type": "application/json"}
    replies = [
        await page.post("/sample", content=b"{", headers=json),
        await page.get("/sample"),
        await page.post("/v2/repository/models/tiny/load", headers=KEY),
        await page.get("/nowhere"),
        await page.put("/sample"),
        await page.get("/sample", headers=KEY | {"Accept": "text/html"}),
        await page.post("/sample", content=b"x", headers=json | {"Content-Length": "99999999"}),
        await page.post("/discriminate", content=b"x", headers=KEY),
        await page.get("/sample?seed=x", headers=KEY),
    ]
    async with hold_engine(keyed):
        batches = keyed.state.manager.metrics.registry.get_sample_value
        before = batches("gan_batch_images_count", {"bundle": "tiny", "operation": "sample"})
        running = asyncio.create_task(page.get("/sample", headers=KEY))
        await until(lambda: batches("gan_batch_images_count", {"bundle": "tiny", "operation": "sample"}) != before)
        replies.append(await page.get("/sample", headers=KEY | {"X-Timeout-Ms": "20"}))
        waiting = asyncio.create_task(page.get("/sample?count=64", headers=KEY))
        await until(lambda: batches("gan_queue_images", {"device": "cpu"}) == 64)
        replies.append(await page.get("/sample", headers=KEY))
    await asyncio.gather(running, waiting)
    assert [reply.status_code for reply in replies] == [400, 401, 403, 404, 405, 406, 413, 415, 422, 504, 429]
    assert all(may_read(reply) for reply in replies)
    assert "Retry-After" in replies[-1].headers["access-control-expose-headers"]


@pytest.mark.anyio
async def test_a_page_may_read_that_the_service_is_not_ready(tiny_settings: Callable[..., Settings]) -> None:
    """Before its bundles are loaded."""
    app = create_app(tiny_settings(cors_origins=ORIGIN))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for path in ("/readyz", "/sample"):
            reply = await client.get(path, headers={"Origin": ORIGIN})
            assert reply.status_code == 503
            assert may_read(reply)


@pytest.mark.anyio
async def test_every_preflight_is_answered_without_a_key(page: httpx.AsyncClient, keyed: FastAPI) -> None:
    """Of every route and method, and of paths that do not exist; the headers that carry keys are among the allowed."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-api-key,x-odd"}
    for path in (*keyed.openapi()["paths"], "/", "/docs", "/static/page/main.js", "/nowhere"):
        reply = await page.options(path, headers=asks)
        assert (reply.status_code, reply.content) == (204, b"")
        assert may_read(reply)
        assert set(reply.headers["access-control-allow-methods"].split(", ")) == {"GET", "HEAD", "POST"}
        named = {name.lower() for name in reply.headers["access-control-allow-headers"].split(", ")}
        assert named >= {"authorization", "x-api-key", "content-type", "x-timeout-ms", "x-request-id", "*"}
    for headers in ({"Origin": OTHER} | asks, {"Origin": ORIGIN}):
        refused = await page.options("/sample", headers=headers)
        assert refused.status_code == 405
        assert may_read(refused) == (headers["Origin"] == ORIGIN)


@pytest.mark.anyio
@pytest.mark.parametrize("origin", [ORIGIN, OTHER, "null"])
async def test_a_star_lets_every_page_call(tiny_settings: Callable[..., Settings], start: Start, origin: str) -> None:
    """Without the browser's own credentials, which `*` forbids."""
    async with start(create_app(tiny_settings(cors_origins="*"))) as client:
        for reply in (
            await client.get("/sample", headers={"Origin": origin}),
            await client.get("/nowhere", headers={"Origin": origin}),
            await client.options("/sample", headers={"Origin": origin, "Access-Control-Request-Method": "GET"}),
        ):
            assert may_read(reply, origin)
            assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.anyio
async def test_nobody_is_let_in_unless_the_operator_says_so(client: httpx.AsyncClient) -> None:
    """By default there is no trace of it."""
    for reply in (
        await client.get("/sample?seed=1", headers={"Origin": ORIGIN}),
        await client.options("/sample", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "GET"}),
    ):
        assert not any(name.startswith("access-control") for name in reply.headers)
        assert "Origin" not in reply.headers.get(VARY, "")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("OPTIONS /sample HTTP/1.1\r\nHost: x\r\nAccess-Control-Request-Method: GET\r\n", 204),
        ("GET /sample?count=0 HTTP/1.1\r\nHost: x\r\n", 422),
        (f"GET /sample?labels={'1,' * 40_000} HTTP/1.1\r\nHost: x\r\n", 400),
        ("OPTIONS /sample HTTP/1.1\r\nHost: x\r\nHost: y\r\nAccess-Control-Request-Method: GET\r\n", 400),
    ],
    ids=["preflight", "invalid", "too long", "two hosts"],
)
def test_on_a_socket_it_is_the_same(
    live_server: Any, tiny_settings: Callable[..., Settings], sent: str, status: int
) -> None:
    """Requests that can't be parsed are errors, preflights too; what has been read of them decides who may see that."""
    with (
        live_server(tiny_settings(cors_origins="*")).running() as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as client,
    ):
        client.sendall(f"{sent}Origin: {ORIGIN}\r\nConnection: close\r\n\r\n".encode())
        head = b"".join(iter(lambda: client.recv(2**16), b"")).split(b"\r\n\r\n")[0].decode().lower()
    assert head.startswith(f"http/1.1 {status} ")
    assert f"{ALLOWED}: *" in head.splitlines()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("*", "*"),
        ("https://a.example", "https://a.example"),
        (" HTTPS://A.example:443 , http://localhost:3000", "https://a.example,http://localhost:3000"),
        ("http://a.example:80,https://a.example:80", "http://a.example,https://a.example:80"),
        ("null,http://[::1]:8000,chrome-extension://abc", "null,http://[::1]:8000,chrome-extension://abc"),
    ],
)
def test_origins_are_read_as_browsers_write_them(given: str, read: str) -> None:
    """In lower case, without the scheme's own port."""
    assert read_settings({"cors_origins": given}).cors_origins == read


@pytest.mark.parametrize(
    "given", ["", "a.example", "https://a.example/", "https://*.example", "https://a,,*", "https://ä", "a b"]
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    """It would never match what a browser sends."""
    with pytest.raises(SettingsError, match=r"GAN_CORS_ORIGINS .*without a path"):
        read_settings({"cors_origins": given})
