"""Several workers act as one service to clients: real processes with tiny bundles."""

import asyncio
import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.drain import Load
from benchmarks.tools.client import UNANSWERED, Client, Connection, NoReply, Reply, Request
from benchmarks.tools.process import ROOT, Service, running
from models.bundle import Bundle
from service.machine.cpu import cpu_limit, shares
from service.server.channel import Channel
from service.server.supervisor import DEAD_S, Worker, ask_all, hand_out, kill_dead_workers
from service.server.worker_link import WorkerLink

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="connections can't be passed to processes here"),
]

ADMIN = (("X-API-Key", "root"),)
SLOW_BODY = b'{"seed": 1}'


@pytest.fixture(scope="module")
def folder(tiny_bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundles for these tests."""
    return shutil.copytree(tiny_bundles["tiny"].folder.parent, tmp_path_factory.mktemp("workers") / "bundles")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    """A service of two workers."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2, admin_keys="root") as one:
        yield one


def workers_of(service: Service) -> list[int]:
    """The workers' process ids."""
    return [int(pid) for pid in Path(f"/proc/{service.pid}/task/{service.pid}/children").read_text().split()]


def worker_of(reply: Reply) -> str:
    """The worker that answered: all request ids of a process share a prefix."""
    return reply.headers["x-request-id"][:-12]


async def ask_each(service: Service, request: Request) -> list[Reply]:
    """Every worker's reply."""
    replies: dict[str, Reply] = {}
    connections: list[Connection] = []
    while len(replies) < 2:  # the supervisor may not know yet that earlier connections have closed
        assert len(connections) < 50
        connections.append(await Connection.open(service.port))
        reply = await connections[-1].ask(request)
        replies[worker_of(reply)] = reply
    for connection in connections:
        connection.close()
    return list(replies.values())


async def test_every_worker_gets_as_many_connections_as_the_others(folder: Path) -> None:
    """Connections are balanced, also after some have been closed."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        connections = [await Connection.open(service.port) for _ in range(6)]
        by_worker: dict[str, list[Connection]] = {}
        for connection in connections:
            by_worker.setdefault(worker_of(await connection.ask(Request("GET", "/livez"))), []).append(connection)
        assert [len(ones) for ones in by_worker.values()] == [3, 3]
        first, second = by_worker
        goodbye = Request("GET", "/livez", headers=(("Connection", "close"),))
        for connection in by_worker[first]:
            await connection.ask(goodbye)
            with pytest.raises(NoReply):
                await connection.ask(goodbye)  # read to the end: it has been closed
        reply = await by_worker[second][0].ask(Request("GET", "/metrics"))
        assert reply.status == 200  # so the supervisor has heard of it: it takes a worker's messages in order
        new = [await Connection.open(service.port) for _ in range(3)]
        assert {worker_of(await connection.ask(Request("GET", "/livez"))) for connection in new} == {first}
        for connection in connections + new:
            connection.close()


def threads_of(pid: int) -> list[int]:
    return [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="processes can't be bound to processors here")
async def test_each_worker_keeps_to_its_processors(service: Service) -> None:
    """All of its threads are bound, so that its event loop and its engine share caches."""
    mine = os.sched_getaffinity(0)
    expected = shares(2) or [mine, mine]
    for pid, share in zip(workers_of(service), expected, strict=True):
        threads = threads_of(pid)
        assert len(threads) > 2
        assert [os.sched_getaffinity(thread) for thread in threads] == [share] * len(threads)


async def test_metrics_are_the_sum_of_all_workers(service: Service) -> None:
    """Any worker gives exact sums; values that all workers share are not multiplied."""
    before = await service.metrics()
    async with Client(service.port) as client:
        replies = await asyncio.gather(*(client.ask(Request("GET", f"/sample?count=3&seed={n}")) for n in range(40)))
    assert {reply.status for reply in replies} == {200}
    assert len({worker_of(reply) for reply in replies}) == 2
    pages = [await service.metrics() for _ in range(2)]  # over two connections: one for each worker
    for now in pages:
        labels = {"route": "/sample", "status": "200"}
        assert now.total("gan_requests_total", **labels) - before.total("gan_requests_total", **labels) == 40
        assert now.total("gan_images_total") - before.total("gan_images_total") == 120
        buckets = "gan_request_duration_seconds_bucket"
        assert now.total(buckets, route="/sample", le="+Inf") == now.total(
            "gan_request_duration_seconds_count", route="/sample"
        )
        assert now.total("gan_ready") == now.total("gan_build_info") == 1
        assert now.total("gan_engine_threads", device="cpu") == 2 * max(1, cpu_limit() // 2)
        assert now.total("gan_bundle_info", bundle="tiny") == 1
        assert now.total("gan_queue_capacity_images") == 16384
        assert now.total("gan_queue_images") == now.total("gan_requests_in_flight", route="/sample") == 0
    workers = sum(resident(pid) for pid in workers_of(service))
    assert pages[0].total("process_resident_memory_bytes") == pytest.approx(workers, rel=0.2)
    assert pages[0].total("process_start_time_seconds") == pytest.approx(time.time(), abs=600)


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_seed_has_the_same_bytes_in_every_worker(service: Service) -> None:
    """Bytes and ETag are the same, so a client may switch between workers."""
    one, other = await ask_each(service, Request("GET", "/sample?count=70&seed=5"))
    assert (one.status, one.body, one.headers["etag"]) == (other.status, other.body, other.headers["etag"])


async def test_a_bundle_is_loaded_and_unloaded_in_every_worker(service: Service) -> None:
    """One request to any worker is enough."""
    sample = Request("GET", "/sample?bundle=rgb&seed=1")
    change = "/v2/repository/models/rgb"
    assert (await service.ask(Request("POST", f"{change}/unload", headers=ADMIN))).status == 200
    assert [reply.status for reply in await ask_each(service, sample)] == [404, 404]
    assert (await service.ask(Request("POST", f"{change}/load", headers=ADMIN))).status == 200
    assert [reply.status for reply in await ask_each(service, sample)] == [200, 200]
    swapped = await service.metrics()
    assert swapped.total("gan_bundle_swaps_total", bundle="rgb", result="loaded") == 2  # one for each worker


async def test_sighup_reaches_every_worker(service: Service, folder: Path) -> None:
    """A bundle that is removed from the folder disappears from all workers, and comes back with it."""
    hidden = folder / ".cond"
    (folder / "cond").rename(hidden)
    loaded = service.log().count("bundles: ")
    service.send(signal.SIGHUP)
    service.wait_for_log("bundles: ", loaded + 2)
    assert [reply.status for reply in await ask_each(service, Request("GET", "/sample?bundle=cond"))] == [404, 404]
    hidden.rename(folder / "cond")
    service.send(signal.SIGHUP)
    service.wait_for_log("bundles: ", loaded + 4)
    assert [reply.status for reply in await ask_each(service, Request("GET", "/sample?bundle=cond"))] == [200, 200]


async def test_keys_are_read_again_in_every_worker(folder: Path, tmp_path: Path) -> None:
    """A bad file changes nothing in any of them; a key that is taken out of a good one is refused by all."""
    file = tmp_path / "keys"
    file.write_text("team-a alpha\n")
    alpha, beta = (Request("GET", "/bundles", headers=(("X-API-Key", key),)) for key in ("alpha", "beta"))
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2, api_keys_file=file) as service:
        file.write_text("")
        service.send(signal.SIGHUP)
        service.wait_for_log("keys not read again", 2)
        assert [reply.status for reply in await ask_each(service, alpha)] == [200, 200]
        file.write_text("team-a beta\n")
        service.send(signal.SIGHUP)
        service.wait_for_log("keys have changed", 2)
        assert [reply.status for reply in await ask_each(service, alpha)] == [401, 401]
        assert [reply.status for reply in await ask_each(service, beta)] == [200, 200]


async def test_a_new_certificate_is_taken_up_by_every_worker(
    folder: Path, tmp_path: Path, make_certificate: Callable[..., tuple[Path, Path]]
) -> None:
    """After SIGHUP new connections get it from each of them; one that can't be used changes nothing in any."""
    certificate, key = make_certificate(tmp_path, "used")
    with running(
        bundles=folder, default_bundle="tiny", device="cpu", workers=2, tls_cert_file=certificate, tls_key_file=key
    ) as service:

        def seen() -> set[str]:
            """The certificates of as many connections as reach both workers, while all are open."""
            trust = ssl.create_default_context()
            trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
            with contextlib.ExitStack() as stack:
                ones = [
                    stack.enter_context(trust.wrap_socket(socket.create_connection(("127.0.0.1", service.port), 60)))
                    for _ in range(4)
                ]
                return {ssl.DER_cert_to_PEM_cert(one.getpeercert(binary_form=True) or b"").strip() for one in ones}

        def read(name: str) -> str:
            return Path(tmp_path / name).read_text().strip()

        old = read("used.pem")
        assert await asyncio.to_thread(seen) == {old}
        new, new_key = make_certificate(tmp_path, "new")
        new_key.replace(key)
        service.send(signal.SIGHUP)
        service.wait_for_log("the old one stays", 2)
        assert await asyncio.to_thread(seen) == {old}
        new.replace(certificate)
        times = service.log().count("certificate read")
        service.send(signal.SIGHUP)
        service.wait_for_log("certificate read", times + 2)
        assert await asyncio.to_thread(seen) == {read("used.pem")} != {old}


async def test_limits_of_keys_hold_for_all_workers_together(folder: Path, tmp_path: Path) -> None:
    """Whichever worker is asked, a name has its images once, and still owes them after the keys were read again."""
    file = tmp_path / "keys"
    file.write_text("team-a alpha\nteam-b beta\n")
    alpha, beta = (Request("GET", "/sample", headers=(("X-API-Key", key),)) for key in ("alpha", "beta"))
    with running(
        bundles=folder,
        default_bundle="tiny",
        device="cpu",
        workers=2,
        api_keys_file=file,
        key_images_per_s=1 / 3600,
    ) as service:
        assert sorted(reply.status for reply in await ask_each(service, alpha)) == [200, 429]
        file.write_text("team-b alpha\nteam-a beta\n")
        service.send(signal.SIGHUP)
        service.wait_for_log("keys have changed", 2)
        refused = await ask_each(service, beta)
        assert [reply.status for reply in refused] == [429, 429]
        assert all(3500 < int(reply.headers["retry-after"]) <= 3600 for reply in refused)
        assert sorted(reply.status for reply in await ask_each(service, alpha)) == [200, 429]
        assert (await service.metrics()).total("gan_rejected_total", reason="rate_limited") >= 4


async def test_what_one_worker_is_refused_changes_nothing_in_the_others(service: Service, folder: Path) -> None:
    """A bundle that fails verification is refused, and all workers keep the loaded version."""
    weights = folder / "rgb" / "generator.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    try:
        reply = await service.ask(Request("POST", "/v2/repository/models/rgb/load", headers=ADMIN))
        assert reply.status == 422
    finally:
        weights.write_bytes(good)
    assert [reply.status for reply in await ask_each(service, Request("GET", "/sample?bundle=rgb"))] == [200, 200]


async def test_a_stop_under_load_loses_no_accepted_request(folder: Path) -> None:
    """SIGTERM reaches the supervisor alone; every worker drains, and the exit code is 0."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        async with Client(service.port) as client, asyncio.TaskGroup() as group:
            load = Load(client)
            group.create_task(load.run())
            await load.is_on.wait()
            service.send(signal.SIGTERM)
            code = await asyncio.to_thread(service.wait)
        logged = {str(line.get("request_id")) for line in service.log_lines()}
    assert code == 0
    answered = [exchange for exchange in load.exchanges if exchange.outcome == 200]
    cut = [e for e in load.exchanges if e.outcome == UNANSWERED and dict(e.request.headers)["X-Request-ID"] in logged]
    assert answered
    assert not cut
    assert all(exchange.outcome != "reply cut off" for exchange in load.exchanges)


async def test_a_worker_that_dies_ends_the_service_after_a_drain(folder: Path) -> None:
    """The other worker answers its accepted requests, and the exit code reports the failure."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2, drain_delay_s=1) as service:
        connections = [await Connection.open(service.port) for _ in range(2)]
        for connection in connections:
            assert (await connection.ask(Request("GET", "/sample"))).status == 200
        os.kill(workers_of(service)[0], signal.SIGKILL)
        service.wait_for_log("ended with exit code -9: stopping the others")
        outcomes = []
        for connection in connections:
            try:
                outcomes.append((await connection.ask(Request("GET", "/sample"))).status)
            except NoReply:
                outcomes.append(0)
        assert sorted(outcomes) == [0, 200]
        assert await asyncio.to_thread(service.wait) == 1


async def test_a_worker_that_stands_still_makes_the_whole_service_not_ready(folder: Path) -> None:
    """Every worker then says not ready, and metrics are refused without the stopped worker's share."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        connections = [await Connection.open(service.port) for _ in range(2)]
        ready = Request("GET", "/readyz")
        assert [(await connection.ask(ready)).status for connection in connections] == [200, 200]
        halted = workers_of(service)[0]
        os.kill(halted, signal.SIGSTOP)
        try:
            replies = [asyncio.ensure_future(connection.ask(Request("GET", "/metrics"))) for connection in connections]
            done, _ = await asyncio.wait(replies, return_when=asyncio.FIRST_COMPLETED)
            [refused] = done
            assert refused.result().status == 503
            awake = connections[replies.index(refused)]
            async with asyncio.timeout(60):
                while (reply := await awake.ask(ready)).status == 200:
                    pass
            assert "does not answer" in json.loads(reply.body)["detail"]
            async with asyncio.timeout(60):  # new connections go to the other worker
                for connection in [await Connection.open(service.port) for _ in range(4)]:
                    assert (await connection.ask(ready)).status == 503
                    connection.close()
        finally:
            os.kill(halted, signal.SIGCONT)
        async with asyncio.timeout(60):
            while (await awake.ask(ready)).status != 200:  # the stopped worker recovers
                pass
        await asyncio.wait(replies)


async def test_nobody_waits_for_the_answer_of_a_worker_that_has_ended(folder: Path) -> None:
    """Questions from before and after its end return, so that a scrape does not hold up the drain."""
    with running(bundles=folder, device="cpu", workers=2, admin_keys="root", drain_delay_s=60) as service:
        connections = [await Connection.open(service.port) for _ in range(2)]
        for connection in connections:
            assert (await connection.ask(Request("GET", "/livez"))).status == 200
        victim, other = workers_of(service)
        os.kill(victim, signal.SIGSTOP)
        load = Request("POST", "/v2/repository/models/rgb/load", headers=ADMIN)
        loads = [asyncio.ensure_future(connection.ask(load)) for connection in connections]
        os.kill(victim, signal.SIGKILL)
        async with asyncio.timeout(30):
            replies = await asyncio.gather(*loads, return_exceptions=True)
            assert [reply.status for reply in replies if isinstance(reply, Reply)] == [503]
            assert (await service.get("/metrics")).status == 503
        os.kill(other, signal.SIGKILL)
        assert await asyncio.to_thread(service.wait) == 1


@contextlib.asynccontextmanager
async def slow_request(service: Service) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection with a request whose body, `SLOW_BODY`, is not sent yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    head = f"POST /sample HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(SLOW_BODY)}"
    writer.write(f"{head}\r\nExpect: 100-continue\r\n\r\n".encode())
    assert b" 100 " in await reader.readline()  # it is being read
    await reader.readline()
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_a_signal_to_all_processes_counts_once(folder: Path) -> None:
    """With systemd a worker gets the signal twice, also from the supervisor, and still drains."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        workers = workers_of(service)
        async with slow_request(service) as (reader, writer):
            service.send(signal.SIGTERM)
            service.wait_for_log("SIGTERM: draining", 2)
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):  # the idle one is quick
                    os.kill(pid, signal.SIGTERM)
            writer.write(SLOW_BODY)
            assert await reader.readline()
        assert await asyncio.to_thread(service.wait) == 0
        assert "again" not in service.log()


