"""The core as a whole, on real bundles and a real thread: start, work, health, drain, and bundles that change."""

import asyncio
import gc
import json
import shutil
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from models.bundle import (
    DISCRIMINATOR,
    GENERATOR,
    MANIFEST,
    SAMPLES,
    Bundle,
    BundleError,
    record_evaluation,
    write_bundle,
)
from models.inference.fast_nets import fast_discriminator, fast_generator
from models.inference.noise import draw_labels, draw_latents
from models.inference.pixels import UInt8, to_pixels
from models.signing import PublicKeys
from service.engine.engine import Engine, Loaded
from service.engine.health import DEAD_AFTER_S, NOT_READY_AFTER_S
from service.engine.model_manager import ModelManager
from service.errors import DeadlinePassed, Draining, NotReady, QueueFull, UnknownBundle
from service.metrics import Metrics
from service.settings import Settings

pytestmark = pytest.mark.anyio

Make = Callable[..., Settings]
Refusals = Callable[[], list[str]]


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        """What time it is."""
        return self.now


@asynccontextmanager
async def started(settings: Settings, clock: Callable[[], float] | None = None) -> AsyncIterator[ModelManager]:
    """The core, from start to stop."""
    metrics = Metrics(CollectorRegistry())
    manager = ModelManager(settings, metrics) if clock is None else ModelManager(settings, metrics, clock)
    try:
        await manager.start()
        yield manager
    finally:
        if not manager.is_draining:
            await manager.stop()


@asynccontextmanager
async def held(manager: ModelManager) -> AsyncIterator[threading.Event]:
    """Within the block the engine's thread is busy until the gate is opened, at the latest by the block's end."""
    gate, arrived, loop = threading.Event(), asyncio.Event(), asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(arrived.set)
        gate.wait(60)

    [thread] = manager.engine.threads
    call = thread.run(wait)
    await arrived.wait()
    try:
        yield gate
    finally:
        gate.set()
        await call


async def found(manager: ModelManager, name: str | None) -> Loaded:
    """What requests of this name get."""
    return await manager.find(name, 60)


