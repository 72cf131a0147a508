"""The bundles that are served: which versions there are, what names mean, and which of them are in memory.

- A look at the folder of bundles (index.py) gives the versions that are there, and aliases.json says what some
  names mean (names.py). Both are taken up together: at the start, on SIGHUP, and by the repository's requests.
- Before a name comes to mean another version, that one is loaded, verified and warmed beside the old one.
- What else was asked for last is in memory too (residents.py), up to GAN_MAX_RESIDENT_BUNDLES. Any other version is
  loaded when a request asks for it, and the request waits (cold_loads.py).
- A folder that can't be loaded is refused until it changes (loader.py), and names mean what is left. What is in
  memory from before goes on serving.
- The default bundle stays in memory, and so does what could not be loaded again.
- Where GAN_BUNDLE_KEYS_FILE names keys, only what one of them has signed is served (keys.py). They are read again by a
  reload. What no trusted key has signed any more is let go of too, unless the service can't do without it: then the
  old keys stay in force.
- One thing changes at a time, under one lock. Requests need it only to load.

Each of several workers does all this for itself. They look at the same folders, are told of the same requests and
signals, and so come to the same meanings; what each has in memory depends on what it was asked for.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from models.bundle import BundleError
from models.signing import PublicKeys
from service.engine.batching.batch import DeviceFailed
from service.engine.bundles.cold_loads import ColdLoads
from service.engine.bundles.index import BundleIndex, Key, Version
from service.engine.bundles.keys import read_bundle_keys
from service.engine.bundles.loader import BundleLoader
from service.engine.bundles.names import View, default_name, meanings, read_aliases
from service.engine.bundles.residents import Residents
from service.engine.engine import Engine, Loaded
from service.errors import DeadlinePassed, Draining, NotReady, ServiceError, UnknownBundle
from service.logs import current_key
from service.metrics import Metrics
from service.settings import Settings, SettingsError

ROOM_TRIES, ROOM_POLL_S = 50, 0.01  # to find one in memory that is not in use

log = logging.getLogger(__name__)

Failures = Mapping[Key, BundleError]


class RepositoryEntry(NamedTuple):
    """A version that requests can ask for, or one that they can't, or a folder whose manifest can't be used."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


@dataclass(frozen=True)
class Seen:
    """What a look at the folder of bundles has found, and the keys that were trusted: None asks for no signature."""

    index: BundleIndex
    aliases: Mapping[str, Key]
    trusted: PublicKeys | None

    def trusts(self, bundle: Loaded) -> bool:
        """Whether requests may have this bundle, which is in memory."""
        return self.trusted is None or not bundle.signers.isdisjoint(self.trusted.values())


