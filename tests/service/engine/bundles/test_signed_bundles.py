"""Services that load only signed bundles: what they refuse, and what becomes of it when the file of keys changes."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from models.bundle import GENERATOR, MANIFEST, Bundle, BundleError, sign_bundle
from models.signing import new_key
from service.engine.bundles.bundles import Bundles
from service.engine.bundles.keys import read_bundle_keys
from service.engine.model_manager import ModelManager
from service.errors import UnknownBundle
from service.metrics import Metrics
from service.settings import Settings, SettingsError

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]
(A_PEM, A), (B_PEM, B), (C_PEM, C) = (new_key() for _ in range(3))


@pytest.fixture
def root(tmp_path: Path, tiny_bundles: dict[str, Bundle]) -> Path:
    """Three bundles: `tiny`, which A and B have signed; `rgb`, which B has; and `cond`, which nobody has."""
    for name in ("tiny", "rgb", "cond"):
        shutil.copytree(tiny_bundles[name].folder, tmp_path / "bundles" / name)
    for name, pem in (("tiny", A_PEM), ("tiny", B_PEM), ("rgb", B_PEM)):
        sign_bundle(tmp_path / "bundles" / name, pem)
    return tmp_path / "bundles"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The file of keys, which holds both."""
    file = tmp_path / "keys"
    file.write_text(f"# release and build\n{A}\n{B}")
    return file


@pytest.fixture
def settings(tiny_settings: Make, root: Path, keys: Path) -> Settings:
    """Of a service that loads only signed bundles."""
    return tiny_settings(bundles=root, bundle_keys_file=keys)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Bundles]:
    """The bundles of a service, from start to stop."""
    manager = ModelManager(settings, Metrics(CollectorRegistry()))
    try:
        await manager.start()
        yield manager.bundles
    finally:
        await manager.stop()


def trust(keys: Path, content: str | None) -> None:
    """Write the file of keys anew; None removes it."""
    keys.unlink(missing_ok=True)
    if content is not None:
        keys.write_text(content)


def names(bundles: Bundles) -> list[str]:
    return [version.name for version in bundles.names()]