async def sample(manager: ModelManager, bundle: str | Bundle | None = None, count: int = 1, **more: Any) -> UInt8:
    """Images of a seed, the simplest way."""
    asked = bundle if isinstance(bundle, Bundle) else await found(manager, bundle)
    options = {"seed": 7, "first_index": 0, "labels": None, "truncation": 1.0, "deadline_s": 60.0} | more
    images, _, _ = await manager.sample(asked, count=count, **options)
    return images


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something is so."""
    while not condition():  # noqa: ASYNC110 - these are numbers and flags, as probes read them: nothing rings a bell
        await asyncio.sleep(0.001)


def value(manager: ModelManager, series: str, **labels: str) -> float | None:
    return manager.metrics.registry.get_sample_value(series, labels)


def place(bundle: Bundle, folder: Path) -> Path:
    """A copy of a bundle, named like the folder; the name is no part of its version."""
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"name": folder.name}))
    return folder


def place_version(bundle: Bundle, folder: Path, factor: float) -> Bundle:
    """Another version of a bundle, in its place: the same nets with weights that are larger by a factor."""
    facts = bundle.manifest.model_dump(exclude={"format", "files", "name"}) | {"name": folder.name}
    states = [
        {name: tensor * factor for name, tensor in net.state_dict().items()}
        for net in (bundle.generator, bundle.discriminator)
    ]
    return write_bundle(folder, facts, states[0], states[1], np.zeros((4, 4, 1), np.uint8))


def damage(folder: Path) -> None:
    """One bit of the weights falls over."""
    content = bytearray((folder / GENERATOR).read_bytes())
    content[-1] ^= 1
    (folder / GENERATOR).write_bytes(content)


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Refusals:
    """What the log says of the refused bundles, since this was last called."""

    def take() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line.removeprefix("bundle refused: ") for line in lines if line.startswith("bundle refused: ")]

    return take


# Start


@pytest.mark.parametrize("trouble", ["no folder", "no bundles", "corrupt", "corrupt default", "default"])
async def test_a_start_that_fails_says_why_in_one_line(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, trouble: str
) -> None:
    """Whatever is wrong with the folder of bundles, the error names the place, and the service stays not ready."""
    root = tmp_path / "bundles"
    words = str(root)
    if trouble != "no folder":
        root.mkdir()
        (root / "notes.txt").write_text("not a bundle")
        (root / ".half-written").mkdir()
        (root / ".half-written" / MANIFEST).write_text("{")
    if trouble in {"corrupt", "corrupt default", "default"}:
        place(tiny_bundles["tiny"], root / "tiny")
    if trouble == "corrupt default":
        damage(place(tiny_bundles["rgb"], root / "rgb"))
        place(tiny_bundles["cond"], root / "cond")
    if trouble in {"corrupt", "corrupt default"}:
        damage(root / "tiny")
        words = str(root / "tiny" / GENERATOR)
    default = "other" if trouble == "default" else "tiny"
    manager = ModelManager(tiny_settings(bundles=root, default_bundle=default), Metrics(CollectorRegistry()))
    with pytest.raises(BundleError) as error:
        await manager.start()
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert manager.bundles.names() == []
    assert manager.health.ready() == manager.health.started() == "the bundles are being loaded"
    await manager.stop()


@pytest.mark.parametrize("default", [None, "mnist", "mnist@{version}"])
async def test_a_start_without_its_usual_default_says_why(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, default: str | None
) -> None:
    """Requests that name no bundle would get images of another one: where mnist is damaged, it is missed."""
    place(tiny_bundles["rgb"], tmp_path / "apple")
    damage(place(tiny_bundles["tiny"], tmp_path / "mnist"))
    chosen = default and default.format(version=tiny_bundles["tiny"].version)
    with pytest.raises(BundleError, match=str(tmp_path / "mnist" / GENERATOR)):
        async with started(tiny_settings(bundles=tmp_path, default_bundle=chosen)):
            pass


async def test_a_bad_bundle_is_refused_and_the_others_are_served(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, refusals: Refusals
) -> None:
    """A damaged one, and one that vanishes while it is read: a line in the log for each, none for a second copy."""
    for name in ("tiny", "rgb", "broken"):
        place(tiny_bundles["tiny" if name == "tiny" else "rgb"], tmp_path / name)
    damage(tmp_path / "broken")
    shutil.copytree(tmp_path / "rgb", tmp_path / "twin")
    place(tiny_bundles["cond"], tmp_path / "gone")
    reasons = [
        f"{tmp_path}/broken/{GENERATOR}: sha256 ",
        f"{tmp_path}/gone/{GENERATOR}: No such file or directory",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "load", vanishing(tmp_path / "gone"))
        async with started(tiny_settings(bundles=tmp_path)) as manager:
            assert [bundle.name for bundle in manager.bundles.loaded()] == ["rgb", "tiny"]
            for line, reason in zip(refusals(), reasons, strict=True):
                assert line.startswith(reason)
            entries = await manager.bundles.repository()
            waiting = {entry.name: entry.reason for entry in entries if entry.state != "READY"}
            assert sorted(waiting) == ["broken", "gone"]
            for name, reason in zip(sorted(waiting), reasons, strict=True):
                assert waiting[name].startswith(reason.removeprefix(f"{tmp_path}/"))
            await sample(manager, "rgb")


def vanishing(folder: Path) -> Callable[..., Loaded]:
    """An engine's `load` that comes too late for this folder: all but its manifest has gone."""
    load = Engine.load

    def late(engine: Engine, found: Path, known: Mapping[str, Loaded], trusted: PublicKeys | None = None) -> Loaded:
        if found == folder:
            for name in (GENERATOR, DISCRIMINATOR, SAMPLES):
                (found / name).unlink()
        return load(engine, found, known, trusted)

    return late


