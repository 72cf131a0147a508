"""Reads a request's headers from its scope: one pass over the raw list for each, and no object for all of them."""

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this name (lower case); None where there is none."""
    for given, value in scope["headers"]:
        if given == name:
            return str(value, "latin-1")
    return None


def all_of_header(scope: Scope, name: bytes) -> str:
    """Every header of this name, joined as RFC 9110, 5.3 allows; empty where there is none."""
    return ", ".join([str(value, "latin-1") for given, value in scope["headers"] if given == name])