class Bundles:
    """What requests find.

    Args:
        settings, metrics, engine: Of the service.
        is_draining: Whether the service is about to end.
        device_failed: Called when the device has failed while a bundle was loaded.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        engine: Engine,
        is_draining: Callable[[], bool],
        device_failed: Callable[[DeviceFailed], None],
    ) -> None:
        self._settings = settings
        self._root = settings.bundles
        self._chosen_default = settings.default_bundle
        self._keeps_default = settings.max_resident_bundles > 1  # else no other bundle could be loaded
        self._metrics = metrics
        self._device = engine.name
        self._is_draining = is_draining
        self._loader = BundleLoader(engine, metrics, is_draining, device_failed)
        self._residents = Residents(settings.max_resident_bundles, self._is_needed, self._note_unloaded)
        self._changing = asyncio.Lock()
        self._cold = ColdLoads(self._load_cold, self._changing)
        self._last_index = BundleIndex()  # of the last look, which may not be taken up yet
        self._seen = Seen(self._last_index, {}, None)
        self._unloaded: Collection[Key] = frozenset()
        self._view = View()
        self._fingerprints: dict[Key, str] = {}  # of versions that were in memory, and may be again

    # ------------------------------------------------------------------------------------------ what requests ask for

    async def find(self, name: str | None, deadline_s: float) -> Loaded:
        """The bundle of this name, alias or name@version, ready to run; the default where there is none.

        Raises:
            NotReady: Nothing is loaded yet, or it can't be loaded for now.
            UnknownBundle: No such bundle, or it was refused.
            DeadlinePassed: It was not loaded in time.
            Draining: The service ends.
        """
        key = self._view.key(name)
        if key is not None and (found := self._residents.get(key)) is not None:
            self._cold.served += 1
            return found
        try:
            async with asyncio.timeout(deadline_s):
                return await self._find_cold(name)
        except TimeoutError:
            raise DeadlinePassed(deadline_s) from None

    async def _find_cold(self, name: str | None) -> Loaded:
        while True:
            if self.is_started and self._view.key(name) is None:
                await self._take_up_mended(name or self._view.default)
            key = self.look_up(name).key
            found = self._residents.get(key) or await self._cold.wait(key)
            if found is not None:
                return found
            if self._is_draining():
                raise Draining

    def cold(self, name: str | None) -> tuple[Version, str] | None:
        """What `find` would load, with its fingerprint, if it was in memory before and is not now; else None.

        That is all it takes to tell whether a client's copy is current.
        """
        key = self._view.key(name)
        if key is None or key in self._residents or key not in self._fingerprints:
            return None
        return self._view.versions[key], self._fingerprints[key]

    def look_up(self, name: str | None) -> Version:
        """What `find` would load, as its manifest says.

        Raises:
            NotReady: Nothing is loaded yet.
            UnknownBundle: No such bundle, or it was refused.
        """
        if not self.is_started:
            raise NotReady("the bundles are being loaded")
        key = self._view.key(name)
        if key is None:
            raise self._unknown(name or self._view.default)
        return self._view.versions[key]

    def _unknown(self, name: str) -> UnknownBundle:
        version = self._seen.index.versions.get(Key.parse(name))
        reason = None if version is None else self._reason(version)
        return UnknownBundle(name, [str(key) for key in self._view.names().values()], reason)

    def _reason(self, version: Version) -> str | None:
        """Why it was refused, for clients."""
        refusal = next(filter(None, map(self._loader.last_refusal, version.folders)), None)
        return None if refusal is None else refusal.relative_to(self._root)

    @property
    def is_started(self) -> bool:
        """Whether requests can name a bundle."""
        return bool(self._view.means)

    @property
    def default(self) -> str:
        """The name of the bundle of requests that name none."""
        return self._view.default_key.name

    def aliases(self) -> dict[str, str]:
        """The versions that aliases mean."""
        return {alias: key.version for alias in sorted(self._seen.aliases) if (key := self._view.key(alias))}

    def names(self) -> list[Version]:
        """What each name means, by name."""
        return [self._view.versions[key] for key in self._view.names().values()]

    def versions(self, name: str) -> list[Version]:
        """Every version of a bundle that requests can ask for, the newest first."""
        return [version for version in reversed(list(self._view.versions.values())) if version.name == name]

    def version(self, name: str) -> str | None:
        """The version that a name means, if it means any."""
        key = self._view.means.get(name)
        return None if key is None else key.version

    def loaded(self) -> list[Loaded]:
        """Every bundle in memory, by name."""
        return [bundle for _, bundle in sorted(self._residents.items())]

    async def repository(self) -> list[RepositoryEntry]:
        """Every version, whether requests can ask for it or not, and every folder whose manifest can't be used."""
        try:
            index = (await self._look(self._seen.trusted)).index
        except BundleError as error:  # requests can ask for what they could before
            log.warning("the index has no more than what is served: %s", error)
            index = BundleIndex()
        versions = sorted({**index.versions, **self._view.versions}.values(), key=Version.age)
        return [self._entry(version) for version in versions] + [
            RepositoryEntry(folder.name, "", "UNAVAILABLE", folder.refusal.relative_to(self._root))
            for folder in index.folders.values()
            if folder.refusal is not None
        ]

    def _entry(self, version: Version) -> RepositoryEntry:
        if version.key in self._view.versions:
            return RepositoryEntry(*version.key, "READY", "")
        return RepositoryEntry(*version.key, "UNAVAILABLE", self._reason(version) or "unloaded")

    # -------------------------------------------------------------------------------------------------------- changes

    async def reload(self) -> None:
        """Take up what has changed in the folder of bundles and in the file of keys, and what was unloaded.

        The first time, take up everything.

        Raises:
            BundleError: What would be left can't be served: no bundle, or not the default one. Nothing has changed.
            Draining, NotReady: The service ends, or its device has failed.
        """
        async with self._changing:
            seen = await self._look(await self._read_keys())
            have_changed = self.is_started and seen.trusted != self._seen.trusted
            try:
                await self._take_up(seen, frozenset(), fill=True)
            except BundleError:
                if have_changed:
                    log.error("the old keys of bundles stay: the service can't do without what they have signed")  # noqa: TRY400 - as below
                raise
            if have_changed:
                log.info("keys of bundles have changed", extra={"fields": {"keys": sorted(seen.trusted or ())}})

    async def reload_if_possible(self) -> bool:
        """Reload, and return True; where that can't be done, the log says why, and what is there goes on serving."""
        try:
            await self.reload()
        except (BundleError, ServiceError) as error:
            log.error("bundles not reloaded: %s", error)  # noqa: TRY400 - a traceback would say no more
        except Exception:
            log.exception("bundles not reloaded")
        else:
            log.info("bundles: %s", " ".join(str(one.key) for one in self.names()))
            return True
        return False

    async def load(self, name: str) -> None:
        """Take up what has changed in the folder of bundles, and load what this name, alias or name@version means.

        Raises:
            UnknownBundle: No folder holds it.
            BundleError: It can't be loaded, the aliases can't be used, or what would be left can't be served. Names
                mean what they meant.
            Draining, NotReady: The service ends, or its device has failed.
        """
        async with self._changing:
            before = self._view.means.get(name)
            was_loaded = before in self._residents
            seen = await self._look(self._seen.trusted, needs_aliases=True)
            for folder in seen.index.folders.values():
                if folder.name == Key.parse(name).name:
                    self._loader.forget_refusal(folder)
            meant = seen.aliases.get(name, Key.parse(name))
            unloaded = {key for key in self._unloaded if name != key.name and meant != key}
            await self._take_up(seen, unloaded, wanted=name)
            if was_loaded and self._view.means[name] == before:
                log.info("bundle loaded already: %s", before)

    async def unload(self, name: str) -> None:
        """Let go of a bundle's versions, or of one of them, until it is loaded again or all are reloaded.

        Raises:
            UnknownBundle: There is none.
            BundleError: The service can't do without it: it is the last, or the default.
        """
        async with self._changing:
            meant = self.look_up(name).key
            seen = await self._look(self._seen.trusted)
            keys = {meant} if "@" in name else {meant, *(key for key in seen.index.versions if key.name == name)}
            await self._take_up(seen, {*self._unloaded, *keys})

    def stop(self) -> None:
        """Load no more."""
        self._loader.stop()

    async def _read_keys(self) -> PublicKeys | None:
        """The keys that are trusted, as their file is now; the old ones where it can't be used."""
        try:
            return await asyncio.to_thread(read_bundle_keys, self._settings)
        except SettingsError as error:
            if not self.is_started:  # it was read before, and has changed since
                raise BundleError(self._root, str(error)) from None
            log.error("keys of bundles not read again, the old ones stay: %s", error)  # noqa: TRY400 - as below
            return self._seen.trusted

    async def _look(self, trusted: PublicKeys | None, *, needs_aliases: bool = False) -> Seen:
        """Look at the folder of bundles. The log names what can't be read or used, once until it changes.

        Args:
            trusted: The keys of which one must have signed a bundle; None asks for no signature.
            needs_aliases: Whether aliases that can't be used are an error, as they are at the start. Else the old stay.

        Raises:
            BundleError: The folder can't be read, or holds no bundle; or the aliases can't be used.
        """
        before = self._last_index
        index = self._last_index = await asyncio.to_thread(BundleIndex.read, self._root, before, trusted)
        for path, error in index.unreadable.items():
            if path not in before.unreadable:
                log.warning("no bundle: %s", error)
        for path, folder in index.folders.items():
            if folder.refusal is not None and folder is not before.folders.get(path):
                self._loader.note_refusal(folder, folder.refusal)
        try:
            return Seen(index, await asyncio.to_thread(read_aliases, self._root), trusted)
        except BundleError as error:
            if needs_aliases or not self.is_started:
                raise
            log.error("aliases not read again, the old ones stay: %s", error)  # noqa: TRY400 - a traceback says no more
            return Seen(index, self._seen.aliases, trusted)

    async def _take_up(
        self, seen: Seen, unloaded: Collection[Key], *, fill: bool = False, wanted: str | None = None
    ) -> None:
        """Load what has to be in memory before requests may ask for it, then have them see it.

        Args:
            seen: What they are to see.
            unloaded: But not these.
            fill: Load also what other names mean, as far as there is room.
            wanted: Load also what this means.

        Raises:
            UnknownBundle: It means nothing.
            BundleError: It can't be loaded; or what would be left can't be served. Requests see what they saw.
            Draining, NotReady: The service ends, or its device has failed.
        """
        if self._is_draining():
            raise Draining
        try:
            view = await self._load_changes(seen, unloaded, fill=fill, wanted=wanted)
            self._show(view, seen, unloaded)
        finally:
            if self.is_started:  # else the one line that the start ends with says why
                self._loader.tell_refusals()

    async def _load_changes(self, seen: Seen, unloaded: Collection[Key], *, fill: bool, wanted: str | None) -> View:
        """Load what has to be in memory, and return what requests may then see; see `_take_up`."""
        failures: dict[Key, BundleError] = {}
        while True:
            view = self._view_of(seen, unloaded, failures)
            asked = None if wanted is None else self._asked(wanted, view, seen.index)
            keys = [key for key in self._keys_to_load(view, asked, fill=fill) if key not in failures]
            if not keys:
                return view
            versions, known = [view.versions[key] for key in keys], [self._residents.peek(key) for key in keys]
            results = await self._loader.load_all(versions, known, at_once=not self.is_started)
            for key, result in zip(keys, results, strict=True):
                if isinstance(result, Loaded):
                    self._keep(key, result)
                elif key == asked:
                    raise result
                else:
                    failures[key] = result

    def _view_of(self, seen: Seen, unloaded: Collection[Key], failures: Failures) -> View:
        """What requests would see; without what has failed to load, but for what is in memory from before."""
        found = {
            key: version
            for key, version in seen.index.versions.items()
            if key not in failures and not all(map(self._loader.refusal, version.folders))
        }
        for key, bundle in self._residents.items():
            if key not in found and seen.trusts(bundle) and self._is_irreplaceable(key, bundle, seen.index, failures):
                found[key] = Version(key, bundle.manifest, ())
        versions = {one.key: one for one in sorted(found.values(), key=Version.age) if one.key not in unloaded}
        means = meanings(versions, seen.aliases, self._view.means)
        reasons = ({}, {}) if self.is_started else (self._refusals(seen.index, failures), seen.aliases)
        default = default_name(self._chosen_default, means, *reasons, self._root)
        return View(versions, means, default)

    def _is_irreplaceable(self, key: Key, bundle: Loaded, index: BundleIndex, failures: Failures) -> bool:
        """Whether what is in memory came from a folder that can't be loaded as it is now."""
        if key in index.versions or bundle.folder in index.unreadable:
            return True
        folder = index.folders.get(bundle.folder)
        return folder is not None and (self._loader.refusal(folder) is not None or folder.key in failures)

    def _refusals(self, index: BundleIndex, failures: Failures) -> dict[str, BundleError]:
        """Why folders can't be loaded, by the name of their bundle; of several, the first by their own name."""
        found: dict[str, BundleError] = {}
        for folder in index.folders.values():
            refusal = self._loader.refusal(folder) or failures.get(folder.key)
            if refusal is not None:
                found.setdefault(folder.name, refusal)
        return found

    def _asked(self, name: str, view: View, index: BundleIndex) -> Key:
        """The version that an administrator asks to load.

        Raises:
            UnknownBundle, BundleError: There is none, or none that can be loaded.
        """
        key = view.means.get(name)
        if key is not None and view.versions[key].folders:
            return key
        for folder in index.folders.values():
            refusal = self._loader.refusal(folder)
            if refusal is not None and name in {folder.name, str(folder.key)}:
                raise refusal
        raise self._unknown(name)

    def _keys_to_load(self, view: View, asked: Key | None, *, fill: bool) -> list[Key]:
        """What has to be in memory and is not, or was not verified as it is now; then what else there is room for."""
        needed = {view.default_key, *([] if asked is None else [asked])}
        needed |= {key for name, key in view.means.items() if self._view.means.get(name) in self._residents}
        needed |= {key for key in self._residents if key in view.versions}
        keys = [key for key in view.versions if key in needed and not self._is_current(view.versions[key])]
        if fill:
            others = [key for key in dict.fromkeys(view.chosen().values()) if key not in {*keys, *self._residents}]
            keys += others[: max(0, self._residents.room - len(keys))]
        return keys

    def _is_current(self, version: Version) -> bool:
        """Whether it is in memory, and verified as it is on disk now, if it is there."""
        if version.key not in self._residents:
            return False
        return not version.folders or any(map(self._loader.has_verified, version.folders))

    def _show(self, view: View, seen: Seen, unloaded: Collection[Key]) -> None:
        """Have requests see this from now on, and let go of what they can no longer ask for."""
        if self.is_started and (changes := view.changes(self._view)):
            by = {} if (name := current_key()) is None else {"key": name}
            log.info("bundles have changed", extra={"fields": changes | by})
        self._view, self._seen, self._unloaded = view, seen, unloaded
        self._loader.forget_all_but(seen.index.folders.keys())
        self._fingerprints = {key: found for key, found in self._fingerprints.items() if key in view.versions}
        for alias, key in seen.aliases.items():
            if key not in view.versions:
                log.error("alias refused: %s would mean %s, which is not there", alias, key)
        for key in self._residents:
            if key not in view.versions:
                self._residents.drop(key)
                self._note_unloaded(key)
        self._residents.make_room(0)
        self._set_gauges()
        self._metrics.forget_bundles_but(view.versions.keys())

    # ------------------------------------------------------------------------------------------- loaded for a request

    async def _load_cold(self, key: Key) -> Loaded | str | None:
        """Load a version for requests; see `ColdLoads`."""
        try:
            return await self._load_for_request(key)
        except BundleError as error:
            log.error("bundles not reloaded for a request: %s", error)  # noqa: TRY400 - a traceback would say no more
            return "its folder of bundles can't be used as it is"
        except NotReady:
            return "the device failed"
        except Draining:
            return None

    async def _load_for_request(self, key: Key) -> Loaded | str | None:
        version = self._view.versions.get(key)
        if version is not None and await asyncio.to_thread(version.has_changed):
            await self._take_up(await self._look(self._seen.trusted), self._unloaded)
            version = self._view.versions.get(key)
        if version is None or key in self._residents:
            return self._residents.peek(key)
        if not await self._make_room():
            return "every bundle in memory is in use"
        try:
            loaded = await self._loader.load(version)
        except BundleError as error:
            self._loader.tell_refusals()
            if error.is_passing:
                return "the bundle can't be read now"
            await self._take_up(self._seen, self._unloaded)  # names mean what is left
            return None
        self._keep(key, loaded)
        self._set_gauges()
        return loaded

    async def _make_room(self) -> bool:
        """Let go of a bundle that is not in use, or wait a little for one, as most requests are over soon."""
        for _ in range(ROOM_TRIES):
            if self._residents.make_room():
                return True
            await asyncio.sleep(ROOM_POLL_S)
        return self._residents.make_room()

    async def _take_up_mended(self, name: str) -> None:
        """Take up what has changed, where this means a version whose folder was refused or gone, and has changed."""
        index, meant = self._seen.index, self._seen.aliases.get(name, Key.parse(name))
        versions = [
            version
            for key, version in {**index.gone, **index.versions}.items()
            if meant in {key, Key(key.name, "")} and key not in self._unloaded
        ]
        # Most names that mean nothing are nobody's: they cost no look at the disk.
        if not versions or not await asyncio.to_thread(any, (version.has_changed() for version in versions)):
            return
        async with self._changing:
            try:
                await self._take_up(await self._look(self._seen.trusted), self._unloaded)
            except BundleError as error:
                log.error("bundles not reloaded for a request: %s", error)  # noqa: TRY400 - as above

    # ------------------------------------------------------------------------------------------------ what is in memory

    def _is_needed(self, key: Key) -> bool:
        """Whether it has to stay in memory: the default, and what can't be loaded again."""
        version = self._view.versions.get(key)
        return (self._keeps_default and key == self._view.default_key) or (version is not None and not version.folders)

    def _keep(self, key: Key, bundle: Loaded) -> None:
        known = self._residents.peek(key)
        self._residents.put(key, bundle)
        self._fingerprints[key] = bundle.fingerprint
        if self.is_started and (known is None or known.sample is not bundle.sample):
            self._metrics.bundle_swaps.labels(key.name, "loaded").inc()
            log.info("bundle loaded: %s", key)

    def _note_unloaded(self, key: Key) -> None:
        self._metrics.bundle_swaps.labels(key.name, "unloaded").inc()
        log.info("bundle unloaded: %s", key)

    def _set_gauges(self) -> None:
        self._metrics.bundle_info.clear()
        self._metrics.warmup.clear()
        for key, bundle in self._residents.items():
            self._metrics.bundle_info.labels(*key, self._device).set(1)
            self._metrics.warmup.labels(key.name).set(bundle.warmup_s)
