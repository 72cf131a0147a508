"""API keys: which requests need one, and which are refused."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.http.layers.auth import Key, Keys, KeyScope, read_keys
from service.settings import Settings, SettingsError

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Make = Callable[..., Settings]
Hold = Callable[[FastAPI], AbstractAsyncContextManager[None]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]
Problem = Callable[[httpx.Response, int, str], str]

OPEN = ("/", "/docs", "/openapi.json", "/livez", "/readyz", "/health", "/startupz", "/metrics")
CLOSED = ("/sample", "/bundles", "/bundles/tiny")
LOAD = "/v2/repository/models/tiny/load"


@pytest.mark.anyio
async def test_without_a_key_only_probes_metrics_and_pages_answer(
    start: Start, tiny_settings: Make, problem: Problem
) -> None:
    """Probes, metrics and pages need none; every other route says which header it needs."""
    async with start(create_app(tiny_settings(api_keys="alpha,beta"))) as client:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200
        for path in CLOSED:
            reply = await client.get(path)
            assert "X-API-Key" in problem(reply, 401, "unauthorized")
            assert reply.headers["www-authenticate"].startswith("Bearer")
        problem(await client.post("/discriminate"), 401, "unauthorized")
        assert (await client.post("/v2/repository/index")).status_code == 401
        page = (await client.get("/metrics")).text
        assert 'gan_rejected_total{reason="unauthorized",route="/sample"} 1.0' in page


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer alpha"},
        {"Authorization": "bearer beta"},
        {"X-API-Key": "beta"},
        {"Authorization": "Basic dXNlcjp4", "X-API-Key": "alpha"},
        {"Authorization": "Bearer ", "X-API-Key": "alpha"},
        {"X-API-Key": "root"},
    ],
)
async def test_a_key_is_accepted_in_either_header(start: Start, tiny_settings: Make, headers: dict[str, str]) -> None:
    """A client's or an administrator's key in either header is accepted, and the reply is marked private."""
    async with start(create_app(tiny_settings(api_keys="alpha, beta", admin_keys="root"))) as client:
        reply = await client.get("/sample?seed=1", headers=headers)
        assert reply.status_code == 200
        assert reply.headers["cache-control"].startswith("private")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer alphA"},
        {"Authorization": "Bearer alpha beta"},
        {"Authorization": "Bearer "},
        {"Authorization": "alpha"},
        {"X-API-Key": ""},
        {"X-API-Key": "alpha,beta"},
        {b"X-API-Key": "größe".encode()},
    ],
)
async def test_anything_else_does_not(
    start: Start, tiny_settings: Make, problem: Problem, headers: dict[str, str]
) -> None:
    """A nearly right key is refused, and the reply does not repeat it."""
    async with start(create_app(tiny_settings(api_keys="alpha,beta"))) as client:
        problem(await client.get("/sample", headers=headers), 401, "unauthorized")


@pytest.mark.anyio
async def test_only_an_administrator_changes_the_repository(start: Start, tiny_settings: Make) -> None:
    """A client's key is refused, and so is every key if no administrator's key is set."""
    async with start(create_app(tiny_settings(api_keys="alpha", admin_keys="root"))) as client:
        assert (await client.post(LOAD)).status_code == 401
        refused = await client.post(LOAD, headers={"X-API-Key": "alpha"})
        assert (refused.status_code, set(refused.json())) == (403, {"error"})
        assert (await client.post(LOAD, headers={"X-API-Key": "root"})).status_code == 200
    async with start(create_app(tiny_settings())) as client:
        assert (await client.get("/sample")).status_code == 200
        assert (await client.post(LOAD)).status_code == 403
        assert (await client.post(LOAD, headers={"X-API-Key": "root"})).status_code == 403
    async with start(create_app(tiny_settings(admin_keys="root"))) as client:
        assert (await client.get("/sample")).status_code == 200
        assert (await client.post(LOAD)).status_code == 401


def test_keys_come_from_files_too(tmp_path: Path, tiny_settings: Make) -> None:
    """One key a line, as secrets are mounted; comments and empty lines are skipped."""
    file = tmp_path / "keys"
    file.write_text("# team a\nalpha\n\n  beta  \n")
    keys = read_keys(tiny_settings(api_keys_file=file))
    assert keys.are_needed
    for key in ("alpha", "beta"):
        assert keys.find(None, key) == Key("unnamed", KeyScope.USE)


def test_keys_in_files_may_have_names(tmp_path: Path, tiny_settings: Make) -> None:
    """A line is KEY or NAME KEY; a named line wins over the same key in the variable, an administrator's over both."""
    file, admins = tmp_path / "keys", tmp_path / "admins"
    file.write_bytes(b"\xef\xbb\xbfteam-a\talpha\r\n  B.2_b   beta \r\ngamma\r\n")
    admins.write_text("ops gamma\n")
    keys = read_keys(tiny_settings(api_keys="alpha,delta", api_keys_file=file, admin_keys_file=admins))
    found = {key: keys.find(f"Bearer {key}", None) for key in ("alpha", "beta", "gamma", "delta", "team-a")}
    assert found == {
        "alpha": Key("team-a", KeyScope.USE),
        "beta": Key("B.2_b", KeyScope.USE),
        "gamma": Key("ops", KeyScope.ADMIN),
        "delta": Key("unnamed", KeyScope.USE),
        "team-a": Key(None, KeyScope.NONE),
    }


