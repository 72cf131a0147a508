"""Checks the fields of a request's head that request smuggling depends on (RFC 9112).

If a proxy and this server disagree about where a request ends or which host it is for, a client can put a request of
its own in front of another client's. The parser rules most of that out; this module checks the rest.
"""

import re
from collections.abc import Sequence

from service.errors import Malformed, UnknownTransferCoding

MAX_FIELDS = 200

_HOST = re.compile(
    rb"(?:\[[A-Za-z0-9._~!$&'()*+,;=:%-]++\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+)(?::[0-9]*+)?"
)
_CHECKED = frozenset({b"host", b"transfer-encoding"})


def check_head(version: str, fields: Sequence[tuple[bytes, bytes]]) -> None:
    """Check `Host` and `Transfer-Encoding`.

    Args:
        version: Of HTTP, such as "1.1".
        fields: Names in lower case, and values.

    Raises:
        Malformed: `Host` is missing, repeated or malformed (RFC 9112, 3.2), or `Transfer-Encoding` is repeated,
            malformed or not allowed in this version (6.1, 6.3).
        UnknownTransferCoding: The body has another transfer coding than chunked.
    """
    checked = [field for field in fields if field[0] in _CHECKED]
    hosts = [value for name, value in checked if name == b"host"]
    if len(hosts) > 1:
        raise Malformed("The request has more than one Host.")
    if not hosts and version >= "1.1":
        raise Malformed("The request has no Host.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise Malformed("The request's Host is not a name or an address, with a port or without.")
    codings = [value.lower() for name, value in checked if name == b"transfer-encoding"]
    if codings and version < "1.1":
        raise Malformed("The request has a Transfer-Encoding, which its version of HTTP does not know.")
    if codings and codings != [b"chunked"]:
        named = {coding.strip(b" \t") for coding in b",".join(codings).split(b",")}
        if named <= {b"chunked", b""}:
            raise Malformed("The request's Transfer-Encoding is something else than chunked, once.")
        raise UnknownTransferCoding