async def test_only_signed_bundles_are_served(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The log and the repository's index say of the others why they are refused."""
    async with serving(settings) as bundles:
        assert names(bundles) == ["rgb", "tiny"]
        with pytest.raises(UnknownBundle):
            await bundles.find("cond", 60)
        assert "bundle refused: " in caplog.text
        listed = {entry.name: entry.reason for entry in await bundles.repository()}
        assert listed["cond"] == "cond/manifest.json: it is not signed, and only signed bundles are loaded here"


async def test_an_unsigned_default_bundle_ends_the_start(settings: Settings) -> None:
    """So that nobody takes it for served."""
    with pytest.raises(BundleError, match="it is not signed"):
        async with serving(settings.model_copy(update={"default_bundle": "cond"})):
            pass


async def test_a_newer_version_that_is_not_signed_does_not_take_the_name(
    settings: Settings, root: Path, make_tiny: Callable[..., Bundle], tiny_bundles: dict[str, Bundle]
) -> None:
    """Neither by a reload nor by a request to load; once it is signed it does."""
    old = tiny_bundles["tiny"]
    async with serving(settings) as bundles:
        new = make_tiny(root.parent / "elsewhere" / "tiny", old.manifest.image, None, None, seed=9)
        raw = (new.folder / MANIFEST).read_text().replace("2026-01-02", "2027-01-02")
        (new.folder / MANIFEST).write_text(raw)
        shutil.copytree(new.folder, root / "tiny-new")
        await bundles.reload()
        await bundles.load("tiny")
        assert bundles.version("tiny") == old.version
        with pytest.raises(UnknownBundle):
            await bundles.find(f"tiny@{new.version}", 60)
        sign_bundle(root / "tiny-new", A_PEM)
        await bundles.reload()
        assert bundles.version("tiny") == new.version


async def test_what_is_changed_on_disk_does_not_replace_what_is_in_memory(settings: Settings, root: Path) -> None:
    """Weights beside a signed manifest, or a manifest without its signature: refused, and the old bundle goes on."""
    async with serving(settings) as bundles:
        before = await bundles.find("rgb", 60)
        whole = (root / "rgb" / GENERATOR).read_bytes()
        (root / "rgb" / GENERATOR).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        await bundles.reload()
        assert await bundles.find("rgb", 60) is before
        (root / "rgb" / GENERATOR).write_bytes(whole)
        shutil.copy(root / "cond" / MANIFEST, root / "rgb" / MANIFEST)
        await bundles.reload()
        assert (await bundles.find("rgb", 60)).version == before.version


async def test_a_key_that_is_taken_out_takes_its_bundles_along(
    settings: Settings, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the next reload, also out of memory, but for what another trusted key has signed. With it they come back."""
    async with serving(settings) as bundles:
        await bundles.find("rgb", 60)
        trust(keys, A)
        with caplog.at_level(logging.INFO, "service"):
            await bundles.reload()
        assert names(bundles) == ["tiny"]
        assert [bundle.name for bundle in bundles.loaded()] == ["tiny"]
        with pytest.raises(UnknownBundle):
            await bundles.find("rgb", 60)
        assert f"it is signed by {B.split()[0]}, and no such key is trusted here" in caplog.text
        [line] = [record for record in caplog.records if record.message == "keys of bundles have changed"]
        assert vars(line)["fields"] == {"keys": [A.split()[0]]}
        trust(keys, B)
        await bundles.reload()
        assert names(bundles) == ["rgb", "tiny"]
        assert (await bundles.find("rgb", 60)).name == "rgb"


async def test_a_folder_that_is_gone_does_not_keep_its_bundle_trusted(
    settings: Settings, root: Path, keys: Path
) -> None:
    """What is in memory and can't be read again stays for as long as one of its signers is trusted."""
    async with serving(settings) as bundles:
        await bundles.find("rgb", 60)
        (root / "rgb" / MANIFEST).write_text("{")
        await bundles.reload()
        assert names(bundles) == ["rgb", "tiny"]
        trust(keys, A)
        await bundles.reload()
        assert names(bundles) == ["tiny"]


async def test_keys_without_which_nothing_is_left_stay_in_force(
    settings: Settings, keys: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the default bundle would go, nothing changes, and the error says so; the next good file is taken up."""
    async with serving(settings) as bundles:
        trust(keys, C)
        with pytest.raises(BundleError, match="the default bundle tiny must be there"):
            await bundles.reload()
        assert "the old keys of bundles stay" in caplog.text
        assert names(bundles) == ["rgb", "tiny"]
        await bundles.load("rgb")  # by the old keys
        sign_bundle(root / "tiny", C_PEM)
        await bundles.reload()
        assert names(bundles) == ["tiny"]


@pytest.mark.parametrize("content", [None, "", "# none\n", "a b c\n", f"{A}{A}"])
async def test_a_file_of_keys_that_cannot_be_used_leaves_the_old_ones(
    content: str | None, settings: Settings, keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Missing, empty, not understood, an id twice: the log says so, and signatures are still asked for."""
    async with serving(settings) as bundles:
        trust(keys, content)
        await bundles.reload()
        assert f"keys of bundles not read again, the old ones stay: GAN_BUNDLE_KEYS_FILE: {keys}: " in caplog.text
        assert names(bundles) == ["rgb", "tiny"]


async def test_a_copy_that_nobody_signed_hides_behind_no_other(settings: Settings, root: Path) -> None:
    """Of two folders with one version the signed one is served."""
    unsigned = shutil.copytree(root / "cond", root / "a-copy")
    sign_bundle(root / "cond", A_PEM)
    async with serving(settings) as bundles:
        found = await bundles.find("cond", 60)
        assert found.folder == root / "cond" != unsigned


@pytest.mark.parametrize("content", [None, "", "# none\n", f"{A}{A}", "a AAAA\n"])
def test_unusable_keys_stop_the_start(content: str | None, tiny_settings: Make, tmp_path: Path) -> None:
    """One clear line that names the setting and the file."""
    trust(tmp_path / "keys", content)
    with pytest.raises(SettingsError, match=f"^GAN_BUNDLE_KEYS_FILE: {tmp_path / 'keys'}: "):
        read_bundle_keys(tiny_settings(bundle_keys_file=tmp_path / "keys"))


@pytest.mark.parametrize("setting", ["GAN_BUNDLE_KEYS_FILE", "GAN_API_KEYS_FILE", "GAN_ADMIN_KEYS_FILE"])
def test_a_file_of_keys_that_is_missing_or_empty_ends_with_exit_code_two(setting: str, tmp_path: Path) -> None:
    """Before anything that takes time is imported, in one line."""
    (tmp_path / "empty").touch()
    for name in ("none", "empty"):
        done = subprocess.run(
            [sys.executable, "-m", "service"],
            env={**os.environ, setting: str(tmp_path / name)},
            cwd=Path(__file__).parents[4],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"gan-service: {setting}: {tmp_path / name}: ")
        assert len(done.stderr.splitlines()) == 1


def test_only_those_who_ask_for_signatures_import_cryptography() -> None:
    """Its import takes time and memory, which nobody else should pay for."""
    program = "import sys, service.app, service.__main__; print(any(n.startswith('cryptography') for n in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[4], capture_output=True, text=True, check=False
    )
    assert done.stdout == "False\n", done.stderr
