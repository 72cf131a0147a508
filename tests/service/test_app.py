"""The application as a whole: its start, its documents and pages, and that two of them share nothing."""

import asyncio
import base64
import gc
import io
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message

import service
from models.bundle import BundleError
from models.inference.pixels import UInt8
from service.app import create_app, work_routes
from service.settings import Settings

pytestmark = pytest.mark.anyio

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]


async def test_two_applications_do_not_meet(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """Each has its own bundles, engine and metrics."""
    one, two = create_app(tiny_settings()), create_app(tiny_settings(default_bundle="rgb"))
    async with start(one) as first, start(two) as second:
        assert (await first.get("/sample?seed=1")).headers["x-bundle"].startswith("tiny@")
        assert (await second.get("/sample?seed=1")).headers["x-bundle"].startswith("rgb@")
        for client, mine, others in ((first, "tiny", "rgb"), (second, "rgb", "tiny")):
            page = (await client.get("/metrics")).text
            labels = rf'bundle="{mine}",operation="sample",version="\w{{12}}"'
            assert re.search(rf"^gan_images_total{{{labels}}} 1\.0$", page, re.MULTILINE)
            assert f'gan_images_total{{bundle="{others}"' not in page


async def test_a_bundle_that_does_not_verify_is_reported_by_the_start(
    tiny_settings: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has one line with the reason, and the application never becomes ready."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{}")
    app = create_app(tiny_settings(bundles=tmp_path, default_bundle=None))
    async with app.router.lifespan_context(app):
        with pytest.raises(BundleError, match=r"manifest\.json"):
            await app.state.starting
        assert app.state.manager.health.ready() is not None
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "manifest.json" in line.getMessage()
    assert line.exc_info is None


def test_a_device_that_is_not_there_is_an_error(tiny_settings: Callable[..., Settings]) -> None:
    """It is refused before anything is loaded."""
    with pytest.raises(ValueError, match="cuda:99"):
        create_app(tiny_settings(device="cuda:99"))


@pytest.mark.slow
def test_importing_does_nothing() -> None:
    """An import reads no environment, registers no metric and starts no thread."""
    program = (
        "import os, threading; os.environ['GAN_PORT'] = 'nonsense'; import service.app, prometheus_client;"
        "names = [m.name for m in prometheus_client.REGISTRY.collect() if m.name.startswith('gan')];"
        "assert not names, names; assert threading.active_count() == 1, threading.enumerate()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_version_is_that_of_the_package() -> None:
    """The version is the same wherever it is read."""
    text = (Path(service.__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{service.__version__}"' in text


# ------------------------------------------------------------------------------------------------- openapi and pages


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from refs(value)


async def test_openapi_is_whole(client: httpx.AsyncClient) -> None:
    """It has every route with methods, parameters, bodies and errors, and every reference resolves."""
    document = (await client.get("/openapi.json")).json()
    methods = {path: set(facts) for path, facts in document["paths"].items()}
    assert methods == {
        "/sample": {"get", "post"}, "/interpolate": {"get"}, "/discriminate": {"post"},
            "/verify": {"post"},
        "/encode": {"post"}, "/bundles": {"get"}, "/bundles/{name}": {"get"},
        "/livez": {"get"}, "/readyz": {"get"}, "/health": {"get"}, "/startupz": {"get"}, "/metrics": {"get"},
        "/v2/repository/index": {"post"}, "/v2/repository/models/{name}/load": {"post"},
        "/v2/repository/models/{name}/unload": {"post"},
        "/v2": {"get"}, "/v2/health/live": {"get"}, "/v2/health/ready": {"get"}, "/v2/models/stats": {"get"},
        **{
            f"/v2/models/{model}{end}": {"post" if end == "/infer" else "get"}
            for model in ("{name}", "{name}/versions/{version}")
            for end in ("", "/ready", "/config", "/stats", "/infer")
        },
        "/v1/images/generations": {"post"}, "/v1/models": {"get"}, "/v1/models/{name}": {"get"},
    }  # fmt: skip
    assert methods.keys() > work_routes(Settings()).keys()
    for ref in refs(document):
        assert ref.removeprefix("#/components/schemas/") in document["components"]["schemas"]
    operations = {(path, method): facts for path, one in document["paths"].items() for method, facts in one.items()}
    assert len({facts["operationId"] for facts in operations.values()}) == len(operations)
    for facts in operations.values():
        assert facts["description"]
        assert "500" in facts["responses"]
    sample = operations["/sample", "get"]
    assert [parameter["name"] for parameter in sample["parameters"]] == [
        "count", "seed", "first_index", "labels", "truncation", "select", "bundle", "format", "layout", "columns",
        "scale", "latents", "recipe", "X-Timeout-Ms", "If-None-Match",
    ]  # fmt: skip
    assert set(sample["responses"]) == {
        "200", "304", "400", "401", "404", "406", "413", "422", "429", "500", "503", "504",
    }  # fmt: skip
    upload = operations["/discriminate", "post"]
    assert set(upload["requestBody"]["content"]) == {
        "image/png", "image/jpeg", "image/jpg", "image/webp", "image/bmp", "multipart/form-data", "application/x-npy",
        "application/json",
    }  # fmt: skip
    assert {"408", "413", "415"} <= set(upload["responses"])


async def test_replies_are_what_openapi_says(client: httpx.AsyncClient) -> None:
    """It has the media types of /sample and the fields of a problem."""
    document = (await client.get("/openapi.json")).json()
    for media_type in document["paths"]["/sample"]["get"]["responses"]["200"]["content"]:
        assert (await client.get("/sample", headers={"Accept": media_type})).headers["content-type"] == media_type
    assert set((await client.get("/nope")).json()) == set(document["components"]["schemas"]["Problem"]["properties"])


async def test_a_bundle_says_which_networks_it_has(client: httpx.AsyncClient) -> None:
    """So that nobody has to ask for what it can't do."""
    assert set((await client.get("/bundles/tiny")).json()["networks"]) == {"generator", "discriminator"}


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient, path: str) -> None:
    """Everything that a page refers to is served here, and the policy forbids other sources."""
    page = await client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "<style" not in page.text
    assert " style=" not in page.text
    assert not re.search(r"<script(?![^>]*\bsrc=)", page.text)
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 4
    for link in links:
        assert not re.match(r"[a-z]+:|/", link), "absolute links would lead past a proxy's prefix"
        assert (await client.get(urljoin(path, link))).status_code == 200


async def test_static_files_have_their_types_and_nothing_else_is_served(client: httpx.AsyncClient) -> None:
    """Only files of the folder are served; no path leads out of it."""
    for name, media_type in (
        ("page/main.js", "text/javascript"),
        ("style.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
    ):
        assert (await client.get(f"/static/{name}")).headers["content-type"].startswith(media_type)
    for path in ("/static/nope.js", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/", "/static/a/b"):
        assert (await client.get(path)).status_code == 404


async def test_the_page_loads_all_its_modules_at_once(client: httpx.AsyncClient) -> None:
    """Each is named in the page's head, so that none waits for another, and none is named that is not imported."""
    page = (await client.get("/")).text
    named = set(re.findall(r'href="static/page/([\w.]+\.js)"', page)) | {"main.js"}
    imported = {"main.js"}
    for name in named:
        script = (await client.get(f"/static/page/{name}")).text
        imported |= set(re.findall(r'from "\./([\w.]+)"', script))
    assert named == imported


@pytest.mark.parametrize("root_path", [None, "/", "/gan", "/a/b.c/"])
async def test_every_prefix_that_a_proxy_strips_is_served(
    start: Start, tiny_settings: Callable[..., Settings], root_path: str | None
) -> None:
    """OpenAPI names the prefix as the server's address; without one it says nothing, which means the root."""
    async with start(create_app(tiny_settings(root_path=root_path))) as client:
        document = (await client.get("/openapi.json")).json()
        prefix = (root_path or "").rstrip("/")
        assert document.get("servers", []) == ([{"url": prefix}] if prefix else [])
        assert (await client.get("/bundles/tiny")).json()["name"] == "tiny"


async def test_a_prefix_that_the_proxy_leaves_changes_nothing(
    start: Start, tiny_settings: Callable[..., Settings]
) -> None:
    """Pages, the API, errors and keys are those without it, and metrics have the same routes."""
    async with start(create_app(tiny_settings(root_path="/gan", api_keys="secret"))) as client:
        for path in ("/", "/docs", "/static/page/main.js", "/openapi.json", "/livez"):
            plain, prefixed = await client.get(path), await client.get(f"/gan{path}")
            assert (plain.status_code, plain.content) == (prefixed.status_code, prefixed.content)
            assert plain.status_code == 200
        for path, status in (("/bundles/tiny", 401), ("/nope", 404), ("/gan/gan/docs", 404), ("/ganymede", 404)):
            assert (await client.get(f"/gan{path}")).status_code == (await client.get(path)).status_code == status
        assert (await client.delete("/gan/sample")).headers["allow"] == "GET, HEAD, POST"
        assert set((await client.get("/gan/v2/nope")).json()) == {"error"}
        key = {"Authorization": "Bearer secret"}
        for path in ("/bundles/tiny", "/sample?seed=1"):
            plain, prefixed = [await client.get(at + path, headers=key) for at in ("", "/gan")]
            assert plain.content == prefixed.content
        assert "/gan" not in (await client.get("/metrics")).text


@pytest.mark.parametrize("root_path", ["/gan", "/outer/gan"])
async def test_a_prefix_alone_leads_to_the_page(
    start: Start, tiny_settings: Callable[..., Settings], root_path: str
) -> None:
    """Its links are relative, so its address has to end in a slash."""
    async with start(create_app(tiny_settings(root_path=root_path))) as client:
        reply = await client.get(root_path)
        assert reply.is_redirect
        assert urljoin(root_path, reply.headers["location"]) == f"{root_path}/"
        assert (await client.get(f"{root_path}/")).text == (await client.get("/")).text


async def test_a_route_wins_over_a_prefix_of_its_name(start: Start, tiny_settings: Callable[..., Settings]) -> None:
    """The proxy strips the prefix, so that what begins with it is first of all a route."""
    async with start(create_app(tiny_settings(root_path="/bundles"))) as client:
        assert (await client.get("/bundles/tiny")).json()["name"] == "tiny"
        assert (await client.get("/bundles/docs")).status_code == 404
        assert (await client.get("/bundles")).json()["default"] == "tiny"
        assert (await client.get("/bundles/static/page/main.js")).status_code == 200


async def test_an_application_that_is_mounted_in_another_answers_below_its_place(
    tiny_settings: Callable[..., Settings],
) -> None:
    """ASGI's root_path is such a prefix too."""
    inner = create_app(tiny_settings())
    async with inner.router.lifespan_context(inner):
        await inner.state.starting
        transport = httpx.ASGITransport(Starlette(routes=[Mount("/gan", inner)]))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            for path in ("/gan/", "/gan/static/page/main.js", "/gan/bundles/tiny", "/gan/sample?seed=1"):
                assert (await client.get(path)).status_code == 200


def npy(array: UInt8) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


TENSOR = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,8,8,1],"data":[%b]}]}' % b",".join([b"1"] * 64)
JUNK, IMAGES = b"no picture", npy(np.zeros((3, 8, 8), np.uint8))


class Cycle:
    """The objects that a server holds for one request, its body included."""

    def __init__(self, method: str, path: str, content_type: bytes, body: bytes) -> None:
        self.body = body
        self.status = 0
        self.is_read = False
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", content_type)] if content_type else [],
            "client": None,
            "server": None,
        }

    async def receive(self) -> Message:
        """Return the whole body, then wait: the client stays."""
        if self.is_read:
            await asyncio.Event().wait()
        self.is_read = True
        return {"type": "http.request", "body": self.body}

    async def send(self, message: Message) -> None:
        """Record the status."""
        self.status = message.get("status", self.status)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "content_type", "body", "status"),
    [
        ("GET", "/livez", b"", b"", 200),
        ("GET", "/metrics", b"", b"", 200),
        ("GET", "/nope", b"", b"", 404),
        ("DELETE", "/sample", b"", b"", 405),
        ("GET", "/sample", b"", b"", 200),
        ("HEAD", "/sample", b"", b"", 200),
        ("POST", "/sample", b"application/json", b"{}", 200),
        ("POST", "/sample", b"application/json", b"{", 400),
        ("POST", "/v2/models/tiny/infer", b"application/json", b"{}", 200),
        ("POST", "/v2/models/tiny/infer", b"application/json", b'{"outputs":[{"name":"images"},1]}', 422),
        ("POST", "/v2/models/tiny.discriminator/infer", b"application/json", TENSOR, 200),
        ("POST", "/discriminate", b"text/plain", JUNK, 415),
        ("POST", "/discriminate", b"image/png", JUNK, 422),
        ("POST", "/discriminate", b"application/x-npy", JUNK, 400),
        ("POST", "/discriminate", b"application/x-npy", IMAGES, 200),
        (
            "POST",
            "/discriminate",
            b"application/json",
            json.dumps({"images": [base64.b64encode(JUNK).decode()] * 2}).encode(),
            200,
        ),
    ],
)
async def test_nothing_of_a_request_waits_for_the_garbage_collector(
    method: str, path: str, content_type: bytes, body: bytes, status: int, tiny_settings: Callable[..., Settings]
) -> None:
    """The collector runs rarely and bodies may be large, so requests must be freed by reference counting."""
    app = create_app(tiny_settings())
    async with app.router.lifespan_context(app):
        await app.state.starting
        gc.collect()
        gc.disable()
        try:
            cycle = Cycle(method, path, content_type, body)
            task = asyncio.create_task(app(cycle.scope, cycle.receive, cycle.send))
            await task
            seen = weakref.ref(cycle)
            assert cycle.status == status
            del cycle, task
            for _ in range(20):  # pending callbacks
                await asyncio.sleep(0)
            assert seen() is None
        finally:
            gc.enable()
