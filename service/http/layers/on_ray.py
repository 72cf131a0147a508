"""What stands in front of the service on Ray Serve, whose server and proxy take the place of ours.

- One X-Request-ID in each reply. Ray would echo whatever a client sends, in a header beside ours.
- A reply whose length is known leaves with its headers in one piece. A proxy can send a request to another replica as
  long as it has nothing of the reply; a replica that ends between headers and body would fail its client.

Ray calls `middlewares` in its proxies and in front of each replica, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
names it. So this imports little: proxies need no torch.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import is_request_id, new_request_id

NAME = b"x-request-id"


class OneRequestId:
    """Lets a safe id in, the client's or a new one, and one id out: of several the first, the innermost layer's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                ids = [pair for pair in message["headers"] if pair[0].lower() == NAME]
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != NAME] + ids[:1]
            await send(message)

        given = next((value for name, value in scope["headers"] if name == NAME), b"").decode("latin-1")
        own = given if is_request_id(given) else new_request_id()
        headers = [pair for pair in scope["headers"] if pair[0] != NAME] + [(NAME, own.encode())]
        await self._app({**scope, "headers": headers}, receive, send_one)


class InOnePiece:
    """Keeps headers that say how long the body is until that is there, and has both written at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        kept: list[Message] = []

        async def send_together(message: Message) -> None:
            if message["type"] == "http.response.start" and has_length(message):
                kept.append(message)
                return
            with one_write(send):
                while kept:
                    await send(kept.pop())
                await send(message)

        await self._app(scope, receive, send_together)


@contextmanager
def one_write(send: Send) -> Iterator[None]:
    """Have uvicorn, whose `send` it is, write what it is sent at once. Another server's is left as it is."""
    connection = getattr(send, "__self__", None)
    transport = getattr(connection, "transport", None)
    if transport is None:
        yield
        return
    together = Together(transport)
    connection.transport = together  # type: ignore[union-attr]
    try:
        yield
    finally:
        connection.transport = transport  # type: ignore[union-attr]
        together.flush()


class Together:
    """A transport that keeps what is written until it is flushed, or until anything else is asked of it."""

    def __init__(self, transport: "asyncio.Transport") -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Keep it."""
        self._parts.append(data)

    def flush(self) -> None:
        """Write what was kept."""
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts.clear()

    def __getattr__(self, name: str) -> Any:
        self.flush()  # before it is closed, for one
        return getattr(self._transport, name)


def has_length(start: Message) -> bool:
    """Whether a reply says how long it is."""
    return any(name.lower() == b"content-length" for name, _ in start["headers"])


def middlewares() -> list[Middleware]:
    """For Ray Serve, which puts each around those before it, and all around its own."""
    return [Middleware(OneRequestId), Middleware(InOnePiece)]
