"""Several versions of one name: what names mean, and which versions are in memory while others are asked for."""

import asyncio
import json
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from models.bundle import GENERATOR, MANIFEST, Bundle, BundleError, write_bundle
from service.engine.bundles.bundles import Bundles
from service.engine.bundles.cold_loads import MOST_WAITERS
from service.engine.bundles.names import ALIASES, read_aliases
from service.engine.engine import Engine, Loaded
from service.engine.model_manager import ModelManager
from service.errors import DeadlinePassed, NotReady, UnknownBundle
from service.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]
Place = Callable[..., Bundle]
OLD, NEW = "2026-01-01T00:00:00Z", "2026-06-01T00:00:00Z"


@pytest.fixture
def place(tmp_path: Path, tiny_bundles: dict[str, Bundle]) -> Place:
    """Writes a version of a bundle into a folder of this name: the same nets with weights larger by a factor."""

    def write(folder: str, factor: float, *, name: str = "tiny", created: str = OLD) -> Bundle:
        tiny = tiny_bundles["tiny"]
        facts = tiny.manifest.model_dump(exclude={"format", "files"}) | {"name": name, "created": created}
        generator = {key: factor * tensor for key, tensor in tiny.generator.state_dict().items()}
        samples = (tiny.folder / "samples.png").read_bytes()
        return write_bundle(tmp_path / folder, facts, generator, tiny.discriminator.state_dict(), samples)

    return write


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Bundles]:
    """The bundles of a service, from start to stop."""
    manager = ModelManager(settings, Metrics(CollectorRegistry()))
    try:
        await manager.start()
        yield manager.bundles
    finally:
        await manager.stop()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are loaded, as they are."""
    load, folders = Engine.load, list[str]()

    def noted(engine: Engine, folder: Path, *rest: Any) -> Loaded:
        folders.append(folder.name)
        return load(engine, folder, *rest)

    monkeypatch.setattr(Engine, "load", noted)
    return folders


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Cold loads wait for it."""
    load, opened = Engine.load, threading.Event()

    def held(engine: Engine, folder: Path, *rest: Any) -> Loaded:
        opened.wait(60)
        return load(engine, folder, *rest)

    opened.set()
    monkeypatch.setattr(Engine, "load", held)
    return opened


def write_aliases(root: Path, **aliases: str) -> None:
    (root / ALIASES).write_text(json.dumps({name.replace("__", "@"): version for name, version in aliases.items()}))


async def settled(bundles: Bundles) -> Bundles:
    """Once the threads have put down what they have just loaded: until then it counts as in use."""
    loader = bundles._loader  # noqa: SLF001 - nothing else needs to know when that is
    for thread in (loader._thread, *loader._engine.threads):  # noqa: SLF001
        await thread.run(int)
    return bundles


def damage(folder: Path) -> Callable[[], None]:
    """One bit of the weights falls over; what is returned mends it."""
    whole = (folder / GENERATOR).read_bytes()
    (folder / GENERATOR).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    def mend() -> None:
        (folder / GENERATOR).write_bytes(whole)

    return mend


def in_memory(bundles: Bundles) -> set[str]:
    return {bundle.version for bundle in bundles.loaded()}


# What names mean


async def test_a_name_means_its_newest_version_and_each_can_be_pinned(
    tmp_path: Path, place: Place, tiny_settings: Make
) -> None:
    """Whatever the folders are called; of equally new ones the greater version; copies of one count as one."""
    old, new, equal = place("z", 1, created=OLD), place("a", 2, created=NEW), place("m", 3, created=NEW)
    shutil.copytree(tmp_path / "z", tmp_path / "copy")
    newest = max(new, equal, key=lambda bundle: bundle.version)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        assert bundles.version("tiny") == newest.version == (await bundles.find(None, 60)).version
        assert [one.version for one in bundles.versions("tiny")][-1] == old.version
        assert len(bundles.versions("tiny")) == 3
        for bundle in (old, new, equal):
            found = await bundles.find(f"tiny@{bundle.version}", 60)
            assert (found.version, found.manifest.created) == (bundle.version, bundle.manifest.created)
        shutil.rmtree(tmp_path / "z")
        await bundles.reload()
        assert len(bundles.versions("tiny")) == 3  # the copy is still there


