"""Which replies of GET /sample may be kept, how they are named, and when a client's copy will do (RFC 9110, 9111)."""

import hashlib
import re
from typing import NamedTuple

from models.bundle import Bundle
from service.encode import ENCODERS
from service.schemas import SamplePlan, SampleRequest, fingerprint

SHORT_S = 300  # a bundle's name can come to mean another version
YEAR_S = 31_536_000  # a pinned version can't

_TAG = re.compile(r'(?:W/)?("[\x21\x23-\x7e\x80-\xff]*")')


class Caching(NamedTuple):
    """Headers that tell caches what they may do, and the validator to compare with theirs."""

    headers: dict[str, str]
    etag: str | None


def caching(
    request: SampleRequest, plan: SamplePlan, bundle: Bundle, device_kind: str, *, exact: bool, is_private: bool
) -> Caching:
    """What caches may do with the reply to GET /sample.

    With a seed the pixels never change, so the reply may be kept: for long where the bundle's version is pinned, and
    by the client alone where the service is private. Without, every reply is another one.
    """
    vary = {"Vary": "Accept"}
    if request.seed is None:
        return Caching({**vary, "Cache-Control": "no-store"}, None)
    pinned = request.bundle is not None and "@" in request.bundle
    freshness = f"max-age={YEAR_S}, immutable" if pinned else f"max-age={SHORT_S}"
    freshness = f"{'private' if is_private else 'public'}, {freshness}"
    facts = "\n".join([bundle.name, bundle.version, fingerprint(plan), ENCODERS, device_kind])
    tag = f'"{hashlib.sha256(facts.encode()).hexdigest()[:32]}"'
    # Batches that may change the last bits make two replies alike, not equal: that is what a weak validator says.
    etag = tag if exact else "W/" + tag
    return Caching({**vary, "Cache-Control": freshness, "ETag": etag}, etag)


def client_has_it(if_none_match: str, etag: str | None) -> bool:
    """Whether a client's If-None-Match names this validator; W/ makes no difference to GET (RFC 9110, 13.1.2)."""
    if etag is None:
        return False
    if if_none_match.strip() == "*":
        return True
    return etag.removeprefix("W/") in _TAG.findall(if_none_match)
