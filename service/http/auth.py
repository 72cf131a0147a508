"""API keys of clients and administrators, and which scope each has. Only their hashes are kept in memory."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from pydantic import SecretStr

from service.errors import Forbidden, Unauthorized
from service.settings import Settings, SettingsError, variable

_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]{1,1024}")  # printable ASCII without spaces and commas


class KeyScope(IntEnum):
    """What a key allows. Each scope includes those before it."""

    NONE = 0
    USE = 1
    ADMIN = 2


class Keys:
    """The configured keys.

    Args:
        use: Keys of clients. If there are none, clients need no key.
        admin: Keys of administrators. If there are none, routes for administrators refuse everybody.
    """

    def __init__(self, use: Iterable[str], admin: Iterable[str]) -> None:
        self._scopes = {_digest(key): KeyScope.USE for key in use}
        self.are_needed = bool(self._scopes)
        self._scopes |= {_digest(key): KeyScope.ADMIN for key in admin}

    def check(self, authorization: str | None, x_api_key: str | None, needed: KeyScope) -> None:
        """Check whether a request with these headers has the scope that it needs.

        Raises:
            Unauthorized: It has no key, or an unknown one.
            Forbidden: Its key has a lower scope, or no configured key has this scope.
        """
        if needed is KeyScope.NONE or (needed is KeyScope.USE and not self.are_needed):
            return
        if needed not in self._scopes.values():
            raise Forbidden("No administrator's key is set on this service.")
        scheme, _, token = (authorization or "").partition(" ")
        key = (token.strip() if scheme.lower() == "bearer" else "") or x_api_key
        if not key:
            raise Unauthorized("A key is needed: Authorization: Bearer KEY, or X-API-Key: KEY.")
        found = self._scope(key)
        if found is KeyScope.NONE:
            raise Unauthorized("This key is not known here.")
        if found < needed:
            raise Forbidden("This key is not an administrator's.")

    def _scope(self, key: str) -> KeyScope:
        offered, found = _digest(key), KeyScope.NONE
        for (
            digest,
            scope,
        ) in self._scopes.items():  # always all of them, so that the time does not depend on which key it is
            if hmac.compare_digest(digest, offered):
                found = scope
        return found


def read_keys(settings: Settings) -> Keys:
    """Read the keys from the settings and from the files that they name.

    Raises:
        SettingsError: A file can't be read or holds no key, or a key is malformed. The message never holds a key.
    """
    return Keys(
        _read("api_keys", settings.api_keys, settings.api_keys_file),
        _read("admin_keys", settings.admin_keys, settings.admin_keys_file),
    )


def _read(name: str, listed: SecretStr | None, file: Path | None) -> list[str]:
    keys = _checked(variable(name), listed.get_secret_value().split(",")) if listed is not None else []
    if file is None:
        return keys
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingsError(f"{variable(name)}_FILE: {file}: {reason}") from None
    return keys + _checked(f"{variable(name)}_FILE: {file}", [line for line in lines if line and line[0] != "#"])


def _checked(source: str, keys: list[str]) -> list[str]:
    keys = [key.strip() for key in keys]
    if not keys or not all(_KEY.fullmatch(key) for key in keys):
        # An empty list was most likely meant to hold keys. Starting would leave the service open.
        raise SettingsError(f"{source}: needs keys of printable ASCII characters without spaces and commas")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