async def test_a_second_signal_stops_all_workers_at_once(folder: Path) -> None:
    """It stops them as it stops a single process."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        async with slow_request(service) as (reader, _):
            service.send(signal.SIGTERM)
            service.wait_for_log("SIGTERM: draining", 2)
            service.send(signal.SIGTERM)
            assert await asyncio.to_thread(service.wait) == 128 + signal.SIGTERM
            assert b" 503 " in await reader.readline()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_while_workers_are_being_started_ends_them_in_order(folder: Path, workers: int) -> None:
    """Workers that do not handle signals yet end too; nothing was accepted, so the exit code is 0."""
    with starting(folder) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < workers:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_sighup_while_workers_are_being_started_is_heeded_later_and_ends_none(folder: Path) -> None:
    """Workers can't handle it yet and may miss the change, so each reloads once it has started."""
    with starting(folder) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while len(children.read_text().split()) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        awaited = ["serving http", "bundles: ", "bundles: "]
        while awaited:
            line = process.stderr.readline()
            assert line
            awaited = [words for n, words in enumerate(awaited) if words not in line or words in awaited[:n]]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A service of two workers that has just been started."""
    command = [sys.executable, "-m", "service", "--workers", "2", "--port", "0", "--bundles", str(folder)]
    with subprocess.Popen(
        [*command, "--device", "cpu", "--default-bundle", "tiny"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="changes another process' limits")
async def test_a_connection_that_a_worker_has_no_file_descriptor_for_is_not_counted(folder: Path) -> None:
    """The kernel closes it, the log says so, and later connections are still balanced."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        first, second = [await Connection.open(service.port) for _ in range(2)]
        there = worker_of(await first.ask(Request("GET", "/livez")))
        assert worker_of(await second.ask(Request("GET", "/livez"))) != there
        pid = workers_of(service)[0]
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        with pytest.raises(NoReply):
            await service.get("/livez")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        service.wait_for_log("no file descriptor was left")
        assert (await first.ask(Request("GET", "/metrics"))).status == 200  # the supervisor has heard of it, then
        third = await Connection.open(service.port)
        assert worker_of(await third.ask(Request("GET", "/livez"))) == there
        for connection in (first, second, third):
            connection.close()


