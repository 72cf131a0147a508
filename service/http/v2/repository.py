"""Lists, loads and unloads bundles: the model repository extension of the Open Inference Protocol (v2).

Its errors have the protocol's own shape (problems.py). Load and unload need an administrator's key (app.py).
"""

import asyncio
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from models.bundle import BundleError
from service.codecs.time_slices import run_steps
from service.engine.bundles.bundles import Bundles
from service.engine.model_manager import ModelManager
from service.errors import Invalid, RequestTimeout, ServiceError, TooLarge
from service.http.openapi.routes import REPOSITORY_INDEX, REPOSITORY_LOAD, REPOSITORY_UNLOAD
from service.http.requests.json_limits import JsonLimits
from service.http.requests.parsing import SchemaT, parse_body
from service.http.requests.request_context import context_of
from service.http.requests.responses import JSON
from service.http.v2.messages import RepositoryIndex, RepositoryLoad, RepositoryQuery, RepositoryUnload
from service.machine.worker_group import WorkerGroup

MAX_BODY_BYTES = 65536
BODY_S = 30.0  # for the body to arrive
LIMITS = JsonLimits(values=64)
CHANGE_S = 300.0  # within which all workers must load a bundle
TRIES = 3  # to have all workers agree


def repository_routes(manager: ModelManager) -> APIRouter:
    """POST /v2/repository/index, /v2/repository/models/{name}/load and …/unload."""
    router = APIRouter()
    repository = Repository(manager.bundles, manager.worker_group, manager.settings.bundles)
    manager.worker_group.answer({"change": repository.follow})

    def note_bundle(request: Request, name: str) -> None:
        """Note for the log what the name means, if anything."""
        if (version := manager.bundles.version(name)) is not None:
            context_of(request).bundle = f"{name.partition('@')[0]}@{version}"

    @router.post("/v2/repository/index", **REPOSITORY_INDEX)
    async def index(request: Request) -> Response:
        """Every version of every bundle, and why requests can't ask for some."""
        asked = await _parse(request, RepositoryQuery)
        entries = [
            entry._asdict() for entry in await manager.bundles.repository() if entry.state == "READY" or not asked.ready
        ]
        return Response(RepositoryIndex.model_validate(entries).model_dump_json(), 200, media_type=JSON)

    @router.post("/v2/repository/models/{name}/load", **REPOSITORY_LOAD)
    async def load(request: Request) -> Response:
        """Take up what has changed on disk, and load what the name means, beside serving; or answer why not."""
        await _parse(request, RepositoryLoad)
        name = request.path_params["name"]
        await repository.change("load", name)
        note_bundle(request, name)
        return Response("{}", 200, media_type=JSON)

    @router.post("/v2/repository/models/{name}/unload", **REPOSITORY_UNLOAD)
    async def unload(request: Request) -> Response:
        """Unload all versions of a bundle, or one; requests that have found it already are still answered."""
        await _parse(request, RepositoryUnload)
        name = request.path_params["name"]
        note_bundle(request, name)
        await repository.change("unload", name)
        return Response("{}", 200, media_type=JSON)

    return router


class Repository:
    """Loads and unloads bundles in this worker and in all others.

    Args:
        bundles: Those of this worker.
        others: The other workers.
        root: Where bundles lie.
    """

    def __init__(self, bundles: Bundles, others: WorkerGroup, root: Path) -> None:
        self._bundles = bundles
        self._others = others
        self._root = root
        self._changes = {"load": bundles.load, "unload": bundles.unload}

    async def change(self, how: str, bundle: str) -> None:
        """Load or unload a bundle in this worker, and if that succeeds, in all others at once.

        Again where another worker then has another version, because it was told to do the opposite meanwhile: whoever
        is last decides for all.

        Raises:
            Invalid: It can't be loaded, or another worker failed to do the same.
        """
        for _ in range(TRIES):
            await self._change_here(how, bundle)
            there = await self._others.ask("change", within_s=CHANGE_S, how=how, bundle=bundle)
            reasons = [why for version, why in there if version != self._bundles.version(bundle)]
            if not reasons:
                return
        raise Invalid(f"another worker did not follow ({reasons[0] or 'its version is another'}): try again")

    async def follow(self, how: str, bundle: str) -> tuple[str | None, str | None]:
        """Do what another worker did. Returns the version that it means then, if any, and why it failed, if it did."""
        reason = None
        try:
            await self._change_here(how, bundle)
        except ServiceError as error:  # perhaps it was done already
            reason = error.detail
        return self._bundles.version(bundle), reason

    async def _change_here(self, how: str, bundle: str) -> None:
        """Load or unload in this worker. The client gets the reason of a failure, without the path of the bundles."""
        try:
            await self._changes[how](bundle)
        except BundleError as error:
            raise Invalid(error.relative_to(self._root)) from None


async def _parse(request: Request, schema: type[SchemaT]) -> SchemaT:
    """Read a small JSON object; an empty body counts as an empty object."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise TooLarge(f"The body has more than {MAX_BODY_BYTES} bytes.")
    except TimeoutError:
        raise RequestTimeout(f"The body was not there within {BODY_S:g} s.") from None
    return run_steps(parse_body(schema, bytes(body), LIMITS))