async def test_aliases_say_what_names_mean_and_are_taken_up_by_a_reload(
    tmp_path: Path, place: Place, tiny_settings: Make
) -> None:
    """A name alone, or name@alias; the version that a name comes to mean is loaded first, and the old one stays."""
    old, new = place("old", 1), place("new", 2, created=NEW)
    write_aliases(tmp_path, tiny=old.version, tiny__canary=new.version)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        assert (bundles.version("tiny"), bundles.version("tiny@canary")) == (old.version, new.version)
        assert bundles.aliases() == {"tiny": old.version, "tiny@canary": new.version}
        write_aliases(tmp_path, tiny=new.version)
        for take_up in (bundles.reload(), bundles.load("tiny")):
            await take_up
            assert bundles.version("tiny") == new.version
            with pytest.raises(UnknownBundle):
                bundles.look_up("tiny@canary")
            assert in_memory(bundles) == {old.version, new.version}


async def test_an_alias_of_a_version_that_is_not_there_never_leads_to_the_newest(
    tmp_path: Path, place: Place, tiny_settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start the name means nothing; later it keeps its meaning. The log says so."""
    place("tiny", 1)
    rgb, newer = place("rgb", 1, name="rgb"), place("newer", 2, name="rgb", created=NEW)
    write_aliases(tmp_path, rgb="0123456789ab")
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        assert "rgb would mean rgb@0123456789ab, which is not there" in caplog.text
        with pytest.raises(UnknownBundle):
            await bundles.find("rgb", 60)
        assert (await bundles.find(f"rgb@{rgb.version}", 60)).version == rgb.version
        write_aliases(tmp_path, rgb=rgb.version)
        await bundles.reload()
        write_aliases(tmp_path, rgb=newer.version)
        damage(tmp_path / "newer")
        await bundles.reload()
        assert bundles.version("rgb") == rgb.version
    write_aliases(tmp_path, tiny="0123456789ab", rgb="0123456789ab")
    for default, why in (
        ("tiny", "tiny would mean tiny@0123456789ab, which is not there"),
        (None, "no name means a version"),
    ):
        with pytest.raises(BundleError, match=f"{ALIASES}: {why}"):
            async with serving(tiny_settings(bundles=tmp_path, default_bundle=default)):
                pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"tiny": "0123456789ab", "tiny": "0123456789ab"}', "a key comes twice"),
        ('{"tiny": 7}', "must mean a version of 12 hex digits"),
        ('{"tiny": "0123456789AB"}', "must mean a version of 12 hex digits"),
        ('{"tiny@0123456789ab": "0123456789ab"}', "an alias may not look like a version"),
        ('{"tiny@": "0123456789ab"}', "neither a bundle's name nor name@alias"),
        ('{"tiny@a@b": "0123456789ab"}', "neither a bundle's name nor name@alias"),
        ('{"../tiny": "0123456789ab"}', "neither a bundle's name nor name@alias"),
        (json.dumps({f"a{n}": "0123456789ab" for n in range(5000)}), "more than 4096 aliases"),
        ("x" * 2**21, "larger than 1048576 bytes"),
    ],
    ids=range(11),
)
async def test_aliases_that_cannot_be_used_end_a_start_and_change_nothing_later(
    tmp_path: Path, place: Place, tiny_settings: Make, content: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a name means is not guessed: the error names the file."""
    old = place("old", 1)
    place("new", 2, created=NEW)
    write_aliases(tmp_path, tiny=old.version)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        (tmp_path / ALIASES).write_text(content)
        with pytest.raises(BundleError, match=f"{ALIASES}: .*{reason}"):
            read_aliases(tmp_path)
        await bundles.reload()
        assert bundles.version("tiny") == old.version
        assert "aliases not read again" in caplog.text
        with pytest.raises(BundleError, match=ALIASES):  # whoever asks to load waits for an answer
            await bundles.load("tiny")
        assert bundles.version("tiny") == old.version
    with pytest.raises(BundleError, match=ALIASES):
        async with serving(tiny_settings(bundles=tmp_path)):
            pass


async def test_a_folder_that_is_a_bundle_is_served_alone(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """As image volumes lay it; its own sub-folders are not looked into."""
    bundle = place("mount", 1)
    place("mount/inner", 2, name="inner")
    async with serving(tiny_settings(bundles=tmp_path / "mount")) as bundles:
        assert [(one.name, one.version) for one in bundles.names()] == [("tiny", bundle.version)]


async def test_names_of_the_protocols_discriminators_are_refused(place: Place) -> None:
    """Model NAME.discriminator is the D of NAME there."""
    with pytest.raises(BundleError, match=r"name must not end in \.discriminator"):
        place("odd", 1, name="tiny.discriminator")


# What is in memory


async def test_the_least_recently_asked_for_makes_room(
    tmp_path: Path, place: Place, tiny_settings: Make, loads: list[str]
) -> None:
    """A version is loaded at its first request, beside the default, which stays; what leaves, leaves memory."""
    a, b, c = (place(folder, factor) for folder, factor in (("a", 1), ("b", 2), ("c", 3)))
    place("default", 4, created=NEW)
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=3)) as bundles:
        default = bundles.version("tiny")
        assert loads == ["default"]  # other versions are loaded when they are asked for
        first = weakref.ref(await bundles.find(f"tiny@{a.version}", 60))
        await bundles.find(f"tiny@{b.version}", 60)
        await settled(bundles)
        assert in_memory(bundles) == {default, a.version, b.version}
        await bundles.find(f"tiny@{a.version}", 60)
        await bundles.find(f"tiny@{c.version}", 60)
        assert in_memory(await settled(bundles)) == {default, a.version, c.version}
        await bundles.find(f"tiny@{b.version}", 60)
        assert in_memory(bundles) == {default, b.version, c.version}
        assert first() is None
        assert loads == ["default", "a", "b", "c", "b"]


