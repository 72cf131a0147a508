"""Small real parts that many tests share: bundles with seeded nets, an application on them, a server on a socket."""

import asyncio
import concurrent.futures
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import torch
from fastapi import FastAPI

from models.bundle import Bundle, write_bundle
from models.networks import build_encoder, build_networks
from models.spec import PRESETS, EncoderSpec, ImageSpec, LatentSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec
from service.app import create_app
from service.server.listener import listen
from service.server.server import Server
from service.server.tls import read_tls
from service.settings import Settings, variable

collect_ignore = ["clients", "ray"]  # they run in environments of their own: make test-clients, make test-ray

NETWORK = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(32,)),
    discriminator=MaxoutDiscriminatorSpec(units=(16,), pieces=2),
)
GREY, COLOUR = ImageSpec(channels=1, height=8, width=8), ImageSpec(channels=3, height=6, width=10)
# Headers of replies that say nothing of their own: of any reply, or of any to pages of other origins.
PLAIN_HEADERS = {
    *("content-type", "content-length", "cache-control", "connection", "x-content-type-options", "vary"),
    *("access-control-allow-origin", "access-control-expose-headers"),
}
CALIBRATION = {"scale": 0.5, "offset": -0.25, "auc": 0.9, "expected_calibration_error": 0.02}


