"""Which replies of GET /sample may be kept, by whom, and under which name (RFC 9110, 9111)."""

import hashlib
import re
from typing import NamedTuple

from models.bundle import Bundle
from service.codecs.encode import ENCODERS
from service.http.schemas import SamplePlan, SampleRequest, fingerprint

SHORT_S = 300  # a bundle's name can come to mean another version
YEAR_S = 31_536_000  # a pinned version can't

# Entity tags (RFC 9110, 8.8.3) in a list (5.6.1). Never looks at a character again, however long the list.
_TAGS = re.compile(r'[ \t,]*+(?:(?:W/)?+"[\x21\x23-\x7e\x80-\xff]*+"[ \t]*+(?:,[ \t,]*+|\Z))*+')


class Caching(NamedTuple):
    """Headers that tell caches what they may do, and the validator to compare with theirs."""

    headers: dict[bytes, bytes]
    etag: str | None


def caching(
    request: SampleRequest, plan: SamplePlan, bundle: Bundle, device_kind: str, *, exact: bool, is_private: bool
) -> Caching:
    """What caches may do with the reply to GET /sample.

    With a seed the pixels never change, so the reply may be kept: for long where the bundle's version is pinned, and
    by the client alone where the service is private. Without, every reply is another one.
    """
    vary = {b"vary": b"Accept"}
    if request.seed is None:
        return Caching({**vary, b"cache-control": b"no-store"}, None)
    pinned = request.bundle is not None and "@" in request.bundle
    freshness = f"max-age={YEAR_S}, immutable" if pinned else f"max-age={SHORT_S}"
    freshness = f"{'private' if is_private else 'public'}, {freshness}"
    facts = "\n".join([bundle.name, bundle.version, fingerprint(plan), ENCODERS, device_kind])
    tag = f'"{hashlib.sha256(facts.encode()).hexdigest()[:32]}"'
    # Batches that may change the last bits make two replies alike, not equal: that is what a weak validator says.
    etag = tag if exact else "W/" + tag
    return Caching({**vary, b"cache-control": freshness.encode(), b"etag": etag.encode()}, etag)


def client_has_it(if_none_match: str, etag: str | None) -> bool:
    """Whether a client's If-None-Match names this validator; W/ makes no difference to GET (RFC 9110, 13.1.2).

    A list with anything else in it names none: the worst that comes of it is a reply that the client has already.
    """
    if etag is None:
        return False
    if if_none_match == "*":
        return True
    # Quotes are in no tag, so that ours, with its own, is nowhere but where it is one of the list.
    return etag.removeprefix("W/") in if_none_match and _TAGS.fullmatch(if_none_match) is not None
