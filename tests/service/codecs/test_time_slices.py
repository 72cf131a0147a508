"""Long work on the event loop is divided into slices, so that other callbacks and other work run in between."""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from service.codecs import time_slices as slices
from service.codecs.time_slices import OffLoopWork, Steps, TimeSlices, timed_call

Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.anyio


async def on_thread(call: OffLoopWork) -> tuple[Any, float]:
    return await asyncio.to_thread(timed_call, call.work)


async def on_no_thread(call: OffLoopWork) -> tuple[Any, float]:
    raise AssertionError(call)


@pytest.fixture
def one_step_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a whole slice and the same time, by a clock of our own."""
    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    monkeypatch.setattr("service.codecs.time_slices.time.perf_counter", partial(next, itertools.count(0.0, 1e-4)))


def steps(name: str, count: int, done: list[str]) -> Steps[str]:
    for _ in range(count):
        done.append(name)
        yield None
    return name


async def test_work_that_fits_into_one_slice_runs_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small request is done before its coroutine first gives up control."""
    monkeypatch.setattr(slices, "SLICE_S", 60.0)
    work = TimeSlices().run(steps("a", 1000, []), on_no_thread)
    with pytest.raises(StopIteration) as end:
        work.send(None)
    result, took_s = end.value.value
    assert result == "a"
    assert 0 < took_s < 60


@pytest.mark.usefixtures("one_step_a_slice")
async def test_one_turn_of_the_loop_holds_one_slice() -> None:
    """Five jobs wait; each turn of the loop runs one slice of one of them."""
    done: list[str] = []
    together = TimeSlices()
    works = [asyncio.create_task(together.run(steps(name, 20, done), on_no_thread)) for name in "abcde"]
    await asyncio.sleep(0)  # new work runs its first slice at once
    turns = 0
    while len(done) < 100:
        before = len(done)
        await asyncio.sleep(0)
        assert len(done) - before <= 1
        turns += 1
        assert turns < 1000
    assert [name for name, _ in await asyncio.gather(*works)] == list("abcde")


async def test_much_new_work_does_not_all_start_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past a limit, new work waits for the next turn, in which other new work may start at once again."""
    monkeypatch.setattr(slices, "NEW_WORK_S", 1e-9)
    done: list[str] = []
    together = TimeSlices()
    works = [asyncio.create_task(together.run(steps(name, 5, done), on_no_thread)) for name in "abc"]
    await asyncio.sleep(0)
    assert done == ["a"] * 5
    await asyncio.gather(*works)
    assert sorted(done) == sorted("abc" * 5)
    await asyncio.sleep(0)
    with pytest.raises(StopIteration):
        together.run(steps("d", 5, done), on_no_thread).send(None)


@pytest.mark.usefixtures("one_step_a_slice")
async def test_half_of_the_slices_go_to_the_oldest_job_and_half_to_the_cheapest(until: Until) -> None:
    """Long jobs finish one after the other, and a short job does not wait for all of them."""
    done: list[str] = []
    together = TimeSlices()
    works = [asyncio.create_task(together.run(steps(name, 200, done), on_no_thread)) for name in "abc"]
    await asyncio.sleep(0)
    assert done == list("abc")
    await until(lambda: len(done) > 50)
    before = len(done)
    await together.run(steps("short", 5, done), on_no_thread)
    assert len(done) - before <= 5 + 5 + 1 + 2  # its own, the oldest job's in between, and those around its start
    await works[0]
    assert done.count("a") == 200
    assert 80 <= done.count("b") <= 120
    assert 80 <= done.count("c") <= 120
    assert [name for name, _ in await asyncio.gather(*works)] == list("abc")


@pytest.mark.usefixtures("one_step_a_slice")
async def test_cancelled_work_ends_and_the_other_goes_on(until: Until) -> None:
    """The steps of a cancelled job are not run to their end."""
    done: list[str] = []
    together = TimeSlices()
    given_up, other = (asyncio.create_task(together.run(steps(name, 50, done), on_no_thread)) for name in "ab")
    await until(lambda: len(done) > 10)
    given_up.cancel()
    assert (await other)[0] == "b"
    assert given_up.cancelled()
    assert done.count("a") < 50
    assert done.count("b") == 50


async def test_off_loop_work_is_called_on_a_thread() -> None:
    """The loop goes on meanwhile, and the result is sent into the steps."""
    gate = threading.Event()

    def call() -> tuple[str, threading.Thread]:
        assert gate.wait(60)
        return "result", threading.current_thread()

    def work() -> Steps[Any]:
        yield None
        result = yield OffLoopWork(call, 1)
        yield None
        return result

    running = asyncio.create_task(TimeSlices().run(work(), on_thread))
    await asyncio.sleep(0)
    gate.set()
    (result, thread), took_s = await running
    assert result == "result"
    assert thread is not threading.current_thread()
    assert took_s > 0


@pytest.mark.parametrize("where", ["in a step", "on a thread"])
async def test_an_error_ends_the_work(where: str) -> None:
    """It reaches the caller, whether a step raised it or a call on a thread."""

    def fail() -> Any:
        raise ValueError(where)

    def work() -> Steps[None]:
        yield None
        yield OffLoopWork(fail, 1) if where == "on a thread" else fail()
        raise AssertionError

    run: Callable[[], Awaitable[Any]] = partial(TimeSlices().run, work(), on_thread)
    with pytest.raises(ValueError, match=where):
        await run()
