"""API keys: which requests need one, and which are refused."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from service.app import create_app
from service.http.auth import Keys, KeyScope, read_keys
from service.settings import Settings, SettingsError

Start = Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
Make = Callable[..., Settings]
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
        keys.check(None, key, KeyScope.USE)


@pytest.mark.parametrize("content", ["", "# nothing\n", "two words\n", "a,b\n", "schlüssel\n"])
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, tiny_settings: Make, content: str) -> None:
    """An empty secret would leave the service open; the message names the file and never a key."""
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(SettingsError, match="GAN_ADMIN_KEYS_FILE: ") as caught:
        read_keys(tiny_settings(admin_keys_file=file))
    assert "words" not in str(caught.value)
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(tiny_settings(admin_keys_file=tmp_path / "none"))


def test_no_key_is_kept_or_shown(tiny_settings: Make) -> None:
    """Printing settings or keys does not show a key."""
    settings = tiny_settings(api_keys="alpha-secret")
    assert "alpha-secret" not in repr(settings)
    assert isinstance(settings.api_keys, SecretStr)
    assert "alpha-secret" not in repr(vars(Keys(["alpha-secret"], [])))
