"""A reply whose headers are bytes already: Starlette's are turned into bytes one by one, and searched."""

from collections.abc import Mapping

from starlette.responses import Response

JSON = "application/json"


class BytesResponse(Response):
    """A response.

    Args:
        body: All of it.
        headers: Names in lower case.
        media_type: Of the body; empty where there can be none.
    """

    def __init__(self, body: bytes, headers: Mapping[bytes, bytes], media_type: str, status: int = 200) -> None:
        self.status_code = status
        self.body = body
        self.background = None
        self.raw_headers = [*headers.items()]
        if media_type:
            self.raw_headers += [(b"content-length", b"%d" % len(body)), (b"content-type", media_type.encode())]
