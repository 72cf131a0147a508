"""What leaves a connection and when, on a transport that takes notes; the sockets are test_middleware's."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from service.app import create_app
from service.held import SMALL_BYTES
from service.protocol import BURST, Burst, Joining, Protocol
from service.settings import Settings

pytestmark = pytest.mark.anyio


class Wire(asyncio.Transport):
    """Notes what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_read = True

    def write(self, data: Any) -> None:  # noqa: D102
        self.writes.append(data)

    def writelines(self, list_of_data: Any) -> None:  # noqa: D102
        self.write(b"".join(list_of_data))

    def close(self) -> None:  # noqa: D102
        self.writes.append(b"closed")

    def is_closing(self) -> bool:  # noqa: D102
        return b"closed" in self.writes

    def pause_reading(self) -> None:  # noqa: D102
        self.is_read = False

    def resume_reading(self) -> None:  # noqa: D102
        self.is_read = True


async def test_a_reply_goes_out_in_one_piece_and_nothing_stays_behind() -> None:
    """Head and body together, at the end of the step, at once where they are large, or before the connection closes."""
    wire = Wire()
    joining = Joining(wire, Burst(asyncio.get_running_loop()), linger=bool)
    joining.write(b"head ")
    joining.write(b"body")
    assert wire.writes == []
    await asyncio.sleep(0)
    assert wire.writes == [b"head body"]
    joining.write(b"head alone")
    await asyncio.sleep(0)
    assert wire.writes[1:] == [b"head alone"]
    joining.write(b"head ")
    joining.write(bytes(2 * SMALL_BYTES))
    joining.write(bytes(2 * SMALL_BYTES))  # at once: whoever writes so much is told when to wait
    assert [len(data) for data in wire.writes[2:]] == [5 + 2 * SMALL_BYTES, 2 * SMALL_BYTES]
    joining.write(b"last")
    joining.close()
    assert wire.writes[4:] == [b"last", b"closed"]
    joining.write(b"nobody is there any more")
    await asyncio.sleep(0)
    assert wire.writes[6:] == []


async def test_replies_that_are_ready_together_are_written_together() -> None:
    """A few at a time, so that no client waits for all of them; each in the order in which it was ready."""
    burst = Burst(asyncio.get_running_loop())
    wires = [Wire() for _ in range(BURST + 1)]
    for wire in wires:
        joining = Joining(wire, burst, linger=bool)
        joining.write(b"head ")
        joining.write(b"body")
    assert [wire.writes for wire in wires] == [[b"head body"]] * BURST + [[]]
    await asyncio.sleep(0)
    assert wires[-1].writes == [b"head body"]


