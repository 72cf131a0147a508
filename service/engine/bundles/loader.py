"""Loads bundles beside serving, and remembers what came of each folder until it changes."""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from models.bundle import BundleError
from service.engine.batching.batch import DeviceFailed, OutOfMemory
from service.engine.bundles.index import Folder, Key, Stamp, Version
from service.engine.engine import Engine, Loaded
from service.engine.engine_thread import EngineThread
from service.errors import Draining, NotReady
from service.metrics import Metrics

log = logging.getLogger(__name__)


class BundleLoader:
    """Loads bundles, one at a time but at the start.

    Args:
        engine: What loads them.
        metrics: Where refusals are counted.
        is_draining: Whether the service is about to end.
        device_failed: Called when the device has failed.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        is_draining: Callable[[], bool],
        device_failed: Callable[[DeviceFailed], None],
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._is_draining = is_draining
        self._device_failed = device_failed
        self._thread = EngineThread("loader")  # batches go on while a bundle is verified and warmed
        self._tried: dict[Path, tuple[Stamp, BundleError | None]] = {}
        self._untold: dict[Path, tuple[Folder, BundleError]] = {}

    async def load(self, version: Version, known: Loaded | None = None, thread: EngineThread | None = None) -> Loaded:
        """A version from the first of its folders that can be loaded, ready to run.

        Args:
            version: Which.
            known: The same version, if it is in memory; then its folder is verified, and no more.
            thread: Of `load_all`.

        Raises:
            BundleError: No folder can be loaded, or none for now.
            Draining, NotReady: The service ends, or its device has failed.
        """
        refusal: BundleError | None = None
        for folder in version.folders:
            refusal = self.refusal(folder)
            if refusal is None:
                try:
                    loaded = await self._load_folder(folder, version.key, known, thread or self._thread)
                except BundleError as error:
                    refusal = error
                    self.note_refusal(folder, error)
                else:
                    self._tried[folder.path] = folder.stamp, None
                    return loaded
        assert refusal is not None  # noqa: S101 - what is in memory only is not loaded
        raise refusal

    async def load_all(
        self, versions: Sequence[Version], known: Sequence[Loaded | None], *, at_once: bool
    ) -> list[Loaded | BundleError]:
        """Several versions, and why some can't be loaded; see `load`.

        Args:
            versions: Which.
            known: For each of them.
            at_once: Whether to load on as many threads as will run batches, because none runs yet.

        Raises:
            Draining, NotReady: As `load`.
        """
        count = min(len(versions), self._engine.device.loaders) if at_once else 1
        threads = [self._thread, *(EngineThread(f"loader {n}") for n in range(1, count))]
        try:
            loads = [
                self.load(version, one, threads[n % len(threads)])
                for n, (version, one) in enumerate(zip(versions, known, strict=True))
            ]
            results = await asyncio.gather(*loads, return_exceptions=True)
        finally:
            for helper in threads[1:]:
                helper.stop()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, BundleError):
                raise result
        return [result for result in results if isinstance(result, Loaded | BundleError)]

    def refusal(self, folder: Folder) -> BundleError | None:
        """Why a folder was refused when it was last tried, if it has not changed since."""
        if folder.refusal is not None:
            return folder.refusal
        stamp, error = self._tried.get(folder.path, ((), None))
        return error if stamp == folder.stamp else None

    def last_refusal(self, folder: Folder) -> BundleError | None:
        """Why a folder was refused when it was last tried, also if it has changed since."""
        _, error = self._tried.get(folder.path, ((), None))
        return folder.refusal or error

    def has_verified(self, folder: Folder) -> bool:
        """Whether a folder was loaded, and has not changed since."""
        return self._tried.get(folder.path) == (folder.stamp, None)

    def forget_refusal(self, folder: Folder) -> None:
        """Have a folder tried again, though it has not changed."""
        if not self.has_verified(folder):
            self._tried.pop(folder.path, None)

    def forget_all_but(self, folders: Collection[Path]) -> None:
        """Forget folders that are not there any more."""
        self._tried = {path: tried for path, tried in self._tried.items() if path in folders}

    def stop(self) -> None:
        """End the thread, after what it does."""
        self._thread.stop()

    async def _load_folder(self, folder: Folder, key: Key, known: Loaded | None, thread: EngineThread) -> Loaded:
        if self._is_draining():
            raise Draining
        try:
            by_name = {} if known is None else {known.name: known}
            loaded = await thread.run(self._engine.load, folder.path, by_name, folder.trusted)
            if known is None or loaded.sample is not known.sample:
                await asyncio.gather(*(one.run(loaded.run_first_batches) for one in self._engine.threads))
        except DeviceFailed as error:
            if self._is_draining():
                raise Draining from None
            self._device_failed(error)
            raise NotReady("the device failed") from error
        except BundleError:
            raise
        except OutOfMemory:
            raise BundleError(folder.path, "there is no memory for it", is_passing=True) from None
        except Exception as error:
            raise BundleError(folder.path, f"it can't be run: {type(error).__name__}") from error
        if (loaded.name, loaded.version) != key:
            raise BundleError(folder.path, f"it holds {loaded.name}@{loaded.version} by now", is_passing=True)
        return loaded

    def note_refusal(self, folder: Folder, error: BundleError) -> None:
        """Remember that a folder can't be loaded as it is."""
        self._untold[folder.path] = folder, error
        if not error.is_passing and error is not folder.refusal:  # which may depend on the keys that are trusted
            self._tried[folder.path] = folder.stamp, error

    def tell_refusals(self) -> None:
        """Log and count what was refused since this was last called; of each folder, why it was the last time."""
        told, self._untold = self._untold, {}
        for _, (folder, error) in sorted(told.items()):
            log.error("bundle refused: %s", error, exc_info=error.__cause__)  # which only unforeseen errors have
            self._metrics.bundle_swaps.labels(folder.name, "refused").inc()
