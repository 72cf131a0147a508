"""Both kinds of client behind the same calls, and a server between them and the service that does what a test says."""

import asyncio
import dataclasses
import http.server
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from gan_client import AsyncClient, Client


class BlockingAsyncClient:
    """AsyncClient with the methods of Client: each waits on an event loop of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._runner.run(method(*arguments, **options))

    def iter_arrays(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        """The batches one by one, as a loop over them would have them."""
        return self._each(self._client.iter_arrays(*arguments, **options))

    def _each(self, batches: AsyncGenerator[Any]) -> Iterator[Any]:
        try:
            while True:
                try:
                    yield self._runner.run(anext(batches))
                except StopAsyncIteration:
                    return
        finally:
            self._runner.run(batches.aclose())

    def close(self) -> None:
        """Close the client and its loop."""
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, BlockingAsyncClient], ids=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a client of either kind, which retries at once where the service does not ask it to wait."""
    monkeypatch.setattr("gan_client.core.retries._FIRST_BACKOFF_S", 0.0)
    made = []

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(request.param(*arguments, **options))
        return made[-1]

    yield make
    for client in made:
        client.close()


Answer = tuple[int, dict[str, str], bytes]
Step = Answer | Callable[[http.server.BaseHTTPRequestHandler], None] | str | None


@dataclasses.dataclass
class ScriptedServer:
    """What a request meets on its way: each takes the next entry of `script`; those after its end are passed on.

    Attributes:
        script: (status, headers, body), None to hang up without an answer, or a function that answers.
        seen: (request line's target, headers, body) of every request.
    """

    target: str
    url: str = ""
    script: deque[Step] = dataclasses.field(default_factory=deque)
    seen: list[tuple[str, dict[str, str], bytes]] = dataclasses.field(default_factory=list)
    is_over: threading.Event = dataclasses.field(default_factory=threading.Event)

    passing = "passed on"

    def hang(self, _: http.server.BaseHTTPRequestHandler) -> None:
        """A step that does nothing until the test is over."""
        self.is_over.wait(60)

    def drip(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        """A step that sends a body byte by byte until the client hangs up."""
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while not self.is_over.wait(0.01):
                handler.wfile.write(b"x")

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        """The class of a request."""
        told = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                told.seen.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
                step = told.script.popleft() if told.script else told.passing
                if isinstance(step, str):
                    step = self.passed_on(body)
                if step is None or callable(step):
                    if step:
                        step(self)
                    self.close_connection = True
                    return
                status, headers, content = step
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Transfer-Encoding" not in headers and "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = "Content-Length" in headers  # which may be a lie

            def passed_on(self, body: bytes) -> Answer:
                kept = {name: text for name, text in self.headers.items() if name.lower() != "host"}
                reply = httpx.request(self.command, told.target + self.path, content=body, headers=kept)
                names = ("content-type", "x-bundle", "x-seed", "x-first-index", "x-request-id")
                return (
                    reply.status_code,
                    {name: reply.headers[name] for name in names if name in reply.headers},
                    reply.content,
                )

            do_GET = do_POST = answer  # noqa: N815 - names that the library looks for

            def log_message(self, *args: object) -> None:
                """Keep the tests' output clean."""

        return Handler

    @contextmanager
    def running(self) -> Iterator["ScriptedServer"]:
        """Serve while the block lasts."""
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler()) as server:
            server.daemon_threads = True
            self.url = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                self.is_over.set()
                server.shutdown()
                thread.join()


@pytest.fixture
def scripted(live: Any) -> Iterator[ScriptedServer]:
    """A server in front of the real one."""
    with ScriptedServer(live.url).running() as server:
        yield server
