"""What happens to clients when things go wrong around a real service process: small versions of benchmarks/."""

import asyncio
import io
import json
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import disconnects, drain, swaps
from benchmarks.faults.gated import HELD
from benchmarks.serving.growth import write_wide
from benchmarks.tools.client import Client, Reply, Request
from benchmarks.tools.process import Service, running
from models.bundle import read_bundle
from models.inference.pixels import UInt8
from service.engine import health
from service.server import server

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

NEVER_S = 1e6
IMAGES, MOST = 10_000, 4096  # of the seed that everyone asks for; in one request
SEED = 7


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one bundle: the paper's nets with random weights, whose kernels are those of real work."""
    return write_wide(tmp_path_factory.mktemp("bundles"), 1200).parent


@pytest.fixture(scope="module")
def gated(bundles: Path) -> Iterator[Service]:
    """A service process whose engine can be held; its probes call nothing stuck."""
    times = [str(NEVER_S)] * 3
    with running("benchmarks.faults.gated", times, bundles=bundles, device="cpu", max_queued_images=8192) as service:
        yield service


def hold(service: Service) -> Callable[[], None]:
    """Block the engine's thread; returns what lets it go on."""
    times = service.log().count(HELD)
    service.send(signal.SIGUSR1)
    service.wait_for_log(HELD, times + 1)
    return lambda: service.send(signal.SIGUSR2)


async def wait_for(service: Service, target: str, status: int) -> Reply:
    """The first reply with this status."""
    while (reply := await service.get(target)).status != status:  # noqa: ASYNC110 - another process
        await asyncio.sleep(disconnects.POLL_S)
    return reply


# Health


async def test_a_stuck_engine_is_told_and_a_recovered_one_works(bundles: Path) -> None:
    """A batch that does not end turns /readyz, then /livez, while every probe answers; once it ends all is well."""
    with running("benchmarks.faults.gated", ["0.2", "0.5", "1e6"], bundles=bundles, device="cpu") as service:
        release = hold(service)
        waiting = asyncio.ensure_future(service.get(f"/sample?seed={SEED}"))
        not_ready = await wait_for(service, "/readyz", 503)
        assert json.loads(not_ready.body)["code"] == "not_ready"
        assert "engine" in json.loads((await wait_for(service, "/livez", 503)).body)["detail"]
        assert (await service.get("/startupz")).status == 200
        assert (await service.metrics()).total("gan_ready") == 0
        assert not waiting.done()
        release()
        assert (await waiting).status == 200
        assert (await service.get("/livez")).status == (await service.get("/readyz")).status == 200


async def test_a_process_whose_engine_never_comes_back_ends_itself(bundles: Path) -> None:
    """Nothing outside need look at /livez: who still waits is answered, and the exit code says that it failed."""
    with running("benchmarks.faults.gated", ["0.2", "0.5", "1"], bundles=bundles, device="cpu") as service:
        hold(service)
        async with Client(service.port) as client:
            reply = await client.ask(Request("GET", "/sample"))
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert service.wait() == 1
        assert "ending the process" in service.log()


def test_health_tells_of_a_stuck_engine_in_time() -> None:
    """The times that the tests above shorten: traffic goes elsewhere within 10 s, the process is replaced later."""
    assert health.NOT_READY_AFTER_S < 10 < health.DEAD_AFTER_S
    assert server.LINGER_S < health.DEAD_AFTER_S


async def test_a_full_queue_refuses_politely_and_stays_healthy(gated: Service) -> None:
    """Behind a held engine the queue fills: then 429 with Retry-After, though busy is not dead, and all is answered."""
    before = await gated.metrics()
    release = hold(gated)
    async with Client(gated.port) as client:
        first = asyncio.ensure_future(client.ask(Request("GET", "/sample")))
        await disconnects.until(gated, "gan_batches_total", before.total("gan_batches_total") + 1)
        large = Request("GET", f"/sample?count={MOST}&format=png&seed={SEED}")
        accepted = [asyncio.ensure_future(client.ask(large)) for _ in range(2)]
        await disconnects.until(gated, "gan_queue_images", 2 * MOST)
        refused = await client.ask(Request("GET", "/sample"))
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await gated.get("/livez")).status == (await gated.get("/readyz")).status == 200
        release()
        assert {reply.status for reply in await asyncio.gather(first, *accepted)} == {200}
        assert (await client.ask(Request("GET", "/sample"))).status == 200


# Departures


async def test_what_clients_leave_behind_in_the_queue_is_not_computed(gated: Service) -> None:
    """Two hundred ask and hang up behind a held engine: nothing of theirs is computed, and nobody else notices."""
    storm, neighbours_alike = await disconnects.storm_on_held_engine(gated, 200)
    assert neighbours_alike
    assert storm.grown("gan_requests_total", status="499") == 200
    assert storm.grown("gan_cancelled_total", phase="queued") == 200
    assert storm.grown("gan_images_total") == disconnects.NEIGHBOURS * disconnects.NEIGHBOUR_COUNT + 1


