"""The thread between an event loop and a device: calls in order, whatever becomes of them or of their callers."""

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from models.inference.tiles import Tiles
from models.spec import LatentSpec
from service.engine.batcher import DeviceFailed, OutOfMemory, Part
from service.engine.engine import SampleLane, SamplePayload
from service.engine.engine_thread import EngineThread

CPU = torch.device("cpu")


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    one = EngineThread("test")
    yield one
    one.stop()


def test_calls_run_in_order_on_one_thread_that_is_not_the_loops(thread: EngineThread) -> None:
    """What is sent first runs first, and nothing runs beside it."""

    async def story() -> None:
        ran: list[int] = []
        await asyncio.gather(*(thread.run(ran.append, n) for n in range(200)))
        assert ran == list(range(200))
        idents = {await thread.run(threading.get_ident) for _ in range(3)}
        assert len(idents) == 1
        assert threading.get_ident() not in idents

    asyncio.run(story())


def throw(error: BaseException) -> None:
    raise error


def test_it_begins_with_what_it_was_told() -> None:
    """Before the first call, on the same thread, such as to choose a stream."""

    async def story() -> None:
        began: list[int] = []
        one = EngineThread("test", lambda: began.append(threading.get_ident()))
        assert [await one.run(threading.get_ident)] == began
        one.stop()

    asyncio.run(story())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_begin_has_ended() -> None:
    """Nobody waits for it."""

    async def story() -> None:
        one = EngineThread("test", partial(throw, RuntimeError("CUDA error: no device")))
        with pytest.raises(DeviceFailed, match="thread has ended"):
            await one.run(math.sqrt, 4)
        assert not one.is_alive
        one._thread.join()  # noqa: SLF001 - or what is said of its end would come to another test

    asyncio.run(story())


def test_an_exception_comes_back_as_it_is(thread: EngineThread) -> None:
    """The caller gets the error itself, and the thread takes the next call."""

    async def story() -> None:
        error = LookupError("here")
        with pytest.raises(LookupError) as raised:
            await thread.run(throw, error)
        assert raised.value is error
        assert await thread.run(math.sqrt, 4) == 2

    asyncio.run(story())


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, StopIteration, BaseException]
)
def test_what_would_end_the_caller_comes_back_as_an_error(thread: EngineThread, kind: type[BaseException]) -> None:
    """An exit, a cancellation or a StopIteration in a call stops neither thread nor loop nor task, and is not lost."""

    async def story() -> None:
        with pytest.raises(RuntimeError, match=kind.__name__) as raised:
            await thread.run(throw, kind("why"))
        assert isinstance(raised.value.__cause__, kind)
        assert thread.is_alive
        assert await thread.run(math.sqrt, 4) == 2

    asyncio.run(story())


def test_a_caller_that_leaves_stops_neither_the_call_nor_the_next(thread: EngineThread) -> None:
    """A cancelled future's call ends unheard, whether it gives a result or raises."""

    async def story() -> None:
        gate = threading.Event()
        leavers: list[asyncio.Future[Any]] = [thread.run(gate.wait, 60), thread.run(throw, LookupError())]
        for leaver in leavers:
            leaver.cancel()
        after = thread.run(math.sqrt, 9)
        gate.set()
        assert await after == 3
        assert all(leaver.cancelled() for leaver in leavers)

    asyncio.run(story())


def test_a_loop_that_has_closed_meanwhile_harms_the_thread_in_nothing(thread: EngineThread) -> None:
    """The loop ends while a call runs: the answer goes nowhere, and another loop's calls are served."""
    gate, sent = threading.Event(), []

    async def leave() -> None:
        sent.append(thread.run(gate.wait, 60))

    asyncio.run(leave())
    gate.set()

    async def story() -> None:
        assert await thread.run(math.sqrt, 9) == 3

    asyncio.run(story())
    assert not sent[0].done()


def test_a_thread_that_has_ended_refuses_at_once() -> None:
    """Calls that it had not come to, and all later ones, fail as on a lost device instead of waiting for ever."""

    async def story() -> None:
        one, gate = EngineThread("test"), threading.Event()
        running = one.run(gate.wait, 60)
        one.stop()
        behind = one.run(math.sqrt, 4)
        gate.set()
        assert await running
        for late in (behind, one.run(math.sqrt, 4)):
            with pytest.raises(DeviceFailed, match="has ended"):
                await late
        with pytest.raises(DeviceFailed):
            await one.run(math.sqrt, 4)

    asyncio.run(story())


class Heavy:
    """Stands for a tensor: can be watched."""


def test_the_thread_keeps_nothing_of_a_call_that_is_over(thread: EngineThread) -> None:
    """While it waits for the next call, arguments and result belong to whoever still wants them."""

    async def story() -> None:
        argument = Heavy()
        seen = weakref.ref(argument)
        result = weakref.ref(await thread.run(lambda _: Heavy(), argument))
        del argument
        await thread.run(int)  # the thread has left the first call for good
        assert (seen(), result()) == (None, None)

    asyncio.run(story())


def absurd(*_: Any) -> torch.Tensor:
    return torch.empty(1 << 60, dtype=torch.uint8)


def test_memory_is_free_again_before_a_failed_batch_is_retried(thread: EngineThread) -> None:
    """Once the caller has dropped the error, nothing of the failed call is left, even without a garbage collector."""
    seen: list[weakref.ref[Heavy]] = []

    lane = SampleLane("toy", LatentSpec(dim=4, distribution="normal"), Tiles(absurd, [4]), CPU)

    def overflow(payload: Heavy) -> None:
        tensor = Heavy()
        seen.extend([weakref.ref(tensor), weakref.ref(payload)])
        lane.run([Part(SamplePayload(0, 0, None, 1.0), 0, 1)])

    async def story() -> None:
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(OutOfMemory):
                await thread.run(overflow, Heavy())
            await thread.run(int)
            assert [one() for one in seen] == [None, None]
        finally:
            gc.enable()

    asyncio.run(story())
