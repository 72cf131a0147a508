"""The examples of proxies, run by the real nginx and HAProxy in front of real services."""

import asyncio
import contextlib
import io
import re
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from benchmarks.tools.process import Service
from benchmarks.tools.proxies import EXAMPLES, free_port, proxying, why_not
from models.bundle import Bundle
from service.settings import Settings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(make_certificate: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A certificate and its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "one")


class Proxy(NamedTuple):
    """A proxy that is running."""

    name: str
    url: str
    trust: ssl.SSLContext

    def client(self, **options: Any) -> httpx.Client:
        """A client that trusts it."""
        return httpx.Client(base_url=self.url, verify=self.trust, timeout=60, **options)


@contextlib.contextmanager
def proxy(name: str, folder: Path, files: tuple[Path, Path], ports: tuple[int, int]) -> Iterator[Proxy]:
    """The example, in front of these ports of this machine."""
    if reason := why_not(name):
        pytest.skip(reason)
    with proxying(name, folder, ports, files) as port:
        yield Proxy(name, f"https://127.0.0.1:{port}", ssl.create_default_context(cafile=str(files[0])))


# ------------------------------------------------------------------------------------------------ two stubs behind each


class Stub(ThreadingHTTPServer):
    """An instance that is ready for its probe, answers other requests with one status, and counts them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status, self.asked = 200, 0
        self.is_asked, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        """Answer."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_probe = self.path == "/readyz"
        self.server.asked += not is_probe
        if not is_probe:
            self.server.is_asked.set()
            assert self.server.may_answer.wait(60)
        self.send_response(200 if is_probe else self.server.status)
        self.send_header("Retry-After", "3")
        self.send_header("Cache-Control", "no-store" if is_probe else "public, max-age=60")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@pytest.fixture
def stubs() -> Iterator[list[Stub]]:
    """Two instances."""
    with Stub() as one, Stub() as two:
        threads = [threading.Thread(target=stub.serve_forever, args=[0.01]) for stub in (one, two)]
        for thread in threads:
            thread.start()
        try:
            yield [one, two]
        finally:
            for stub, thread in zip((one, two), threads, strict=True):
                stub.daemon_threads = True
                stub.block_on_close = False
                stub.shutdown()
                thread.join()


@pytest.fixture(params=EXAMPLES)
def before_stubs(
    request: pytest.FixtureRequest, stubs: list[Stub], tmp_path: Path, files: tuple[Path, Path]
) -> Iterator[Proxy]:
    """A proxy before the two stubs."""
    with proxy(request.param, tmp_path, files, (stubs[0].server_port, stubs[1].server_port)) as one:
        yield one


def test_a_503_is_tried_again_where_that_is_safe(before_stubs: Proxy, stubs: list[Stub]) -> None:
    """Drawing and judging go to the other instance; loading a bundle does not, and is said to be refused."""
    with before_stubs.client() as client:
        stubs[0].status = 503
        asked = [client.get("/sample?seed=1"), client.post("/sample", json={}), client.get("/bundles")] * 2
        assert {reply.status_code for reply in asked} == {200}
        stubs[1].status = 503
        before = stubs[0].asked + stubs[1].asked
        refused = client.post("/v2/repository/models/tiny/load")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) in {1, 3}
        assert stubs[0].asked + stubs[1].asked - before == 1
        for _ in range(3):
            refused = client.get("/sample")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) in {1, 3}


def test_nginx_goes_on_for_a_client_who_left(stubs: list[Stub], tmp_path: Path, files: tuple[Path, Path]) -> None:
    """What could be kept is computed to its end, and the next client gets it; what can't be is dropped."""
    with proxy("nginx", tmp_path, files, (stubs[0].server_port, stubs[1].server_port)) as nginx:
        for stub in stubs:
            stub.may_answer.clear()
        with nginx.client() as client, pytest.raises(httpx.ReadTimeout):
            client.get("/sample?seed=9", timeout=httpx.Timeout(60, read=0.5))
        assert any(stub.is_asked.wait(60) for stub in stubs)
        for stub in stubs:
            stub.may_answer.set()
        with nginx.client() as client:
            got: set[str] = set()
            while got != {"HIT"}:  # once nginx has what the instance answered
                got = {client.get("/sample?seed=9").headers["x-cache"]}
        assert sum(stub.asked for stub in stubs) <= 2