async def test_what_is_in_use_stays(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """Requests hold what they have found; where nothing is free, another has to come back later."""
    a, b, c = (
        place(folder, factor, created=f"2026-01-0{factor}T00:00:00Z")
        for folder, factor in zip("abc", (1, 2, 3), strict=True)
    )
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=2)) as bundles:
        held = await bundles.find(f"tiny@{a.version}", 60)
        with pytest.raises(NotReady, match="in use") as refused:
            await bundles.find(f"tiny@{b.version}", 60)
        assert int(refused.value.headers["Retry-After"]) >= 1
        assert in_memory(bundles) == {a.version, c.version}
        del held
        await bundles.find(f"tiny@{b.version}", 60)
        assert in_memory(bundles) == {b.version, c.version}


async def test_with_room_for_one_even_the_default_makes_room(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """Else no other could ever be served."""
    old, new = place("old", 1), place("new", 2, created=NEW)
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=1)) as bundles:
        for version in (old.version, new.version, old.version):
            assert (await bundles.find(f"tiny@{version}", 60)).version == version
            assert in_memory(bundles) == {version}
        assert (await bundles.find(None, 60)).version == new.version


async def test_requests_wait_for_one_load_at_a_time_and_only_so_many(
    tmp_path: Path, place: Place, tiny_settings: Make, loads: list[str], gate: threading.Event
) -> None:
    """Each version is loaded once for all who wait; over the bound, or past a deadline, they are told."""
    a, b = place("a", 1), place("b", 2)
    place("tiny", 3, created=NEW)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        loads.clear()
        gate.clear()
        names = [f"tiny@{version}" for version in (a.version, b.version)]
        waiting = [asyncio.create_task(bundles.find(names[n % 2], 60)) for n in range(MOST_WAITERS)]
        await asyncio.sleep(0)
        with pytest.raises(NotReady, match="wait for bundles"):
            await bundles.find(names[0], 60)
        assert (await bundles.find(None, 60)).version == bundles.version("tiny")  # who does not wait is served
        waiting.pop().cancel()
        await asyncio.sleep(0)
        with pytest.raises(DeadlinePassed):
            await bundles.find(names[0], 0.001)
        gate.set()
        found = await asyncio.gather(*waiting)
        assert {bundle.version for bundle in found} == {a.version, b.version}
        assert sorted(loads) == ["a", "b"]


