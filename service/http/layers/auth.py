"""API keys of clients and administrators: whose each is, and its scope. Only their hashes are kept in memory."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from pydantic import SecretStr

from service.errors import Forbidden, Unauthorized
from service.settings import Settings, SettingsError, lines_of, variable

UNNAMED = "unnamed"  # the name of keys without one
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,1024}")  # printable ASCII without spaces and commas
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class KeyScope(IntEnum):
    """What a key allows. Each scope includes those before it."""

    NONE = 0
    USE = 1
    ADMIN = 2


class Key(NamedTuple):
    """What is known of a key that a request has: for a key that is not known here, no name and no scope."""

    name: str | None
    scope: KeyScope


class Keys:
    """The keys that are in force.

    Args:
        use: Keys of clients, each with its name. If there are none, clients need no key.
        admin: Keys of administrators. If there are none, routes for administrators refuse everybody.

    Attributes:
        are_needed: Whether clients need a key. Reading the files again never changes it: none may be empty.
    """

    def __init__(self, use: Mapping[str, str], admin: Mapping[str, str]) -> None:
        # By hash: how long a look-up takes may tell something of a hash, from which nobody gets to a key.
        self._known = {_digest(key): Key(name, KeyScope.USE) for key, name in use.items()}
        self.are_needed = bool(use)
        self._known |= {_digest(key): Key(name, KeyScope.ADMIN) for key, name in admin.items()}
        self._has_admin = bool(admin)
        self._have_several_names = len({*use.values(), *admin.values()}) > 1

    def replace_by(self, others: "Keys") -> dict[str, list[str]]:
        """Let these others be in force from now on. Returns the names whose keys were added, removed and replaced."""
        before, after = self._by_name(), others._by_name()  # noqa: SLF001 - of the same class
        vars(self).update(vars(others))
        names = {
            "added": after.keys() - before.keys(),
            "removed": before.keys() - after.keys(),
            "replaced": {name for name in before.keys() & after.keys() if before[name] != after[name]},
        }
        return {what: sorted(found) for what, found in names.items() if found}

    def _by_name(self) -> dict[str, set[tuple[bytes, KeyScope]]]:
        named: dict[str, set[tuple[bytes, KeyScope]]] = {}
        for digest, key in self._known.items():
            named.setdefault(key.name or UNNAMED, set()).add((digest, key.scope))
        return named

    def count(self, scope: KeyScope) -> int:
        """How many keys have exactly this scope."""
        return sum(key.scope is scope for key in self._known.values())

    @property
    def have_several_names(self) -> bool:
        """Whether clients can be told apart."""
        return self._have_several_names

    def need_none(self, needed: KeyScope) -> bool:
        """Whether requests that need this scope are answered without a key."""
        return needed is KeyScope.NONE or (needed is KeyScope.USE and not self.are_needed)

    def find(self, authorization: str | None, x_api_key: str | None) -> Key | None:
        """The key in these headers; None if they hold none."""
        scheme, _, token = (authorization or "").partition(" ")
        key = (token.strip() if scheme.lower() == "bearer" else "") or x_api_key
        return self._known.get(_digest(key), Key(None, KeyScope.NONE)) if key else None

    def check(self, key: Key | None, needed: KeyScope) -> None:
        """Check whether a request that needs a key has one of the scope that it needs.

        Raises:
            Unauthorized: It has no key, or an unknown one.
            Forbidden: Its key has a lower scope, or no configured key has this scope.
        """
        if needed is KeyScope.ADMIN and not self._has_admin:
            raise Forbidden("No administrator's key is set on this service.")
        if key is None:
            raise Unauthorized("A key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.")
        if key.scope is KeyScope.NONE:
            raise Unauthorized("This key is not known here.")
        if key.scope < needed:
            raise Forbidden("This key is not an administrator's.")


def read_keys(settings: Settings) -> Keys:
    """Read the keys from the settings and from the files that they name.

    Raises:
        SettingsError: A file can't be read or holds no key, a line can't be understood, or a name or a key stands
            twice in a file. The message never holds a key.
    """
    return Keys(
        _read("api_keys", settings.api_keys, settings.api_keys_file),
        _read("admin_keys", settings.admin_keys, settings.admin_keys_file),
    )


def has_files(settings: Settings) -> bool:
    """Whether keys come from files, which may have changed."""
    return settings.api_keys_file is not None or settings.admin_keys_file is not None


def _read(name: str, listed: SecretStr | None, file: Path | None) -> dict[str, str]:
    keys = {} if listed is None else dict.fromkeys(_listed(variable(name), listed.get_secret_value()), UNNAMED)
    if file is None:
        return keys
    return keys | _named(f"{variable(name)}_FILE: {file}", lines_of(f"{name}_file", file))


def _listed(source: str, text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    if not all(_KEY.fullmatch(key) for key in keys):
        # An empty list was most likely meant to hold keys. Starting would leave the service open.
        raise SettingsError(f"{source}: needs keys of printable ASCII characters without spaces and commas")
    return keys


def _named(source: str, lines: Iterable[str]) -> dict[str, str]:
    """Each key of a file with its name. A line is KEY or NAME KEY; empty ones and those that begin with # are none."""
    keys: dict[str, str] = {}
    names = set[str]()
    for where, name, key in _fields(source, lines):
        if key in keys or name in names:
            raise SettingsError(f"{where}: its {'key' if key in keys else 'name'} stands in the file already")
        keys[key] = name or UNNAMED
        names |= {name} - {""}
    if not keys:
        raise SettingsError(f"{source}: holds no key")
    return keys


def _fields(source: str, lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Of each line with a key: where it is, the name, empty for none, and the key."""
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{source}: line {number}"
        if len(fields) > 2:
            raise SettingsError(f"{where}: needs to be KEY or NAME KEY")
        *name, key = fields
        if not _KEY.fullmatch(key):
            raise SettingsError(f"{where}: needs a key of printable ASCII characters without commas")
        if name and not _NAME.fullmatch(name[0]):
            raise SettingsError(f"{where}: needs a name of at most 64 letters, digits, dots, dashes and underscores")
        yield where, "".join(name), key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
