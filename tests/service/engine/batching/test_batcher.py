"""The batcher under every kind of trouble, on an event loop whose time jumps: nothing here sleeps."""

import asyncio
import functools
import logging
import selectors
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ParamSpec

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from service.engine.batching.batch import BatchSlice, DeviceFailed, ModelRunner, OutOfMemory, Rows, Then
from service.engine.batching.batcher import GROW_AFTER_BATCHES, MIN_SHARE_ROWS, Batcher
from service.engine.batching.policy import (
    EAGER,
    LEAST_GAP_S,
    MOST_GAP_S,
    MOST_QUIET_TURNS,
    MOST_TURNS,
    MOST_WAIT_S,
    SHARING,
    BatchingPolicy,
)
from service.engine.batching.request_queue import Result
from service.errors import DeadlinePassed, Draining, EngineFailed, NotReady, QueueFull
from service.logs import RequestMetadata, enter_request
from service.metrics import Metrics

P = ParamSpec("P")
DEVICE = "toy"


class JumpingSelector(selectors.DefaultSelector):
    """Waits for no timer: it moves the time on to it. Where there is nothing left to wait for, it says so."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, at once."""
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everyone waits for something that nobody will do"
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop on made-up time."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds of made-up time."""
        return self._jumping.now

    def advance(self, seconds: float) -> None:
        """Let time pass at once, as where somebody holds up the loop."""
        self._jumping.now += seconds


def on_jumping_time(story: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make an asynchronous test a plain one, run on made-up time."""

    @functools.wraps(story)
    def test(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(story(*args, **kwargs))

    return test


def now() -> float:
    return asyncio.get_running_loop().time()


def rows_of(caller: int, count: int) -> NDArray[np.int64]:
    """A payload whose rows say whose they are: (count, 2), caller and row."""
    return np.stack([np.full(count, caller), np.arange(count)], axis=1)


@dataclass(eq=False)
class Doubler:
    """A runner that doubles its rows, unless rows of certain callers are among them."""

    bundle: str = "toy"
    version: str = "0123456789ab"
    operation: str = "sample"
    most_rows: int = 10**6
    poisonous: set[int] = field(default_factory=set)  # it raises
    multiplying: set[int] = field(default_factory=set)  # it returns a row too many
    computed: list[Rows] = field(default_factory=list)

    def padded(self, rows: int) -> int:
        """Whole fours."""
        return -(-rows // 4) * 4

    def run(self, slices: Sequence[BatchSlice[Any]]) -> Rows:
        """2·rows."""
        rows = np.concatenate([payload[start:stop] for payload, start, stop in slices])
        callers = set(rows[:, 0].tolist())
        if callers & self.poisonous:
            raise ZeroDivisionError("poison")
        if callers & self.multiplying:
            return np.concatenate([rows, rows[:1]]) * 2
        self.computed.append(rows)
        return rows * 2


class ToyEngine:
    """Runs runners on the loop itself. A call takes `seconds`, and ends only while the gate is open."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.memory_rows = 10**9
        self.is_broken = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[dict[int, int]] = []  # rows of each caller
        self.runners: list[ModelRunner] = []
        self.running: set[int] = set()  # instances
        self.stuck: dict[int, asyncio.Event] = {}
        self.watch: Callable[[Sequence[BatchSlice[Any]]], None] = lambda _: None
        self._started = asyncio.Condition()
        self._tasks: set[asyncio.Task[Rows]] = set()

    def run(self, instance: int, runner: ModelRunner, slices: Sequence[BatchSlice[Any]], then: Then[Rows]) -> None:
        """As the engine's thread of this instance would."""
        assert instance not in self.running
        self.running.add(instance)
        self.watch(slices)
        self.runners.append(runner)
        self.calls.append({int(payload[0, 0]): stop - start for payload, start, stop in slices})
        call = asyncio.ensure_future(self._call(instance, runner, slices))
        self._tasks.add(call)

        def end(_: object) -> None:
            self._tasks.discard(call)
            self.running.discard(instance)
            if not call.cancelled():  # as at the end of the loop
                error = call.exception()
                assert error is None or isinstance(error, Exception)
                then(None if error else call.result(), error)

        call.add_done_callback(end)

    async def _call(self, instance: int, runner: ModelRunner, slices: Sequence[BatchSlice[Any]]) -> Rows:
        async with self._started:
            self._started.notify_all()
        await self.gate.wait()
        while instance in self.stuck:
            await self.stuck[instance].wait()
        await asyncio.sleep(self.seconds)
        if self.is_broken:
            raise DeviceFailed("CUDA error: toy fell off the bus")
        if sum(stop - start for _, start, stop in slices) > self.memory_rows:
            raise OutOfMemory("toy is full")
        return runner.run(slices)

    async def reached(self, calls: int) -> None:
        """Wait until this many calls have begun."""
        async with self._started:
            await self._started.wait_for(lambda: len(self.calls) >= calls)


def with_key(name: str | None) -> Context:
    """For a task that works for a request with the key of this name."""
    context = copy_context()
    context.run(enter_request, RequestMetadata("id", "POST", "/sample", 0.0, key=name, has_left=True))
    return context


@dataclass
class Bench:
    """A batcher on a toy engine, and callers numbered in the order in which they come."""

    batcher: Batcher
    engine: ToyEngine
    metrics: Metrics
    callers: int = 0

    def submit(
        self, runner: ModelRunner, rows: int, deadline_s: float = 60, key: str | None = None
    ) -> "asyncio.Task[Result]":
        """A caller's task; its number is the order of its coming, from 0."""
        payload = rows_of(self.callers, rows)
        self.callers += 1
        context = None if key is None else with_key(key)
        return asyncio.create_task(self.batcher.submit(runner, payload, rows, deadline_s), context=context)

    async def block(self, runner: ModelRunner) -> "asyncio.Task[Result]":
        """Shut the gate behind a caller of one row: from now on the engine is busy."""
        self.engine.gate.clear()
        blocker = self.submit(runner, 1)
        await self.engine.reached(len(self.engine.calls) + 1)
        return blocker

    async def settle(self) -> None:
        """Let everything happen that takes no time."""
        for _ in range(20):
            await asyncio.sleep(0)

    def value(self, series: str, **labels: str) -> float:
        """A metric as /metrics would show it."""
        return self.metrics.registry.get_sample_value(series, labels) or 0.0

    def total(self, series: str) -> float:
        """A metric's sum over all labels."""
        return sum(s.value for metric in self.metrics.registry.collect() for s in metric.samples if s.name == series)

    def is_at_rest(self) -> bool:
        """Whether nothing of anybody is left."""
        names = "images", "requests", "oldest_age_seconds"
        gauges = [self.value(f"gan_queue_{name}", device=DEVICE) for name in names]
        return gauges == [0, 0, 0] and self.batcher.queued_rows == 0 and self.batcher.busy_s() == 0


@asynccontextmanager
async def bench(
    max_rows: int = 8, max_queued_rows: int = 64, *, clock: Callable[[], float] = now, **options: Any
) -> AsyncIterator[Bench]:
    engine, metrics = ToyEngine(), Metrics(CollectorRegistry())
    options |= {"max_rows": max_rows, "max_queued_rows": max_queued_rows}
    async with Batcher(engine.run, metrics, device=DEVICE, clock=clock, **options) as batcher:
        one = Bench(batcher, engine, metrics)
        yield one
        await one.settle()
        assert one.is_at_rest()


def assert_own_rows(result: Result, caller: int, count: int) -> None:
    np.testing.assert_array_equal(result.rows, rows_of(caller, count) * 2)


# Batches


@on_jumping_time
async def test_an_idle_engine_never_waits() -> None:
    """A single row is computed without any time passing."""
    async with bench() as one:
        came = now()
        result = await one.submit(Doubler(), 1)
        assert (now(), result.queue_s, result.compute_s) == (came, 0, 0)
        assert one.value("gan_batches_total", bundle="toy", operation="sample", closed_by="idle") == 1


@on_jumping_time
async def test_callers_that_wait_for_a_busy_engine_share_the_next_batch() -> None:
    """Three callers come while a batch runs: one batch serves them all, each with its own rows, when it is full."""
    async with bench() as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, rows) for rows in (3, 1, 4)]
        one.engine.gate.set()
        for caller, task in enumerate(tasks, 1):
            assert_own_rows(await task, caller, (3, 1, 4)[caller - 1])
        assert one.engine.calls == [{0: 1}, {1: 3, 2: 1, 3: 4}]
        assert one.value("gan_batches_total", bundle="toy", operation="sample", closed_by="full") == 1
        assert one.value("gan_batch_images_sum", bundle="toy", operation="sample") == 9
        assert one.value("gan_batch_padding_images_total", bundle="toy", operation="sample") == 3