class Process:
    """Records the signals that it is sent."""

    def __init__(self) -> None:
        self.signals: list[signal.Signals] = []

    def send_signal(self, number: signal.Signals) -> None:
        """Record a signal."""
        self.signals.append(number)


@contextlib.asynccontextmanager
async def idle_workers(count: int) -> AsyncIterator[list[Worker]]:
    """The supervisor's side of workers whose own side never reads."""
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(1, count + 1):
            (connections, its_connections), (messages, its_messages) = socket.socketpair(), socket.socketpair()
            for end in (connections, its_connections, messages, its_messages):
                stack.enter_context(end)
            process: Any = Process()
            workers.append(Worker(number, process, connections, await Channel.open(messages)))
            workers[-1].last_heartbeat = time.monotonic()
            stack.callback(workers[-1].channel.close)
        yield workers


def signals_to(worker: Worker) -> list[signal.Signals]:
    """The signals that its process was sent."""
    process: Any = worker.process
    return list(process.signals)


async def test_a_worker_that_is_silent_for_too_long_is_killed() -> None:
    """Other workers are not killed."""
    async with idle_workers(2) as (dead, alive):
        dead.last_heartbeat = time.monotonic() - DEAD_S - 1
        kill_dead_workers([dead, alive])
        assert signals_to(dead) == [signal.SIGKILL]
        assert signals_to(alive) == []


