"""The loaded bundles, with the engine and the batcher that serve them: load, swap, sample, judge, stop."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from models.bundle import MANIFEST, Bundle, BundleError
from models.inference.noise import Float32, draw_labels
from models.inference.pixels import UInt8
from service.engine.batching.batch import BatchSlice, DeviceFailed, ModelRunner, Rows, Then
from service.engine.batching.batcher import Batcher
from service.engine.batching.policy import EAGER, SHARING
from service.engine.batching.request_queue import Result
from service.engine.bundle_folders import find_bundles
from service.engine.engine import Engine, Loaded
from service.engine.engine_thread import EngineThread
from service.engine.health import Health
from service.engine.hints import Hints
from service.engine.payloads import UNKNOWN_LABEL, DiscriminatePayload, SamplePayload
from service.errors import Draining, NotReady, UnknownBundle
from service.logs import current_key
from service.metrics import Metrics
from service.settings import Settings
from service.worker_group import WorkerGroup

USUAL_DEFAULT = "mnist"  # the bundle of requests that name none, where there is one of this name and no setting

log = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Where a request's time went, in seconds."""

    queue_s: float
    compute_s: float


class RepositoryEntry(NamedTuple):
    """A bundle that is loaded, or a folder that could be."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class ModelManager:
    """What the routes call.

    Raises:
        ValueError: The settings name a device that is not there.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        worker_group: WorkerGroup | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.worker_group = worker_group or WorkerGroup()
        self.engine = Engine(
            settings.device,
            exact=settings.exact,
            workers=settings.worker_count,
            precision=settings.precision,
            cuda_graphs=settings.cuda_graphs,
        )
        self.batcher = self._make_batcher(clock)
        self.is_draining = False
        self.health = Health(
            self.engine,
            self.batcher,
            self.worker_group,
            is_started=lambda: self.is_started,
            is_draining=lambda: self.is_draining,
            clock=clock,
        )
        self._loader = EngineThread("loader")  # batches go on while a bundle is verified and warmed
        self._bundles: dict[str, Loaded] = {}
        self._unloaded: dict[str, Path] = {}  # folders of unloaded bundles by name, which may differ
        self._refused: dict[Path, str] = {}  # why a folder could not be loaded when last tried, for clients
        self._unreadable: dict[Path, BundleError] = {}  # folders that could not be read at the last look
        self._loading = asyncio.Lock()
        self._set_gauges()

    def _make_batcher(self, clock: Callable[[], float]) -> Batcher:
        policy = SHARING if self.engine.device.shares_processor else EAGER
        return Batcher(
            self._run,
            self.metrics,
            device=self.engine.name,
            instances=len(self.engine.threads),
            max_rows=self.engine.device.max_batch_rows,
            max_queued_rows=self.settings.own_queued_images,
            policy=policy._replace(max_queue_delay_s=self.settings.batch_window_ms / 1000),
            clock=clock,
        )

    def _set_gauges(self) -> None:
        self.metrics.engine_threads.labels(self.engine.name).set(len(self.engine.threads))
        self.metrics.ready.set_function(lambda: float(self.health.ready() is None))
        for kind in self.engine.memory():
            gauge = self.metrics.device_memory.labels(self.engine.name, kind)
            gauge.set_function(partial(self._memory, kind))

    def _run(self, instance: int, runner: ModelRunner, slices: Sequence[BatchSlice[Any]], then: Then[Rows]) -> None:
        self.engine.threads[instance].call(runner.run, [slices], then)

    def _memory(self, kind: str) -> float:
        return float(self.engine.memory()[kind])

    async def start(self) -> None:
        """Load and warm every bundle, on as many threads as will run batches, then be ready.

        A folder that can't be loaded is refused, with a line in the log; so is a second one with a bundle of the same
        name.

        Raises:
            BundleError: No bundle can be loaded, or not the default one. It says why of the first such folder by name.
        """
        async with self._loading:
            folders = await self._find_folders()
            helpers = [EngineThread(f"loader {n}") for n in range(1, min(len(folders), self.engine.device.loaders))]
            try:
                bundles, refused = await self._load_all(folders, [self._loader, *helpers])
            finally:
                for helper in helpers:
                    helper.stop()
            default = (self.settings.default_bundle or USUAL_DEFAULT).partition("@")[0]
            for folder, error in refused.items():
                if not bundles or (folder.name == default and default not in bundles):
                    raise error
            self._replace_bundles(bundles)
            self._refuse(refused)
            self.batcher.start()

    async def reload(self) -> None:
        """Load what has changed in the folder of bundles, and swap it in between two batches.

        New versions are loaded, warmed and tried beside the old ones. A folder that can't be loaded is refused, with a
        line in the log, and its old version stays. Unchanged versions stay too, with the metadata of their manifests as
        it is now. A request goes on with the version that it found.

        Raises:
            BundleError: What would be left can't be served: no bundle, or not the default one. Nothing has changed.
            Draining, NotReady: The service ends, or its device has failed.
        """
        async with self._loading:
            before = self._bundles
            bundles, refused = await self._load_all(await self._find_folders(), [self._loader])
            for old in before.values():
                if old.folder in refused or old.folder in self._unreadable:
                    bundles.setdefault(old.name, old)
            self._replace_bundles(bundles)
            self._refused.clear()
            self._refuse(refused)
            self._count_swaps(before, bundles, refused)

    async def load(self, name: str) -> None:
        """Load one bundle as its folder is now: the folder that it was loaded from before, else the one of this name.

        Raises:
            UnknownBundle: There is no such folder.
            BundleError: It can't be loaded. Nothing has changed.
            Draining, NotReady: The service ends, or its device has failed.
        """
        async with self._loading:
            before = self._bundles
            folders = {folder.name: folder for folder in await self._find_folders()}
            folder = before[name].folder if name in before else self._unloaded.get(name)
            if name not in before and folder not in folders.values():
                folder = folders.get(name)
            if folder is None:
                raise UnknownBundle(name, list(folders))
            try:
                self._replace_bundles({**before, name: await self._load(folder, self._loader, name)})
            except BundleError as error:
                self._refuse({folder: error})
                self._count_swaps(before, before, [folder])
                raise
            self._refused.pop(folder, None)
            self._count_swaps(before, self._bundles, [])
            if self._bundles[name] is before.get(name):
                log.info("bundle loaded already: %s@%s", name, before[name].version)

    async def unload(self, name: str) -> None:
        """Unload a bundle, until it is loaded again or all are reloaded.

        Raises:
            UnknownBundle: It is not loaded.
            BundleError: The service can't do without it: it is the last, or the setting's default.
        """
        async with self._loading:
            before = self._bundles
            if name not in before:
                raise UnknownBundle(name, list(before))
            self._replace_bundles({other: bundle for other, bundle in before.items() if other != name})
            self._unloaded[name] = before[name].folder
            self._count_swaps(before, self._bundles, [])

    async def repository(self) -> list[RepositoryEntry]:
        """Every bundle that is loaded, then every folder that could be."""
        loaded = self._bundles.values()
        entries = [RepositoryEntry(one.name, one.version, "READY", "") for one in loaded]
        served = {one.folder for one in loaded}
        try:
            folders = await self._find_folders()
        except BundleError as error:  # what is loaded is served all the same
            log.warning("the index has no more than what is loaded: %s", error)
            return entries
        names = {folder: name for name, folder in self._unloaded.items()}
        return entries + [
            RepositoryEntry(names.get(folder, folder.name), "", "UNAVAILABLE", self._refused.get(folder, "unloaded"))
            for folder in folders
            if folder not in served
        ]

    async def _find_folders(self) -> list[Path]:
        """The folders with a bundle. The log names those that can't be read, once until they can be.

        Raises:
            BundleError: The folder of bundles can't be read, or holds none.
        """
        folders, unreadable = await asyncio.to_thread(find_bundles, self.settings.bundles)
        for folder, error in unreadable.items():
            if folder not in self._unreadable:
                log.warning("no bundle: %s", error)
        self._unreadable = unreadable
        if not folders:
            raise BundleError(self.settings.bundles, f"no sub-folder with a {MANIFEST}")
        return folders

    async def _load_all(
        self, folders: Sequence[Path], loaders: Sequence[EngineThread]
    ) -> tuple[dict[str, Loaded], dict[Path, BundleError]]:
        """What these folders hold, by name, and why the others are refused.

        Raises:
            Draining, NotReady: As `_load`.
        """
        loads = [self._load(folder, loaders[n % len(loaders)]) for n, folder in enumerate(folders)]
        bundles: dict[str, Loaded] = {}
        refused: dict[Path, BundleError] = {}
        for folder, result in zip(folders, await asyncio.gather(*loads, return_exceptions=True), strict=True):
            if isinstance(result, BundleError):
                refused[folder] = result
            elif isinstance(result, BaseException):
                raise result
            elif result.name in bundles:
                first = bundles[result.name].folder.name
                refused[folder] = BundleError(folder, f"it is named {result.name}, as is what {first}/ holds")
            else:
                bundles[result.name] = result
        return bundles, refused

    async def _load(self, folder: Path, loader: EngineThread, name: str | None = None) -> Loaded:
        """The bundle in this folder, ready to run; the one that is loaded already where that is what the folder has.

        Raises:
            BundleError: As `Engine.load`; or it has another name; or whatever else is wrong with it.
            Draining: The threads that load have ended.
            NotReady: The device failed. From now on nothing is computed.
        """
        if self.is_draining:
            raise Draining
        try:
            loaded = await loader.run(self.engine.load, folder, self._bundles)
            known = self._bundles.get(loaded.name)
            if known is None or loaded.sample is not known.sample:
                await asyncio.gather(*(thread.run(loaded.run_first_batches) for thread in self.engine.threads))
        except DeviceFailed as error:
            if self.is_draining:
                raise Draining from None
            self.batcher.fail_all("the device failed", error)
            raise NotReady("the device failed") from error
        except BundleError:
            raise
        except Exception as error:
            raise BundleError(folder, f"it can't be run: {type(error).__name__}") from error
        if name not in {None, loaded.name}:
            raise BundleError(folder, f"it holds the bundle {loaded.name}")
        return loaded

    def _refuse(self, refused: Mapping[Path, BundleError]) -> None:
        for folder, error in refused.items():
            log.error("bundle refused: %s", error, exc_info=error.__cause__)  # which only unforeseen errors have
            self._refused[folder] = error.relative_to(self.settings.bundles)

    def _replace_bundles(self, bundles: dict[str, Loaded]) -> None:
        self._default = _default_name(self.settings, bundles)
        self._bundles = bundles
        self.metrics.bundle_info.clear()
        self.metrics.warmup.clear()
        for one in bundles.values():
            self.metrics.bundle_info.labels(one.name, one.version, self.engine.name).set(1)
            self.metrics.warmup.labels(one.name).set(one.warmup_s)

    def _count_swaps(self, before: Mapping[str, Loaded], after: Mapping[str, Loaded], refused: Iterable[Path]) -> None:
        results = [(name, "loaded") for name, new in after.items() if new is not before.get(name)]
        results += [(name, "unloaded") for name in before if name not in after]
        results += [(folder.name, "refused") for folder in refused]
        for name, result in results:
            self.metrics.bundle_swaps.labels(name, result).inc()
            if result != "refused":  # which has its own line
                one = (after if result == "loaded" else before)[name]
                log.info("bundle %s: %s@%s", result, name, one.version)

    async def stop(self, delay_s: float = 0.0) -> None:
        """Say not ready; after the delay refuse new requests; finish what runs, up to the drain time-out; end."""
        self.is_draining = True
        await asyncio.sleep(delay_s)
        await self.batcher.drain(self.settings.drain_timeout_s)
        await self.batcher.close()
        for thread in self.engine.threads:
            thread.stop()
        self._loader.stop()

    def admit(self) -> None:
        """Raise what would refuse any request now: Draining, NotReady, QueueFull."""
        if not self.batcher.is_draining and (reason := self.health.able()) is not None:
            raise NotReady(reason)
        self.batcher.admit()

    async def find(self, name: str | None, deadline_s: float) -> Loaded:  # noqa: ARG002 - all are loaded
        """The bundle of this name or name@version, ready to compute; the default where there is none.

        `deadline_s` is how long the caller can wait.

        Raises:
            NotReady: Nothing is loaded yet.
            UnknownBundle: No such bundle.
        """
        return self.look_up(name)

    def look_up(self, name: str | None) -> Loaded:
        """The bundle of this name or name@version; the default where there is none.

        Raises:
            NotReady: Nothing is loaded yet.
            UnknownBundle: No such bundle.
        """
        if not self._bundles:
            raise NotReady("the bundles are being loaded")
        wanted, _, version = (name or self._default).partition("@")
        found = self._bundles.get(wanted)
        if found is None or (version and found.version != version):
            loaded = [f"{one.name}@{one.version}" for one in self._bundles.values()]
            raise UnknownBundle(name or self._default, loaded)
        return found

    @property
    def is_started(self) -> bool:
        """Whether requests can name a bundle."""
        return bool(self._bundles)

    def loaded(self) -> list[Bundle]:
        """Every bundle that requests can name."""
        return list(self._bundles.values())

    def version(self, name: str) -> str | None:
        """The version that is loaded of a bundle, if any is."""
        return self._bundles[name].version if name in self._bundles else None

    def fingerprint(self, bundle: Bundle) -> str:
        """Equal for two replicas where the bundle's images have the same bytes on both."""
        return _warm(bundle).fingerprint

    def hints(self, bundle: Bundle) -> Hints:
        """What tells images that a client can't have meant for this bundle."""
        return _warm(bundle).hints

    async def sample(
        self,
        bundle: Bundle,
        *,
        seed: int,
        first_index: int,
        labels: list[int] | None,
        count: int,
        truncation: float,
        deadline_s: float,
    ) -> tuple[UInt8, list[int] | None, Timing]:
        """Images first_index … first_index + count − 1 of a seed: uint8 (count, h, w, c), and their labels.

        `labels` has one for each image; a bundle with labels gets them drawn from the seed where it is None.
        `bundle` is what `find` gave, also if another version has taken its place since. Errors are those of
        `Batcher.submit`.
        """
        chosen = None if labels is None else np.asarray(labels, dtype=np.int64)
        frequencies = bundle.manifest.latent.label_frequencies
        if chosen is None and frequencies is not None:
            chosen = draw_labels(frequencies, seed, first_index, count)
        payload = SamplePayload(seed, first_index, chosen, truncation)
        result = await self._submit(_warm(bundle).sample, payload, count, deadline_s)
        return result.rows, None if chosen is None else chosen.tolist(), Timing(result.queue_s, result.compute_s)

    async def sample_latents(
        self, bundle: Bundle, latents: Float32, *, labels: list[int] | None, truncation: float, deadline_s: float
    ) -> tuple[UInt8, Timing]:
        """Images of latents (n, dim): uint8 (n, h, w, c). A bundle with labels needs one for each. See `sample`."""
        chosen = None if labels is None else np.asarray(labels, dtype=np.int64)
        payload = SamplePayload(0, 0, chosen, truncation, latents)
        result = await self._submit(_warm(bundle).sample, payload, len(latents), deadline_s)
        return result.rows, Timing(result.queue_s, result.compute_s)

    async def discriminate(
        self, bundle: Bundle, images: UInt8, *, labels: list[int] | None, deadline_s: float
    ) -> tuple[Float32, list[int] | None, Timing]:
        """D's logits (n,) for uint8 images (n, h, w, c) of the bundle's shape, and the labels that they are for.

        `labels` has one for each image; where it is None, the class head of a bundle with classes names them. Errors:
        see `Batcher.submit`.
        """
        chosen = None
        if bundle.manifest.labels is not None:
            chosen = np.asarray([UNKNOWN_LABEL] * len(images) if labels is None else labels, dtype=np.int64)
        payload = DiscriminatePayload(images, chosen)
        result = await self._submit(_warm(bundle).discriminate, payload, len(images), deadline_s)
        judged_as = None if chosen is None else result.rows[:, 1].astype(np.int64).tolist()
        return result.rows[:, 0], judged_as, Timing(result.queue_s, result.compute_s)

    async def _submit(self, runner: ModelRunner, payload: Any, rows: int, deadline_s: float) -> Result:
        """Rows through the batcher, which are counted for the client's key."""
        key = current_key()
        with nullcontext() if key is None else self.metrics.of_key(key).computing(rows):
            return await self.batcher.submit(runner, payload, rows, deadline_s)


def _warm(bundle: Bundle) -> Loaded:
    assert isinstance(bundle, Loaded)  # noqa: S101 - requests bring back what `find` gave them
    return bundle


def _default_name(settings: Settings, loaded: Mapping[str, Loaded]) -> str:
    """The bundle of requests that name none: the setting's, else the usual one, else the only one, else the first."""
    if not loaded:
        raise BundleError(settings.bundles, "at least one bundle must be there")
    if settings.default_bundle is not None:
        name, _, version = settings.default_bundle.partition("@")
        if name not in loaded or (version and loaded[name].version != version):
            raise BundleError(settings.bundles, f"the default bundle {settings.default_bundle} must be there")
        return name
    return USUAL_DEFAULT if USUAL_DEFAULT in loaded else min(loaded)