@on_jumping_time
async def test_a_single_row_beside_thousands_is_served_in_the_very_next_batch() -> None:
    """A request of 4096 rows runs; count=1 comes, and waits for the batch that runs and for no other."""
    async with bench(max_rows=512, max_queued_rows=16384) as one:
        runner = Doubler()
        one.engine.gate.clear()
        large = one.submit(runner, 4096)
        await one.engine.reached(1)
        small = one.submit(runner, 1)
        one.engine.gate.set()
        assert_own_rows(await small, 1, 1)
        assert not large.done()
        assert one.engine.calls[:2] == [{0: 512}, {0: 511, 1: 1}]
        assert_own_rows(await large, 0, 4096)
        assert len(one.engine.calls) == 9


@on_jumping_time
async def test_requests_of_equal_size_are_served_in_order_of_arrival() -> None:
    """Nobody's rows are spread over more batches than they need, so the first are done long before the last."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, 4) for _ in range(4)]
        one.engine.gate.set()
        await asyncio.gather(*tasks)
        assert one.engine.calls[1:] == [{1: 4, 2: 4}, {3: 4, 4: 4}]


@on_jumping_time
async def test_half_of_a_batch_is_for_the_oldest_and_half_for_the_smallest() -> None:
    """Small requests overtake a large one however large it is, and it goes on however many they are."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        large = one.submit(runner, 12)
        tasks = [one.submit(runner, rows) for rows in (20, 3, 1, 2, 1)]
        one.engine.gate.set()
        await asyncio.gather(large, *tasks)
        assert one.engine.calls[1:4] == [{1: 4, 4: 1, 6: 1, 5: 2}, {1: 5, 3: 3}, {1: 3, 2: 5}]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16))