async def test_a_load_that_nobody_waits_for_any_more_is_left_out(
    tmp_path: Path, place: Place, tiny_settings: Make, loads: list[str], gate: threading.Event
) -> None:
    """Those who wanted it have left while another one was loaded."""
    a, b = place("a", 1), place("b", 2)
    place("tiny", 3, created=NEW)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        loads.clear()
        gate.clear()
        stays = asyncio.create_task(bundles.find(f"tiny@{a.version}", 60))
        leaves = asyncio.create_task(bundles.find(f"tiny@{b.version}", 60))
        await asyncio.sleep(0)
        leaves.cancel()
        gate.set()
        await stays
        await bundles.reload()  # behind whatever else there may be
        assert loads == ["a"]


async def test_loads_in_a_row_leave_the_processors_to_those_who_are_served(
    tmp_path: Path,
    place: Place,
    tiny_settings: Make,
    gate: threading.Event,
    loads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    """After a load beside which others were served the next one waits; beside nobody it does not."""
    a, b, c = (place(folder, factor) for folder, factor in (("a", 1), ("b", 2), ("c", 3)))
    place("tiny", 4, created=NEW)
    for name in ("REST", "MOST_REST_S"):
        monkeypatch.setattr(f"service.engine.bundles.cold_loads.{name}", 1e6)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        loads.clear()
        await bundles.find(f"tiny@{a.version}", 60)
        gate.clear()
        cold = asyncio.create_task(bundles.find(f"tiny@{b.version}", 60))
        await until(lambda: len(loads) == 2)
        await bundles.find(None, 60)
        gate.set()
        await cold
        with pytest.raises(DeadlinePassed):
            await bundles.find(f"tiny@{c.version}", 0.01)
        assert loads == ["a", "b"]


# What can't be loaded


async def test_a_refused_version_is_not_tried_again_until_its_folder_changes(
    tmp_path: Path, place: Place, tiny_settings: Make, loads: list[str]
) -> None:
    """The request is told why; once the folder is mended the next request loads it, without a signal."""
    old = place("old", 1)
    place("new", 2, created=NEW)
    mend = damage(tmp_path / "old")
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        loads.clear()
        for _ in range(3):
            with pytest.raises(UnknownBundle, match=f"can't be loaded: old/{GENERATOR}: sha256"):
                await bundles.find(f"tiny@{old.version}", 60)
        assert loads == ["old"]
        mend()
        assert (await bundles.find(f"tiny@{old.version}", 60)).version == old.version


@pytest.mark.parametrize("asked", ["rgb", "rgb@canary", "rgb@{}"])
@pytest.mark.parametrize("lost", ["folder", "manifest"])
async def test_what_was_gone_for_a_moment_is_found_again(
    tmp_path: Path, place: Place, tiny_settings: Make, asked: str, lost: str
) -> None:
    """Without a signal, by whatever name: a request may come while a folder is moved, or its manifest is written."""
    place("tiny", 1)
    rgb = place("rgb", 2, name="rgb")
    write_aliases(tmp_path, rgb__canary=rgb.version)
    manifest = tmp_path / "rgb" / MANIFEST
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=1)) as bundles:
        if lost == "folder":
            (tmp_path / "rgb").rename(tmp_path / ".rgb")
        else:
            text = manifest.read_text()
            manifest.write_text(text[:100])
        for _ in range(2):
            with pytest.raises(UnknownBundle):
                await bundles.find(asked.format(rgb.version), 60)
        if lost == "folder":
            (tmp_path / ".rgb").rename(tmp_path / "rgb")
        else:
            manifest.write_text(text)
        assert (await bundles.find(asked.format(rgb.version), 60)).version == rgb.version
        assert not bundles._seen.index.gone  # noqa: SLF001 - else it would grow


