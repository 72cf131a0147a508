"""Which Host and Transfer-Encoding fields are refused. test_protocol.py has the replies."""

import pytest

from service.errors import Malformed, UnknownTransferCoding
from service.server.head import check_head


@pytest.mark.parametrize(
    "host",
    [
        "", "x", "localhost:8000", "images.example.com", "gan_service-1", "10.0.0.1:80", "[::1]",
        "[fe80::1%25eth0]:8000", "[v1.a:b]", "x:", "xn--bcher-kva.example", "b%C3%BCcher.example", "UPPER.case",
    ],
)  # fmt: skip
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    """It may have a port, also an empty one (RFC 3986)."""
    check_head("1.1", [(b"accept", b"*/*"), (b"host", host.encode())])
    check_head("1.0", [(b"host", host.encode())])


@pytest.mark.parametrize(
    "host",
    [
        "a b", "a, b", "a/b", "http://a", "a@b", "a?b", "a#b", "a\\b", "<a>", "a:b", "a:80:80", "::1", "[::1", "::1]",
        "[]", "[::1]x", "%", "%4", "%zz", "bücher", "a:８０", '"a"', "x" * 60_000 + "/", "%41" * 20_000 + "/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_another_host_is_refused(host: str, version: str) -> None:
    """A proxy that reads it differently could take the request for another host's."""
    with pytest.raises(Malformed, match="Host"):
        check_head(version, [(b"host", host.encode())])


def test_only_the_oldest_versions_need_no_host() -> None:
    """Only HTTP/1.0 and before may leave Host out; two are refused in every version."""
    check_head("1.0", [])
    check_head("0.9", [])
    for version, hosts in (("1.1", []), ("2.0", []), ("1.1", [b"a", b"a"]), ("1.0", [b"a", b"b"])):
        with pytest.raises(Malformed, match="Host"):
            check_head(version, [(b"host", host) for host in hosts])


@pytest.mark.parametrize(
    ("codings", "error"),
    [
        (["chunked"], None),
        (["CHUNKED"], None),
        (["gzip"], UnknownTransferCoding),
        (["gzip, chunked"], UnknownTransferCoding),
        (["chunked, gzip"], UnknownTransferCoding),
        (["gzip", "chunked"], UnknownTransferCoding),
        (["identity"], UnknownTransferCoding),
        (["chunked;a=b"], UnknownTransferCoding),
        (["chunked", "chunked"], Malformed),
        (["chunked,"], Malformed),
        ([""], Malformed),
    ],
)
def test_a_body_comes_in_chunks_or_has_a_length(codings: list[str], error: type[Exception] | None) -> None:
    """Only `chunked`, once, in HTTP/1.1 is accepted; with anything else the end of the body is unknown."""
    fields = [(b"host", b"x"), *((b"transfer-encoding", coding.encode()) for coding in codings)]
    if error is None:
        check_head("1.1", fields)
    else:
        with pytest.raises(error):
            check_head("1.1", fields)
    with pytest.raises(Malformed):
        check_head("1.0", fields)