def test_a_batch_is_as_full_as_it_can_be_and_as_fair(sizes: list[int], max_rows: int) -> None:
    """Whatever waits: half of the next batch goes to the oldest requests, the rest to those that then need least."""

    @on_jumping_time
    async def story() -> None:
        async with bench(max_rows=max_rows, max_queued_rows=2000) as one:
            runner = Doubler()
            await one.block(runner)
            tasks = [one.submit(runner, rows) for rows in sizes]
            one.engine.gate.set()
            await one.engine.reached(2)
            batch = one.engine.calls[1]
            needs, expected = dict(enumerate(sizes, 1)), dict[int, int]()

            def hand_out(callers: list[int], room: int) -> int:
                for caller in callers:
                    rows = min(room, needs[caller])
                    if rows:
                        expected[caller] = expected.get(caller, 0) + rows
                        needs[caller] -= rows
                        room -= rows
                return room

            left = hand_out(list(needs), max_rows - max_rows // 2)
            hand_out(sorted(needs, key=lambda number: (needs[number], number)), left + max_rows // 2)
            assert batch == expected
            for caller, (task, rows) in enumerate(zip(tasks, sizes, strict=True), 1):
                assert_own_rows(await task, caller, rows)

    story()


@on_jumping_time
async def test_an_endless_stream_of_small_requests_does_not_starve_a_large_one() -> None:
    """For every batch that is computed, two batches' worth of single rows arrive; the large request ends in time."""
    async with bench(max_rows=4, max_queued_rows=1000) as one:
        runner = Doubler()
        one.engine.seconds = 1.0
        large = one.submit(runner, 40)
        small = []
        while not large.done():
            small += [one.submit(runner, 1) for _ in range(8)]
            await asyncio.sleep(1.0)
            assert now() < 1030
        for task in small:
            await task


@on_jumping_time
async def test_instances_run_side_by_side_and_never_wait_for_one_another() -> None:
    """Two batches run at once; an instance that is stuck keeps its own batch and holds up no other."""
    async with bench(max_rows=24, max_queued_rows=1000, instances=2) as one:
        runner = Doubler()
        one.engine.stuck[0] = one.engine.stuck[1] = asyncio.Event()
        first = one.submit(runner, 48)
        await one.engine.reached(2)
        assert one.engine.calls == [{0: 24}, {0: 24}]
        one.engine.stuck.pop(1).set()  # wakes both; instance 0 finds itself stuck again
        one.engine.stuck[0] = stuck = asyncio.Event()
        for _ in range(10):
            await one.submit(runner, 3)
        assert not first.done()
        assert one.engine.running == {0}
        del one.engine.stuck[0]
        stuck.set()
        assert_own_rows(await first, 0, 48)


@on_jumping_time
async def test_idle_instances_divide_what_waits() -> None:
    """So that one caller's many rows are computed by all of them."""
    async with bench(max_rows=64, max_queued_rows=1000, instances=2) as one:
        await one.submit(Doubler(), 48)
        assert one.engine.calls == [{0: 24}, {0: 24}]


@on_jumping_time
async def test_few_rows_are_not_divided() -> None:
    """Two small batches would cost nearly twice what one does."""
    async with bench(max_rows=64, max_queued_rows=1000, instances=4) as one:
        await one.submit(Doubler(), MIN_SHARE_ROWS)
        assert one.engine.calls == [{0: MIN_SHARE_ROWS}]


@on_jumping_time
async def test_what_is_done_soon_is_not_divided_unless_it_is_one_callers() -> None:
    """Instances side by side hold up the event loop, which has the other requests to see to."""
    async with bench(max_rows=64, max_queued_rows=1000, instances=2) as one:
        runner = Doubler()
        for seconds, calls in ((1.0, 2), (0.001, 1)):
            one.engine.seconds = seconds
            for _ in range(50):  # so that the rate is known
                await asyncio.gather(one.submit(runner, 32), one.submit(runner, 32))
            before = len(one.engine.calls)
            await asyncio.gather(*(one.submit(runner, 1) for _ in range(40)))
            assert len(one.engine.calls) == before + calls
        await one.submit(runner, 40)
        assert one.engine.calls[-2:] == [{one.callers - 1: 20}] * 2


@on_jumping_time
async def test_clients_that_ask_again_one_after_the_other_share_batches() -> None:
    """The idle engine waits for the loop, so a client that asks again while others are answered joins their batch."""
    async with bench(max_rows=64) as one:
        runner = Doubler()

        async def ask(turns: int) -> None:
            for _ in range(10):
                for _ in range(turns):  # of the loop, until a reply is out and the next request in
                    await asyncio.sleep(0)
                await one.submit(runner, 1)

        clients = range(4)
        await asyncio.gather(*(ask(number % 3) for number in clients))
        assert [len(call) for call in one.engine.calls] == [len(clients)] * 10


@on_jumping_time
async def test_the_loop_goes_first_for_a_few_turns_only() -> None:
    """A stream of clients, one in every turn of the loop, can't keep the engine idle."""
    async with bench(max_rows=64, max_queued_rows=1000) as one:
        runner = Doubler()
        waiting = [one.submit(runner, 1)]
        while not one.engine.calls:
            waiting.append(one.submit(runner, 1))
            await asyncio.sleep(0)
        assert len(waiting) < 2 * MOST_TURNS
        await asyncio.gather(*waiting)


class TickingClock:
    """Moves on by a step whenever somebody looks."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.now_s = 0.0

    def __call__(self) -> float:
        """Seconds."""
        self.now_s += self.step_s
        return self.now_s


@on_jumping_time
@pytest.mark.parametrize("policy", [EAGER, SHARING])
async def test_where_loop_and_engine_share_a_processor_clients_may_come_again(
    policy: BatchingPolicy,
) -> None:
    """They come when the loop has been quiet for longer than an engine with a processor of its own waits."""
    async with bench(max_rows=64, clock=TickingClock(LEAST_GAP_S / 100), policy=policy) as one:
        runner = Doubler()

        async def ask(turns: int) -> None:
            for _ in range(10):
                for _ in range(turns):
                    await asyncio.sleep(0)
                await one.submit(runner, 1)

        clients = range(4)
        await asyncio.gather(*(ask(number % 2 * (MOST_QUIET_TURNS + 2)) for number in clients))
        together = [len(call) == len(clients) for call in one.engine.calls]
        assert (sum(together) >= 8) is (policy is SHARING)  # the first batch shows how many there are


@on_jumping_time
@pytest.mark.parametrize("policy", [EAGER, SHARING])
async def test_two_clients_who_keep_asking_end_up_in_one_batch(policy: BatchingPolicy) -> None:
    """The second comes while the first one's batch runs; on a shared processor they soon share batches."""
    async with bench(max_rows=64, clock=TickingClock(LEAST_GAP_S / 100), policy=policy) as one:
        runner, one.engine.seconds = Doubler(), 0.001

        async def ask(turns: int) -> None:
            for _ in range(20):
                for _ in range(turns):
                    await asyncio.sleep(0)
                await one.submit(runner, 1)

        first = asyncio.create_task(ask(4))
        await one.engine.reached(1)
        await asyncio.gather(first, ask(3))
        together = sum(len(call) == 2 for call in one.engine.calls)
        assert (together >= 15) is (policy is SHARING)


@on_jumping_time
async def test_a_lone_caller_waits_for_no_turn_of_the_loop() -> None:
    """Who was alone before is taken to be alone again: the batch has begun when the loop goes on."""
    async with bench() as one:
        await one.submit(Doubler(), 1)
        again = one.submit(Doubler(), 1)
        await asyncio.sleep(0)
        assert len(one.engine.calls) == 2
        await again


@on_jumping_time
async def test_a_client_that_is_left_alone_is_answered_at_once() -> None:
    """One of two goes: the other waits for it once, and not at all after a pause."""
    clock = TickingClock(LEAST_GAP_S / 1000)
    async with bench(max_rows=64, clock=clock, policy=SHARING) as one:
        runner, waits = Doubler(), []
        await asyncio.gather(one.submit(runner, 1), one.submit(runner, 1))
        for pause_s in (0, 0, 0, 1):
            clock.now_s += pause_s
            began = clock.now_s
            await one.submit(runner, 1)
            waits.append(clock.now_s - began)
        assert LEAST_GAP_S / 2 < waits[0] < 1.5 * MOST_GAP_S
        assert max(waits[1:]) < LEAST_GAP_S / 5
        await asyncio.gather(one.submit(runner, 1), one.submit(runner, 1))
        clock.now_s += 1
        began = clock.now_s
        await one.submit(runner, 1)
        assert clock.now_s - began < LEAST_GAP_S / 5


async def _wait_s(one: Bench, clock: TickingClock, *, before: int = 300, keep_coming: bool = False) -> float:
    """Seconds until two rows are begun with, after a batch of that many."""
    runner, batches = Doubler(), len(one.engine.calls)
    clock.now_s += 1  # whoever was answered before does not come again
    await asyncio.gather(one.submit(runner, before // 2), one.submit(runner, before - before // 2))
    waiting = [one.submit(runner, 1), one.submit(runner, 1)]
    began = clock.now_s
    while len(one.engine.calls) < batches + 2:
        if keep_coming:
            waiting.append(one.submit(runner, 1))
        await asyncio.sleep(0)
    seconds = clock.now_s - began
    await asyncio.gather(*waiting)
    return seconds


@on_jumping_time
async def test_on_a_shared_processor_the_loop_goes_first_for_a_moment_only() -> None:
    """A stream of clients, one in every turn of the loop, can't keep the engine idle."""
    clock = TickingClock(MOST_WAIT_S / 30)  # two or three steps a turn: fewer callers come than the 300 rows there were
    async with bench(max_rows=1000, max_queued_rows=1000, clock=clock, policy=SHARING) as one:
        assert MOST_WAIT_S <= await _wait_s(one, clock, keep_coming=True) < 2 * MOST_WAIT_S


@on_jumping_time
async def test_once_all_clients_have_asked_again_the_batch_starts() -> None:
    """As many rows wait as were in the last batch."""
    clock = TickingClock(LEAST_GAP_S / 40)
    async with bench(max_rows=1000, clock=clock, policy=SHARING) as one:
        assert await _wait_s(one, clock, before=2) < LEAST_GAP_S


@on_jumping_time
async def test_the_wait_for_clients_who_do_not_ask_again_gets_shorter() -> None:
    """The gap is halved each time, down to the shortest."""
    clock = TickingClock(LEAST_GAP_S / 40)
    async with bench(max_rows=1000, max_queued_rows=1000, clock=clock, policy=SHARING) as one:
        waits = [await _wait_s(one, clock) for _ in range(6)]
    assert MOST_GAP_S <= waits[0] < 1.5 * MOST_GAP_S
    assert all(later < 1.05 * earlier for earlier, later in pairwise(waits))
    assert LEAST_GAP_S <= waits[-1] < 2 * LEAST_GAP_S


@on_jumping_time
async def test_an_idle_engine_waits_up_to_the_queue_delay_for_company() -> None:
    """What arrives meanwhile shares the batch; a full batch starts at once, and a busy engine adds no delay."""
    async with bench(max_rows=8, policy=BatchingPolicy(max_queue_delay_s=0.5)) as one:
        runner = Doubler()
        begin = now()
        early = one.submit(runner, 2)
        await asyncio.sleep(0.3)
        late = one.submit(runner, 3)
        await asyncio.gather(early, late)
        assert (one.engine.calls, now()) == ([{0: 2, 1: 3}], begin + 0.5)
        await asyncio.gather(one.submit(runner, 4), one.submit(runner, 4))
        assert (len(one.engine.calls), now()) == (2, begin + 0.5)
        labels = {"bundle": "toy", "operation": "sample"}
        assert one.value("gan_batches_total", closed_by="window", **labels) == 1
        assert one.value("gan_batches_total", closed_by="full", **labels) == 1
        one.engine.seconds = 1.0
        busy = one.submit(runner, 8)
        await asyncio.sleep(0.9)
        following = one.submit(runner, 1)
        await asyncio.gather(busy, following)
        assert now() == begin + 0.5 + 2


@on_jumping_time
async def test_runners_take_turns() -> None:
    """Much work for one net doesn't hold up another: their batches alternate."""
    async with bench() as one:
        busy, quiet = Doubler(), Doubler(operation="discriminate")
        await one.block(busy)
        tasks = [one.submit(busy, 32), one.submit(quiet, 10)]
        one.engine.gate.set()
        await asyncio.gather(*tasks)
        assert one.engine.runners[1:6] == [busy, quiet, busy, quiet, busy]


@on_jumping_time
async def test_a_runner_may_have_less_room_than_others() -> None:
    """Large images get smaller batches, so that others wait no longer; such a batch counts as full."""
    async with bench(max_rows=8) as one:
        small, large = Doubler("small"), Doubler("large", most_rows=3)
        await one.block(small)
        tasks = [one.submit(large, 7), one.submit(small, 9)]
        one.engine.gate.set()
        for caller, task in enumerate(tasks, 1):
            assert_own_rows(await task, caller, (7, 9)[caller - 1])
        assert one.engine.calls == [{0: 1}, {1: 3}, {2: 8}, {1: 3}, {2: 1}, {1: 1}]
        closed = {
            bundle: one.value("gan_batches_total", bundle=bundle, operation="sample", closed_by="full")
            for bundle in ("small", "large")
        }
        assert closed == {"small": 1, "large": 2}
        assert one.batcher.retry_after_s() == 1


@on_jumping_time
async def test_an_answer_keeps_its_own_rows_only() -> None:
    """A caller that keeps one row of a large batch doesn't keep the batch."""
    async with bench() as one:
        runner = Doubler()
        await one.block(runner)
        small, large = one.submit(runner, 1), one.submit(runner, 20)
        one.engine.gate.set()
        for rows in ((await small).rows, (await large).rows):
            assert rows.base is None


@on_jumping_time
async def test_a_submit_of_no_rows_is_a_bug_of_ours() -> None:
    """The schema refuses a request for nothing; the batcher insists."""
    async with bench() as one:
        with pytest.raises(ValueError, match="0 rows"):
            await one.submit(Doubler(), 0)


# Admission


@on_jumping_time
async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    """Retry-After comes from what waits and the measured rate; a client that obeys it is let in."""
    async with bench(max_rows=10, max_queued_rows=50) as one:
        runner = Doubler()
        one.engine.seconds = 1
        await one.submit(runner, 10)
        accepted = [one.submit(runner, 10)]
        await one.engine.reached(2)  # it runs; the next five wait
        accepted += [one.submit(runner, 10) for _ in range(5)]
        await one.settle()
        with pytest.raises(QueueFull) as refusal:
            await one.submit(runner, 1)
        assert refusal.value.retry_after_s == 5
        assert (one.batcher.queued_rows, one.value("gan_queue_images", device=DEVICE)) == (50, 50)
        with pytest.raises(QueueFull):
            one.batcher.admit()
        await asyncio.sleep(refusal.value.retry_after_s)
        one.batcher.admit(40)
        await asyncio.gather(*accepted)
        assert sum(len(rows) for rows in runner.computed) == 70


@on_jumping_time
async def test_the_rate_is_that_of_full_batches_as_soon_as_there_is_one() -> None:
    """A quiet hour of single rows says little about what the engine can do; two full batches say most of it."""
    async with bench(max_rows=100, max_queued_rows=1000) as one:
        runner = Doubler()
        one.engine.seconds = 0.1  # ten rows a second
        for _ in range(50):
            await one.submit(runner, 1)
        one.engine.seconds = 1  # a hundred
        await one.submit(runner, 100)
        await one.submit(runner, 100)
        await one.block(runner)
        waiting = one.submit(runner, 900)
        await one.settle()
        assert 9 <= one.batcher.retry_after_s() <= 15
        one.engine.gate.set()
        await waiting


@on_jumping_time
async def test_a_burst_after_quiet_traffic_is_not_refused_for_its_rate() -> None:
    """Single rows say nothing about full batches: a hundred that would be done in time are not called too late."""
    async with bench(max_rows=100, max_queued_rows=1000) as one:
        runner = Doubler()
        one.engine.seconds = 0.5
        for _ in range(20):
            await one.submit(runner, 1)  # two rows a second
        burst = [one.submit(runner, 8, deadline_s=10) for _ in range(100)]
        for task in burst:
            await task


@on_jumping_time
async def test_before_anything_was_measured_retry_after_is_a_second() -> None:
    """Without a rate there is no estimate, and never a zero."""
    async with bench(max_queued_rows=4) as one:
        with pytest.raises(QueueFull) as refusal:
            await one.submit(Doubler(), 5)
        assert refusal.value.retry_after_s == 1


@on_jumping_time
async def test_the_gauges_are_read_from_the_queue() -> None:
    """Rows that wait, of how many requests, and the age of the oldest of them."""
    async with bench() as one:
        runner = Doubler()
        await one.block(runner)
        first = one.submit(runner, 5)
        await asyncio.sleep(3)
        second = one.submit(runner, 2)
        await asyncio.sleep(4)
        assert one.value("gan_queue_images", device=DEVICE) == 7
        assert one.value("gan_queue_requests", device=DEVICE) == 2
        assert one.value("gan_queue_capacity_images", device=DEVICE) == 64
        assert one.value("gan_queue_oldest_age_seconds", device=DEVICE) == pytest.approx(7)
        assert one.batcher.busy_s() == pytest.approx(7)
        first.cancel()
        await one.settle()
        assert one.value("gan_queue_oldest_age_seconds", device=DEVICE) == pytest.approx(4)
        one.engine.gate.set()
        assert (await second).queue_s == pytest.approx(4)


# Deadlines and departures


@on_jumping_time
async def test_a_deadline_that_passes_in_the_queue_costs_no_compute() -> None:
    """The entry leaves the queue when its time is over, and its rows never reach the engine."""
    async with bench() as one:
        runner = Doubler()
        blocker = await one.block(runner)
        came = now()
        with pytest.raises(DeadlinePassed):
            await one.submit(runner, 3, deadline_s=2.5)
        assert now() == pytest.approx(came + 2.5)
        assert one.batcher.queued_rows == 0
        one.engine.gate.set()
        await blocker
        assert one.engine.calls == [{0: 1}]


@on_jumping_time
async def test_a_request_that_would_come_too_late_is_refused_at_once() -> None:
    """The wait is longer than its deadline; a request that is small enough to be served first is let in."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        one.engine.seconds = 1.0
        await one.submit(runner, 8)  # the rate is known: 8 rows a second
        tasks = [one.submit(runner, 8) for _ in range(20)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refusal:
            await one.submit(runner, 8, deadline_s=15)
        assert refusal.value.retry_after_s == 19  # one of the twenty runs already
        begin = now()
        await one.submit(runner, 2, deadline_s=15)
        assert now() <= begin + 2
        assert_own_rows(await one.submit(runner, 8, deadline_s=25), 23, 8)
        await asyncio.gather(*tasks)


@on_jumping_time
async def test_a_deadline_that_passes_while_its_batch_runs_harms_nobody() -> None:
    """One caller gets DeadlinePassed on time; the other, in the same batch, its rows."""
    async with bench() as one:
        runner = Doubler()
        one.engine.gate.clear()
        patient, hasty = one.submit(runner, 3), one.submit(runner, 3, deadline_s=1)
        with pytest.raises(DeadlinePassed):
            await hasty
        one.engine.gate.set()
        assert_own_rows(await patient, 0, 3)
        assert one.engine.calls == [{0: 3, 1: 3}]


@on_jumping_time
async def test_a_deadline_holds_where_the_loop_is_late() -> None:
    """A request whose deadline has passed is left out of the batch, even before its timer has run."""
    async with bench() as one:
        runner = Doubler()
        blocker = await one.block(runner)
        late, punctual = one.submit(runner, 2, deadline_s=1), one.submit(runner, 2)
        await one.settle()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, JumpingLoop)
        one.engine.gate.set()
        for _ in range(2):  # what the blocker's batch needs to end, but for the last step
            await asyncio.sleep(0)
        loop.advance(5)
        assert_own_rows(await punctual, 2, 2)
        with pytest.raises(DeadlinePassed):
            await late
        await blocker
        assert one.engine.calls == [{0: 1}, {2: 2}]


@on_jumping_time
async def test_a_caller_that_leaves_the_queue_costs_no_compute() -> None:
    """A cancelled caller's rows are gone from the queue at once, even where it leaves as the batch is formed."""
    async with bench() as one:
        runner = Doubler()
        blocker = await one.block(runner)
        leaver, stayer = one.submit(runner, 3), one.submit(runner, 2)
        await one.settle()
        one.engine.gate.set()
        leaver.cancel()
        assert_own_rows(await stayer, 2, 2)
        await blocker
        assert one.engine.calls == [{0: 1}, {2: 2}]
        assert one.value("gan_cancelled_total", route="unmatched", phase="queued") == 1


@on_jumping_time
async def test_a_caller_that_leaves_a_running_batch_harms_nobody() -> None:
    """One caller leaves while the batch runs; the other still gets its own rows, and the departure is counted."""
    async with bench() as one:
        runner = Doubler()
        one.engine.gate.clear()

        async def request() -> None:
            enter_request(RequestMetadata("id", "GET", "/sample", 0.0, has_left=True))
            await one.batcher.submit(runner, rows_of(7, 20), 20, 60)

        leaver, stayer = asyncio.create_task(request()), one.submit(runner, 3)
        await one.engine.reached(1)
        leaver.cancel()
        one.engine.gate.set()
        assert_own_rows(await stayer, 0, 3)
        assert one.engine.calls == [{7: 5, 0: 3}]  # of its 20 rows, those that ran already and no more
        assert one.value("gan_cancelled_total", route="/sample", phase="running") == 1


@on_jumping_time
@pytest.mark.parametrize("has_left", [True, False])
async def test_a_departure_is_counted_once_a_request(*, has_left: bool) -> None:
    """However many entries the request has; and not where they are dropped for another reason, such as an error."""
    async with bench() as one:
        one.engine.gate.clear()
        busy = one.submit(Doubler(), 1)
        await one.engine.reached(1)

        async def request() -> None:
            enter_request(RequestMetadata("id", "POST", "/verify", 0.0, has_left=has_left))
            await asyncio.gather(*(one.batcher.submit(Doubler(), rows_of(7, 2), 2, 60) for _ in range(3)))

        leaver = asyncio.create_task(request())
        await one.settle()
        assert one.batcher.queued_rows == 6
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        one.engine.gate.set()
        await busy
        assert one.total("gan_cancelled_total") == has_left


@on_jumping_time
async def test_a_thousand_callers_hang_up_and_none_of_their_rows_are_computed() -> None:
    """All leave while they wait; the engine sees only the one that stays."""
    async with bench(max_rows=512, max_queued_rows=16384) as one:
        runner = Doubler()
        await one.block(runner)
        leavers = [one.submit(runner, 1 + n % 16) for n in range(1000)]
        stayer = one.submit(runner, 5)
        await one.settle()
        for leaver in leavers:
            leaver.cancel()
        one.engine.gate.set()
        assert_own_rows(await stayer, 1001, 5)
        assert sum(len(rows) for rows in runner.computed) == 6
        assert one.value("gan_cancelled_total", route="unmatched", phase="queued") == 1000


# Failures


@on_jumping_time
async def test_one_poisoned_row_in_thirty_two_fails_alone() -> None:
    """31 callers get their rows and one an error that names the cause, for a handful of extra calls."""
    async with bench(max_rows=32) as one:
        runner = Doubler(poisonous={20})
        await one.block(runner)
        tasks = [one.submit(runner, 1) for _ in range(32)]
        one.engine.gate.set()
        for caller, task in enumerate(tasks, 1):
            if caller == 20:
                with pytest.raises(EngineFailed, match="poison") as failure:
                    await task
                assert isinstance(failure.value.__cause__, ZeroDivisionError)
            else:
                assert_own_rows(await task, caller, 1)
        assert len(one.engine.calls) == 1 + 1 + 2 * 5
        assert one.value("gan_engine_errors_total", kind="batch") == 5
        assert one.value("gan_engine_errors_total", kind="failed_rows") == 1
        assert one.total("gan_images_total") == 32


@on_jumping_time
async def test_a_batch_of_poison_only_comes_to_an_end() -> None:
    """Every caller gets its error, for at most two calls each."""
    async with bench(max_rows=32) as one:
        runner = Doubler(poisonous=set(range(1, 33)))
        await one.block(runner)
        tasks = [one.submit(runner, 1) for _ in range(32)]
        one.engine.gate.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, EngineFailed) for outcome in outcomes)
        assert len(one.engine.calls) - 1 == 2 * 32 - 1


@on_jumping_time
async def test_a_large_poisoned_request_is_given_up_at_its_first_failure() -> None:
    """The rows that it still had in the queue are not tried."""
    async with bench() as one:
        with pytest.raises(EngineFailed):
            await one.submit(Doubler(poisonous={0}), 64)
        assert one.engine.calls == [{0: 8}]


@on_jumping_time
async def test_rows_out_other_than_rows_in_is_an_error_that_names_both() -> None:
    """An engine that returns too many rows is not trusted with whose they are; only the guilty caller fails."""
    async with bench() as one:
        runner = Doubler(multiplying={2})
        await one.block(runner)
        tasks = [one.submit(runner, 3), one.submit(runner, 4)]
        one.engine.gate.set()
        assert_own_rows(await tasks[0], 1, 3)
        with pytest.raises(EngineFailed, match="given 4 rows and returned 5"):
            await tasks[1]


@on_jumping_time
async def test_a_caller_that_leaves_while_a_failed_batch_is_halved_is_not_tried_again() -> None:
    """Halves that have lost all their callers are not run."""
    async with bench() as one:
        runner = Doubler(poisonous={1})
        await one.block(runner)
        guilty, leaver = one.submit(runner, 1), one.submit(runner, 1)
        one.engine.gate.set()
        await one.engine.reached(3)  # the blocker's, both, and now the first half
        leaver.cancel()
        with pytest.raises(EngineFailed):
            await guilty
        await one.settle()
        assert one.engine.calls == [{0: 1}, {1: 1, 2: 1}, {1: 1}]


@on_jumping_time
async def test_out_of_memory_halves_the_batches_and_loses_nobody() -> None:
    """A batch that doesn't fit is run in halves, the next ones are small from the start, and later they grow again."""
    async with bench(max_rows=32, max_queued_rows=8192) as one:
        runner = Doubler()
        one.engine.memory_rows = 10
        await one.block(runner)
        tasks = [one.submit(runner, 24), one.submit(runner, 8)]
        one.engine.gate.set()
        assert_own_rows(await tasks[0], 1, 24)
        assert_own_rows(await tasks[1], 2, 8)
        assert [sum(call.values()) for call in one.engine.calls[1:]] == [32, 16, 8, 8, 8, 8]
        assert one.value("gan_out_of_memory_total") == 2  # the second 16 are halved unasked
        assert one.value("gan_engine_errors_total", kind="out_of_memory") == 2
        one.engine.memory_rows = 32
        for _ in range(GROW_AFTER_BATCHES):
            await one.submit(runner, 1)  # these say nothing about what fits
        few = GROW_AFTER_BATCHES - 4  # four of the cap have run well already
        await one.submit(runner, 8 * few + 16 * GROW_AFTER_BATCHES + 32)
        sizes = [sum(call.values()) for call in one.engine.calls[7 + GROW_AFTER_BATCHES :]]
        assert sizes == [8] * few + [16] * GROW_AFTER_BATCHES + [32]
        assert one.value("gan_out_of_memory_total") == 2


@on_jumping_time
async def test_nothing_is_kept_of_those_who_were_answered() -> None:
    """While large callers come and go, the queue holds on to no answer, payload or entry of one that has left."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        payload = rows_of(0, 40)
        kept = weakref.ref(payload)
        other = one.submit(runner, 300)
        task = asyncio.create_task(one.batcher.submit(runner, payload, 40, 60))
        one.callers += 1
        del payload
        await task
        del task
        runner.computed.clear()
        await one.submit(runner, 1)
        assert not other.done()
        assert kept() is None
        await other


@on_jumping_time
async def test_a_single_row_that_does_not_fit_fails_and_the_next_is_tried() -> None:
    """Nothing is left to halve: its caller gets an error, and later rows are computed when there is memory again."""
    async with bench() as one:
        runner = Doubler()
        one.engine.memory_rows = 0
        with pytest.raises(EngineFailed, match="single row"):
            await one.submit(runner, 1)
        one.engine.memory_rows = 8
        assert_own_rows(await one.submit(runner, 1), 1, 1)


@on_jumping_time
async def test_a_lost_device_is_never_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Everybody fails at once, those who wait too; newcomers are refused; the reason is in the log, not in replies."""
    async with bench() as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, 30), one.submit(Doubler(), 1)]
        await one.settle()
        one.engine.is_broken = True
        one.engine.gate.set()
        for task in tasks:
            with pytest.raises(NotReady, match="the device failed") as refusal:
                await task
            assert "bus" not in refusal.value.detail
        assert len(one.engine.calls) == 1
        assert one.batcher.failure == "the device failed"
        assert one.value("gan_engine_errors_total", kind="device") == 1
        with pytest.raises(NotReady):
            await one.submit(runner, 1)
    [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.exc_info is not None
    assert "fell off the bus" in str(record.exc_info[1])


class Forgetful(Doubler):
    """A runner with a bug where nobody expects one."""

    def padded(self, rows: int) -> int:
        """Forgets how."""
        raise LookupError(f"how were {rows} rows padded again?")


@on_jumping_time
async def test_a_bug_in_the_batcher_leaves_no_caller_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """A bug of ours ends the worker: every caller hears of it at once, and the log has the traceback."""
    async with bench() as one:
        runner = Forgetful()
        one.engine.gate.clear()
        tasks = [one.submit(runner, 20), one.submit(Doubler(), 1)]
        await one.engine.reached(1)
        one.engine.gate.set()
        for task in tasks:
            with pytest.raises(NotReady, match="the batcher died"):
                await task
        assert one.batcher.failure == "the batcher died"
    assert "padded again" in caplog.text


@on_jumping_time
async def test_an_engine_that_takes_no_batches_leaves_no_caller_waiting() -> None:
    """A batch that can't even begin ends the worker, and its callers hear of it."""

    def run(*_: Any) -> None:
        raise LookupError("no such thread")

    metrics = Metrics(CollectorRegistry())
    async with Batcher(run, metrics, device=DEVICE, max_rows=8, max_queued_rows=8, clock=now) as batcher:
        await asyncio.sleep(0)  # the worker waits
        with pytest.raises(NotReady, match="the batcher died"):
            await batcher.submit(Doubler(), rows_of(0, 1), 1, 60)
        assert batcher.failure == "the batcher died"


# The end


@on_jumping_time
async def test_a_drain_finishes_what_was_accepted_and_refuses_newcomers() -> None:
    """All that had been let in is answered; nobody else is let in, not even into an empty queue."""
    async with bench() as one:
        runner = Doubler()
        one.engine.seconds = 1
        accepted = [one.submit(runner, 12), one.submit(runner, 5)]
        await one.settle()
        began, drain = now(), asyncio.create_task(one.batcher.drain(25))
        await one.settle()
        with pytest.raises(Draining):
            await one.submit(runner, 1)
        with pytest.raises(Draining):
            one.batcher.admit()
        assert await drain
        assert now() == pytest.approx(began + 3)  # three batches, and not a moment more
        assert_own_rows(accepted[0].result(), 0, 12)
        assert_own_rows(accepted[1].result(), 1, 5)


@on_jumping_time
async def test_a_caller_with_several_submits_is_accepted_once() -> None:
    """Its later rows are refused neither by a full queue nor by a drain, which waits for the last of them."""
    async with bench(max_queued_rows=10) as one:
        runner = Doubler()
        with pytest.raises(QueueFull), one.batcher.accept(11):
            pass
        with one.batcher.accept(10):
            blocker = await one.block(runner)
            waiting = one.submit(runner, 10)
            await one.settle()
            more = asyncio.create_task(one.batcher.submit(runner, rows_of(7, 5), 5, 60, is_accepted=True))
            await one.settle()
            assert not more.done()
            drain = asyncio.create_task(one.batcher.drain(25))
            one.engine.gate.set()
            await asyncio.gather(blocker, waiting, more)
            await one.settle()
            assert not drain.done()
            last = one.batcher.submit(runner, rows_of(8, 5), 5, 60, is_accepted=True)
            assert len((await last).rows) == 5
        assert await drain
        with pytest.raises(Draining):
            await one.batcher.submit(runner, rows_of(9, 5), 5, 60, is_accepted=True)


@on_jumping_time
async def test_a_drain_ends_on_time_whatever_runs() -> None:
    """A batch that doesn't end can't hold up the shutdown: its callers get Draining, when the time is over."""
    async with bench() as one:
        runner = Doubler()
        blocker = await one.block(runner)
        waiting = one.submit(runner, 40)
        began = now()
        assert not await one.batcher.drain(25)
        assert now() == pytest.approx(began + 25)
        for task in (blocker, waiting):
            with pytest.raises(Draining):
                await task
        await one.batcher.close()


@on_jumping_time
async def test_an_idle_batcher_drains_at_once() -> None:
    """Nothing to wait for, also where no time is given."""
    async with bench() as one:
        began = now()
        assert await one.batcher.drain(0)
        assert now() == began


@on_jumping_time
async def test_closing_completes_every_future() -> None:
    """Callers in the queue and in the running batch all hear that it is over."""
    async with bench() as one:
        runner = Doubler()
        tasks = [await one.block(runner), one.submit(runner, 40), one.submit(Doubler(), 3)]
        await one.settle()
        await one.batcher.close()
        for task in tasks:
            with pytest.raises(Draining):
                await task


@on_jumping_time
async def test_a_batch_that_ends_while_the_batcher_closes_is_nobodys() -> None:
    """Its worker is cancelled already, and its caller has been told."""
    started: asyncio.Future[Then[Rows]] = asyncio.get_running_loop().create_future()
    options: dict[str, Any] = {"device": DEVICE, "max_rows": 8, "max_queued_rows": 8}
    async with Batcher(lambda *call: started.set_result(call[-1]), Metrics(CollectorRegistry()), **options) as batcher:
        caller = asyncio.create_task(batcher.submit(Doubler(), rows_of(0, 1), 1, 60))
        end = await started
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        end(rows_of(0, 1), None)
        await closing
        with pytest.raises(Draining):
            await caller


# Keys


@on_jumping_time
async def test_a_flood_of_one_key_does_not_delay_another_key() -> None:
    """However many requests of one key wait, and of whatever size, another key's are in the very next batch."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        flood = [one.submit(runner, rows, key="a") for rows in [1] * 20 + [60]]
        others = one.submit(runner, 3, key="b")
        one.engine.gate.set()
        assert_own_rows(await others, 22, 3)
        assert [one.engine.calls[1].get(caller) for caller in (*range(1, 6), 22)] == [1] * 5 + [3]
        await asyncio.gather(*flood)


@on_jumping_time
async def test_keys_that_want_more_than_there_is_get_as_much_as_each_other() -> None:
    """Each gets its even part of every batch, the row that is left over in turn, and what nobody else needs."""
    async with bench(max_rows=8, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, rows, key=key) for key, rows in (("a", 24), ("b", 24), ("c", 8))]
        one.engine.gate.set()
        await asyncio.gather(*tasks)
        assert one.engine.calls[1:5] == [{1: 3, 2: 3, 3: 2}, {3: 3, 1: 3, 2: 2}, {2: 3, 3: 3, 1: 2}, {1: 4, 2: 4}]


@on_jumping_time
async def test_more_keys_than_a_batch_has_rows_take_turns() -> None:
    """Each is served once before any is served again."""
    async with bench(max_rows=4, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, 2, key=f"{n}") for n in range(10)]
        one.engine.gate.set()
        await asyncio.gather(*tasks)
        order = [caller for call in one.engine.calls[1:] for caller in call]
        assert order == [*range(1, 11)] * 2


@on_jumping_time
async def test_a_key_with_many_runners_gets_no_more_turns_than_one_with_a_single_one() -> None:
    """Asking for ten bundles at once is no way past the others."""
    async with bench(max_rows=4, max_queued_rows=400) as one:
        many, single = [Doubler(f"toy{n}") for n in range(10)], Doubler()
        await one.block(single)
        flood = [one.submit(runner, 8, key="a") for runner in many]
        others = one.submit(single, 12, key="b")
        one.engine.gate.set()
        await asyncio.gather(others, *flood)
        assert [runner is single for runner in one.engine.runners[1:7]] == [False, True] * 3


@on_jumping_time
async def test_within_a_key_the_order_is_that_without_keys() -> None:
    """A key's oldest go on, its smallest overtake, also where its share of a batch is a single row."""
    async with bench(max_rows=2, max_queued_rows=400) as one:
        runner = Doubler()
        await one.block(runner)
        tasks = [one.submit(runner, rows, key=key) for key, rows in (("a", 6), ("b", 6), ("a", 1))]
        one.engine.gate.set()
        await asyncio.gather(*tasks)
        assert one.engine.calls[1:3] == [{1: 1, 2: 1}, {3: 1, 2: 1}]


@on_jumping_time
async def test_a_key_leaves_room_in_the_queue_for_others() -> None:
    """It may hold half of the queue, or one request of any size; another key's is still let in."""
    async with bench(max_rows=8, max_queued_rows=64) as one:
        runner = Doubler()
        one.batcher.has_several_keys = lambda: True
        blocker = await one.block(runner)
        mine = [one.submit(runner, 8, key="a") for _ in range(5)]
        other = one.submit(runner, 32, key="b")
        await one.settle()
        assert (one.batcher.queued_rows, mine[4].done()) == (64, True)
        with pytest.raises(QueueFull):
            await mine.pop()
        one.engine.gate.set()
        await asyncio.gather(blocker, other, *mine)
        await one.submit(runner, 64, key="a")


@on_jumping_time
async def test_what_waits_of_another_key_makes_no_request_too_late() -> None:
    """A key whose own rows fill its deadlines is told so; a newcomer with another key is served meanwhile."""
    async with bench(max_rows=10, max_queued_rows=400) as one:
        runner = Doubler()
        one.engine.seconds = 1
        await one.submit(runner, 10)
        flood = one.submit(runner, 100, key="a")
        await one.engine.reached(2)
        with pytest.raises(QueueFull):
            await one.submit(runner, 100, deadline_s=5, key="a")
        assert_own_rows(await one.submit(runner, 4, deadline_s=5, key="b"), 3, 4)
        await flood


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 16))
def test_a_batch_is_full_and_gives_each_key_its_part(requests: list[tuple[int, int]], max_rows: int) -> None:
    """No key that wants more gets over a row less than another; and no room is left while anybody wants it."""

    @on_jumping_time
    async def story() -> None:
        async with bench(max_rows=max_rows, max_queued_rows=2000) as one:
            runner = Doubler()
            await one.block(runner)
            tasks = [one.submit(runner, rows, key=str(key)) for key, rows in requests]
            one.engine.gate.set()
            await one.engine.reached(2)
            wanted, got = dict.fromkeys(range(5), 0), dict.fromkeys(range(5), 0)
            for key, rows in requests:
                wanted[key] += rows
            for caller, rows in one.engine.calls[1].items():
                got[requests[caller - 1][0]] += rows
            assert sum(got.values()) == min(max_rows, sum(wanted.values()))
            most = max(got.values())
            assert all(got[key] >= most - 1 for key in wanted if got[key] < wanted[key])
            for caller, (task, (_, rows)) in enumerate(zip(tasks, requests, strict=True), 1):
                assert_own_rows(await task, caller, rows)

    story()


