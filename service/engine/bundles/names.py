"""What requests may call a bundle: a version by its digits, an alias by aliases.json, the newest by the name alone."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.bundle import NAME_PATTERN, BundleError, read_object
from service.engine.bundles.index import Key, Version

ALIASES = "aliases.json"
USUAL_DEFAULT = "mnist"  # the bundle of requests that name none, where there is one of this name and no setting
_NAME = re.compile(NAME_PATTERN)
_VERSION = re.compile("[0-9a-f]{12}")
MAX_ALIASES = 4096


def read_aliases(root: Path) -> dict[str, Key]:
    """What the file of aliases in the folder of bundles says: `name` or `name@alias` → the version that it means.

    Raises:
        BundleError: It can't be read, or it is not a JSON object of such names and of versions.
    """
    path = root / ALIASES
    try:
        path.lstat()
    except OSError:
        return {}
    found = read_object(path)
    if len(found) > MAX_ALIASES:
        raise BundleError(path, f"more than {MAX_ALIASES} aliases")
    return {alias: _meant(path, alias, version) for alias, version in found.items()}


def _meant(path: Path, alias: str, version: object) -> Key:
    name, at, label = alias.partition("@")
    if not _NAME.fullmatch(name) or (at and not _NAME.fullmatch(label)):
        raise BundleError(path, f"{alias[:200]!r} is neither a bundle's name nor name@alias, of a-z, 0-9 and ._-")
    if _VERSION.fullmatch(label):
        raise BundleError(path, f"{alias!r}: an alias may not look like a version")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise BundleError(path, f"{alias!r} must mean a version of 12 hex digits")
    return Key(name, version)


def meanings(versions: Collection[Key], aliases: Mapping[str, Key], before: Mapping[str, Key]) -> dict[str, Key]:
    """All that requests may call a bundle, and the version that it comes to; names alone first.

    An alias of a version that is not there keeps the meaning from before, as long as that is there, and else has none:
    the newest version may be the very one that it was to avoid.

    Args:
        versions: Those that are there, each name's from the oldest to the newest.
        aliases: As `read_aliases` gives them.
        before: What this function returned at the last look.
    """
    newest = {key.name: key for key in versions}
    chosen = {alias: key if key in versions else before.get(alias) for alias, key in aliases.items()}
    kept = {alias: key for alias, key in chosen.items() if key in versions}
    means = {name: key for name, key in newest.items() if name not in aliases}
    means |= {alias: key for alias, key in sorted(kept.items(), key=lambda one: "@" in one[0]) if key is not None}
    return means | {str(key): key for key in versions}


def default_name(
    chosen: str | None,
    means: Mapping[str, Key],
    refused: Mapping[str, BundleError],
    aliases: Mapping[str, Key],
    root: Path,
) -> str:
    """What requests that name no bundle get: what the setting has chosen, else the usual one, else the first by name.

    Raises:
        BundleError: There is none, or what was chosen is not there. Those `refused` by name, and aliases, may say why.
    """
    wanted = chosen or USUAL_DEFAULT
    if wanted in means:
        return wanted
    if (refusal := refused.get(Key.parse(wanted).name)) is not None:
        raise refusal
    if not means and refused:
        raise next(iter(refused.values()))
    if (key := aliases.get(wanted)) is not None:
        raise BundleError(root / ALIASES, f"{wanted} would mean {key}, which is not there")
    if chosen is not None:
        raise BundleError(root, f"the default bundle {chosen} must be there")
    if names := [name for name in means if "@" not in name]:
        return min(names)
    if aliases:
        raise BundleError(root / ALIASES, "no name means a version that is there")
    raise BundleError(root, "at least one bundle must be there")


@dataclass(frozen=True)
class View:
    """What requests can ask for.

    Attributes:
        versions: Of all bundles, by name, and of each from the oldest to the newest.
        means: All that they may be called, names alone first.
        default: What requests that name none get: one of these.
    """

    versions: Mapping[Key, Version] = field(default_factory=dict)
    means: Mapping[str, Key] = field(default_factory=dict)
    default: str = ""

    def key(self, name: str | None) -> Key | None:
        """What a request that says this asks for, if there is such a thing."""
        return self.means.get(name or self.default)

    @property
    def default_key(self) -> Key:
        """What requests that name none ask for."""
        return self.means[self.default]

    def names(self) -> dict[str, Key]:
        """What each name alone means, by name."""
        return {name: key for name, key in sorted(self.means.items()) if "@" not in name}

    def changes(self, before: "View") -> dict[str, object]:
        """What differs from before: versions that were added and removed, and names that mean another version now."""
        means = {name: str(key) for name, key in self.chosen().items() if before.means.get(name) != key}
        lists = {
            "added": [str(key) for key in self.versions if key not in before.versions],
            "removed": [str(key) for key in before.versions if key not in self.versions],
        }
        return {what: found for what, found in {**lists, "means": means}.items() if found}

    def chosen(self) -> dict[str, Key]:
        """What names alone and aliases mean."""
        return {name: key for name, key in self.means.items() if name != str(key)}
