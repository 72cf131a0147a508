"""A response whose headers are already bytes. Starlette's own encodes and searches its headers for each reply."""

from collections.abc import AsyncGenerator, Callable, Mapping

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


class StreamedResponse(Response):
    """A response whose body is sent while it is made.

    Args:
        parts: Of the body. What it raises breaks the connection off.
        headers: With names in lower case.
        media_type: Of the body.
        left_s: Seconds that are left for all of it; raises DeadlinePassed if there are none.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        headers: Mapping[bytes, bytes],
        media_type: str,
        left_s: Callable[[], float],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.parts = parts
        self.left_s = left_s
        self.raw_headers = [*headers.items(), (b"content-type", media_type.encode())]