async def test_bundles_are_loaded_side_by_side(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processors two bundles are loaded at once, each while the other is."""
    monkeypatch.setattr("service.engine.device.cpu_limit", lambda: 2)
    for name in ("one", "two", "three", "four"):
        place(tiny_bundles["tiny"], tmp_path / name)
    load, pair = Engine.load, threading.Barrier(2)

    def load_beside_another(*arguments: Any) -> Loaded:
        pair.wait(60)
        return load(*arguments)

    monkeypatch.setattr(Engine, "load", load_beside_another)
    async with started(tiny_settings(bundles=tmp_path, default_bundle="one")) as manager:
        assert sorted(bundle.name for bundle in manager.bundles.loaded()) == ["four", "one", "three", "two"]
        assert len({(await sample(manager, name)).tobytes() for name in ("one", "two", "three", "four")}) == 1


async def test_of_two_bad_bundles_the_first_by_name_is_told(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is found out first: the same start fails with the same words."""
    monkeypatch.setattr("service.engine.device.cpu_limit", lambda: 2)
    for name in ("a", "b"):
        damage(place(tiny_bundles["tiny"], tmp_path / name))
    load, over = Engine.load, threading.Event()

    def load_the_second_first(engine: Engine, folder: Path, known: Mapping[str, Loaded]) -> Loaded:
        if folder.name == "a":
            over.wait(60)
        try:
            return load(engine, folder, known)
        finally:
            over.set()

    monkeypatch.setattr(Engine, "load", load_the_second_first)
    manager = ModelManager(tiny_settings(bundles=tmp_path, default_bundle=None), Metrics(CollectorRegistry()))
    with pytest.raises(BundleError, match=str(tmp_path / "a")):
        await manager.start()
    await manager.stop()


@pytest.mark.parametrize(
    ("names", "setting", "default"),
    [
        pytest.param(["tiny"], None, "tiny", id="the only one"),
        pytest.param(["zebra", "mnist", "apple"], None, "mnist", id="mnist where it is"),
        pytest.param(["zebra", "apple"], None, "apple", id="else the first by name"),
        pytest.param(["mnist", "zebra"], "zebra", "zebra", id="what the setting says"),
        pytest.param(["mnist", "zebra"], "zebra@{version}", "zebra", id="by version"),
        pytest.param(["mnist", "zebra"], "zebra@0123456789ab", None, id="another version"),
        pytest.param(["mnist", "zebra"], "lion", None, id="none of this name"),
    ],
)
async def test_requests_that_name_no_bundle_get_the_default(
    tmp_path: Path, tiny_bundles: dict[str, Bundle], tiny_settings: Make, names: list[str], setting: str, default: str
) -> None:
    """The setting's bundle, else mnist, else the only one, else the first; a setting that can't be met is an error."""
    for name in names:
        place(tiny_bundles["tiny"], tmp_path / name)
    chosen = setting and setting.format(version=tiny_bundles["tiny"].version)
    settings = tiny_settings(bundles=tmp_path, default_bundle=chosen)
    if default is None:
        with pytest.raises(BundleError, match=f"default bundle {chosen} must be there"):
            async with started(settings):
                pass
        return
    async with started(settings) as manager:
        assert (await found(manager, None)).name == default
        assert sorted(bundle.name for bundle in manager.bundles.loaded()) == sorted(names)


async def test_bundles_are_found_by_name_and_version(tiny_settings: Make, tiny_bundles: dict[str, Bundle]) -> None:
    """A name, or name@version; another name or version is an error that lists what there is."""
    version = tiny_bundles["rgb"].version
    async with started(tiny_settings()) as manager:
        assert (await found(manager, "rgb")).version == (await found(manager, f"rgb@{version}")).version == version
        for wrong in ("lion", "rgb@0123456789ab", f"rgb@{version}0", f"tiny@{version}"):
            with pytest.raises(UnknownBundle, match=f"rgb@{version}"):
                manager.bundles.look_up(wrong)
        fingerprints = {manager.fingerprint(bundle) for bundle in manager.bundles.loaded()}
        assert len(fingerprints) == 3
        for name, bundle in tiny_bundles.items():
            assert value(manager, "gan_bundle_info", bundle=name, version=bundle.version, device="cpu") == 1
            assert (value(manager, "gan_warmup_seconds", bundle=name) or 0) > 0


# Work


async def test_images_and_logits_are_those_of_the_nets(tiny_settings: Make, tiny_bundles: dict[str, Bundle]) -> None:
    """What callers get, many at a time, is what the nets give for their latents and images alone."""
    async with started(tiny_settings()) as manager:
        for name, bundle in tiny_bundles.items():
            classes = None if bundle.manifest.labels is None else [2, 0, 1, 1, 0]
            labels = None if classes is None else torch.tensor(classes)
            options = {"labels": classes, "truncation": 0.5, "first_index": 3}
            images, again, pair = await asyncio.gather(
                sample(manager, name, 5, **options),
                sample(manager, name, 5, **options),
                sample(manager, name, 2, **options | {"labels": classes and classes[1:3], "first_index": 4}),
            )
            z = torch.from_numpy(draw_latents(bundle.manifest.latent, 7, 3, 5) * np.float32(0.5))
            expected = fast_generator(bundle.generator).levels(z, labels).numpy()
            np.testing.assert_array_equal(images, expected)
            np.testing.assert_array_equal(again, expected)
            np.testing.assert_array_equal(pair, expected[1:3])
            asked = await found(manager, name)
            logits, judged_as, timing = await manager.discriminate(asked, images, labels=classes, deadline_s=60)
            assert judged_as == classes
            judged = fast_discriminator(bundle.discriminator)(to_pixels(images), labels)
            np.testing.assert_array_equal(logits, judged[:, 0].numpy())
            assert timing.queue_s >= 0
            assert timing.compute_s > 0


async def test_labels_are_drawn_where_none_are_named(tiny_settings: Make, tiny_bundles: dict[str, Bundle]) -> None:
    """From the seed, at the training data's frequencies, the same for an index in any request; the result has them."""
    frequencies = tiny_bundles["cond"].manifest.latent.label_frequencies
    assert frequencies is not None
    async with started(tiny_settings()) as manager:
        cond = await found(manager, "cond")
        fixed: dict[str, Any] = {"seed": 11, "truncation": 1.0, "deadline_s": 60}
        images, labels, _ = await manager.sample(cond, first_index=0, labels=None, count=4000, **fixed)
        assert labels is not None
        assert labels == draw_labels(frequencies, 11, 0, 4000).tolist()
        assert np.bincount(labels) / 4000 == pytest.approx(frequencies, abs=0.03)
        part, few, _ = await manager.sample(cond, first_index=1000, labels=None, count=3, **fixed)
        assert few == labels[1000:1003]
        np.testing.assert_array_equal(part, images[1000:1003])
        named, given, _ = await manager.sample(cond, first_index=1000, labels=few, count=3, **fixed)
        assert given == few
        np.testing.assert_array_equal(named, part)
        _, none, _ = await manager.sample(await found(manager, "tiny"), first_index=0, labels=None, count=3, **fixed)
        assert none is None


async def test_a_full_queue_and_a_passed_deadline_come_through(tiny_settings: Make) -> None:
    """With the engine held, a request without room is refused at once; one that waits too long gets an error."""
    async with started(tiny_settings(max_queued_images=20, max_count=20)) as manager, held(manager):
        first = asyncio.create_task(sample(manager, count=1))
        await until(lambda: manager.batcher.busy_s() > 0)
        waiting = asyncio.create_task(sample(manager, count=20, deadline_s=0.05))
        await until(lambda: manager.batcher.queued_rows == 20)
        with pytest.raises(QueueFull):
            manager.admit()
        with pytest.raises(QueueFull):
            await sample(manager)
        with pytest.raises(DeadlinePassed):
            await waiting
        manager.admit()
        first.cancel()


# Health


async def test_health_tells_of_the_start(tiny_settings: Make) -> None:
    """Alive from the first moment, ready when every bundle is warm; until then, requests are told to come back."""
    manager = ModelManager(tiny_settings(), Metrics(CollectorRegistry()))
    health = manager.health
    assert health.live() is None
    assert health.ready() == health.started() == "the bundles are being loaded"
    assert value(manager, "gan_ready") == 0
    for ask in (manager.admit, lambda: manager.bundles.look_up(None)):
        with pytest.raises(NotReady, match="being loaded"):
            ask()
    await manager.start()
    assert (health.live(), health.ready(), health.started(), value(manager, "gan_ready")) == (None, None, None, 1)
    manager.admit()
    await manager.stop()


async def test_a_stuck_engine_is_not_ready_then_dead_then_well_again(tiny_settings: Make) -> None:
    """One batch takes too long: traffic is sent elsewhere, then the process is to be replaced; unless it recovers."""
    clock = Clock()
    async with started(tiny_settings(), clock) as manager:
        health = manager.health
        async with held(manager) as gate:
            clock.now += 1000  # idle for long is not stuck
            waiting = asyncio.create_task(sample(manager))
            labels = {"bundle": "tiny", "operation": "sample", "closed_by": "idle"}
            await until(lambda: value(manager, "gan_batches_total", **labels) == 1)
            clock.now += NOT_READY_AFTER_S
            assert (health.live(), health.ready()) == (None, None)
            clock.now += 0.1
            assert health.ready() == f"the engine has been in one batch for over {NOT_READY_AFTER_S:g} s"
            assert (health.live(), health.started(), value(manager, "gan_ready")) == (None, None, 0)
            with pytest.raises(NotReady, match="in one batch"):
                manager.admit()
            clock.now += DEAD_AFTER_S - NOT_READY_AFTER_S
            assert health.live() == f"the engine has been in one batch for over {DEAD_AFTER_S:g} s"
            assert health.ready() is not None
            gate.set()
            await waiting
            assert (health.live(), health.ready(), value(manager, "gan_ready")) == (None, None, 1)
            manager.admit()


async def test_a_new_bundle_that_hangs_in_its_first_batch_is_seen(
    tiny_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is none of the batcher's batches, but it holds the engine's thread all the same."""
    monkeypatch.setattr("service.engine.health.NOT_READY_AFTER_S", 0.05)
    async with started(tiny_settings()) as manager, held(manager) as gate:
        await until(lambda: manager.health.ready() is not None)
        assert manager.health.live() is None
        gate.set()
        await until(lambda: manager.health.ready() is None)


async def test_a_device_that_is_lost_while_a_bundle_is_loaded_is_lost_for_all(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is not to blame: nothing is refused, nothing is computed any more, and health says so."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: the device fell off the bus")

    async with started(tiny_settings(bundles=root)) as manager:
        place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        monkeypatch.setattr("service.engine.engine.read_bundle", fail)
        with pytest.raises(NotReady, match="device failed"):
            await manager.bundles.reload()
        assert manager.health.live() == "the device failed"
        assert value(manager, "gan_bundle_swaps_total", bundle="tiny", result="refused") is None


async def test_busy_is_neither_stuck_nor_dead(tiny_settings: Make) -> None:
    """A queue that takes many minutes, of batches that each take seconds, is healthy from beginning to end."""
    clock = Clock()
    async with started(tiny_settings(), clock) as manager:
        bundle = await found(manager, "tiny")
        tiles, fast = bundle.sample.tiles, bundle.sample.tiles.run
        seen: list[str | None] = []

        def slow(rows: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
            clock.now += NOT_READY_AFTER_S - 0.5
            seen.extend([manager.health.ready(), manager.health.live()])
            return fast(rows, labels)

        tiles.run = slow
        tiles.sizes = (512,)
        await asyncio.gather(*(sample(manager, "tiny", 4096, deadline_s=10_000) for _ in range(3)))
        assert len(seen) == 2 * 3 * 4096 / 512
        assert set(seen) == {None}
        assert clock.now > 5 * DEAD_AFTER_S


async def test_an_engine_thread_that_has_ended_fails_everyone_at_once(tiny_settings: Make) -> None:
    """Its callers don't wait for their deadlines, newcomers are refused, and health says that it won't come back."""
    async with started(tiny_settings()) as manager:
        async with held(manager):
            tasks = [asyncio.create_task(sample(manager, name, 600)) for name in ("tiny", "rgb")]
            manager.engine.threads[0].stop()
            await until(lambda: manager.batcher.queued_rows == 1200 - 512)
        for task in tasks:
            with pytest.raises(NotReady):
                await task
        await until(lambda: not manager.engine.threads[0].is_alive)
        assert manager.health.live() == manager.health.ready() == "a thread of the engine has ended"
        assert manager.batcher.failure == "the device failed"
        assert value(manager, "gan_ready") == 0
        with pytest.raises(NotReady):
            manager.admit()


async def test_a_latched_failure_is_told_by_every_probe(tiny_settings: Make) -> None:
    """After a device error nothing is ready or alive, however well the thread may be."""
    async with started(tiny_settings()) as manager:

        def lose(*_: Any) -> torch.Tensor:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        (await found(manager, "tiny")).sample.tiles.run = lose
        with pytest.raises(NotReady, match="the device failed"):
            await sample(manager, "tiny")
        assert manager.engine.threads[0].is_alive
        assert manager.health.live() == manager.health.ready() == "the device failed"
        assert manager.health.started() is None
        with pytest.raises(NotReady, match="the device failed"):
            await sample(manager, "rgb")


# Drain


async def test_a_stop_says_so_first_and_finishes_what_was_accepted(tiny_settings: Make) -> None:
    """Not ready at once; requests are let in during the drain delay and not after it; all that were get an answer."""
    async with started(tiny_settings()) as manager, held(manager) as gate:
        early = asyncio.create_task(sample(manager, count=5))
        stop = asyncio.create_task(manager.stop(delay_s=0.2))
        await until(lambda: manager.is_draining)
        assert manager.health.ready() == "draining"
        assert value(manager, "gan_ready") == 0
        assert manager.health.live() is None
        manager.admit()
        late = asyncio.create_task(sample(manager, count=3))
        await until(lambda: manager.batcher.is_draining)
        for refused in (manager.admit, manager.batcher.admit):
            with pytest.raises(Draining):
                refused()
        with pytest.raises(Draining):
            await sample(manager)
        gate.set()
        assert (len(await early), len(await late)) == (5, 3)
        await stop
        await until(lambda: not manager.engine.threads[0].is_alive)


async def test_a_stop_does_not_wait_for_a_stuck_engine(tiny_settings: Make) -> None:
    """When the drain time-out is over, those who still wait are told, and the stop is over too."""
    async with started(tiny_settings(drain_timeout_s=0.05)) as manager, held(manager):
        waiting = asyncio.create_task(sample(manager, count=5))
        await until(lambda: manager.batcher.queued_rows == 0 and manager.batcher.busy_s() > 0)
        await manager.stop()
        with pytest.raises(Draining):
            await waiting


async def test_a_stop_before_the_start_is_over(tiny_settings: Make) -> None:
    """A signal comes while bundles are loaded: the stop waits for nothing."""
    manager = ModelManager(tiny_settings(), Metrics(CollectorRegistry()))
    starting = asyncio.create_task(manager.start())
    await asyncio.sleep(0)
    starting.cancel()
    await manager.stop()
    with pytest.raises(Draining):
        manager.admit()
    with pytest.raises(asyncio.CancelledError):
        await starting


# Bundles that change


@pytest.fixture
def root(tmp_path: Path, tiny_bundles: dict[str, Bundle]) -> Path:
    """A folder of two bundles, for a test to change."""
    place(tiny_bundles["tiny"], tmp_path / "tiny")
    place(tiny_bundles["rgb"], tmp_path / "rgb")
    return tmp_path


async def test_a_reload_takes_up_what_is_new_and_keeps_what_is_not(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], refusals: Refusals
) -> None:
    """A new version, a new bundle, one that vanished and one that stayed: each is seen for what it is, and counted."""
    async with started(tiny_settings(bundles=root)) as manager:
        place(tiny_bundles["cond"], root / "cond")
        await manager.bundles.reload()
        assert refusals() == []
        old = {bundle.name: bundle for bundle in manager.bundles.loaded()}
        before = await sample(manager, "tiny")
        new = place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        shutil.rmtree(root / "rgb")
        await manager.bundles.reload()
        assert refusals() == []
        assert {bundle.name for bundle in manager.bundles.loaded()} == {"tiny", "cond"}
        assert await found(manager, "cond") is old["cond"]
        assert (await found(manager, "tiny")).version == new.version != old["tiny"].version
        assert not np.array_equal(await sample(manager, "tiny"), before)
        with pytest.raises(UnknownBundle):
            manager.bundles.look_up("rgb")
        swaps = {
            (name, result): value(manager, "gan_bundle_swaps_total", bundle=name, result=result)
            for name in ("tiny", "rgb", "cond")
            for result in ("loaded", "unloaded", "refused")
        }
        assert {key for key, count in swaps.items() if count} == {
            ("cond", "loaded"),
            ("tiny", "loaded"),
            ("tiny", "unloaded"),
            ("rgb", "unloaded"),
        }
        infos = {
            (s.labels["bundle"], s.labels["version"])
            for s in next(m for m in manager.metrics.registry.collect() if m.name == "gan_bundle_info").samples
        }
        assert infos == {("tiny", new.version), ("cond", old["cond"].version)}
        assert value(manager, "gan_warmup_seconds", bundle="rgb") is None


async def test_a_request_goes_on_with_the_version_that_it_found(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle]
) -> None:
    """Found before the swap and asked after it, or waiting in the queue meanwhile: old bytes, and no error."""
    async with started(tiny_settings(bundles=root)) as manager:
        old, expected = await found(manager, "tiny"), await sample(manager, "tiny", 3)
        waiting = asyncio.create_task(sample(manager, old, 3))
        place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        await manager.bundles.reload()
        new = await found(manager, "tiny")
        np.testing.assert_array_equal(await waiting, expected)
        np.testing.assert_array_equal(await sample(manager, old, 3), expected)
        assert not np.array_equal(await sample(manager, new, 3), expected)
        assert manager.fingerprint(old) != manager.fingerprint(new)
        await manager.discriminate(old, expected, labels=None, deadline_s=60)


async def test_a_replaced_bundle_leaves_memory(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle]
) -> None:
    """Once the last request that found it is over, nothing refers to the old version; its series have gone."""
    async with started(tiny_settings(bundles=root)) as manager:
        await sample(manager, "tiny")
        old = weakref.ref(await found(manager, "tiny"))
        labels = {"bundle": "tiny", "version": (await found(manager, "tiny")).version, "operation": "sample"}
        assert value(manager, "gan_images_total", **labels) == 1
        place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        await manager.bundles.reload()
        gc.collect()
        assert old() is None
        assert value(manager, "gan_images_total", **labels) is None


async def test_a_corrupt_bundle_is_refused_and_the_old_one_goes_on(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], refusals: Refusals
) -> None:
    """The reason comes back in one line, the others are reloaded all the same, and mended it is taken up."""
    async with started(tiny_settings(bundles=root)) as manager:
        expected = await sample(manager, "tiny", 3)
        version = (await found(manager, "tiny")).version
        new = place_version(tiny_bundles["rgb"], root / "rgb", 0.5)
        damage(root / "tiny")
        await manager.bundles.reload()
        [reason] = refusals()
        assert str(root / "tiny" / GENERATOR) in reason
        assert len(reason.splitlines()) == 1
        assert ((await found(manager, "tiny")).version, (await found(manager, "rgb")).version) == (version, new.version)
        np.testing.assert_array_equal(await sample(manager, "tiny", 3), expected)
        assert value(manager, "gan_bundle_swaps_total", bundle="tiny", result="refused") == 1
        damage(root / "tiny")  # the same bit again
        await manager.bundles.reload()
        assert refusals() == []


async def test_a_bundle_that_fails_its_first_batch_is_refused(
    root: Path,
    tiny_settings: Make,
    tiny_bundles: dict[str, Bundle],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusals: Refusals,
) -> None:
    """What verifies and still can't run on the engine's thread never meets a request."""

    def fail(_: Any) -> None:
        raise RuntimeError("no kernel image is available")

    async with started(tiny_settings(bundles=root)) as manager:
        version = (await found(manager, "tiny")).version
        place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        monkeypatch.setattr("service.engine.engine.Loaded.run_first_batches", fail)
        await manager.bundles.reload()
        assert "no kernel image" in caplog.text
        assert refusals()[-1] == f"{root / 'tiny'}: it can't be run: RuntimeError"
        assert "no kernel image" not in str(await manager.bundles.repository())  # clients hear nothing of the inside
        assert (await found(manager, "tiny")).version == version
        await sample(manager, "tiny")


@pytest.mark.parametrize("how", ["reload", "load"])
async def test_new_facts_of_the_same_version_are_taken_up_and_nothing_is_warmed_again(
    root: Path, tiny_settings: Make, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Scores are recorded later, and the version stays: a request that waits meanwhile notices nothing."""

    def fail(*_: object) -> None:
        raise AssertionError

    async with started(tiny_settings(bundles=root)) as manager:
        old, other = await found(manager, "tiny"), await found(manager, "rgb")
        expected = await sample(manager, "tiny", 3)
        async with held(manager) as gate:
            waiting = asyncio.create_task(sample(manager, old, 3))
            record_evaluation(old, {"fld": 3})
            monkeypatch.setattr("models.bundle.build_networks", fail)
            monkeypatch.setattr(
                "service.engine.engine.Loaded.run_first_batches", fail
            )  # for which the thread is not free
            await (manager.bundles.reload() if how == "reload" else manager.bundles.load("tiny"))
            new = await found(manager, "tiny")
            assert new.manifest.evaluation == {"fld": 3}
            assert old.manifest.evaluation == {}
            assert (new.version, new.generator, new.sample) == (old.version, old.generator, old.sample)
            assert await found(manager, "rgb") is other
            gate.set()
        np.testing.assert_array_equal(await waiting, expected)
        np.testing.assert_array_equal(await sample(manager, new, 3), expected)
        record_evaluation(new, {"fld": 2})  # the next time too
        await manager.bundles.reload()
        assert (await found(manager, "tiny")).manifest.evaluation == {"fld": 2}


@pytest.mark.parametrize("loss", ["all", "default", "folder", "pinned"])
async def test_a_reload_that_would_leave_nothing_to_serve_changes_nothing(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], loss: str
) -> None:
    """No bundles, or not the default one in the version that the setting pins: an error, and the old ones go on."""
    default = f"tiny@{tiny_bundles['tiny'].version}" if loss == "pinned" else "tiny"
    async with started(tiny_settings(bundles=root, default_bundle=default)) as manager:
        before = manager.bundles.loaded()
        if loss == "pinned":
            place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        else:
            shutil.rmtree({"all": root / "tiny", "default": root / "tiny", "folder": root}[loss])
        if loss == "all":
            shutil.rmtree(root / "rgb")
        with pytest.raises(BundleError):
            await manager.bundles.reload()
        assert manager.bundles.loaded() == before
        await sample(manager)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
async def test_a_bundle_whose_folder_can_no_longer_be_looked_into_goes_on(
    root: Path, tiny_settings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Who can't see what is in it can't say that the bundle has gone."""
    async with started(tiny_settings(bundles=root)) as manager:
        rgb = await found(manager, "rgb")
        shutil.rmtree(root / "rgb")
        (root / "rgb").symlink_to("rgb")
        await manager.bundles.reload()
        assert await found(manager, "rgb") is rgb
        assert f"no bundle: {root / 'rgb'}: Too many levels of symbolic links" in caplog.text
        (root / "rgb").unlink()
        await manager.bundles.reload()
        with pytest.raises(UnknownBundle):
            manager.bundles.look_up("rgb")


async def test_reloads_come_one_after_another(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], refusals: Refusals
) -> None:
    """Two signals at once: the second finds what the first has loaded, and has nothing to do."""
    async with started(tiny_settings(bundles=root)) as manager:
        place_version(tiny_bundles["tiny"], root / "tiny", 0.5)
        await asyncio.gather(manager.bundles.reload(), manager.bundles.reload())
        assert refusals() == []
        assert value(manager, "gan_bundle_swaps_total", bundle="tiny", result="loaded") == 1


async def test_swaps_under_load_lose_nothing(
    root: Path, tiny_settings: Make, tiny_bundles: dict[str, Bundle], refusals: Refusals
) -> None:
    """Clients ask without pause while versions come and go: every answer is one version's, whole, and none fails."""
    async with started(tiny_settings(bundles=root)) as manager:
        versions = {
            place_version(tiny_bundles["tiny"], root / "tiny", factor).version: factor for factor in (1.0, 0.5, 0.25)
        }
        known: dict[str, bytes] = {}
        answers, is_over = 0, False

        async def client() -> None:
            nonlocal answers
            while not is_over:
                bundle = await found(manager, "tiny")
                images = await sample(manager, bundle, 40)
                assert known.setdefault(bundle.version, images.tobytes()) == images.tobytes()
                answers += 1

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for factor in (0.25, 0.5, 1.0, 0.5, 0.25, 1.0):
            place_version(tiny_bundles["tiny"], root / "tiny", factor)
            await manager.bundles.reload()
            assert refusals() == []
            enough = answers + 8

            def has_seen_enough(enough: int = enough) -> bool:
                return answers >= enough

            await until(has_seen_enough)
        is_over = True
        await asyncio.gather(*clients)
        assert set(known) == set(versions)
        assert len(set(known.values())) == 3
