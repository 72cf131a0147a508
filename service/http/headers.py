"""Reads a request's headers from its scope, which keeps them by name once they have been asked for."""

from starlette.types import Scope

MAX_ACCEPT = 1024  # characters
_FIRST = "gan.headers"


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name (lower case); None where there is none."""
    value = (scope.get(_FIRST) or _keep_first(scope)).get(name)
    return None if value is None else str(value, "latin-1")


def all_of_header(scope: Scope, name: bytes) -> str:
    """Every header of this name, joined as RFC 9110, 5.3 allows; empty where there is none."""
    if name not in (scope.get(_FIRST) or _keep_first(scope)):
        return ""
    return ", ".join([str(value, "latin-1") for given, value in scope["headers"] if given == name])


def accept(scope: Scope) -> str:
    """What the client accepts; of a longer list than any client needs, as much as is read in no time."""
    given = all_of_header(scope, b"accept")
    return given if len(given) <= MAX_ACCEPT else given[:MAX_ACCEPT].rpartition(",")[0]


def _keep_first(scope: Scope) -> dict[bytes, bytes]:
    first: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # of several of a name the first one stays
    scope[_FIRST] = first
    return first
