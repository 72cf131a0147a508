"""Bundles are loaded and unloaded by request; if that fails, loaded bundles go on serving."""

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from models.bundle import GENERATOR, MANIFEST, Bundle
from models.spec import ImageSpec
from service.app import create_app
from service.machine.worker_group import Handler, WorkerGroup
from service.settings import Settings

pytestmark = pytest.mark.anyio

ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture
def folder(tmp_path: Path, tiny_bundles: dict[str, Bundle]) -> Path:
    """A folder of its own with two bundles."""
    for name in ("tiny", "rgb"):
        shutil.copytree(tiny_bundles[name].folder, tmp_path / name)
    return tmp_path


@pytest.fixture
def served(folder: Path, tiny_settings: Callable[..., Settings]) -> FastAPI:
    """A service on that folder."""
    return create_app(tiny_settings(bundles=folder, admin_keys="root"))


@pytest.fixture
async def admin(
    served: FastAPI, start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
) -> AsyncIterator[httpx.AsyncClient]:
    """A client with an administrator's key."""
    async with start(served) as client:
        client.headers.update(ADMIN)
        yield client


async def index(client: httpx.AsyncClient, **asked: Any) -> dict[str, tuple[str, str]]:
    reply = await client.post("/v2/repository/index", json=asked)
    assert reply.status_code == 200
    return {entry["name"]: (entry["state"], entry["reason"]) for entry in reply.json()}