# Everything at once


@dataclass
class Caller:
    """What is known of one caller from the outside."""

    number: int
    rows: int
    deadline: float
    is_guilty: bool
    outcome: Result | BaseException | None = None
    ended: float = 0.0
    had_room: bool = True
    before: int = 0  # rows in the queue when it came
    patience_s: float = 0.0
    has_left: bool = False


@dataclass(frozen=True)
class Submit:
    """A caller comes."""

    runner: int
    rows: int
    deadline_s: float
    guilt: str


@dataclass(frozen=True)
class Leave:
    """A caller that is still there goes; `which` counts round."""

    which: int


@dataclass(frozen=True)
class Pass:
    """Time passes; or, where it is 0, only the next step is taken."""

    seconds: float


@dataclass(frozen=True)
class Swap:
    """Another version takes a runner's place for callers to come."""

    runner: int


@dataclass(frozen=True)
class Memory:
    """The device has room for batches of this size."""

    rows: int


@dataclass(frozen=True)
class Break:
    """The device is lost."""


@dataclass(frozen=True)
class Drain:
    """The service is told to end within this time."""

    timeout_s: float


@dataclass(frozen=True)
class Close:
    """The service ends at once."""


Step = Submit | Leave | Pass | Swap | Memory | Break | Drain | Close

