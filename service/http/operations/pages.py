"""The pages for browsers: the web page, the API documentation, and the OpenAPI document that it shows.

All files come from `static/`, so the pages also work without internet access. The content security policy forbids
loading anything from elsewhere.
"""

import json
from functools import cache
from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from service.errors import NotFound

_STATIC = Path(__file__).parents[2] / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    # The page fetches images, so that a key can be sent with them, and shows them from blob: URLs.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
}


def page_routes() -> APIRouter:
    """GET /, /docs, /openapi.json and what is in static/; none of them is part of the API."""
    router = APIRouter(include_in_schema=False)
    paths = (path for path in _STATIC.rglob("*") if path.suffix in _TYPES)
    files = {path.relative_to(_STATIC).as_posix(): path.read_bytes() for path in paths}

    def page(name: str) -> Response:
        if name not in files:
            raise NotFound("No such file.")
        return Response(files[name], headers=_HEADERS, media_type=_TYPES[Path(name).suffix])

    @router.get("/")
    async def home(request: Request) -> Response:
        sent = (request.scope.get("raw_path") or b"/").decode("ascii", "replace")
        if not sent.endswith("/"):  # a prefix alone, as GAN_ROOT_PATH says: links on the page would miss it
            return RedirectResponse(sent.rpartition("/")[2] + "/", headers=_HEADERS)
        return page("index.html")

    @router.get("/docs")
    async def docs(_: Request) -> Response:
        return page("docs.html")

    @router.get("/static/{name:path}")
    async def static(request: Request) -> Response:
        return page(request.path_params["name"])

    @cache
    def document(app: FastAPI) -> bytes:
        return json.dumps(app.openapi()).encode()

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        return Response(document(request.app), headers={"Cache-Control": "no-cache"}, media_type="application/json")

    return router
