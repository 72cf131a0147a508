"""What a request's head has to say, and must not, for everybody on its way to take it for the same request (RFC 9112).

Where two that read one connection disagree about where a request ends or whom it is for, one client's request can be
put in front of another's. The parser settles most of that; this is what it leaves to us.
"""

import re
from collections.abc import Sequence

from service.errors import Malformed, UnknownTransferCoding

MOST_FIELDS = 200

_HOST = re.compile(
    rb"(?:\[[A-Za-z0-9._~!$&'()*+,;=:%-]++\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})*+)(?::[0-9]*+)?"
)
_CHECKED = frozenset({b"host", b"transfer-encoding"})


def check_head(version: str, fields: Sequence[tuple[bytes, bytes]]) -> None:
    """Return where a head of this version of HTTP is one that can be answered; names are in lower case.

    Raises:
        Malformed: Its `Host` (RFC 9112, 3.2) or its `Transfer-Encoding` (6.1, 6.3) is missing, doubled or wrong.
        UnknownTransferCoding: Its body comes in a coding that we do not know.
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
