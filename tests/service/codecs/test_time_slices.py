"""Long work on the event loop leaves everything else its turns, and none of it waits for the whole of another."""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from service.codecs import time_slices as slices
from service.codecs.time_slices import Apart, Steps, TimeSlices, timed

Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.anyio


async def on_thread(apart: Apart) -> tuple[Any, float]:
    return await asyncio.to_thread(timed(apart.work))


async def on_no_thread(apart: Apart) -> tuple[Any, float]:
    raise AssertionError(apart)


@pytest.fixture
def one_step_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a whole slice, and as long as any other, whatever else this machine does."""
    monkeypatch.setattr(slices, "SLICE_S", 0.0)
    monkeypatch.setattr("service.codecs.time_slices.time.perf_counter", partial(next, itertools.count(0.0, 1e-4)))


def steps(name: str, count: int, done: list[str]) -> Steps[str]:
    for _ in range(count):
        done.append(name)
        yield None
    return name


async def test_what_fits_into_a_slice_is_done_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small requests wait for nobody."""
    monkeypatch.setattr(slices, "SLICE_S", 60.0)
    work = TimeSlices().run(steps("a", 1000, []), on_no_thread)
    with pytest.raises(StopIteration) as end:
        work.send(None)
    result, took_s = end.value.value
    assert result == "a"
    assert 0 < took_s < 60


@pytest.mark.usefixtures("one_step_a_slice")
async def test_all_else_gets_its_turn_between_two_slices() -> None:
    """However much of such work there is, one turn of the loop holds one slice."""
    done: list[str] = []
    together = TimeSlices()
    works = [asyncio.create_task(together.run(steps(name, 20, done), on_no_thread)) for name in "abcde"]
    await asyncio.sleep(0)  # what is new begins at once
    turns = 0
    while len(done) < 100:
        before = len(done)
        await asyncio.sleep(0)
        assert len(done) - before <= 1
        turns += 1
        assert turns < 1000
    assert [name for name, _ in await asyncio.gather(*works)] == list("abcde")


async def test_a_crowd_of_newcomers_leaves_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slices of very many are not all done in one turn; what is new in the next one begins at once again."""
    monkeypatch.setattr(slices, "NEWCOMERS_S", 1e-9)
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
async def test_half_of_the_slices_go_to_the_oldest_and_half_to_who_had_least(until: Until) -> None:
    """In a crowd one after the other gets done, and short work does not wait for all of them."""
    done: list[str] = []
    together = TimeSlices()
    works = [asyncio.create_task(together.run(steps(name, 200, done), on_no_thread)) for name in "abc"]
    await asyncio.sleep(0)
    assert done == list("abc")
    await until(lambda: len(done) > 50)
    before = len(done)
    await together.run(steps("short", 5, done), on_no_thread)
    assert len(done) - before <= 5 + 5 + 1 + 2  # its own, the oldest's between them, and what began meanwhile
    await works[0]
    assert done.count("a") == 200
    assert 80 <= done.count("b") <= 120
    assert 80 <= done.count("c") <= 120
    assert [name for name, _ in await asyncio.gather(*works)] == list("abc")


@pytest.mark.usefixtures("one_step_a_slice")
async def test_cancelled_work_ends_and_the_others_go_on(until: Until) -> None:
    """Nobody waits for it any more."""
    done: list[str] = []
    together = TimeSlices()
    given_up, other = (asyncio.create_task(together.run(steps(name, 50, done), on_no_thread)) for name in "ab")
    await until(lambda: len(done) > 10)
    given_up.cancel()
    assert (await other)[0] == "b"
    assert given_up.cancelled()
    assert done.count("a") < 50
    assert done.count("b") == 50


async def test_what_takes_long_by_itself_is_called_on_a_thread() -> None:
    """The work is sent its result; the loop turns meanwhile."""
    gate = threading.Event()

    def call() -> tuple[str, threading.Thread]:
        assert gate.wait(60)
        return "result", threading.current_thread()

    def work() -> Steps[Any]:
        yield None
        result = yield Apart(call, 1)
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
async def test_an_error_is_that_of_the_work(where: str) -> None:
    """It ends it, and reaches who waits for it."""

    def fail() -> Any:
        raise ValueError(where)

    def work() -> Steps[None]:
        yield None
        yield Apart(fail, 1) if where == "on a thread" else fail()
        raise AssertionError

    run: Callable[[], Awaitable[Any]] = partial(TimeSlices().run, work(), on_thread)
    with pytest.raises(ValueError, match=where):
        await run()