def pytest_sessionstart() -> None:
    """Tests say which settings they use; those of the machine they run on are not among them."""
    cases = int(os.environ.get("HOSTILE_CASES", "100"))  # of each test; see CONTRIBUTING.md
    hypothesis.settings.register_profile("any machine", deadline=None, max_examples=cases)  # it may be a busy one
    hypothesis.settings.load_profile("any machine")
    for field in Settings.model_fields:
        os.environ.pop(variable(field), None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # by a shell that started the tests in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # programs that they start would ignore it too


@pytest.fixture(scope="session", autouse=True)
def one_processor() -> Iterator[None]:
    """Engines have a single thread, whatever the machine, but where a test says otherwise: then it can be held."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.engine.device.cpu_limit", lambda: 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are not worth a second thread, which waits for the first on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset `small`, whose nets are so small that a run of a few steps takes no time."""
    options = PRESETS["mlp-adam"].model_copy(update={"preset": "small", "network": NETWORK, "batch_size": 4})
    monkeypatch.setitem(PRESETS, "small", options)


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that set up the log: the root logger is everybody's, and so are logging's options."""
    for place, name in (
        *((logging, name) for name in ("logThreads", "logProcesses", "logMultiprocessing")),
        (threading, "excepthook"),
        (sys, "unraisablehook"),
    ):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setattr("service.logs.END_S", 60.0)  # the log is read, and a busy machine is no reason to lose it
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def flush_log() -> Callable[[], None]:
    """Wait until all that was logged is written."""

    def flush() -> None:
        for handler in logging.getLogger().handlers:
            handler.flush()

    return flush


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs goes to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"debug": False}


def write_tiny(
    folder: Path,
    image: ImageSpec,
    labels: tuple[str, ...] | None,
    calibration: dict[str, float] | None,
    seed: int = 0,
    encoder: EncoderSpec | None = None,
) -> Bundle:
    """A bundle of this kind with random weights that the seed alone decides, named like its folder."""
    frequencies = (
        None if labels is None else tuple(np.arange(1, len(labels) + 1) / (len(labels) * (len(labels) + 1) / 2))
    )
    latent = LatentSpec(dim=12, distribution="normal", label_frequencies=frequencies)
    rng = torch.Generator().manual_seed(seed)
    shape = NETWORK.model_copy(update={"encoder": encoder}), image, latent, len(labels or ())
    states = [
        None if net is None else {k: torch.randn(v.shape, generator=rng) for k, v in net.state_dict().items()}
        for net in (*build_networks(*shape), build_encoder(*shape))
    ]
    facts = {
        "name": folder.name,
        "created": "2026-01-02T03:04:05Z",
        "network": shape[0],
        "image": image,
        "latent": latent,
        "labels": labels,
        "calibration": calibration,
        "training": {"preset": "none", "steps": 0},
        "evaluation": {},
    }
    samples = np.zeros((image.height, image.width, image.channels), np.uint8)
    generator, discriminator, found = states
    assert generator is not None
    return write_bundle(folder, facts, generator, discriminator, samples, found)


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Bundle]:
    """For tests that need a bundle of their own: `write_tiny`."""
    return write_tiny


@pytest.fixture(scope="session")
def tiny_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Three bundles in one folder: grey; in colour and calibrated; with classes and calibrated."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "tiny": write_tiny(folder / "tiny", GREY, None, None),
        "rgb": write_tiny(folder / "rgb", COLOUR, None, CALIBRATION),
        "cond": write_tiny(folder / "cond", GREY, ("cat", "dog", "owl"), CALIBRATION),
    }


@pytest.fixture(scope="session")
def tiny_settings(tiny_bundles: dict[str, Bundle]) -> Callable[..., Settings]:
    """Settings on the tiny bundles, `tiny` being the default; arguments are further settings.

    No images are scored: which ones would be is left to chance.
    """
    folder = tiny_bundles["tiny"].folder.parent

    def make(**more: Any) -> Settings:
        usual = {"bundles": folder, "default_bundle": "tiny", "device": "cpu", "scored_share": 0}
        return Settings.model_validate(usual | more)

    return make


def checked_by(app: FastAPI, more_headers: Collection[str] = ()) -> dict[str, list[Callable[..., Any]]]:
    """The hooks of a client that has whatever it is answered be in the application's document, headers included.

    Args:
        app: The application, or one like it.
        more_headers: Those that servers and proxies add.
    """

    async def check(reply: httpx.Response) -> None:
        for path, operations in app.openapi()["paths"].items():
            method = {"HEAD": "get"}.get(reply.request.method, reply.request.method.lower())
            if method in operations and re.fullmatch(re.sub("{.*?}", "[^/]+", path), reply.request.url.path):
                known = operations[method]["responses"]
                assert str(reply.status_code) in known
                told = known[str(reply.status_code)]
                assert reply.headers.get("content-type", "").split(";")[0] in told.get("content", {"": {}})
                assert set(reply.headers) <= {name.lower() for name in told["headers"]} | PLAIN_HEADERS | {
                    *more_headers
                }

    return {"response": [check]}


@asynccontextmanager
async def start_app(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application within its lifespan, once its bundles are loaded."""
    async with app.router.lifespan_context(app):
        await app.state.starting
        transport, hooks = httpx.ASGITransport(app), checked_by(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service", event_hooks=hooks) as client:
            yield client


@pytest.fixture(scope="session")
def start() -> Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]:
    """For tests that need an application of their own."""
    return start_app


@pytest.fixture(scope="module")
def app(tiny_settings: Callable[..., Settings]) -> FastAPI:
    """An application on the tiny bundles; `client` starts it."""
    return create_app(tiny_settings())


@pytest.fixture(scope="module")
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, without a socket between them; or of a service like it that runs elsewhere (tests/ray)."""
    if (url := os.environ.get("SERVICE_URL")) is not None:
        hooks = checked_by(app, ("date", "server", "transfer-encoding"))
        async with httpx.AsyncClient(base_url=url, event_hooks=hooks, timeout=60, trust_env=False) as one:
            yield one
        return
    async with start_app(app) as one:
        yield one


@pytest.fixture(scope="session")
def hold_engine() -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """While the block lasts the engine's threads are busy, so that work queues up behind it."""

    @asynccontextmanager
    async def hold(app: FastAPI) -> AsyncIterator[None]:
        gate = threading.Event()
        held = [thread.run(gate.wait) for thread in app.state.manager.engine.threads]
        try:
            yield
        finally:
            gate.set()
            await asyncio.gather(*held)

    return hold


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Wait for something that announces itself to nobody, while others run; fail where it does not come in a minute."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110 - see above
                await asyncio.sleep(0)

    return wait


@pytest.fixture(scope="session")
def problem() -> Callable[[httpx.Response, int, str], str]:
    """Assert that a reply is a problem in the one shape, and return its detail."""

    def check(reply: httpx.Response, status: int, code: str) -> str:
        assert reply.status_code == status, reply.text
        assert reply.headers["content-type"] == "application/problem+json"
        assert reply.headers["cache-control"] == "no-store"
        body = reply.json()
        assert set(body) == {"type", "title", "status", "detail", "code", "request_id"}
        assert (body["status"], body["code"]) == (status, code)
        assert body["request_id"] == reply.headers["x-request-id"]
        return str(body["detail"])

    return check


class LiveServer(Server):
    """The service as `python -m service` runs it, on a port of its own, in a thread of this process."""

    def __init__(
        self, settings: Settings, loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    ) -> None:
        self.app = create_app(settings)
        super().__init__(self.app, settings, tls=read_tls(settings))
        self.listener = listen("127.0.0.1", 0)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http{'s' if settings.tls_cert_file else ''}://127.0.0.1:{self.port}"
        self.is_ready = threading.Event()
        self.thread = threading.Thread(target=self._run, args=[loop_factory])

    def _run(self, loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(self.serve([self.listener]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say when the bundles are there."""
        self.loop = asyncio.get_running_loop()  # in its thread
        await super().startup(sockets)
        self.app.state.starting.add_done_callback(lambda _: self.is_ready.set())

    @contextmanager
    def running(self) -> "Iterator[LiveServer]":
        """Serve while the block lasts."""
        self.thread.start()
        assert self.is_ready.wait(60)
        try:
            yield self
        finally:
            self.should_exit = True
            self.thread.join(60)

    @contextmanager
    def engine_held(self) -> Iterator[None]:
        """While the block lasts the engine's threads are busy, so that work queues up behind it."""
        gate = threading.Event()

        async def hold() -> None:
            threads = self.app.state.manager.engine.threads
            await asyncio.gather(*(thread.run(gate.wait) for thread in threads))

        held = asyncio.run_coroutine_threadsafe(hold(), self.loop)
        try:
            yield
        finally:
            gate.set()
            concurrent.futures.wait([held], 60)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the server's series of this name that have these labels."""
        registry, wanted = self.app.state.manager.metrics.registry, labels.items()
        samples = (one for metric in registry.collect() for one in metric.samples if one.name == name)
        return float(sum(one.value for one in samples if wanted <= one.labels.items()))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when something that announces itself to nobody is the case; fail where it is not in a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture(scope="session")
def live_server() -> type[LiveServer]:
    """For tests that need a server of their own."""
    return LiveServer


@pytest.fixture(scope="session")
def make_certificate() -> Callable[[Path, str], tuple[Path, Path]]:
    """Write a certificate of this machine that vouches for itself, and its key, into a folder; returns both files."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")

    def make(folder: Path, name: str) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        options += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
        subprocess.run(
            ["openssl", *options.split(), "-out", str(certificate), "-keyout", str(key)],
            check=True,
            capture_output=True,
        )
        return certificate, key

    return make


@pytest.fixture(scope="module")
def live(tiny_settings: Callable[..., Settings]) -> Iterator[LiveServer]:
    """The tiny bundles behind a real socket."""
    with LiveServer(tiny_settings()).running() as server:
        yield server


@pytest.fixture(scope="module")
def embedded() -> Iterator[LiveServer]:
    """The service as `make serve` starts it: on the embedded bundles."""
    with LiveServer(Settings.model_validate({"device": "cpu"})).running() as server:
        yield server