def test_where_nobody_is_there_clients_hear_when_to_come_back(tmp_path: Path, files: tuple[Path, Path]) -> None:
    """503 with Retry-After, as a problem that is not cached."""
    for name in EXAMPLES:
        (folder := tmp_path / name).mkdir()
        with proxy(name, folder, files, (free_port(), free_port())) as one, one.client() as client:
            reply = client.get("/sample")
            assert reply.status_code == 503
            assert reply.headers["retry-after"] == "1"
            assert reply.headers["cache-control"] == "no-store"
            assert reply.headers["content-type"] == "application/problem+json"
            assert reply.json()["code"] == "not_ready"


@pytest.mark.parametrize("name", EXAMPLES)
def test_bodies_have_the_services_limit(name: str) -> None:
    """The example and the setting's default say the same."""
    text = EXAMPLES[name].read_text()
    [(number, unit)] = re.findall(r"([0-9]+)(m?)[; }]+ # GAN_MAX_BODY_BYTES", text)
    assert int(number) * (2**20 if unit else 1) == Settings.model_fields["max_body_bytes"].default


# --------------------------------------------------------------------------------------------- two services behind each


class Pair:
    """Two services on the tiny bundles, which can be replaced one after the other."""

    def __init__(self, bundles: Path) -> None:
        self.ports = free_port(), free_port()
        self._bundles = bundles
        with ThreadPoolExecutor(2) as pool:
            self.services = list(pool.map(self._start, self.ports))

    def _start(self, port: int) -> Service:
        return Service(
            port=port,
            bundles=self._bundles,
            default_bundle="tiny",
            device="cpu",
            root_path="/gan",
            trusted_proxies="127.0.0.1",
            drain_delay_s=2,  # HAProxy asks each second whether it is ready
        )

    def replace(self, number: int) -> int:
        """Stop one in order and start it again. Returns its exit code."""
        old = self.services[number]
        old.send(signal.SIGTERM)
        code = old.wait()
        old.stop()
        self.services[number] = self._start(self.ports[number])
        return code

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric of both."""
        return sum(asyncio.run(service.metrics()).total(name, **labels) for service in self.services)


@pytest.fixture(scope="module")
def pair(tiny_bundles: dict[str, Bundle]) -> Iterator[Pair]:
    """Two services, ready."""
    one = Pair(tiny_bundles["tiny"].folder.parent)
    try:
        yield one
    finally:
        for service in one.services:
            service.stop()


@pytest.fixture(scope="module")
def proxies(pair: Pair, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Proxy]]:
    """Those proxies that are on this machine, before the two services."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(proxy(name, tmp_path_factory.mktemp(name), files, pair.ports))
            for name in EXAMPLES
            if not why_not(name)
        ] or pytest.skip("needs nginx or haproxy")


@pytest.fixture
def nginx(proxies: list[Proxy]) -> Proxy:
    """The one of them that caches."""
    return next((one for one in proxies if one.name == "nginx"), None) or pytest.skip("needs nginx")


