"""Undoes the compression of a body, which tritonclient offers: in small steps, and within the bounds of a plain one."""

import zlib
from collections.abc import Callable

from service.codecs.time_slices import Steps
from service.errors import Malformed, TooLarge
from service.http.requests.route_context import IDENTITY

_WINDOWS = {"gzip": 31, "deflate": 15}  # zlib's `wbits`; HTTP calls zlib's own format deflate
ENCODINGS = (IDENTITY, *_WINDOWS)
_SENT, _PLAIN = 2**12, 2**16  # bytes of a step: taken in, and at most given out


def decompress(body: bytes, encoding: str, most: int, reserve: Callable[[int], None]) -> Steps[bytes]:
    """The plain bytes of a body that was sent in one of the `ENCODINGS`.

    Args:
        most: Plain bytes that it may have.
        reserve: Told of each piece before it is kept; raises where there is no memory for it.

    Raises:
        Malformed: It is not compressed like this, or something follows its end.
        TooLarge: It has more than `most` plain bytes.
    """
    if encoding == IDENTITY:
        return body
    stream, parts, size = zlib.decompressobj(_WINDOWS[encoding]), list[bytes](), 0
    for start in range(0, len(body), _SENT):
        sent = body[start : start + _SENT]
        while sent:
            yield None
            try:
                part = stream.decompress(sent, _PLAIN)
            except zlib.error:
                raise Malformed(f"The body is not {encoding}, as Content-Encoding says.") from None
            size += len(part)
            if size > most:
                raise TooLarge(f"The body has more than {most} bytes once it is decompressed.")
            reserve(len(part))
            parts.append(part)
            sent = stream.unconsumed_tail
        if stream.unused_data:
            raise Malformed(f"Something follows the end of the {encoding} body.")
    if not stream.eof:
        raise Malformed(f"The {encoding} body ends before its end.")
    return b"".join(parts)
