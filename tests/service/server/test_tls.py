"""HTTPS by settings: certificates that can be used and others, handshakes, and what connections do over TLS."""

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.__main__ import start
from service.settings import Settings

pytestmark = pytest.mark.usefixtures("logging_as_before")
LOOPS = {"asyncio": asyncio.new_event_loop}
if sys.platform != "win32":
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop


@pytest.fixture(scope="module")
def files(make_certificate: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A certificate and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "one")


@pytest.fixture(scope="module")
def trust(files: tuple[Path, Path]) -> ssl.SSLContext:
    """What a client knows that trusts this certificate."""
    return ssl.create_default_context(cafile=str(files[0]))


@pytest.fixture(params=LOOPS)
def serve(
    request: pytest.FixtureRequest,
    live_server: Any,
    tiny_settings: Callable[..., Settings],
    files: tuple[Path, Path],
) -> Callable[..., Any]:
    """A server over TLS, on either event loop; arguments are further settings."""

    def make(**more: Any) -> Any:
        settings = tiny_settings(**{"tls_cert_file": files[0], "tls_key_file": files[1]} | more)
        return live_server(settings, LOOPS[request.param])

    return make


def connect(server: Any, trust: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection by hand."""
    return trust.wrap_socket(socket.create_connection(("127.0.0.1", server.port), 60), server_hostname="localhost")


def read_to_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(2**16), b""))


# ------------------------------------------------------------------------------------------------------- what is served


def test_requests_are_answered_as_over_a_plain_connection(
    serve: Callable[..., Any], live: Any, trust: ssl.SSLContext
) -> None:
    """Images, large streams, uploads and errors are the same, over one connection that is kept."""
    with serve().running() as server, httpx.Client(base_url=server.url, verify=trust) as client:
        for target in ("/sample?seed=1", "/sample?seed=1&count=1024&scale=8&format=npy", "/sample?seed=1&count=-1"):
            reply, plain = client.get(target), httpx.get(live.url + target)
            assert reply.status_code == plain.status_code
            assert reply.headers.keys() == plain.headers.keys()
            if reply.status_code == 200:
                assert reply.content == plain.content
        image = client.get("/sample?seed=1&bundle=rgb").content
        options: dict[str, Any] = {"content": image, "headers": {"Content-Type": "image/png"}}
        judged, plain = (one.post(f"{url}/discriminate", **options) for one, url in ((client, ""), (httpx, live.url)))
        assert judged.json() == plain.json()
        assert len(server.server_state.connections) == 1


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_older_versions_than_tls_1_2_are_refused(serve: Callable[..., Any], files: tuple[Path, Path]) -> None:
    """A client that knows nothing newer gets no connection, and one of TLS 1.2 does."""
    context = ssl.create_default_context(cafile=str(files[0]))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1_1
    with serve().running() as server:
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/livez", verify=context)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(f"{server.url}/livez", verify=context).status_code == 200


def test_what_is_no_tls_is_closed_and_no_request(
    serve: Callable[..., Any], trust: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain HTTP gets no reply, no line in the log and no place in the metrics; the next client is served."""
    closed = []
    server = serve()
    server._worker_group.connection_closed = lambda: closed.append(1)  # noqa: SLF001
    with server.running():
        for sent in (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b""):
            with socket.create_connection(("127.0.0.1", server.port), 60) as plain:
                plain.sendall(sent)
                if not sent.startswith(b"G"):
                    plain.shutdown(socket.SHUT_WR)
                assert b"HTTP" not in read_to_end(plain)
        server.wait_for(lambda: len(closed) == 3)
        assert httpx.get(f"{server.url}/livez", verify=trust).status_code == 200
        assert server.metric("gan_requests_total", route="unmatched", method="GET", status="400") == 0
        assert server.metric("gan_requests_total", route="/livez", method="GET", status="200") == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_head_that_is_no_http_is_one_request_in_the_metrics(serve: Callable[..., Any], trust: ssl.SSLContext) -> None:
    """It is answered with 400 and counted, as over a plain connection."""
    with serve().running() as server, connect(server, trust) as connection:
        connection.sendall(b"GET /sample HTTP/1.1\r\nHost: a b\r\n\r\n")
        assert read_reply(connection).startswith(b"HTTP/1.1 400 ")
        # It counts once its bytes are on their way.
        server.wait_for(lambda: server.metric("gan_requests_total", route="unmatched", method="GET", status="400") == 1)


# ----------------------------------------------------------------------------------------------------------- handshakes


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["nothing", "a part"])
def test_a_handshake_has_a_time_limit(
    serve: Callable[..., Any], trust: ssl.SSLContext, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not finish its own is disconnected, and the supervisor would hear of it."""
    monkeypatch.setattr("service.server.server.HANDSHAKE_S", 0.05)
    closed = []
    server = serve()
    server._worker_group.connection_closed = lambda: closed.append(1)  # noqa: SLF001
    with server.running(), socket.create_connection(("127.0.0.1", server.port), 60) as slow:
        slow.sendall(sent)
        assert read_to_end(slow) == b""
        server.wait_for(lambda: bool(closed))
        assert not server.server_state.connections
        monkeypatch.undo()
        assert httpx.get(f"{server.url}/livez", verify=trust).status_code == 200


def test_an_unfinished_handshake_does_not_keep_the_service_from_ending(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drain does not wait for a client that may be one in name only."""
    monkeypatch.setattr("service.server.server.CANCEL_GRACE_S", 0.05)
    server = serve()
    with socket.socket() as slow:
        with server.running():
            slow.connect(("127.0.0.1", server.port))
            server.wait_for(lambda: bool(server._connecting))  # noqa: SLF001
        assert not server.thread.is_alive()
        assert slow.recv(1) == b""


# ---------------------------------------------------------------------------------------------------------- connections


def read_reply(connection: socket.socket) -> bytes:
    """A reply with a Content-Length."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(1)
    length = int(reply.lower().partition(b"content-length: ")[2].split()[0])
    body = bytearray()
    while len(body) < length:
        body += connection.recv(2**16)
    return reply + body


def send_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(bytes(2**16))


def test_who_is_refused_in_the_middle_of_a_body_can_read_why(
    serve: Callable[..., Any], trust: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is there although the client goes on sending; then the connection ends."""
    monkeypatch.setattr("service.server.protocol.LATE_BODY_S", 0.2)
    with serve().running() as server, connect(server, trust) as connection:
        head = b"POST /discriminate HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked"
        connection.sendall(head + b"\r\n\r\n100000\r\n" + bytes(2**20) + b"\r\nnonsense\r\n")
        connection.sendall(bytes(2**20))
        reply = read_reply(connection)
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in reply.lower()
        with pytest.raises(OSError):  # noqa: PT011 - it depends on the moment which one
            send_for_ever(connection)


def test_a_large_reply_waits_for_its_client(serve: Callable[..., Any], trust: ssl.SSLContext) -> None:
    """TLS would take all of it at once; the application waits until its client has read most of it."""
    size, server, is_answered = 2**25, serve(), threading.Event()

    async def large(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await server.app(scope, receive, send)
            return
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size)})
        is_answered.set()

    server.config.app = large
    with server.running(), connect(server, trust) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(lambda: any(one.drained is not None for one in list(server.server_state.connections)))
        assert not is_answered.is_set()
        assert len(read_reply(connection).partition(b"\r\n\r\n")[2]) == size
        assert is_answered.wait(60)


