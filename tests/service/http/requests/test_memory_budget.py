"""The memory of requests is bounded, stalled clients are evicted, and refusals say when to try again."""

import pytest

from service.errors import QueueFull
from service.http.requests.memory_budget import SMALL_BYTES, STALLED_AFTER_S, MemoryBudget


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:  # noqa: D102
        return self.now


class Client:
    """Holds a little more than is small, until it is evicted."""

    def __init__(self, held: MemoryBudget) -> None:
        self.held = held
        self.evicted = 0

    def evict(self) -> None:  # noqa: D102
        self.evicted += 1
        self.held.used_bytes -= SMALL_BYTES + 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def full(clock: Clock) -> MemoryBudget:
    held = MemoryBudget(10 * SMALL_BYTES, clock)
    held.used_bytes = 10 * SMALL_BYTES
    return held


def refusal(held: MemoryBudget) -> int:
    with pytest.raises(QueueFull) as caught:
        held.check(SMALL_BYTES + 1)
    return caught.value.retry_after_s


def take(held: MemoryBudget, clients: int) -> None:
    """Take as much as so many clients hold."""
    held.check(clients * (SMALL_BYTES + 1))
    held.used_bytes += clients * (SMALL_BYTES + 1)


def test_a_request_is_let_in_if_it_fits_or_is_small(full: MemoryBudget) -> None:
    """The bound holds to the byte, and a request is small by all that it holds."""
    full.check(SMALL_BYTES)
    assert refusal(full) == 1
    with pytest.raises(QueueFull):
        full.check(1, SMALL_BYTES + 1)
    full.used_bytes -= SMALL_BYTES + 1
    full.check(SMALL_BYTES + 1)


def test_a_refusal_says_when_to_try_again(full: MemoryBudget, clock: Clock) -> None:
    """In a second while clients are active; if one has stalled, at the time when it may be evicted."""
    idle = Client(full)
    full.wait_for_client(idle)
    assert refusal(full) == 1
    clock.now += 2.5
    assert refusal(full) == STALLED_AFTER_S - 2
    full.wait_for_client(idle)  # it was active
    assert refusal(full) == 1


def test_the_client_that_has_stalled_longest_is_evicted(full: MemoryBudget, clock: Clock) -> None:
    """One for each request of its size, in order; a client that was active meanwhile stays."""
    first, active, second, done = (Client(full) for _ in range(4))
    for one in (first, active, second, done):
        full.wait_for_client(one)
        clock.now += 1
    full.stop_waiting_for_client(done)
    clock.now += STALLED_AFTER_S - 2
    full.wait_for_client(active)
    take(full, 1)
    assert (first.evicted, active.evicted, second.evicted, done.evicted) == (1, 0, 0, 0)
    take(full, 1)
    assert (first.evicted, active.evicted, second.evicted, done.evicted) == (1, 0, 1, 0)
    assert refusal(full) == 1


def test_as_many_are_evicted_as_a_request_needs(full: MemoryBudget, clock: Clock) -> None:
    """A large one does not exceed the bound by evicting a client that held little; and no more are evicted."""
    clients = [Client(full) for _ in range(5)]
    for one in clients:
        full.wait_for_client(one)
    clock.now += STALLED_AFTER_S
    take(full, 3)
    assert [one.evicted for one in clients] == [1, 1, 1, 0, 0]
    assert full.used_bytes == 10 * SMALL_BYTES
