"""A response whose headers are already bytes. Starlette's own encodes and searches its headers for each reply."""

from collections.abc import Mapping

from starlette.responses import Response

JSON = "application/json"


class BytesResponse(Response):
    """A response that is complete from the start.

    Args:
        body: The whole body.
        headers: With names in lower case.
        media_type: Of the body; empty for a reply that can have none.
        status: HTTP status.
    """

    def __init__(self, body: bytes, headers: Mapping[bytes, bytes], media_type: str, status: int = 200) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        self.raw_headers = [*headers.items()]
        if media_type:
            self.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]