async def test_a_suspended_service_blames_no_worker() -> None:
    """After a suspension, such as `docker pause`, silence counts anew; a worker that stays silent is killed."""
    async with idle_workers(1) as (worker,):
        heartbeat = worker.last_heartbeat = time.monotonic() - 2 * DEAD_S
        worker.discount_silence(2 * DEAD_S)
        assert not worker.is_unresponsive
        kill_dead_workers([worker])
        assert signals_to(worker) == []
        worker.last_heartbeat = heartbeat
        worker.discount_silence(0.01)
        assert worker.is_unresponsive
        kill_dead_workers([worker])
        assert signals_to(worker) == [signal.SIGKILL]


async def test_a_suspension_puts_no_heartbeat_into_the_future() -> None:
    """A worker with a heartbeat right after a suspension does not get that time in advance."""
    async with idle_workers(1) as (worker,):
        worker.discount_silence(1000)
        assert worker.silent_s >= 0


async def test_connections_go_to_workers_that_are_ready() -> None:
    """Workers that still load get none; if no worker is ready, all get the same number."""
    async with idle_workers(2) as workers:

        def shared(connections: int) -> list[int]:
            """Hand out this many more connections; returns the number that each worker has."""
            for _ in range(connections):
                connection = socket.socket()
                hand_out(connection, workers)
                assert connection.fileno() == -1
            return [worker.connections for worker in workers]

        first, second = workers
        assert shared(4) == [2, 2]
        second.reasons = dict.fromkeys(second.reasons, None)
        assert shared(4) == [2, 6]
        first.reasons = dict.fromkeys(first.reasons, None)
        assert shared(6) == [7, 7]


