"""Lets pages of other origins call the service from a browser: CORS, as the Fetch standard defines it.

Starlette's middleware for this adds its headers in ASGI's `send`, but the request context writes most replies itself.
So these layers hand their headers to the context, and every reply has them, errors too.
"""

from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.requests.request_context import KEY, Header, RequestContext
from service.http.requests.responses import BytesResponse

ANY = "*"
EXPOSED = (
    *("X-Seed", "X-First-Index", "X-Bundle", "X-Request-ID", "ETag", "Retry-After", "Server-Timing"),
    "X-Acceptance-Rate",
    *("RateLimit", "RateLimit-Policy", "Content-Disposition", "Inference-Header-Content-Length"),
)
# What every preflight is told. Also of a path or method that does not exist, so that the page can read our 404 or 405.
PREFLIGHT = {
    b"access-control-allow-methods": b"GET, HEAD, POST",
    # A star does not stand for Authorization, nor for anything in older browsers.
    b"access-control-allow-headers": b"Authorization, X-API-Key, Content-Type, If-None-Match, X-Request-ID, "
    b"X-Timeout-Ms, *",
    b"access-control-max-age": b"600",
}


class CrossOrigin:
    """Adds to every reply whether the page that asked for it may read it.

    Pages may read what they ask for without the browser's cookies and passwords: a key has to be set by the page.

    Args:
        app: The next layer.
        origins: Those whose pages may call, as browsers send them; `ANY` for all.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self.app = app
        self._by_origin = {origin: _headers(origin) for origin in origins}
        self._of_others = self._by_origin.get(ANY) or [(b"vary", b"Origin")]

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Pass a request on."""
        if scope["type"] == "http":
            context: RequestContext = scope[KEY]
            headers = self._by_origin.get(context.header(b"origin") or "", self._of_others)
            context.more_headers = [*context.more_headers, *headers]
        return self.app(scope, receive, send)


def _headers(origin: str) -> list[Header]:
    exposed = ", ".join(EXPOSED).encode()
    return [
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-expose-headers", exposed),
        (b"vary", b"Origin"),
    ]


class Preflights:
    """Answers browsers that ask whether a page may send a request. They send no key, so none is needed.

    Args:
        app: The next layer, for all other requests, and for pages that may not call: browsers take its 405 for a no.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Answer a preflight, or pass a request on."""
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            context: RequestContext = scope[KEY]
            is_allowed = any(name == b"access-control-allow-origin" for name, _ in context.more_headers)
            if is_allowed and context.header(b"origin") and context.header(b"access-control-request-method"):
                return context.answer(BytesResponse(b"", PREFLIGHT, "", 204))
        return self.app(scope, receive, send)
