"""Connections are accepted many at a time, not after `stop`, and with a pause when accepting fails."""

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import pytest

from service.server import listener as listening
from service.server.listener import Acceptor, HostError, in_words, listen

Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.anyio


@contextmanager
def clients(listener: socket.socket, count: int) -> Iterator[None]:
    """Connect this many clients."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        yield


class Taken:
    """Keeps connections, after it has refused the first `refuses`."""

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self.refuses = 0
        self.has_refused: Callable[[], object] = bool

    def take(self, connection: socket.socket) -> None:  # noqa: D102
        if self.refuses:
            self.refuses -= 1
            self.has_refused()
            raise OSError("full")
        self.connections.append(connection)


@asynccontextmanager
async def accepting() -> AsyncIterator[tuple[socket.socket, Acceptor, Taken]]:
    taken = Taken()
    with listen("127.0.0.1", 0) as listener:
        acceptor = Acceptor(listener, taken.take)
        try:
            yield listener, acceptor, taken
        finally:
            acceptor.stop()
            for connection in taken.connections:
                connection.close()


@pytest.mark.parametrize(
    ("max_accepts", "seen"),
    [
        pytest.param(listening.MAX_ACCEPTS, {0}, id="all in one step"),
        pytest.param(8, {0, 8, 16}, id="so many in each: a crowd leaves all others their turns"),
    ],
)
async def test_many_connections_are_accepted_in_one_step(
    monkeypatch: pytest.MonkeyPatch, max_accepts: int, seen: set[int]
) -> None:
    """On a busy loop, waiting for one step for each connection takes long."""
    monkeypatch.setattr(listening, "MAX_ACCEPTS", max_accepts)
    async with accepting() as (listener, acceptor, taken):
        with clients(listener, 20):
            acceptor.start()
            counts = set()
            async with asyncio.timeout(60):
                while len(taken.connections) < 20:
                    counts.add(len(taken.connections))
                    await asyncio.sleep(0)
            assert counts == seen


async def test_after_stop_clients_wait_in_the_queue(until: Until) -> None:
    """They are accepted after the next `start`, also if `take` has called `stop` amid a step."""
    taken: list[socket.socket] = []
    with listen("127.0.0.1", 0) as listener, clients(listener, 3), ExitStack() as stack:

        def take_one(connection: socket.socket) -> None:
            taken.append(stack.enter_context(connection))
            acceptor.stop()

        acceptor = Acceptor(listener, take_one)
        for expected in (1, 2, 3):
            acceptor.start()
            await until(lambda: len(taken) == expected)  # noqa: B023 - it ends before the next


async def test_a_refused_connection_is_closed_and_the_others_wait_a_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    """Accepting pauses, so that the loop is not busy with it, and then goes on."""
    monkeypatch.setattr(listening, "PAUSE_S", 0.0)
    async with accepting() as (listener, acceptor, taken):
        taken.refuses = 1
        with clients(listener, 3):
            acceptor.start()
            await until(lambda: len(taken.connections) == 2)
        assert "full" in caplog.text


async def test_a_lack_of_file_descriptors_is_waited_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    """It is logged, and waiting clients are accepted once descriptors are free again."""
    monkeypatch.setattr(listening, "PAUSE_S", 0.0)
    async with accepting() as (listener, acceptor, taken):
        with clients(listener, 3):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                acceptor.start()
                await until(lambda: "Too many open files" in caplog.text)
                assert not taken.connections
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: len(taken.connections) == 3)


async def test_stop_during_a_pause_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    """The end of the pause does not start accepting again."""
    monkeypatch.setattr(listening, "PAUSE_S", 0.0)
    async with accepting() as (listener, acceptor, taken):
        taken.refuses, taken.has_refused = 1, acceptor.stop
        with clients(listener, 3):
            acceptor.start()
            await until(lambda: taken.refuses == 0)
            later = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, later.set)
            await later.wait()
            assert not taken.connections
        assert "full" in caplog.text


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="one family at a time is all this system has")
@pytest.mark.parametrize("host", ["::", "[::]"])
async def test_every_address_of_ipv6_is_every_one_of_ipv4_too(host: str) -> None:
    """Clients of both families can connect, with and without brackets around the address."""
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        for client in ("127.0.0.1", "::1"):
            with socket.create_connection((client, port)):
                pass


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "999.1.1.1", "a..b", "a b", "x" * 300, "[::1", ":::"])
async def test_an_address_that_is_not_this_machines_is_told_apart_from_a_port_in_use(host: str) -> None:
    """The first is a bad setting, the second a state of the machine."""
    with pytest.raises(HostError):
        listen(host, 0)
    with listen("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use") as in_use:
        listen("127.0.0.1", listener.getsockname()[1])
    assert not isinstance(in_use.value, HostError)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "::1"])  # noqa: S104 - what containers listen on
async def test_the_log_names_an_address_that_answers(host: str) -> None:
    """Browsers can't open http://0.0.0.0:8000 everywhere; other machines reach the others."""
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with listen(host, 0) as listener:
        address, comma, others = in_words(listener).partition(", ")
        parts = urlsplit(address)
        socket.create_connection((str(parts.hostname), parts.port or 0), timeout=60).close()
        assert bool(comma) == (host in {"0.0.0.0", "::"})  # noqa: S104 - as above
        assert others in {"", "and on every other address of this machine"}