@pytest.mark.parametrize(
    "content",
    [
        *("", "# nothing\n", "these three words\n", "a,words\n", "schlüssel\n", "a words\na other\n"),
        *("a words\nb words\n", "words\nwords\n", f"{'n' * 65} words\n", "a/b words\n", f"words{'s' * 1020}\n"),
        pytest.param("x" * 100 + "\n" * 2**20, id="a megabyte"),
        pytest.param("\0words", id="no text"),
    ],
)
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, tiny_settings: Make, content: str) -> None:
    """An empty secret would leave the service open; the message names the file and never a key."""
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match="GAN_ADMIN_KEYS_FILE: ") as caught:
        read_keys(tiny_settings(admin_keys_file=file))
    assert "words" not in str(caught.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(tiny_settings(admin_keys_file=tmp_path / "none"))


def test_keys_are_read_from_files_alone(tmp_path: Path, tiny_settings: Make) -> None:
    """A pipe would be empty for the next worker and on SIGHUP, or make them wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(SettingsError, match=f"GAN_API_KEYS_FILE: {path}: is not a regular file"):
            read_keys(tiny_settings(api_keys_file=path))


def test_no_key_is_kept_or_shown(tiny_settings: Make) -> None:
    """Printing settings or keys does not show a key."""
    settings = tiny_settings(api_keys="alpha-secret")
    assert "alpha-secret" not in repr(settings)
    assert isinstance(settings.api_keys, SecretStr)
    assert "alpha-secret" not in repr(vars(Keys({"alpha-secret": "team-a"}, {})))


@pytest.mark.anyio
async def test_a_keys_name_stands_in_log_and_metrics(
    start: Start, tiny_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The name and never the key, whether the request was answered or refused; an unknown key has none."""
    (tmp_path / "keys").write_text("team-a alpha-secret\nbeta-secret\n")
    settings = tiny_settings(api_keys_file=tmp_path / "keys", admin_keys="root-secret")
    async with start(create_app(settings)) as client:
        with caplog.at_level(logging.INFO, "service"):
            for key, query in (("alpha", "count=3"), ("alpha", "count=0"), ("beta", ""), ("root", ""), ("other", "")):
                await client.get(f"/sample?{query}", headers={"X-API-Key": f"{key}-secret"})
            await client.post(LOAD, headers={"X-API-Key": "alpha-secret"})
        page = (await client.get("/metrics")).text
    lines: list[dict[str, object]] = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert [(line.get("key"), line["status"]) for line in lines] == [
        ("team-a", 200),
        ("team-a", 422),
        ("unnamed", 200),
        ("unnamed", 200),
        (None, 401),
        ("team-a", 403),
    ]
    assert "secret" not in str(lines) + page
    for sample in (
        'gan_key_images_total{key="team-a"} 3.0',
        'gan_key_images_total{key="unnamed"} 2.0',
        'gan_key_rejected_total{key="team-a"} 2.0',
        'gan_key_images_in_flight{key="team-a"} 0.0',
    ):
        assert sample in page
    assert 'key="None"' not in page


@pytest.mark.anyio
async def test_images_of_a_key_are_in_flight_until_they_are_computed(
    start: Start, tiny_settings: Make, hold_engine: Hold, until: Until
) -> None:
    """The gauge rises with the request, and falls where its client leaves; what was not computed is not counted."""
    app = create_app(tiny_settings(api_keys="alpha"))
    read = app.state.manager.metrics.registry.get_sample_value
    async with start(app) as client, hold_engine(app):
        asked = asyncio.create_task(client.get("/sample?count=5", headers={"X-API-Key": "alpha"}))
        await until(lambda: read("gan_key_images_in_flight", {"key": "unnamed"}) == 5)
        asked.cancel()
        await until(lambda: read("gan_key_images_in_flight", {"key": "unnamed"}) == 0)
        assert read("gan_key_images_total", {"key": "unnamed"}) == 0


def test_keys_are_read_again_on_a_signal(
    live_server: Any, tiny_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is taken out of the file is refused from then on, and a new one is good."""
    file = tmp_path / "keys"
    file.write_text("team-a alpha\n")
    server = live_server(tiny_settings(api_keys_file=file))
    with server.running(), caplog.at_level(logging.INFO, "service"):
        assert status(server, "alpha") == 200
        file.write_text("team-a beta\nteam-b gamma\n")
        server.loop.call_soon_threadsafe(server.request_reload)
        server.wait_for(lambda: status(server, "alpha") == 401)
        assert [status(server, key) for key in ("beta", "gamma")] == [200, 200]
        [line] = [record for record in caplog.records if record.message == "keys have changed"]
        assert vars(line)["fields"] == {"clients": 2, "administrators": 0, "added": ["team-b"], "replaced": ["team-a"]}


@pytest.mark.parametrize("bad", [None, "", "three words here\n", "a beta\na gamma\n"])
def test_a_bad_file_leaves_the_old_keys_in_force(
    bad: str | None, live_server: Any, tiny_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing, empty, not understood, a name twice: the log says so, the old keys stay, and later files are read."""
    file = tmp_path / "keys"
    file.write_text("alpha\n")
    server = live_server(tiny_settings(api_keys_file=file, admin_keys="root"))
    with server.running():
        if bad is None:
            file.unlink()
        else:
            file.write_text(bad)
        server.loop.call_soon_threadsafe(server.request_reload)
        server.wait_for(lambda: f"keys not read again, the old ones stay: GAN_API_KEYS_FILE: {file}: " in caplog.text)
        assert [status(server, key) for key in ("alpha", "beta", "root")] == [200, 401, 200]
        file.write_text("beta\n")
        server.loop.call_soon_threadsafe(server.request_reload)
        server.wait_for(lambda: status(server, "beta") == 200)
        assert status(server, "alpha") == 401


def test_a_change_during_the_start_is_not_missed(live_server: Any, tiny_settings: Make, tmp_path: Path) -> None:
    """The files are read first of all, when a signal would still be ignored."""
    file = tmp_path / "keys"
    file.write_text("alpha\n")
    server = live_server(tiny_settings(api_keys_file=file))
    file.write_text("beta\n")
    with server.running():
        server.wait_for(lambda: status(server, "beta") == 200)


def status(server: Any, key: str) -> int:
    """What a request with this key gets."""
    return httpx.get(f"{server.url}/sample", headers={"X-API-Key": key}).status_code
