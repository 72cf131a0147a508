"""Whatever bytes come, in whatever pieces, and however a client leaves: others are answered, and nothing is left over.

Conversations are drawn at random from what HTTP is made of, right and wrong: heads, bodies of a length, chunks, and
requests sent ahead. Some of their bytes are changed. They are cut into pieces and sent to a real server, on connections
of which some are left open beside the next ones. After each a probe on another connection is asked.
"""

import contextlib
import http.client
import logging
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

ABANDONED = 8  # connections that are left open at a time
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: close with a reset

METHODS = st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "PUT", "CONNECT", "TRACE", "PRI", "get", "GE T", "", "\0"])
TARGETS = st.sampled_from(
    [
        *(
            "/sample",
            "/sample?count=2&format=npy",
            "/sample?seed=7",
            "/discriminate",
            "/verify",
            "/v2/models/tiny/infer",
        ),
        *("/v1/images/generations", "/metrics", "/readyz", "/", "*", "//", "/%00", "/%ff%fe", "/../../etc/passwd"),
        *("http://other/livez", "http://", "other:443", "/sample?" + "&".join(["a=1"] * 2000), "/" + "a" * 9000),
        *("/sample?count=1e9", "/sample?seed=٣", "/static/..%2f..%2fREADME.md", "/bundles/%0d%0aX: y", "?", "#", "é"),
    ]
)
VERSIONS = st.sampled_from(["HTTP/1.1"] * 6 + ["HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1 ", "http/1.1", "", "X"])
FIELDS = st.sampled_from(
    [
        *(
            "Content-Length: 5",
            "Content-Length: 5, 5",
            "Content-Length: +5",
            "Content-Length: -1",
            "Content-Length: 0x5",
        ),
        *("Content-Length: 99999999999999999999", "Content-Length: 33554432", "Content-Length:", "Content-Length : 5"),
        *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, identity"),
        *("Transfer-Encoding: \x0bchunked", "Transfer-Encoding:chunked", "Transfer-Encoding: CHUNKED"),
        *(
            "Connection: close",
            "Connection: keep-alive, close",
            "Connection: upgrade",
            "Upgrade: h2c",
            "Upgrade: websocket",
        ),
        *("Expect: 100-continue", "Expect: nonsense", "Content-Type: application/json", "Content-Type: image/png"),
        *("Content-Type: multipart/form-data; boundary=x", "Content-Type: application/x-npy", "Host: y", "Host: a b"),
        *(
            " folded: line",
            "no colon",
            ": no name",
            "X-\0: y",
            "X: \x7f",
            "X: é",
            "X-Request-ID: \t",
            "Accept: */*;q=x",
        ),
        *(
            "X-Timeout-Ms: 1",
            "X-Timeout-Ms: 1e400",
            "If-None-Match: *",
            'If-None-Match: "' + "a" * 5000,
            "Range: bytes=0-",
        ),
        *(
            "Authorization: Bearer \xff",
            "Cookie: " + "a" * 20_000,
            "Inference-Header-Content-Length: -1",
            "TE: trailers",
        ),
        "\r\n".join(f"X-{number}: y" for number in range(250)),
    ]
)
BODIES = st.sampled_from(
    [
        *(
            b"",
            b"{}",
            b"hello",
            b'{"count": 2}',
            b'{"images":["AAAA"]}',
            b"--x\r\n\r\n\r\n--x--\r\n",
            b"\x89PNG\r\n\x1a\n",
        ),
        *(b"5\r\nhello\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", b"0\r\n\r\n", b"5;a=b\r\nhello\r\n0\r\n\r\n"),
        *(
            b"fffffffffffffffff\r\n",
            b"-1\r\nx\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"0x5\r\nhello\r\n",
        ),
        *(
            b"1\r\nx\r\n" * 500,
            b"1;" + b"a" * 20_000,
            b"0\r\n" + b"X: y\r\n" * 300 + b"\r\n",
            b"5\r\nhel",
            b"\r\n" * 20,
        ),
        *(
            b"GET /livez HTTP/1.1\r\nHost: smuggled\r\n\r\n",
            bytes(70_000),
            b"\x93NUMPY\x01\0v\0",
            b"\x16\x03\x01\x02\0\x01",
        ),
    ]
)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, mostly with a host, for otherwise nothing else of it is looked at."""
    hosts = draw(st.sampled_from(["Host: x"] * 9 + [""]))
    lines = [" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)]), hosts, *draw(st.lists(FIELDS, max_size=5))]
    end = draw(st.sampled_from(["\r\n"] * 9 + ["\n"]))
    return end.join([*filter(None, lines), "", ""]).encode("utf-8") + draw(BODIES)


class Conversation(NamedTuple):
    """What a client sends, piece by piece, and what it does afterwards."""

    pieces: Sequence[bytes]
    ending: str


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Some requests in a row, of which a few bytes are others, cut anywhere."""
    parts = st.lists(requests() | st.binary(min_size=1, max_size=40), min_size=1, max_size=4)
    sent = bytearray(b"".join(draw(parts)))
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)):
        sent[place % len(sent)] = byte
    cuts = sorted(draw(st.lists(st.integers(0, min(len(sent), 2000)), max_size=4)))
    pieces = [bytes(sent[start:end]) for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    return Conversation(pieces, draw(st.sampled_from(["half-close", "half-close", "reset", "close", "stay"])))


class Client:
    """Holds conversations, asks the probe after each, and keeps what is left open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.probe = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.abandoned: list[socket.socket] = []

    def hold(self, conversation: Conversation) -> None:
        """One connection from its start to its end, where it has one."""
        one = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):  # refused before all was sent
            for piece in conversation.pieces:
                one.sendall(piece)
        self.ask_probe()
        match conversation.ending:
            case "half-close":
                check_replies(rest_of(one))
            case "reset":
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            case "stay":
                self.abandoned.append(one)
                if len(self.abandoned) <= ABANDONED:
                    return
                one = self.abandoned.pop(0)
        one.close()

    def ask_probe(self) -> None:
        """Another connection is answered as ever."""
        self.probe.request("GET", "/livez")
        reply = self.probe.getresponse()
        reply.read()
        assert reply.status == 200

    def close(self) -> None:
        """Leave nothing open."""
        for one in self.abandoned:
            one.close()
        self.probe.close()


def rest_of(one: socket.socket) -> bytes:
    """All that comes until the server ends the connection, when the client says that it will send no more."""
    received = b""
    with contextlib.suppress(OSError):  # the server has ended it already
        one.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionError):
        while data := one.recv(2**16):
            received += data
    return received


def check_replies(received: bytes) -> None:
    """They are HTTP, and none admits a failure of the service."""
    assert received[:9] in {b"", b"HTTP/1.1 "}
    assert b"HTTP/1.1 500" not in received


FILES = Path("/proc/self/fd")


def open_files() -> int:
    return len(list(FILES.iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not FILES.is_dir(), reason="counts open files as Linux lists them")
def test_no_bytes_on_a_socket_hurt_others_or_stay_behind(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Every probe is answered, no reply is a 500, no error is logged, and in the end nothing is open that was not."""
    client = Client(live.port)
    client.ask_probe()
    before = open_files()
    given(conversations())(client.hold)()
    client.ask_probe()
    client.close()
    live.wait_for(lambda: not live.server_state.connections and not live.server_state.tasks)
    assert open_files() <= before
    assert live.metric("gan_requests_in_flight") == 0
    assert live.metric("gan_requests_total", status="500") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