def test_the_smoke_test_passes_through_them_under_a_prefix(proxies: list[Proxy], files: tuple[Path, Path]) -> None:
    """All that it asks for; only metrics are hidden."""
    for one in proxies:
        done = subprocess.run(
            [sys.executable, "-I", str(ROOT / "deploy/smoke"), f"{one.url}/gan", "--ca", str(files[0])],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert {line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith("ok ")} == {
            "skip metrics",
            "skip keys",
        }


def test_images_of_a_seed_are_kept_and_nothing_else(nginx: Proxy, tiny_bundles: dict[str, Bundle]) -> None:
    """A hit has the same bytes and ETag, and answers 304; without a seed, with an error or a key there is none."""
    pinned = f"tiny@{tiny_bundles['tiny'].version}"
    with nginx.client() as client:
        for target in ("/sample?seed=77", f"/sample?seed=77&bundle={pinned}", "/interpolate?seed_from=1&seed_to=2"):
            first, again = client.get(target), client.get(target)
            assert (first.headers["x-cache"], again.headers["x-cache"]) == ("MISS", "HIT"), target
            assert first.content == again.content
            assert first.headers["etag"] == again.headers["etag"]
            unchanged = client.get(target, headers={"If-None-Match": first.headers["etag"]})
            assert (unchanged.status_code, unchanged.headers["x-cache"]) == (304, "HIT")
        assert "immutable" in client.get(f"/sample?seed=77&bundle={pinned}").headers["cache-control"]
        webp = client.get("/sample?seed=77", headers={"Accept": "image/webp"})
        assert webp.headers["content-type"] == "image/webp"
        for target in ("/sample", "/sample?seed=1&count=0", "/sample?seed=1&bundle=nobodys"):
            assert {client.get(target).headers["x-cache"] for _ in range(2)} == {"MISS"}
        for key in ({"Authorization": "Bearer k"}, {"X-API-Key": "k"}):
            assert {client.get("/sample?seed=78", headers=key).headers["x-cache"] for _ in range(2)} == {"BYPASS"}
        assert client.get("/sample?seed=78").headers["x-cache"] == "MISS"


def test_the_log_names_the_client(proxies: list[Proxy], pair: Pair) -> None:
    """Not the proxy, and nobody whom the client makes up."""
    for one in proxies:
        name = f"who-{one.name}"
        transport = httpx.HTTPTransport(local_address="127.0.0.2", verify=one.trust)
        with httpx.Client(base_url=one.url, transport=transport, timeout=60) as client:
            forged = {"X-Forwarded-For": "198.51.100.7", "X-Request-ID": name}
            assert client.get("/sample", headers=forged).status_code == 200
        lines: list[dict[str, Any]] = []
        while not lines:  # it is written after the reply
            every = (line for service in pair.services for line in service.log_lines())
            lines = [line for line in every if line.get("request_id") == name]
        assert [line["client"] for line in lines] == ["127.0.0.2"]


@pytest.mark.parametrize("seed", ["", "&seed=5"])
def test_large_replies_go_through_as_they_come(proxies: list[Proxy], pair: Pair, seed: str) -> None:
    """The first bytes are there while the service still has the rest, unless they are kept; all arrive."""
    for one in proxies:
        with one.client() as client:
            with client.stream("GET", f"/sample?count=4096&scale=16&format=npy{seed}") as reply:
                assert reply.status_code == 200
                parts = reply.iter_raw(2**16)
                first = next(parts)
                if not seed:
                    assert pair.total("gan_requests_in_flight", route="/sample") == 1
                images = np.load(io.BytesIO(first + b"".join(parts)))
            assert images.shape == (4096, 128, 128, 1)


def test_bodies_over_the_limit_are_refused(proxies: list[Proxy]) -> None:
    """Before they are sent on."""
    for one in proxies:
        with one.client() as client:
            size = int(Settings.model_fields["max_body_bytes"].default) + 1
            reply = client.post("/discriminate", content=bytes(size), headers={"Content-Type": "image/png"})
            assert reply.status_code == 413


def test_haproxy_takes_out_an_instance_that_is_frozen(proxies: list[Proxy], pair: Pair) -> None:
    """By its readiness: only what was sent there before has to wait, and it comes back once it goes on."""
    haproxy = next((one for one in proxies if one.name == "haproxy"), None) or pytest.skip("needs haproxy")
    frozen = pair.services[0]
    with ThreadPoolExecutor(4) as pool, haproxy.client(headers={"X-Request-ID": "thawed"}) as client:
        frozen.send(signal.SIGSTOP)
        try:
            asked = [pool.submit(client.get, "/sample", headers={"X-Request-ID": "before"}) for _ in range(4)]
            in_a_row = 0
            while in_a_row < 10:  # in turns, so that every other one went to the frozen one before
                with contextlib.suppress(httpx.ReadTimeout):
                    in_a_row = in_a_row + 1 if client.get("/sample", timeout=2).status_code == 200 else 0
                    continue
                in_a_row = 0
        finally:
            frozen.send(signal.SIGCONT)
        assert {one.result(60).status_code for one in asked} == {200}
        seen = frozen.log().count('"request_id":"thawed"')
        while frozen.log().count('"request_id":"thawed"') <= seen + 3:
            assert client.get("/sample").status_code == 200


def test_a_rolling_update_fails_nobody(proxies: list[Proxy], pair: Pair) -> None:
    """Both instances are replaced one after the other, each once both proxies use the other one."""
    is_over = threading.Event()

    def ask(one: Proxy) -> list[int]:
        statuses = []
        with one.client(headers={"X-Request-ID": one.name}) as client:
            while not is_over.is_set():
                statuses.append(client.get("/sample").status_code)
                statuses.append(client.post("/sample", json={"count": 3}).status_code)
        return statuses

    def wait_until_used(number: int) -> None:
        """Return once each proxy has had answers from the instance."""
        service = pair.services[number]
        for one in proxies:
            service.wait_for_log(f'"request_id":"{one.name}"', 10)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, one) for one in proxies for _ in range(2)]
        try:
            for number in (0, 1):
                assert pair.replace(number) == 0
                wait_until_used(number)
        finally:
            is_over.set()
        for one in asking:
            statuses = one.result(60)
            assert set(statuses) == {200}
            assert len(statuses) > 10
