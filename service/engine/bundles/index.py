"""Which versions of which bundles are on disk, told from their manifests alone: no weights are read.

A folder that has not changed since the last look is not read again, unless other keys are trusted by now. Where a
signature is asked for, a manifest without a valid one can't be used.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from models.bundle import FILES, MANIFEST, BundleError, Manifest, read_manifest
from models.signing import PublicKeys

Stamp = tuple[tuple[int, ...], ...]  # equal for as long as nothing in a folder changes
MAX_GONE = 256


class Key(NamedTuple):
    """A version of a bundle; as text it is what requests call it."""

    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> "Key":
        """What `name@version` says; of a name alone, no version."""
        name, _, version = text.partition("@")
        return cls(name, version)

    def __str__(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Folder:
    """A folder of a bundle, as it was at the last look. `refusal` says why its manifest can't be used.

    `trusted` are the keys of which one must have signed the bundle; None where no signature is asked for.
    """

    path: Path
    stamp: Stamp
    trusted: PublicKeys | None
    manifest: Manifest | None = None
    version: str = ""
    refusal: BundleError | None = None

    @property
    def name(self) -> str:
        """What it holds, as its manifest says; else the folder's own name."""
        return self.path.name if self.manifest is None else self.manifest.name

    @property
    def key(self) -> Key:
        """The version that it holds; of a manifest that can't be used, none."""
        return Key(self.name, self.version)


@dataclass(frozen=True)
class Version:
    """A version of a bundle, and the folders that hold it, by name; none where it is in memory only."""

    key: Key
    manifest: Manifest
    folders: tuple[Folder, ...]

    @property
    def name(self) -> str:
        """The bundle's name."""
        return self.key.name

    @property
    def version(self) -> str:
        """12 hex digits."""
        return self.key.version

    def age(self) -> tuple[str, datetime, str]:
        """Greater for a newer version of a bundle."""
        return self.name, self.manifest.created, self.version

    def has_changed(self) -> bool:
        """Whether anything has changed in its folders since. Looks at the disk."""
        return any(stamp_of(folder.path) != folder.stamp for folder in self.folders)

    def as_it_is(self) -> "Version":
        """With its folders as they are now. Looks at the disk."""
        return replace(self, folders=tuple(replace(one, stamp=stamp_of(one.path)) for one in self.folders))


@dataclass(frozen=True)
class BundleIndex:
    """What a look at the folder of bundles has found.

    Attributes:
        folders: Those with something called a manifest, by path.
        unreadable: Those that can't be looked into.
        versions: Of all bundles, by name, and of each from the oldest to the newest.
        gone: Those that were there at an earlier look, the last `MAX_GONE`, with their folders as they are now. Perhaps
            somebody is about to move a folder back, or to write its manifest again.
    """

    folders: Mapping[Path, Folder] = field(default_factory=dict)
    unreadable: Mapping[Path, BundleError] = field(default_factory=dict)
    versions: Mapping[Key, Version] = field(default_factory=dict)
    gone: Mapping[Key, Version] = field(default_factory=dict)

    @classmethod
    def read(cls, root: Path, before: "BundleIndex", trusted: PublicKeys | None) -> "BundleIndex":
        """Look again, for bundles that one of the trusted keys has signed; None asks for no signature.

        Raises:
            BundleError: The folder can't be read, or it holds no bundle.
        """
        earlier = [version.as_it_is() for version in {**before.gone, **before.versions}.values()]  # first, as below
        paths, unreadable = find_folders(root)
        if not paths:
            raise BundleError(root, f"no sub-folder with a {MANIFEST}")
        folders = {path: _read_folder(path, before.folders.get(path), trusted) for path in paths}
        versions = _versions(folders.values())
        gone = [version for version in earlier if version.key not in versions]
        return cls(folders, unreadable, versions, {version.key: version for version in gone[-MAX_GONE:]})


def find_folders(root: Path) -> tuple[list[Path], dict[Path, BundleError]]:
    """Sub-folders that hold a manifest, by name, and why others can't be read; `root` alone where it holds one itself.

    Whatever is called a manifest counts: whoever reads it says what is wrong with it. Hidden folders are left out:
    they are temporary.

    Raises:
        BundleError: The folder can't be read.
    """
    try:
        if os.path.lexists(root / MANIFEST):
            return [root], {}
        folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BundleError(root, error.strerror or type(error).__name__) from None
    found: list[Path] = []
    unreadable: dict[Path, BundleError] = {}
    for folder in folders:
        try:
            os.lstat(folder / MANIFEST)
            folder.name.encode()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable[folder] = BundleError(folder, error.strerror or type(error).__name__)
        except UnicodeEncodeError:
            unreadable[folder] = BundleError(folder, "its name is not UTF-8")  # which no reply could give
        else:
            found.append(folder)
    return found, unreadable


def stamp_of(folder: Path) -> Stamp:
    """Numbers that differ once a file of the folder has been replaced, written to, or given other rights."""
    return tuple(_stamp(folder / name) for name in FILES)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_folder(path: Path, before: Folder | None, trusted: PublicKeys | None) -> Folder:
    stamp = stamp_of(path)  # first: what changes while the manifest is read is seen at the next look
    is_as_before = before is not None and (before.stamp, before.trusted) == (stamp, trusted)
    if before is not None and is_as_before and not (before.refusal and before.refusal.is_passing):
        return before
    try:
        manifest, version = read_manifest(path, trusted)
    except BundleError as error:
        return Folder(path, stamp, trusted, refusal=error)
    return Folder(path, stamp, trusted, manifest, version)


def _versions(folders: Iterable[Folder]) -> dict[Key, Version]:
    found: dict[Key, Version] = {}
    for folder in folders:
        if folder.manifest is not None:
            other = found.get(folder.key)
            manifests = [folder.manifest] if other is None else [other.manifest, folder.manifest]
            newest = max(manifests, key=lambda manifest: manifest.created)
            found[folder.key] = Version(folder.key, newest, (*(other.folders if other else ()), folder))
    return {version.key: version for version in sorted(found.values(), key=Version.age)}