class LonelyServer:
    """A server that waits for `supervisor_lost`."""

    def __init__(self) -> None:
        self.is_alone = asyncio.Event()
        self.supervisor_lost = self.is_alone.set

    def reasons(self) -> dict[str, str | None]:
        """No reasons."""
        return {}

    def take(self, connection: socket.socket) -> None:
        """Not called."""
        raise AssertionError(connection)

    def stop_at_once(self, number: int) -> None:
        """Not called."""
        raise AssertionError(number)


async def test_a_worker_whose_supervisor_is_cut_off_in_a_message_is_alone() -> None:
    """Half a message is dropped, and the worker learns that its supervisor is gone; `leave` works before `join`."""
    (messages, its_messages), (connections, its_connections) = socket.socketpair(), socket.socketpair()
    with connections, its_connections:
        others = asyncio.all_tasks()
        link = WorkerLink(messages, connections)
        await link.leave()
        server = LonelyServer()
        await link.join(server)
        its_messages.sendall(b'{"others": {"rea')
        its_messages.close()
        await asyncio.wait_for(server.is_alone.wait(), 60)
        for task in asyncio.all_tasks() - others:
            task.cancel()
        asyncio.get_running_loop().remove_reader(connections)


async def test_who_asks_before_all_workers_exist_hears_that_one_is_missing() -> None:
    """A worker that does not exist yet, or ends meanwhile, counts as a missing answer."""
    async with idle_workers(2) as (answering, ending):
        answers = asyncio.create_task(ask_all([answering, ending], 3, {"name": "metrics"}, within_s=60))
        await asyncio.sleep(0)  # it has asked
        answering.answers(0, "42")
        ending.end()
        assert await answers == ["42", None, None]
        assert await ask_all([ending], 1, {"name": "metrics"}, within_s=60) == [None]
        assert await ask_all([], 2, {"name": "metrics"}, within_s=60) == [None, None]


