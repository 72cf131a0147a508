"""The promises of SECURITY.md that concern all of the code: who may ask for what, and what no module does."""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute, Route

from service.app import create_app
from service.settings import Settings

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Make = Callable[..., Settings]

ROOT = Path(__file__).parents[2]
# What answers without a key, and what needs an administrator's. Everything else needs a client's, whatever is added.
OPEN = {
    *("/", "/docs", "/openapi.json", "/static/{name:path}"),
    *("/livez", "/readyz", "/health", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready"),
}
ADMIN = {"/v2/repository/models/{name}/load", "/v2/repository/models/{name}/unload"}


def routes_of(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """All routes, also those of routers within: some versions of FastAPI keep them apart, others copy them."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        else:
            inner = getattr(route, "original_router", None)
            assert isinstance(inner, APIRouter), f"{route} is no plain route: this test must learn to walk it"
            yield from routes_of(inner.routes)


def requests_of(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """Each route's template, a method of it, and a path that leads to it."""
    for route in routes_of(app.routes):
        path = re.sub(r"{name:path}", "style.css", route.path)
        path = re.sub(r"{(name|model|id)[^}]*}", "tiny", path)
        path = re.sub(r"{[^}]*}", "0123456789ab", path)
        for method in sorted(route.methods or ()):
            yield route.path, method, path


@pytest.mark.anyio
async def test_every_route_but_probes_and_pages_needs_a_key(start: Start, tiny_settings: Make) -> None:
    """All routes of the application itself: so one that is added needs a key too, or stands in the list above."""
    app = create_app(tiny_settings(api_keys="alpha", admin_keys="root"))
    found = list(requests_of(app))
    assert {template for template, _, _ in found} >= OPEN | ADMIN
    assert {template.split("/")[1] for template, _, _ in found} >= {"sample", "v1", "v2"}  # all three families
    async with start(app) as client:
        for template, method, path in found:
            for headers, others, admins in (
                ({}, 401, 401),
                ({"X-API-Key": "unknown"}, 401, 401),
                ({"X-API-Key": "alpha"}, None, 403),
            ):
                reply = await client.request(method, path, headers=headers)
                expected = None if template in OPEN else admins if template in ADMIN else others
                refused = reply.status_code if reply.status_code in {401, 403} else None
                assert refused == expected, (method, template, headers)


@pytest.mark.anyio
@pytest.mark.parametrize("keys", [{}, {"api_keys": "alpha"}])
async def test_without_an_administrators_key_nobody_is_one(
    start: Start, tiny_settings: Make, keys: dict[str, str]
) -> None:
    """Their routes answer 403, with a client's key or none or any other."""
    app = create_app(tiny_settings(**keys))
    async with start(app) as client:
        for template, method, path in requests_of(app):
            if template in ADMIN:
                for headers in ({}, {"X-API-Key": "alpha"}, {"Authorization": "Bearer root"}):
                    assert (await client.request(method, path, headers=headers)).status_code == 403


# --- What no module does ------------------------------------------------------------------------------------------

# Modules that run what they read, by themselves or as their way to pass objects between processes.
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
FETCHING = {"urllib.request", "http.client", "ftplib", "requests", "httpx", "aiohttp", "urllib3", "socketserver"}
RUNNING_CALLS = {"eval", "exec", "compile", "__import__"}
UNPICKLING_CALLS = {"torch.load", "torch.jit.load", "torch.package", "torch.export.load", "torch.hub.load"}
# They start our own modules alone. The last is the command `capacity`, which no request reaches.
PROCESSES = {"service/codecs/decoders.py", "service/server/supervisor.py", "service/capacity/service_process.py"}
CLIENTS = {"service/capacity/client.py"}  # of the service that the command `capacity` has started
# The command `generate` hears from processes that it has started itself, over pipes that nobody else has.
OWN_PIPES = {"models/exchange/bulk/processes.py"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.Module) -> Iterator[str]:
    """All that a module imports, by full name, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """All that a module calls, as it is written there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def is_one_of(name: str, forbidden: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in forbidden)


@pytest.mark.parametrize("path", [*modules("service"), *modules("models")], ids=lambda path: path.stem)
def test_nothing_that_is_read_is_run(path: Path) -> None:
    """No module unpickles, by whatever library, or runs text: not of bundles, uploads, checkpoints or workers."""
    tree = ast.parse(path.read_text("utf-8"))
    refused = UNPICKLING | UNPICKLING_CALLS
    if path.relative_to(ROOT).as_posix() in OWN_PIPES:
        refused = refused - {"multiprocessing"}
    assert not [name for name in imports(tree) if is_one_of(name, refused)]
    assert "ProcessPoolExecutor" not in path.read_text("utf-8")  # it pickles
    for name, call in calls(tree):
        assert name not in RUNNING_CALLS | UNPICKLING_CALLS
        for keyword in call.keywords:
            assert keyword.arg != "allow_pickle" or ast.unparse(keyword.value) == "False"


@pytest.mark.parametrize("path", modules("service"), ids=lambda path: path.stem)
def test_the_service_fetches_nothing_and_starts_only_its_own_processes(path: Path) -> None:
    """It has no client of any protocol, so no request can have it ask an address; few modules start processes."""
    tree = ast.parse(path.read_text("utf-8"))
    assert not [name for name in imports(tree) if is_one_of(name, FETCHING)]
    # One end of a socket pair is a connection already, and no address.
    named = [name for name, call in calls(tree) if "sock" not in {keyword.arg for keyword in call.keywords}]
    names = {name.rpartition(".")[2] for name in named}
    assert not names & {"open_connection", "open_unix_connection", "urlopen", "system", "popen"}
    if path.relative_to(ROOT).as_posix() not in CLIENTS:
        assert "create_connection" not in names
    if path.relative_to(ROOT).as_posix() not in PROCESSES:
        assert not names & {"Popen", "create_subprocess_exec", "create_subprocess_shell", "check_output", "spawnv"}


@pytest.mark.anyio
async def test_no_name_of_a_client_becomes_a_path(client: httpx.AsyncClient) -> None:
    """Names of bundles and pages are looked up, never opened: nothing outside of both can be asked for."""
    for name in ("../tiny", "..%2Ftiny", "%2Fetc%2Fpasswd", "tiny%00", "....//tiny", "C:%5Ctiny", "tiny/../../x"):
        for path in (f"/bundles/{name}", f"/static/{name}", f"/static/../{name}", f"/v2/models/{name}"):
            reply = await client.get(path)
            assert reply.status_code in {404, 405}, path
            assert "root:" not in reply.text
        for path in (f"/sample?bundle={name}", f"/interpolate?seed_from=1&seed_to=2&bundle={name}"):
            assert (await client.get(path)).status_code in {404, 422}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("GET", "/sample", None),
        ("POST", "/v2/models/tiny/infer", b"{}"),
        ("POST", "/v1/images/generations", b'{"prompt":""}'),
    ],
)
async def test_raw_errors_never_leave(
    method: str, path: str, content: bytes | None, start: Start, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what nobody expected a client of any family gets a code and an id; message, class and traceback are logged."""
    app = create_app(tiny_settings())

    async def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/srv/secret/path of tensor 0x7f00")

    async with start(app) as client:
        monkeypatch.setattr(app.state.manager, "sample", fail)
        reply = await client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 500
    assert reply.headers["x-request-id"]
    for word in ("secret", "0x7f00", "RuntimeError", "Traceback", "service/"):
        assert word not in reply.text
    json.loads(reply.text)