async def test_the_log_says_what_was_loaded_and_unloaded(
    admin: httpx.AsyncClient, tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    """Each with its version, and by whose key."""
    rgb = f"rgb@{tiny_bundles['rgb'].version}"
    with caplog.at_level(logging.INFO, "service"):
        for verb in ("unload", "load", "load"):
            assert (await change(admin, "rgb", verb)).status_code == 200
    assert [message for message in caplog.messages if message != "request"] == [
        "bundles have changed",
        f"bundle unloaded: {rgb}",
        f"bundle loaded: {rgb}",
        "bundles have changed",
        f"bundle loaded already: {rgb}",
    ]
    lines = [vars(record)["fields"] for record in caplog.records if hasattr(record, "fields")]
    assert [line for line in lines if "route" not in line] == [
        {"removed": [rgb], "key": "unnamed"},
        {"added": [rgb], "means": {"rgb": rgb}, "key": "unnamed"},
    ]
    asked = [(line["route"].rpartition("/")[2], line["bundle"], line["key"]) for line in lines if "route" in line]
    assert asked == [(verb, rgb, "unnamed") for verb in ("unload", "load", "load")]


async def change(client: httpx.AsyncClient, name: str, verb: str, **body: Any) -> httpx.Response:
    return await client.post(f"/v2/repository/models/{name}/{verb}", json=body)


def refusal(reply: httpx.Response, status: int) -> str:
    """The reason of an error in the protocol's shape."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
    assert set(reply.json()) == {"error"}
    return str(reply.json()["error"])


async def test_a_bundle_goes_and_comes_back(admin: httpx.AsyncClient) -> None:
    """An unloaded bundle is unknown and listed as unavailable; loaded again it gives the same bytes."""
    before = (await admin.get("/sample?bundle=rgb&seed=4")).content
    assert await index(admin) == {"rgb": ("READY", ""), "tiny": ("READY", "")}
    assert (await change(admin, "rgb", "unload", parameters={"unload_dependents": False})).json() == {}
    assert (await admin.get("/sample?bundle=rgb&seed=4")).status_code == 404
    assert await index(admin) == {"tiny": ("READY", ""), "rgb": ("UNAVAILABLE", "unloaded")}
    assert set(await index(admin, ready=True)) == {"tiny"}
    assert (await change(admin, "rgb", "load")).json() == {}
    assert (await admin.get("/sample?bundle=rgb&seed=4")).content == before
    page = (await admin.get("/metrics")).text
    for result in ("loaded", "unloaded"):
        assert f'gan_bundle_swaps_total{{bundle="rgb",result="{result}"}} 1.0' in page


async def test_a_new_folder_is_loaded_and_a_new_version_taken_up(
    admin: httpx.AsyncClient, folder: Path, tiny_bundles: dict[str, Bundle]
) -> None:
    """A folder that was added after the start is loaded by its name."""
    assert "cond" in refusal(await change(admin, "cond", "load"), 404)
    shutil.copytree(tiny_bundles["cond"].folder, folder / "cond")
    assert (await change(admin, "cond", "load")).status_code == 200
    assert (await admin.get("/bundles/cond")).json()["version"] == tiny_bundles["cond"].version


async def test_a_corrupt_bundle_is_refused_with_the_reason(admin: httpx.AsyncClient, folder: Path) -> None:
    """The reply names the file, the index remembers why, and the version from before goes on serving."""
    before = (await admin.get("/sample?bundle=rgb&seed=4")).content
    weights = folder / "rgb" / GENERATOR
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert GENERATOR in refusal(await change(admin, "rgb", "load"), 422)
    assert (await admin.get("/sample?bundle=rgb&seed=4")).content == before
    assert (await change(admin, "rgb", "unload")).status_code == 200
    assert refusal(await change(admin, "rgb", "load"), 422)
    assert GENERATOR in (await index(admin))["rgb"][1]
    weights.write_bytes(whole)
    assert (await change(admin, "rgb", "load")).status_code == 200
    assert (await admin.get("/sample?bundle=rgb&seed=4")).content == before


async def test_no_reply_says_where_the_bundles_lie(
    admin: httpx.AsyncClient, folder: Path, tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture
) -> None:
    """Replies show paths relative to the folder of bundles; the log has the whole path."""
    (folder / "rgb" / MANIFEST).write_text("{}")
    shutil.copytree(tiny_bundles["cond"].folder, folder / "cond")
    (folder / "cond" / GENERATOR).unlink()
    assert refusal(await change(admin, "rgb", "load"), 422).startswith(f"rgb/{MANIFEST}: format null")
    assert f"bundle refused: {folder}/rgb/{MANIFEST}: format null" in caplog.text
    assert refusal(await change(admin, "cond", "load"), 422) == f"cond/{GENERATOR}: No such file or directory"
    assert refusal(await change(admin, "tiny", "unload"), 422) == "the default bundle tiny must be there"
    listing = (await admin.post("/v2/repository/index")).text
    assert f"cond/{GENERATOR}: No such file or directory" in listing
    replies = [listing, (await change(admin, "nobody", "load")).text, (await admin.get("/bundles")).text]
    shutil.rmtree(folder)
    replies += [(await change(admin, name, how)).text for name in ("tiny", "new") for how in ("load", "unload")]
    assert not [reply for reply in replies if str(folder.parent) in reply]


def locked(place: Path) -> None:
    place.mkdir(mode=0)
    if os.access(place, os.X_OK):
        pytest.skip("whoever runs this may look into every folder")


def with_a_manifest(place: Path) -> None:
    place.mkdir()
    (place / MANIFEST).touch()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "lost+found": (locked, "Permission denied"),
    "circle": (lambda place: place.symlink_to(place.name), "Too many levels of symbolic links"),
    os.fsdecode(b"caf\xe9"): (with_a_manifest, "its name is not UTF-8"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="such names can't be given, or mean something else")
@pytest.mark.parametrize("name", UNREADABLE, ids=["permissions", "links", "bytes"])
async def test_a_folder_that_cannot_be_looked_into_is_named_once_and_stops_nothing(
    folder: Path,
    tiny_bundles: dict[str, Bundle],
    tiny_settings: Callable[..., Settings],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """It is no bundle, at the start and later: other bundles load, and the log has one warning about it."""
    make, reason = UNREADABLE[name]
    make(folder / name)
    app = create_app(tiny_settings(bundles=folder, admin_keys="root"))
    async with start(app) as admin:
        admin.headers.update(ADMIN)
        shutil.copytree(tiny_bundles["cond"].folder, folder / "cond")
        assert (await change(admin, "cond", "load")).status_code == 200
        refusal(await change(admin, "nobody", "load"), 404)
        for _ in range(2):
            await app.state.manager.bundles.reload()
            assert set(await index(admin)) == {"tiny", "rgb", "cond"}
        assert (await admin.get("/metrics")).status_code == 200
        [line] = [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]
        assert line.levelname == "WARNING"
        assert line.getMessage().startswith(f"no bundle: {folder}/{name[:3]}")
        assert line.getMessage().endswith(f": {reason}")
        assert line.getMessage().isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and links are another matter there")
async def test_whatever_is_called_a_manifest_makes_a_bundle_that_is_refused(
    folder: Path,
    tiny_settings: Callable[..., Settings],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
) -> None:
    """A folder, a pipe, a device or a dangling link as a manifest is refused; other entries are ignored."""
    names = ["folder", "pipe", "device", "link", "n" * 255]
    for name in names:
        (folder / name).mkdir()
    (folder / "folder" / MANIFEST).mkdir()
    os.mkfifo(folder / "pipe" / MANIFEST)
    (folder / "device" / MANIFEST).symlink_to("/dev/zero")
    (folder / "link" / MANIFEST).symlink_to("nowhere")
    (folder / names[-1] / MANIFEST).touch()
    (folder / "file").touch()
    (folder / "empty").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    async with start(create_app(tiny_settings(bundles=folder, admin_keys="root"))) as admin:
        admin.headers.update(ADMIN)
        found = await index(admin)
        assert set(found) == {"tiny", "rgb", *names}
        for name, reason in zip(
            names,
            ["Is a directory", "not a regular file", "not a regular file", "No such file or directory", "not JSON"],
            strict=True,
        ):
            expected = f"{name}/{MANIFEST}: {reason}"
            assert found[name][1].startswith(expected)
            assert refusal(await change(admin, name, "load"), 422).startswith(expected)
        assert (await admin.get("/sample?bundle=rgb")).status_code == 200


async def test_what_the_service_cannot_do_without_stays(admin: httpx.AsyncClient) -> None:
    """The default bundle can't be unloaded."""
    assert "tiny" in refusal(await change(admin, "tiny", "unload"), 422)
    assert (await admin.get("/sample")).status_code == 200


async def test_requests_that_make_no_sense_have_the_protocols_shape(admin: httpx.AsyncClient) -> None:
    """Unknown names and fields, broken JSON, wrong methods, and names like paths are refused."""
    refusal(await change(admin, "nobody", "unload"), 404)
    refusal(await change(admin, "tiny", "load", parameters={"config": "{}"}), 422)
    refusal(await admin.post("/v2/repository/index", content=b"{"), 400)
    refusal(await admin.post("/v2/repository/index", content=b"x" * 70_000), 413)
    refusal(await admin.get("/v2/repository/index"), 405)
    refusal(await admin.get("/v2/nothing"), 404)
    for odd in ("..", "%2e%2e%2ftiny", "tiny%00", "."):
        assert (await admin.post(f"/v2/repository/models/{odd}/load")).status_code in {404, 405}


async def test_a_bundle_whose_folder_has_another_name_comes_back(
    admin: httpx.AsyncClient, folder: Path, served: FastAPI
) -> None:
    """Once loaded, a bundle is known by the name in its manifest, not by its folder's."""
    (folder / "rgb").rename(folder / "colours")
    await served.state.manager.bundles.reload()
    assert (await change(admin, "rgb", "unload")).status_code == 200
    assert await index(admin) == {"tiny": ("READY", ""), "rgb": ("UNAVAILABLE", "unloaded")}
    assert (await change(admin, "rgb", "load")).status_code == 200
    assert (await admin.get("/sample?bundle=rgb")).status_code == 200


async def test_the_index_survives_the_loss_of_the_folder(admin: httpx.AsyncClient, folder: Path) -> None:
    """Loaded bundles are served and listed even if the folder can't be read."""
    shutil.rmtree(folder)
    assert await index(admin) == {"rgb": ("READY", ""), "tiny": ("READY", "")}


async def test_a_service_that_drains_loads_nothing(admin: httpx.AsyncClient, served: FastAPI) -> None:
    """The reply says that the service is shutting down."""
    await served.state.manager.stop()
    assert "shutting down" in refusal(await change(admin, "rgb", "load"), 503)


async def test_a_loaded_bundle_that_lost_its_manifest_goes_on_until_that_is_taken_up(
    admin: httpx.AsyncClient, folder: Path, served: FastAPI
) -> None:
    """A folder without a manifest is no bundle: it can't be loaded, and SIGHUP lets go of what it held."""
    (folder / "rgb" / MANIFEST).unlink()
    assert "rgb" in refusal(await change(admin, "rgb", "load"), 404)
    assert (await admin.get("/sample?bundle=rgb")).status_code == 200
    await served.state.manager.bundles.reload()
    assert (await admin.get("/sample?bundle=rgb")).status_code == 404


class Neighbour(WorkerGroup):
    """One of two workers in this process: it asks the other's handlers directly."""

    other: "Neighbour"

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[str, Handler] = {}

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """Keep them for the other."""
        self.handlers |= handlers

    async def ask(self, what: str, *, within_s: float, **details: Any) -> list[Any]:  # noqa: ARG002 - none is late here
        """The other's answer."""
        return [await self.other.handlers[what](**details)]


@pytest.mark.parametrize("verbs", [("load", "unload"), ("unload", "load"), ("unload", "unload"), ("load", "load")])
async def test_workers_agree_after_two_changes_at_once(
    folder: Path,
    tiny_settings: Callable[..., Settings],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
    verbs: tuple[str, str],
) -> None:
    """Each of two workers is asked for one; whichever comes last, both have the bundle or neither."""
    groups = Neighbour(), Neighbour()
    groups[0].other, groups[1].other = reversed(groups)
    settings = tiny_settings(bundles=folder, admin_keys="root")
    apps = [create_app(settings, worker_group=group) for group in groups]
    async with start(apps[0]) as one, start(apps[1]) as other:
        for client in (one, other):
            client.headers.update(ADMIN)
        replies = await asyncio.gather(change(one, "rgb", verbs[0]), change(other, "rgb", verbs[1]))
        assert {reply.status_code for reply in replies} <= {200, 404}
        found = [(await client.get("/sample?bundle=rgb")).status_code for client in (one, other)]
        assert found[0] == found[1]


@pytest.fixture
def versions(folder: Path, make_tiny: Callable[..., Bundle]) -> list[str]:
    """Two versions of rgb in the folder, the older one first."""
    written = []
    for place, seed, created in (("rgb", 1, "2026-01-01T00:00:00Z"), ("newer", 2, "2026-06-01T00:00:00Z")):
        shutil.rmtree(folder / place, ignore_errors=True)
        bundle = make_tiny(folder / place, ImageSpec(channels=3, height=6, width=10), None, None, seed)
        manifest = json.loads((folder / place / MANIFEST).read_text())
        (folder / place / MANIFEST).write_text(json.dumps(manifest | {"name": "rgb", "created": created}))
        written.append(bundle.version)
    return written


async def test_versions_and_aliases_are_listed_asked_for_and_cached(
    versions: list[str], folder: Path, admin: httpx.AsyncClient
) -> None:
    """A version's address never changes its meaning, an alias may; a reply names what it came to."""
    old, new = versions
    (folder / "aliases.json").write_text(json.dumps({"rgb": old, "rgb@canary": new}))
    assert (await change(admin, "rgb", "load")).status_code == 200
    listed = (await admin.get("/bundles")).json()
    assert listed["aliases"] == {"rgb": old, "rgb@canary": new}
    [rgb] = [bundle for bundle in listed["bundles"] if bundle["name"] == "rgb"]
    assert (rgb["version"], [one["version"] for one in rgb["versions"]]) == (old, [new, old])
    assert (await admin.get("/bundles/rgb@canary")).json()["version"] == new
    for name, version, freshness in (
        ("rgb", old, "public, max-age=300"),
        ("rgb@canary", new, "public, max-age=300"),
        (f"rgb@{old}", old, "public, max-age=31536000, immutable"),
        (f"rgb@{new}", new, "public, max-age=31536000, immutable"),
    ):
        reply = await admin.get(f"/sample?seed=1&bundle={name}")
        assert (reply.status_code, reply.headers["x-bundle"]) == (200, f"rgb@{version}")
        assert reply.headers["cache-control"] == freshness
    entries = (await admin.post("/v2/repository/index")).json()
    assert [(one["version"], one["state"]) for one in entries if one["name"] == "rgb"] == [
        (old, "READY"),
        (new, "READY"),
    ]


async def test_a_version_with_no_room_in_memory_is_asked_for_again_later(
    versions: list[str], folder: Path, tiny_settings: Callable[..., Settings], start: Callable[..., Any]
) -> None:
    """503 with Retry-After, for as long as all that is in memory is in use."""
    app = create_app(tiny_settings(bundles=folder, max_resident_bundles=1))
    async with start(app) as client:
        held = await app.state.manager.find(None, 60)
        reply = await client.post("/sample", json={"bundle": f"rgb@{versions[0]}"})
        assert (reply.status_code, reply.json()["code"]) == (503, "not_ready")
        assert int(reply.headers["retry-after"]) >= 1
        del held
        assert (await client.post("/sample", json={"bundle": f"rgb@{versions[0]}"})).status_code == 200


async def test_workers_agree_on_what_names_mean(
    versions: list[str], folder: Path, tiny_settings: Callable[..., Settings], start: Callable[..., Any]
) -> None:
    """One worker is asked to load or unload; the other follows, and loads for itself what it is asked for."""
    groups = Neighbour(), Neighbour()
    groups[0].other, groups[1].other = reversed(groups)
    settings = tiny_settings(bundles=folder, admin_keys="root", max_resident_bundles=2)
    apps = [create_app(settings, worker_group=group) for group in groups]
    async with start(apps[0]) as one, start(apps[1]) as other:
        one.headers.update(ADMIN)

        async def answers(name: str) -> list[str]:
            replies = [await client.get(f"/sample?seed=1&bundle={name}") for client in (one, other)]
            assert replies[0].content == replies[1].content or replies[0].status_code != 200
            return [reply.headers.get("x-bundle", str(reply.status_code)) for reply in replies]

        old, new = versions
        assert await answers("rgb") == [f"rgb@{new}"] * 2
        (folder / "aliases.json").write_text(json.dumps({"rgb": old}))
        assert (await change(one, "rgb", "load")).status_code == 200
        assert await answers("rgb") == [f"rgb@{old}"] * 2
        assert await answers(f"rgb@{new}") == [f"rgb@{new}"] * 2
        assert (await change(one, f"rgb@{new}", "unload")).status_code == 200
        assert await answers(f"rgb@{new}") == ["404"] * 2
        assert (await change(one, f"rgb@{new}", "load")).status_code == 200
        assert await answers(f"rgb@{new}") == [f"rgb@{new}"] * 2