async def test_a_name_whose_newest_version_is_refused_means_the_one_before(
    tmp_path: Path, place: Place, tiny_settings: Make
) -> None:
    """At the start, and where that is found out by a request."""
    old, new = place("old", 1), place("new", 2, created=NEW)
    rgb, newer = place("rgb", 1, name="rgb"), place("rgb-2", 2, name="rgb", created=NEW)
    damage(tmp_path / "new")
    damage(tmp_path / "rgb-2")
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=1)) as bundles:
        assert bundles.version("tiny") == old.version
        assert bundles.version("rgb") == newer.version
        assert (await bundles.find("rgb", 60)).version == rgb.version
        entries = {(one.name, one.version): one for one in await bundles.repository()}
        assert entries["tiny", old.version].state == entries["rgb", rgb.version].state == "READY"
        assert entries["tiny", new.version].reason.startswith(f"new/{GENERATOR}: sha256")


async def test_what_may_pass_is_tried_again(
    tmp_path: Path, place: Place, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files at this moment are no reason to refuse a version for good."""
    old = place("old", 1)
    place("new", 2, created=NEW)

    def fail(*_: object) -> None:
        raise BundleError(tmp_path / "old", "Too many open files", is_passing=True)

    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        with monkeypatch.context() as patch:
            patch.setattr("service.engine.engine.read_bundle", fail)
            with pytest.raises(NotReady, match="can't be read now"):
                await bundles.find(f"tiny@{old.version}", 60)
        assert (await bundles.find(f"tiny@{old.version}", 60)).version == old.version


async def test_a_refusal_is_told_once_however_often_the_repository_is_listed(
    tmp_path: Path, place: Place, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each list looks again at a folder that can't be read for now; the next reload tells the last of its refusals."""
    place("old", 1)

    def fail(*_: object) -> None:
        raise BundleError(tmp_path / "new", "Too many open files", is_passing=True)

    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        place("new", 2, created=NEW)
        monkeypatch.setattr("service.engine.bundles.index.read_manifest", fail)
        for _ in range(3):
            await bundles.repository()
        await bundles.reload()
        assert caplog.text.count("bundle refused") == 1


# Folders that come and go


async def test_a_version_lives_as_long_as_its_folder(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """Cold, it is missed by the next request; in memory, at the next reload. A new folder comes by reload or load."""
    cold, warm = place("cold", 1), place("warm", 2)
    place("new", 3, created=NEW)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        await bundles.find(f"tiny@{warm.version}", 60)
        for folder in ("cold", "warm"):
            shutil.rmtree(tmp_path / folder)
        with pytest.raises(UnknownBundle):
            await bundles.find(f"tiny@{cold.version}", 60)
        with pytest.raises(UnknownBundle):
            await bundles.find(f"tiny@{warm.version}", 60)  # which took up what has changed
        assert warm.version not in in_memory(bundles)
        later = place("later", 4)
        with pytest.raises(UnknownBundle):
            await bundles.find(f"tiny@{later.version}", 60)
        await bundles.load(f"tiny@{later.version}")
        assert later.version in in_memory(bundles)


async def test_a_cold_folder_with_another_version_is_taken_up_by_its_next_request(
    tmp_path: Path, place: Place, tiny_settings: Make
) -> None:
    """Its name means what is there now, and what was there before is gone."""
    place("tiny", 1)
    before = place("rgb", 1, name="rgb")
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=1)) as bundles:
        after = place("rgb", 2, name="rgb", created=NEW)
        assert (await bundles.find("rgb", 60)).version == after.version
        with pytest.raises(UnknownBundle):
            await bundles.find(f"rgb@{before.version}", 60)