RUNNERS, MAX_ROWS, MAX_QUEUED_ROWS = 3, 8, 60
guilts = st.sampled_from(["", "", "", "", "raises", "multiplies"])
everyday = st.one_of(
    st.builds(Submit, st.integers(0, RUNNERS - 1), st.integers(1, 30), st.sampled_from([0.0, 0.5, 2.0, 100.0]), guilts),
    st.builds(Submit, st.integers(0, RUNNERS - 1), st.integers(1, 3), st.just(100.0), guilts),
    st.builds(Leave, st.integers(0, 20)),
    st.builds(Pass, st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 3.0])),
    st.builds(Swap, st.integers(0, RUNNERS - 1)),
    st.builds(Memory, st.integers(1, 2 * MAX_ROWS)),
)
endings = st.one_of(st.builds(Break), st.builds(Drain, st.sampled_from([0.0, 1.0, 10.0])), st.builds(Close))
schedules = st.builds(
    lambda days, ending, evening: [*days, *ending, *evening],
    st.lists(everyday, min_size=5, max_size=60),
    st.lists(endings, max_size=2),
    st.lists(everyday, max_size=10),
)


class Life:
    """Lives through a schedule, and looks over the batcher's shoulder at every step."""

    def __init__(self, one: Bench, keys: int) -> None:
        self.one = one
        self.keys = keys  # of which callers have one each; without any, nobody needs one
        self.runners = [Doubler(f"toy{n}") for n in range(RUNNERS)]
        self.all_runners = list(self.runners)
        self.callers: list[Caller] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.departures = 0
        self.has_broken = self.has_ended = False
        one.engine.watch = self.check_call

    def check_call(self, slices: Sequence[BatchSlice[Any]]) -> None:
        """No batch is too large, has rows of one caller twice, or rows that nobody waits for."""
        numbers = [int(payload[0, 0]) for payload, _, _ in slices]
        assert len(set(numbers)) == len(numbers)
        assert sum(stop - start for _, start, stop in slices) <= MAX_ROWS
        for number in numbers:
            caller = self.callers[number]
            assert not caller.has_left
            assert caller.outcome is None
            assert now() < caller.deadline
        self.check_bounds()

    def check_bounds(self) -> None:
        """The queue never holds more than it may."""
        assert 0 <= self.one.batcher.queued_rows <= MAX_QUEUED_ROWS

    async def call(self, caller: Caller, runner: ModelRunner, deadline_s: float) -> None:
        """One caller's life, from its first step on."""
        batcher = self.one.batcher
        caller.deadline = now() + deadline_s
        caller.before, caller.patience_s = batcher.queued_rows, deadline_s
        caller.had_room = batcher.queued_rows + caller.rows <= MAX_QUEUED_ROWS
        try:
            caller.outcome = await batcher.submit(runner, rows_of(caller.number, caller.rows), caller.rows, deadline_s)
        except asyncio.CancelledError as error:
            self.departures += 1
            caller.outcome = error
        except Exception as error:  # noqa: BLE001 - looked at when all is over
            caller.outcome = error
        caller.ended = now()

    async def take(self, step: Step) -> None:  # noqa: C901 - one case for each kind of step
        """One step of the schedule."""
        match step:
            case Submit(runner, rows, deadline_s, guilt):
                caller = Caller(len(self.callers), rows, float("inf"), is_guilty=bool(guilt))
                self.callers.append(caller)
                if guilt:
                    chosen = self.runners[runner]
                    (chosen.poisonous if guilt == "raises" else chosen.multiplying).add(caller.number)
                context = with_key(f"key {caller.number % self.keys}" if self.keys else None)
                work = self.call(caller, self.runners[runner], deadline_s)
                self.tasks.append(asyncio.create_task(work, context=context))
            case Leave(which):
                here = [n for n, task in enumerate(self.tasks) if not task.done()]
                if here:
                    number = here[which % len(here)]
                    self.callers[number].has_left = True
                    self.tasks[number].cancel()
            case Pass(seconds):
                await asyncio.sleep(seconds)
            case Swap(runner):
                self.runners[runner] = Doubler(f"toy{runner}")
                self.all_runners.append(self.runners[runner])
            case Memory(rows):
                self.one.engine.memory_rows = rows
            case Break():
                self.has_broken = self.one.engine.is_broken = True
            case Drain(timeout_s):
                self.has_ended = True
                self.tasks.append(asyncio.create_task(self.drain(timeout_s)))
                self.callers.append(Caller(len(self.callers), 0, 0, is_guilty=False))  # keeps the numbers in step
            case Close():
                self.has_ended = True
                await self.one.batcher.close()
        self.check_bounds()

    async def drain(self, timeout_s: float) -> None:
        """The end of the service, as its server brings it about."""
        with suppress(asyncio.CancelledError):
            await self.one.batcher.drain(timeout_s)

    def check_outcomes(self) -> None:
        """Everyone has what the schedule explains, and nothing else."""
        for caller in (caller for caller in self.callers if caller.rows):
            match caller.outcome:
                case Result():
                    assert_own_rows(caller.outcome, caller.number, caller.rows)
                    assert not caller.is_guilty
                    assert caller.ended <= caller.deadline
                case DeadlinePassed():
                    assert caller.ended >= caller.deadline - 1e-6
                case QueueFull():
                    # No room; or, even at the worst rate, a row a batch, a wait that is longer than its deadline.
                    assert not caller.had_room or caller.before * self.one.engine.seconds > caller.patience_s > 0
                case EngineFailed():
                    assert caller.is_guilty
                case NotReady():
                    assert self.has_broken
                case Draining():
                    assert self.has_ended
                case asyncio.CancelledError() | None:  # None: it left before its first step
                    assert caller.has_left
                case _:
                    raise AssertionError(caller)

    def check_counts(self, *, was_closed: bool) -> None:
        """No row was computed twice, all rows of those who were served once, and the counters say the same."""
        one = self.one
        computed = [tuple(row) for runner in self.all_runners for rows in runner.computed for row in rows.tolist()]
        assert len(set(computed)) == len(computed)
        served = [caller for caller in self.callers if isinstance(caller.outcome, Result)]
        assert {(c.number, row) for c in served for row in range(c.rows)} <= set(computed)
        if not was_closed:  # else a batch may have ended that nobody asks for any more
            assert one.total("gan_images_total") == len(computed)
        assert one.total("gan_cancelled_total") == self.departures
        batches = one.total("gan_batches_total")
        assert batches == one.total("gan_batch_images_count")
        assert batches == len(one.engine.calls) or one.total("gan_engine_errors_total") > 0
        assert one.total("gan_compute_seconds_count") == len(one.engine.calls)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@example([Submit(0, 8, 0.5, ""), Pass(0.5), Pass(0)], 0.5, 1, 0)
@example([Submit(0, 30, 100.0, ""), Submit(0, 1, 100.0, "raises"), Memory(3), Pass(1), Swap(0), Drain(1.0)], 0.3, 2, 3)
@given(schedules, st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 3), st.integers(0, 4))
def test_no_row_is_lost_doubled_or_handed_to_another(
    schedule: list[Step], seconds: float, instances: int, keys: int
) -> None:
    """Any interleaving of callers, departures, deadlines, failures, swaps and ends: everyone gets their due, once."""

    @on_jumping_time
    async def story() -> None:
        async with bench(MAX_ROWS, MAX_QUEUED_ROWS, instances=instances) as one:
            one.engine.seconds = seconds
            life = Life(one, keys)
            for step in schedule:
                await life.take(step)
            if life.tasks:
                await asyncio.wait(life.tasks)
            await asyncio.sleep(seconds)  # for the engine to end the batch that everyone has left
            await one.settle()
            life.check_outcomes()
            life.check_counts(was_closed=Close() in schedule)

    story()
