"""What stands in front of the service on Ray Serve, whose server and proxy take the place of ours.

- One X-Request-ID in each reply. Ray would echo whatever a client sends, in a header beside ours.
- A reply whose length is known leaves with its headers in one piece. A proxy can send a request to another replica as
  long as it has nothing of the reply; a replica that ends between headers and body would fail its client.

Ray calls `middlewares` in its proxies and in front of each replica, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
names it. So this imports little: proxies need no torch.
"""

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
    """Keeps a reply's headers until its body is there, where they say how long that is.

    Both are then written in one round of the event loop, and uvloop, which Ray's replicas run on, writes to a socket
    once a round.
    """

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
            while kept:
                await send(kept.pop())
            await send(message)

        await self._app(scope, receive, send_together)


def has_length(start: Message) -> bool:
    """Whether a reply says how long it is."""
    return any(name.lower() == b"content-length" for name, _ in start["headers"])


def middlewares() -> list[Middleware]:
    """For Ray Serve, which has these layers be the outermost."""
    return [Middleware(InOnePiece), Middleware(OneRequestId)]