async def test_what_cannot_be_loaded_again_never_makes_room(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """Its folder is damaged: what is in memory is all that there is."""
    place("tiny", 1)
    rgb, other = place("rgb", 1, name="rgb"), place("other", 2, name="other")
    async with serving(tiny_settings(bundles=tmp_path, max_resident_bundles=2)) as bundles:
        await bundles.find("rgb", 60)
        (tmp_path / "rgb" / MANIFEST).write_text("{}")
        await bundles.reload()
        with pytest.raises(NotReady, match="in use"):
            await bundles.find("other", 60)
        assert (await bundles.find("rgb", 60)).version == rgb.version
        assert bundles.version("other") == other.version


async def test_versions_are_unloaded_and_loaded_alone_or_together(
    tmp_path: Path, place: Place, tiny_settings: Make
) -> None:
    """What is unloaded is not loaded by a request; names mean what is left."""
    place("tiny", 1)
    old, new = place("old", 1, name="rgb"), place("new", 2, name="rgb", created=NEW)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        await bundles.unload(f"rgb@{new.version}")
        assert (await bundles.find("rgb", 60)).version == old.version
        await bundles.unload("rgb")
        for name in ("rgb", f"rgb@{old.version}", f"rgb@{new.version}"):
            with pytest.raises(UnknownBundle):
                await bundles.find(name, 60)
        states = {(one.version, one.state, one.reason) for one in await bundles.repository() if one.name == "rgb"}
        assert states == {(old.version, "UNAVAILABLE", "unloaded"), (new.version, "UNAVAILABLE", "unloaded")}
        await bundles.load(f"rgb@{old.version}")
        assert bundles.version("rgb") == old.version
        await bundles.load("rgb")
        assert (await bundles.find("rgb", 60)).version == new.version
        await bundles.unload("rgb")
        await bundles.reload()
        assert bundles.version("rgb") == new.version


async def test_metrics_tell_what_is_in_memory(tmp_path: Path, place: Place, tiny_settings: Make) -> None:
    """A series for each version in memory, and a count for each that comes or goes, by name."""
    old = place("old", 1)
    place("new", 2, created=NEW)
    metrics = Metrics(CollectorRegistry())
    manager = ModelManager(tiny_settings(bundles=tmp_path, max_resident_bundles=1), metrics)
    await manager.start()
    await manager.find(f"tiny@{old.version}", 60)
    infos = [sample.labels for family in metrics.bundle_info.collect() for sample in family.samples]
    assert infos == [{"bundle": "tiny", "version": old.version, "device": "cpu"}]
    for result in ("loaded", "unloaded"):
        assert metrics.registry.get_sample_value("gan_bundle_swaps_total", {"bundle": "tiny", "result": result}) == 1
    assert (metrics.registry.get_sample_value("gan_warmup_seconds", {"bundle": "tiny"}) or 0) > 0
    await manager.stop()


async def test_a_name_that_nobody_has_costs_no_look_at_the_disk(
    place: Place, tmp_path: Path, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random names are refused on the event loop, without a thread."""
    place("tiny", 1)
    async with serving(tiny_settings(bundles=tmp_path)) as bundles:
        monkeypatch.setattr(asyncio, "to_thread", None)
        for name in ("nobody", "nobody@0123456789ab", "tiny@0123456789ab", "../tiny", "x" * 500):
            with pytest.raises(UnknownBundle):
                await bundles.find(name, 60)
