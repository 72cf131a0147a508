"""What stands in front of the service on Ray: an id for each request, and replies in one piece."""

import asyncio
import socket
from collections.abc import Sequence

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.http.layers.on_ray import NAME, middlewares

pytestmark = pytest.mark.anyio


async def in_front(application: ASGIApp, headers: Sequence[tuple[bytes, bytes]], send: Send) -> None:
    """One request to an application with all that stands in front of it."""

    async def receive() -> Message:
        raise AssertionError("there is no body")

    for layer in middlewares():
        application = layer.cls(application, *layer.args, **layer.kwargs)
    await application({"type": "http", "headers": headers}, receive, send)


async def seen_and_sent(*given: bytes) -> tuple[list[bytes], list[bytes]]:
    """The ids that the application sees of a request with these, and those of a reply to which a proxy adds its own."""
    seen: list[bytes] = []
    sent: list[bytes] = []

    async def application(scope: Scope, _: Receive, send: Send) -> None:
        seen.extend(value for name, value in scope["headers"] if name == NAME)
        headers = [(NAME, seen[0]), (b"etag", b'"1"'), (b"X-Request-ID", b"the proxy's")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(message: Message) -> None:
        assert (b"etag", b'"1"') in message["headers"]
        sent.extend(value for name, value in message["headers"] if name.lower() == NAME)

    await in_front(application, [(b"accept", b"*/*"), *((NAME, one) for one in given)], send)
    return seen, sent


async def test_a_safe_id_is_kept() -> None:
    """The application sees it and the reply has it once, also where a client sends two."""
    assert await seen_and_sent(b"a-1") == ([b"a-1"], [b"a-1"])
    assert await seen_and_sent(b"a-1", b"a-2") == ([b"a-1"], [b"a-1"])


@pytest.mark.parametrize("odd", [b"", b"two words", b"<script>", b"gr\xc3\xb6\xc3\x9fe", b"\xff", b"x" * 129])
async def test_an_odd_id_is_replaced_before_anybody_sees_it(odd: bytes) -> None:
    """So the proxy can't echo it; the new one is in the reply."""
    ([seen], [sent]) = await seen_and_sent(odd)
    assert seen == sent != odd
    assert len(seen) == 32


async def test_where_there_is_none_there_is_one_then() -> None:
    """A new one for each request."""
    assert (await seen_and_sent())[0] != (await seen_and_sent())[0]


@pytest.mark.parametrize(
    ("headers", "turns"),
    [([(b"Content-Length", b"2")], [1, 1]), ([], [0, 1])],
    ids=["a reply whose length is known", "a stream"],
)
async def test_headers_wait_for_a_body_that_is_about_to_come(
    headers: list[tuple[bytes, bytes]], turns: list[int]
) -> None:
    """A reply of known length is sent within one round of the event loop; a stream's headers go at once."""
    turn = 0
    sent: list[int] = []

    async def application(_: Scope, __: Receive, send: Send) -> None:
        nonlocal turn
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        turn += 1
        await send({"type": "http.response.body", "body": b"ab"})

    async def send(_: Message) -> None:
        sent.append(turn)

    await in_front(application, [], send)
    assert sent == turns


async def test_headers_and_body_leave_in_one_piece() -> None:
    """A client of uvicorn, as Ray's replicas run it, gets a whole reply with its first bytes, and the end after it."""
    application: ASGIApp = Response(b"an image")
    for layer in middlewares():
        application = layer.cls(application, *layer.args, **layer.kwargs)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve([listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n")
        first = await reader.read(2**16)
        assert first.startswith(b"HTTP/1.1 200 ")
        assert first.endswith(b"an image")
        assert await reader.read() == b""
        writer.close()
        server.should_exit = True
        await serving