async def test_nobody_waits_for_a_worker_longer_than_it_wants() -> None:
    """A late answer counts as missing, and is ignored when it comes."""
    async with idle_workers(1) as (worker,):
        assert await ask_all([worker], 1, {"name": "metrics"}, within_s=0) == [None]
        worker.answers(0, "too late")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing here tells when somebody else's child ends")
async def test_workers_end_with_their_supervisor(folder: Path) -> None:
    """If the supervisor is killed, its workers end too."""
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers=2) as service:
        ends = [os.pidfd_open(pid) for pid in workers_of(service)]
        service.send(signal.SIGKILL)
        for end in ends:
            readable, _, _ = await asyncio.to_thread(select.select, [end], [], [], 60)
            assert readable
            os.close(end)


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The service with a command line, until it ends."""
    command = [sys.executable, "-m", "service", "--workers", "2", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(["--bundles", str(ROOT / "docs")], 3, "docs: no sub-folder with a manifest.json\n", id="bundles"),
        pytest.param(["--device", "cpu", "--precision", "tf32"], 2, "(or --precision): there is no tf32", id="setting"),
    ],
)
def test_why_workers_cannot_start_is_said_once(arguments: list[str], code: int, says: str) -> None:
    """One line for all of them, and the exit code of a single process."""
    ended = start(["--port", "0", *arguments])
    assert ended.returncode == code
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


async def test_the_log_says_what_is_served_where_and_by_how_many(
    service: Service, tiny_bundles: dict[str, Bundle]
) -> None:
    """Once, when the last worker has started."""
    [line] = [line for line in service.log_lines() if line["message"].startswith("serving ")]
    assert line["message"] == f"serving http://127.0.0.1:{service.port}"
    assert set(line["bundles"].split()) == {f"{one.name}@{one.version}" for one in tiny_bundles.values()}
    assert (line["device"], line["workers"]) == ("cpu", 2)


def test_the_share_of_the_queue_must_hold_a_largest_request() -> None:
    """Otherwise the largest request would get 429 every time."""
    ended = start(["--max-queued-images", "8000"])
    assert ended.returncode == 2
    assert "GAN_MAX_COUNT (4096) is over GAN_MAX_QUEUED_IMAGES (8000) / GAN_WORKERS (2)" in ended.stderr
