"""Caching headers: freshness, entity tags and their comparison (RFC 9110, 9111)."""

import hashlib
import re
from typing import NamedTuple

from models.bundle import Bundle
from service.codecs.encode import ENCODERS
from service.engine.bundles.index import Version

SHORT_S = 300  # the newest version of a bundle's name can change
YEAR_S = 31_536_000  # a pinned version never changes

# Entity tags (RFC 9110, 8.8.3) in a list (5.6.1). Possessive, so a long list can't make it backtrack.
_TAGS = re.compile(r'[ \t,]*+(?:(?:W/)?+"[\x21\x23-\x7e\x80-\xff]*+"[ \t]*+(?:,[ \t,]*+|\Z))*+')


class Caching(NamedTuple):
    """The caching headers of a reply, and its entity tag; None without a seed."""

    headers: dict[bytes, bytes]
    etag: str | None


def caching(
    named: str | None, made_of: str | None, bundle: Bundle | Version, device_kind: str, *, exact: bool, is_private: bool
) -> Caching:
    """The caching headers of a reply to GET.

    Args:
        named: The bundle as the client named it.
        made_of: All options that decide about the images, the same in every process; None without a seed.
        bundle: What makes them.
        device_kind: Where.
        exact: Whether the batch never changes the last bits.
        is_private: Whether the service needs keys.

    With a seed the pixels never change, so the reply may be stored: for a year if the bundle's version is pinned, and
    only by the client itself if the service needs keys. Without a seed every reply differs, and none may be stored.
    """
    vary = {b"vary": b"Accept"}
    if made_of is None:
        return Caching({**vary, b"cache-control": b"no-store"}, None)
    pinned = named == f"{bundle.name}@{bundle.version}"  # an alias can come to mean another version
    freshness = f"max-age={YEAR_S}, immutable" if pinned else f"max-age={SHORT_S}"
    freshness = f"{'private' if is_private else 'public'}, {freshness}"
    tagged = f"{bundle.name}\n{bundle.version}\n{made_of}\n{ENCODERS}\n{device_kind}"
    tag = f'"{hashlib.sha256(tagged.encode()).hexdigest()[:32]}"'
    # Without exact mode the batch may change the last bits: equivalent but not equal, as a weak tag says.
    etag = tag if exact else "W/" + tag
    return Caching({**vary, b"cache-control": freshness.encode(), b"etag": etag.encode()}, etag)


def has_current_copy(if_none_match: str, etag: str | None) -> bool:
    """Whether If-None-Match names this entity tag, weak or strong alike (RFC 9110, 13.1.2).

    A malformed list counts as naming none. The worst outcome is that the client gets a reply that it already has.
    """
    if etag is None:
        return False
    if if_none_match == "*":
        return True
    # A tag can't contain quotes, so finding ours with its quotes in a well-formed list means that it is an element.
    return etag.removeprefix("W/") in if_none_match and _TAGS.fullmatch(if_none_match) is not None