def test_work_ends_when_its_client_says_goodbye(serve: Callable[..., Any], trust: ssl.SSLContext) -> None:
    """TLS has no half-closed connections here: who ends one gives up its request."""
    with serve().running() as server, server.engine_held():
        connection = connect(server, trust)
        connection.sendall(b"GET /sample?seed=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(lambda: server.metric("gan_requests_in_flight", route="/sample") == 1)
        with connection.unwrap():
            cancelled = ("queued", "running")
            server.wait_for(
                lambda: sum(server.metric("gan_cancelled_total", route="/sample", phase=one) for one in cancelled) == 1
            )


def test_a_drain_answers_what_was_accepted_and_waits_for_no_goodbye(
    serve: Callable[..., Any], trust: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads nothing while it is idle, as many do, does not delay the end."""
    monkeypatch.setattr("service.server.protocol.GOODBYE_AT_END_S", 0.05)
    server = serve(drain_timeout_s=600)
    with server.running(), ThreadPoolExecutor(1) as pool, connect(server, trust) as idle:
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(idle).startswith(b"HTTP/1.1 200 ")
        with server.engine_held():
            waiting = pool.submit(httpx.get, f"{server.url}/sample?seed=1", verify=trust, timeout=60)
            server.wait_for(lambda: server.metric("gan_batch_images_count", bundle="tiny", operation="sample") == 1)
            server.handle_exit(15, None)
            server.wait_for(lambda: httpx.get(f"{server.url}/readyz", verify=trust).status_code == 503)
        assert waiting.result(60).status_code == 200
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.exit_code == 0
        assert read_to_end(idle) == b""


# --------------------------------------------------------------------------------------------------------- certificates


def certificate_of(server: Any) -> str:
    """The certificate that a new client gets."""
    return ssl.get_server_certificate(("127.0.0.1", server.port), timeout=60).strip()


def test_a_new_certificate_is_taken_up_and_a_bad_one_is_not(
    serve: Callable[..., Any],
    make_certificate: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """New connections get it, those that are open go on; a file that can't be used is named in the log."""
    caplog.set_level(logging.INFO)
    certificate, key = make_certificate(tmp_path, "used")
    old, old_key = certificate.read_text().strip(), key.read_bytes()
    server = serve(tls_cert_file=certificate, tls_key_file=key)
    trust = ssl.create_default_context(cafile=str(certificate))

    def reload(says: str) -> str:
        caplog.clear()
        server.loop.call_soon_threadsafe(server.request_reload)
        server.wait_for(lambda: any(record.message.startswith(says) for record in caplog.records))
        return next(record.message for record in caplog.records if record.message.startswith(says))

    with server.running(), connect(server, trust) as connection:
        assert certificate_of(server) == old
        new, new_key = make_certificate(tmp_path, "new")
        new_key.replace(key)  # only one of the two yet
        assert f"{key}: is not the key of" in reload("certificate not read again, the old one stays: ")
        assert certificate_of(server) == old
        text = new.read_text().strip()
        new.replace(certificate)
        reload("certificate read")
        assert certificate_of(server) == text
        certificate.unlink()
        assert str(certificate) in reload("certificate not read again, the old one stays: ")
        assert certificate_of(server) == text
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_reply(connection).startswith(b"HTTP/1.1 200 ")
    assert old_key not in caplog.text.encode()


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def bad(
    files: tuple[Path, Path],
    make_certificate: Callable[..., tuple[Path, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder of files, most of them unusable."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.pem").write_bytes(files[0].read_bytes())
    (folder / "good.key").write_bytes(files[1].read_bytes())
    make_certificate(folder, "other")
    (folder / "junk").write_text("junk")
    (folder / "cut.pem").write_bytes(files[0].read_bytes()[:300])
    openssl("pkcs8", "-topk8", "-in", str(files[1]), "-out", str(folder / "locked.key"), "-passout", "pass:x")
    openssl("ec", "-aes128", "-in", str(files[1]), "-out", str(folder / "old-locked.key"), "-passout", "pass:x")
    weak = ("-out", str(folder / "weak.pem"), "-keyout", str(folder / "weak.key"))
    openssl("req", "-x509", "-newkey", "rsa:1024", "-nodes", "-subj", "/CN=localhost", *weak)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("good.pem", None, "GAN_TLS_CERT_FILE needs GAN_TLS_KEY_FILE beside it"),
        (None, "good.key", "GAN_TLS_KEY_FILE needs GAN_TLS_CERT_FILE beside it"),
        ("none", "good.key", "GAN_TLS_CERT_FILE: FOLDER/none: No such file or directory"),
        ("good.pem", "none", "GAN_TLS_KEY_FILE: FOLDER/none: No such file or directory"),
        (".", "good.key", "GAN_TLS_CERT_FILE: FOLDER: is not a regular file"),
        ("good.pem", "pipe", "GAN_TLS_KEY_FILE: FOLDER/pipe: is not a regular file"),
        ("junk", "good.key", "GAN_TLS_CERT_FILE: FOLDER/junk: holds no certificates in PEM"),
        ("cut.pem", "good.key", "GAN_TLS_CERT_FILE: FOLDER/cut.pem: holds no certificates in PEM"),
        ("good.key", "good.pem", "GAN_TLS_CERT_FILE: FOLDER/good.key: holds no certificates in PEM"),
        ("good.pem", "junk", "GAN_TLS_KEY_FILE: FOLDER/junk: holds no private key in PEM"),
        ("good.pem", "other.key", "FOLDER/other.key: is not the key of GAN_TLS_CERT_FILE: FOLDER/good.pem"),
        ("good.pem", "locked.key", "GAN_TLS_KEY_FILE: FOLDER/locked.key: is encrypted"),
        ("good.pem", "old-locked.key", "GAN_TLS_KEY_FILE: FOLDER/old-locked.key: is encrypted"),
        ("weak.pem", "weak.key", "GAN_TLS_CERT_FILE: FOLDER/weak.pem: ee key too small"),
    ],
)
def test_files_that_can_not_be_used_are_one_line_and_code_2(
    bad: Path, certificate: str | None, key: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started, and nobody is asked for a password."""
    named = {"--tls-cert-file": certificate, "--tls-key-file": key}
    flags = [text for flag, name in named.items() if name for text in (flag, str(bad / name))]
    assert start(["--port", "0", *flags]) == 2
    err = capsys.readouterr().err
    assert says.replace("FOLDER", str(bad)) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["GAN_TLS_CERTFILE", "GAN_SSL_KEYFILE"])
def test_a_misspelled_setting_of_tls_ends_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An operator who means HTTPS must not get plain HTTP."""
    monkeypatch.setenv(name, "/etc/tls/tls.crt")
    assert start(["--port", "0"]) == 2
    assert f"{name} is not a setting; TLS is set by" in capsys.readouterr().err