async def test_of_a_body_that_nobody_wants_one_piece_is_read_in_a_turn(until: Any) -> None:
    """A hundred clients that are refused and go on sending leave everyone else their turns; then they can go on."""

    async def refuse(_: Scope, __: Receive, send: Send) -> None:
        headers = [(b"content-length", b"0")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body"})

    loop, wire = asyncio.get_running_loop(), Wire()
    config = uvicorn.Config(refuse, log_config=None)
    one = Protocol(config, ServerState(), {}, loop, burst=Burst(loop), when_closed=lambda: None)
    one.connection_made(wire)
    one.data_received(b"POST / HTTP/1.1\r\nContent-Length: 300\r\n\r\n")
    await until(lambda: len(wire.writes) == 1)
    assert wire.is_read
    for _ in range(2):
        one.data_received(bytes(100))
        assert not wire.is_read
        await asyncio.sleep(0)
        assert wire.is_read
    one.data_received(bytes(100))
    assert wire.is_read
    one.data_received(b"POST / HTTP/1.1\r\n\r\n")
    await until(lambda: len(wire.writes) == 2)
    one.connection_lost(None)


# ------------------------------------------------------------------------------------------- the service on such a wire


class Messages:
    """An application whose replies' messages are counted on their way to the server."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        async def note(message: Message) -> None:
            self.sent += 1
            await send(message)

        await self.app(scope, receive, note)


@pytest.fixture
async def service(tiny_settings: Callable[..., Settings]) -> AsyncIterator[FastAPI]:
    app = create_app(tiny_settings())
    async with app.router.lifespan_context(app):
        await app.state.starting
        yield app


def connect(app: ASGIApp, wire: Wire) -> Protocol:
    """A connection to this application, whose other end is the wire."""
    loop, config = asyncio.get_running_loop(), uvicorn.Config(app, log_config=None, lifespan="off")
    config.load()
    one = Protocol(config, ServerState(), {}, loop, burst=Burst(loop), when_closed=lambda: None)
    one.connection_made(wire)
    return one


def replies(wire: Wire) -> list[tuple[dict[str, str], bytes]]:
    """Headers and bodies of all that was written, one after the other."""
    left, found = b"".join(data for data in wire.writes if data != b"closed"), []
    while left:
        head, _, left = left.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        length = int(headers["content-length"])
        found.append((headers, left[:length]))
        left = left[length:]
    return found


@pytest.mark.parametrize(
    ("request_line", "header", "way"),
    [
        ("GET /sample?seed=7 HTTP/1.1", "", "one go"),
        ("GET /sample?seed=7&count=0 HTTP/1.1", "", "one go"),
        ("GET /sample?seed=7 HTTP/1.1", "If-None-Match: *", "one go"),
        ("GET /sample?seed=7&count=2000&format=npy HTTP/1.1", "", "messages"),
        ("HEAD /sample?seed=7 HTTP/1.1", "", "messages"),
        ("GET /sample?seed=7 HTTP/1.1", "Connection: close", "messages"),
        ("GET /sample?seed=7 HTTP/1.0", "", "messages"),
        ("GET /sample?seed=7 HTTP/1.1", "X-Request-ID: two words", "one go"),
    ],
)
async def test_only_common_replies_go_out_in_one_go(
    service: FastAPI, until: Any, request_line: str, header: str, way: str
) -> None:
    """Small ones on connections that stay: what a large or a last one, or HEAD, takes is left to uvicorn."""
    app, wire = Messages(service), Wire()
    one = connect(app, wire)
    one.data_received("\r\n".join([request_line, *([header] if header else []), "", ""]).encode())
    await until(lambda: one.cycle.response_complete)
    assert way == ("messages" if app.sent else "one go")
    one.connection_lost(None)


async def test_while_draining_every_reply_closes_its_connection(service: FastAPI, until: Any) -> None:
    """The quick way has no word for that."""
    service.state.serving.is_draining = True
    app, wire = Messages(service), Wire()
    one = connect(app, wire)
    one.data_received(b"GET /sample?seed=7 HTTP/1.1\r\n\r\n")
    await until(wire.is_closing)
    assert app.sent
    assert replies(wire)[0][0]["connection"] == "close"
    service.state.serving.is_draining = False
    one.connection_lost(None)


@pytest.mark.parametrize("piece", [1, 7, 50, 10_000])
async def test_bodies_sent_ahead_do_not_mix(service: FastAPI, until: Any, piece: int) -> None:
    """Requests that come before the last is answered, cut anywhere: each is answered for its own body, in order."""
    wire = Wire()
    one = connect(service, wire)
    bodies = [json.dumps({"seed": seed, "count": 1 + seed % 3, "format": "npy"}).encode() for seed in range(5)]
    sent = b"".join(
        b"POST /sample HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        for body in bodies
    )
    for start in range(0, len(sent), piece):
        one.data_received(sent[start : start + piece])
        if start % 3:
            await asyncio.sleep(0)
    await until(lambda: len(replies(wire)) == len(bodies))
    assert [headers["x-seed"] for headers, _ in replies(wire)] == [*"01234"]
    assert [len(body) for _, body in replies(wire)] == [128 + 64 * (1 + seed % 3) for seed in range(5)]
    one.connection_lost(None)


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
async def test_nothing_of_a_connection_waits_for_the_garbage_collector(
    service: FastAPI, until: Any, error: Exception | None
) -> None:
    """It comes by seldom, and clients by the thousand."""
    gc.collect()
    gc.disable()
    try:
        wire = Wire()
        one = connect(service, wire)
        one.data_received(b"GET /sample?seed=7 HTTP/1.1\r\n\r\n")
        await until(lambda: len(wire.writes) == 1)
        seen = weakref.ref(one), weakref.ref(one.cycle)
        one.connection_lost(error)
        del one
        for _ in range(20):  # callbacks of what has ended
            await asyncio.sleep(0)
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