async def test_clients_that_leave_at_any_moment_hurt_nobody(gated: Service) -> None:
    """Some leave waiting, some in a batch, some answered: neighbours get their bytes, and each is counted once."""
    storm, neighbours_alike, answered = await disconnects.storm_on_busy_engine(gated, 200)
    left = storm.grown("gan_requests_total", route="/sample", status="499")
    finished = storm.grown("gan_requests_total", route="/sample", status="200") - disconnects.NEIGHBOURS
    assert neighbours_alike
    assert left + finished == 200
    assert answered <= finished
    queued = storm.grown("gan_cancelled_total", phase="queued")
    wasted = storm.grown("gan_images_total") - disconnects.NEIGHBOURS * disconnects.NEIGHBOUR_COUNT
    assert finished * disconnects.COUNT <= wasted <= (200 - queued) * disconnects.COUNT


# The end, and the next one


async def test_a_stop_under_load_loses_nothing(bundles: Path) -> None:
    """SIGTERM while sixteen clients keep it busy: every request it took in is answered, and it ends with 0."""
    stop = await drain.stop_under_load(bundles)
    assert stop.exit_code == 0
    assert stop.lost() == []


async def test_a_restart_behind_a_proxy_is_not_noticed(bundles: Path) -> None:
    """Two processes, one replaced under load by a third: clients with open connections see not one failure."""
    for delay_s in (drain.DRAIN_DELAY_S, 30.0):  # on a busy machine the proxy and the clients need longer to notice
        rolled = await drain.roll(bundles, 1, delay_s)
        if max(rolled.left_s) < delay_s:
            break
    assert rolled.exit_codes == [0]
    assert {exchange.outcome for exchange in rolled.exchanges} == {200}


async def test_bundles_are_swapped_under_load(bundles: Path, tmp_path: Path) -> None:
    """Versions come and go, one of them damaged: no request fails, and each has the bytes of the version it names."""
    versions = swaps.make_versions(read_bundle(bundles / "wide-1200"), tmp_path)
    link = swaps.Link(tmp_path / "bundles")
    link.turn(versions[0])
    with running(bundles=tmp_path / "bundles", device="cpu") as service:
        load, _ = await swaps.swap_under_load(service, link, versions, 4)
    assert {exchange.outcome for exchange in load.exchanges} == {200}
    assert load.wrong_bytes == 0
    assert len(load.versions) == 2


# The same seed


def images(reply: Reply) -> UInt8:
    assert reply.status == 200, reply.body
    return np.asarray(np.load(io.BytesIO(reply.body)))


def asked(first: int, count: int, seed: int = SEED) -> Request:
    return Request("GET", f"/sample?seed={seed}&first_index={first}&count={count}&format=npy", count)


async def in_pieces(ask: Callable[[Request], Awaitable[Reply]], size: int) -> UInt8:
    """All images of the seed in requests of this many, one after the other."""
    starts = range(0, IMAGES, size)
    return np.concatenate([images(await ask(asked(start, min(size, IMAGES - start)))) for start in starts])


async def in_a_crowd(client: Client, sizes: Sequence[int]) -> UInt8:
    """All images of the seed at once, in requests of changing sizes, beside as many for other seeds."""
    pieces, start = list[Request](), 0
    while start < IMAGES:
        count = min(sizes[len(pieces) % len(sizes)], IMAGES - start)
        pieces.append(asked(start, count))
        start += count
    strangers = [asked(index, 33, seed=index) for index in range(len(pieces))]
    mixed = [request for pair in zip(pieces, strangers, strict=True) for request in pair]
    replies = await asyncio.gather(*map(client.ask, mixed))
    return np.concatenate([images(reply) for reply in replies[::2]])


async def test_a_seed_has_the_same_bytes_everywhere(bundles: Path) -> None:
    """Ten thousand images: alone, in a crowd, one by one, from another process, and after a restart."""
    start = partial(Service, bundles=bundles, device="cpu", max_queued_images=65536)
    with ExitStack() as stack:
        service, other = await asyncio.gather(asyncio.to_thread(start), asyncio.to_thread(start))
        stack.callback(service.stop)
        stack.callback(other.stop)
        async with Client(service.port) as client:
            expected = await in_pieces(client.ask, MOST)
            assert expected.shape == (IMAGES, 28, 28, 1)
            np.testing.assert_array_equal(await in_a_crowd(client, (1, 37, 512, 700, 3)), expected)
            for index in range(0, IMAGES, 397):
                np.testing.assert_array_equal(images(await client.ask(asked(index, 1))), expected[index : index + 1])
        async with Client(other.port) as client:
            np.testing.assert_array_equal(await in_pieces(client.ask, 2500), expected)
    with running(bundles=bundles, device="cpu") as restarted:
        async with Client(restarted.port) as client:
            np.testing.assert_array_equal(await in_pieces(client.ask, MOST), expected)
