"""Large npy and zip replies: their bytes, when they leave, what they hold, and what becomes of those that fail."""

import asyncio
import contextlib
import io
import socket
import threading
import zipfile
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.bundle import Bundle
from service.app import create_app
from service.errors import DeadlinePassed, Draining, EngineFailed
from service.http.images.drawing import draw
from service.settings import Settings

Problem = Callable[[httpx.Response, int, str], str]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
ASKED = "/sample?seed=7&count=600&scale=8"  # of 8×8: 2.4 MB, three pieces
PIECE_ROWS = 256


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces are enough to see."""
    monkeypatch.setattr("service.http.images.streaming.PIECE_ROWS", PIECE_ROWS)


class Gate:
    """In front of the engine: lets the pieces of a stream pass that begin before `until`, and others once it is open.

    Attributes:
        passed: The first image of each piece that was computed.
        waiting: Pieces that have come and wait.
        error: Raised in place of what would pass, if it is set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, until: int = 0) -> None:
        self.passed: list[int] = []
        self.waiting: list[int] = []
        self.error: Exception | None = None
        self.is_open = threading.Event()
        self._draw = draw
        self._until = until
        monkeypatch.setattr("service.http.images.streaming.draw", self.draw)

    async def draw(self, manager: Any, bundle: Bundle, plan: Any, deadline_s: float, **more: Any) -> Any:
        """As `drawing.draw`."""
        start = plan.first_index
        if start >= self._until:
            self.waiting.append(start)
            try:
                async with asyncio.timeout(deadline_s):
                    while not self.is_open.is_set():  # noqa: ASYNC110 - another thread opens it
                        await asyncio.sleep(0.001)
            except TimeoutError:
                raise DeadlinePassed from None
            finally:
                self.waiting.remove(start)
        if self.error is not None and start >= self._until:
            raise self.error
        drawn = await self._draw(manager, bundle, plan, deadline_s, **more)
        self.passed.append(start)
        return drawn


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
@pytest.mark.parametrize("form", ["npy", "zip"])
async def test_a_stream_has_the_bytes_of_a_reply_that_is_made_whole(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, name: str, form: str
) -> None:
    """The images, names do not depend on the pieces; GET, POST and HEAD agree."""
    asked = f"{ASKED}&bundle={name}&first_index=3&truncation=0.5&format={form}"
    stream = await client.get(asked)
    head = await client.head(asked)
    body = {"seed": 7, "count": 600, "scale": 8, "bundle": name, "first_index": 3, "truncation": 0.5, "format": form}
    by_body = await client.post("/sample", json=body)
    monkeypatch.setattr("service.http.images.streaming.WHOLE_BYTES", 2**30)
    whole = await client.get(asked)
    assert stream.content == whole.content == by_body.content
    assert head.content == b""
    assert stream.headers.get("content-length") == head.headers.get("content-length")
    assert stream.headers.get("content-length") == (None if form == "zip" else str(len(whole.content)))
    for header in ("etag", "x-seed", "x-first-index", "x-bundle", "content-disposition", "content-type", "vary"):
        assert stream.headers[header] == whole.headers[header] == head.headers[header]
    assert "compute;dur=" in stream.headers["server-timing"]
    current = await client.get(asked, headers={"If-None-Match": whole.headers["etag"]})
    assert (current.status_code, current.content) == (304, b"")


@pytest.mark.anyio
async def test_given_latents_are_streamed_too(client: httpx.AsyncClient) -> None:
    """With a label for each."""
    drawn = (await client.get("/sample?seed=7&count=600&bundle=cond&format=json&latents=true")).json()
    sent = {"latents": drawn["latents"], "labels": drawn["labels"], "bundle": "cond", "scale": 8, "format": "npy"}
    expected = await client.get(f"{ASKED}&bundle=cond&format=npy")
    assert (await client.post("/sample", json=sent)).content == expected.content


@pytest.mark.anyio
async def test_whatever_is_wrong_before_the_first_piece_is_a_problem(
    start: Start, tiny_settings: Callable[..., Settings], problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full queue, a deadline, an engine that fails: nothing of the reply has been sent by then."""
    app = create_app(tiny_settings(max_output_pixels=65 * 64))
    async with start(app) as client:
        for form in ("npy", "zip"):  # the setting bounds each of their images, and all of the others' together
            assert (await client.get(f"{ASKED}&format={form}")).status_code == 200
            problem(await client.get(f"/sample?count=600&scale=9&format={form}"), 422, "invalid")
        problem(await client.get(f"{ASKED}&format=json"), 422, "invalid")
        gate = Gate(monkeypatch)
        late = await client.get(f"{ASKED}&format=npy", headers={"X-Timeout-Ms": "30"})
        problem(late, 504, "deadline_exceeded")
        gate.error = RuntimeError("the engine broke")
        gate.is_open.set()
        problem(await client.get(f"{ASKED}&format=npy"), 500, "internal")
        await app.state.manager.batcher.drain(0)
        problem(await client.get(f"{ASKED}&format=npy"), 503, "draining")


def ask(server: Any, query: str, version: str = "HTTP/1.1", **headers: str) -> socket.socket:
    """A connection on which a stream was asked for, with little room for what was not read yet."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", server.port))
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    connection.sendall(f"GET {query} {version}\r\nHost: x\r\n{fields}\r\n".encode())
    return connection


