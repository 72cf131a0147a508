"""What requests hold is bounded; who makes others wait for long makes room, and refusals say when to come again."""

import pytest

from service.errors import QueueFull
from service.http.memory_budget import PATIENCE_S, SMALL_BYTES, MemoryBudget


class Clock:
    """Stands still but when it is moved."""

    now = 1000.0

    def __call__(self) -> float:  # noqa: D102
        return self.now


class Client:
    """Counts how often it was left."""

    hung_up = 0

    def give_up(self) -> None:  # noqa: D102
        self.hung_up += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def full(clock: Clock) -> MemoryBudget:
    held = MemoryBudget(10 * SMALL_BYTES, clock)
    held.now = 10 * SMALL_BYTES
    return held


def refusal(held: MemoryBudget) -> int:
    with pytest.raises(QueueFull) as caught:
        held.check(SMALL_BYTES + 1)
    return caught.value.retry_after_s


def test_what_fits_is_let_in_and_what_is_small_always(full: MemoryBudget) -> None:
    """To the byte; smallness is that of all that a request holds."""
    full.check(SMALL_BYTES)
    assert refusal(full) == 1
    with pytest.raises(QueueFull):
        full.check(1, SMALL_BYTES + 1)
    full.now -= SMALL_BYTES + 1
    full.check(SMALL_BYTES + 1)


def test_a_refusal_says_when_our_patience_ends(full: MemoryBudget, clock: Clock) -> None:
    """A client that moves will soon be done; one that has not for a while is ended when its time is up."""
    idle = Client()
    full.wait_for_client(idle)
    assert refusal(full) == 1
    clock.now += 2.5
    assert refusal(full) == PATIENCE_S - 2
    full.wait_for_client(idle)  # it has moved
    assert refusal(full) == 1


def test_the_client_that_others_wait_for_longest_makes_room(full: MemoryBudget, clock: Clock) -> None:
    """One for each newcomer, in order; who has moved meanwhile is not among them."""
    first, moved, second, done = (Client() for _ in range(4))
    for one in (first, moved, second, done):
        full.wait_for_client(one)
        clock.now += 1
    full.client_moved(done)
    clock.now += PATIENCE_S - 2
    full.wait_for_client(moved)
    full.check(SMALL_BYTES + 1)
    assert (first.hung_up, moved.hung_up, second.hung_up, done.hung_up) == (1, 0, 0, 0)
    full.check(SMALL_BYTES + 1)
    assert (first.hung_up, moved.hung_up, second.hung_up, done.hung_up) == (1, 0, 1, 0)
    assert refusal(full) == 1