def read_rest(connection: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def ended(server: Any, status: str, method: str = "GET") -> float:
    return float(server.metric("gan_requests_total", route="/sample", method=method, status=status))


@pytest.mark.parametrize("form", ["npy", "zip"])
def test_the_first_bytes_leave_before_the_last_image_is_computed(
    live: Any, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The rest comes when it is there, and the whole is what it would have been."""
    expected = httpx.get(f"{live.url}{ASKED}&format={form}").content
    gate = Gate(monkeypatch, until=PIECE_ROWS)
    with httpx.stream("GET", f"{live.url}{ASKED}&format={form}", timeout=60) as reply:
        parts = reply.iter_raw()
        received = next(parts)
        assert gate.passed == [0]
        gate.is_open.set()
        received += b"".join(parts)
    assert received == expected
    assert gate.passed == [0, PIECE_ROWS, 2 * PIECE_ROWS]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("form", ["npy", "zip"])
@pytest.mark.parametrize("error", [RuntimeError("the engine broke"), EngineFailed("it did"), None])
def test_a_stream_that_fails_is_no_file(
    live: Any, monkeypatch: pytest.MonkeyPatch, form: str, version: str, error: Exception | None
) -> None:
    """Its connection has no proper end, what came of it can't be read, and it is counted as failed: late, too."""
    status = "504" if error is None else "500"
    before = ended(live, status)
    gate = Gate(monkeypatch, until=PIECE_ROWS)
    gate.error = error
    if error is not None:
        gate.is_open.set()
    connection = ask(live, f"{ASKED}&format={form}", version, X_Timeout_Ms="700" if error is None else "60000")
    with connection:
        head, _, body = read_rest(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert (b"content-length: 2457728" in head) == (form == "npy")
    assert PIECE_ROWS * 2**6 < len(body) < 2_457_728
    assert not body.endswith(b"0\r\n\r\n")
    with pytest.raises((ValueError, EOFError, zipfile.BadZipFile)):
        np.load(io.BytesIO(body)) if form == "npy" else zipfile.ZipFile(io.BytesIO(body))
    live.wait_for(lambda: ended(live, status) == before + 1)


def test_a_client_that_leaves_stops_the_computing(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The piece that waits is given up, and the request counts as left."""
    before = ended(live, "499")
    gate = Gate(monkeypatch, until=PIECE_ROWS)
    with ask(live, f"{ASKED}&format=npy") as connection:
        connection.recv(1)
        live.wait_for(lambda: gate.waiting == [PIECE_ROWS])
    live.wait_for(lambda: gate.waiting == [])
    live.wait_for(lambda: ended(live, "499") == before + 1)
    assert gate.passed == [0]


def test_a_slow_reader_holds_two_pieces(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is computed until it has read, and by the deadline all is over."""
    monkeypatch.setattr("service.http.images.streaming.PIECE_ROWS", 50)
    monkeypatch.setattr("service.http.images.streaming.PIECE_BYTES", 2**20)
    gate = Gate(monkeypatch, until=2000)
    before = ended(live, "504")
    with ask(live, "/sample?format=npy&count=2000&scale=16", X_Timeout_Ms="1500") as connection:  # 33 MB
        connection.recv(1)
        live.wait_for(lambda: ended(live, "504") == before + 1)
        assert len(read_rest(connection)) < 2**24  # the sockets' own buffers
    assert len(gate.passed) < 20  # of 40


@pytest.mark.anyio
async def test_a_drain_waits_for_streams(
    start: Start,
    tiny_settings: Callable[..., Settings],
    problem: Problem,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
) -> None:
    """Those that have begun are computed to their end, while others are refused."""
    app = create_app(tiny_settings())
    async with start(app) as client:
        expected = (await client.get(f"{ASKED}&format=zip")).content
        gate = Gate(monkeypatch, until=PIECE_ROWS)
        stream = asyncio.create_task(client.get(f"{ASKED}&format=zip"))
        await until(lambda: gate.waiting == [PIECE_ROWS])
        drain = asyncio.create_task(app.state.manager.stop())
        await until(lambda: app.state.manager.batcher.is_draining)
        problem(await client.get("/sample"), 503, "draining")
        assert not drain.done()
        gate.is_open.set()
        assert (await stream).content == expected
        await drain


@pytest.mark.anyio
async def test_a_drain_does_not_wait_for_ever(
    start: Start, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """After its time-out the next piece is refused, and the reply breaks off."""
    app = create_app(tiny_settings(drain_timeout_s=0))
    async with start(app) as client:
        gate = Gate(monkeypatch, until=PIECE_ROWS)
        stream = asyncio.create_task(client.get(f"{ASKED}&format=npy"))
        await until(lambda: gate.waiting == [PIECE_ROWS])
        await app.state.manager.batcher.drain(0)
        gate.is_open.set()
        with pytest.raises(Draining):
            await stream
        value = app.state.manager.metrics.registry.get_sample_value
        assert value("gan_requests_total", {"route": "/sample", "method": "GET", "status": "503"}) == 1
        assert value("gan_rejected_total", {"route": "/sample", "reason": "draining"}) == 1
