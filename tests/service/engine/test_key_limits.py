"""Limits of keys, on a clock that the tests set: who is refused, for how long, and what that costs."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.key_limits import KeyLimits
from service.errors import DeadlinePassed, Draining, Invalid, NotReady, QueueFull, RateLimited

MAX_COUNT = 4096


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1e6

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


def limits_of(rate: float = 0, in_flight: int = 0, clock: Clock | None = None, file: int | None = None) -> KeyLimits:
    return KeyLimits(rate, in_flight, MAX_COUNT, file, clock or Clock())


def use(limits: KeyLimits, images: int, key: str = "a") -> None:
    """A request that is computed at once."""
    with limits.reserve(key, images, lambda: 7):
        pass


def refusal(limits: KeyLimits, images: int = 1, key: str = "a") -> RateLimited:
    with pytest.raises(RateLimited) as refused:
        use(limits, images, key)
    return refused.value


def test_a_key_has_a_seconds_worth_at_once_and_then_its_rate() -> None:
    """Whoever obeys Retry-After is let in; another key is not concerned."""
    clock = Clock()
    limits = limits_of(10, clock=clock)
    for _ in range(10):
        use(limits, 1)
    refused = refusal(limits)
    assert (refused.retry_after_s, refused.headers["Retry-After"]) == (1, "1")
    use(limits, 10, "b")
    clock.now_s += 0.2
    use(limits, 1)
    use(limits, 1)
    refusal(limits)


@pytest.mark.parametrize(("rate", "wait_s"), [(10, 409), (0.5, 8192), (4096, 1), (100_000, None)])
def test_a_request_of_any_size_is_accepted_and_paid_off_afterwards(rate: float, wait_s: int | None) -> None:
    """The largest request is never impossible, and Retry-After is when the next is accepted, not a second earlier."""
    clock = Clock()
    limits = limits_of(rate, clock=clock)
    use(limits, MAX_COUNT)
    if wait_s is None:
        use(limits, MAX_COUNT)
        return
    assert refusal(limits).retry_after_s == wait_s
    clock.now_s += wait_s - 1
    if wait_s > 1:
        assert refusal(limits).retry_after_s == 1
    clock.now_s += 1
    use(limits, 1)


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 3))), st.sampled_from([0.5, 3, 10, 1000]))
def test_over_time_a_key_gets_its_rate_and_no_more(requests: list[tuple[int, float]], rate: float) -> None:
    """But for its burst and the last of its requests; and a client that waits as it is told is never refused twice."""
    clock = Clock()
    limits = limits_of(rate, clock=clock)
    began, images = clock.now_s, 0
    for count, pause_s in requests:
        clock.now_s += pause_s
        try:
            use(limits, count)
        except RateLimited as refused:
            clock.now_s += refused.retry_after_s
            use(limits, count)
        images += count
        assert images <= rate * (clock.now_s - began) + max(1, rate) + count


def test_images_are_in_flight_until_their_request_ends_however_it_does() -> None:
    """The limit is on all requests of a key together. Retry-After says when the queue will be done."""
    limits = limits_of(in_flight=100)
    with ExitStack() as others:
        others.enter_context(limits.reserve("a", 60, lambda: 7))
        assert refusal(limits, 41).retry_after_s == 7
        use(limits, 40)
        use(limits, 100, "b")
        with pytest.raises(DeadlinePassed), limits.reserve("a", 40, lambda: 7):
            raise DeadlinePassed
        assert limits.fields("a")["RateLimit"] == '"in-flight";r=40'
    use(limits, 100)


def test_more_than_may_ever_be_in_flight_is_invalid() -> None:
    """No waiting helps, so the client is not told to."""
    with pytest.raises(Invalid, match="101 images; a key may have 100 in flight"):
        use(limits_of(in_flight=100), 101)


@pytest.mark.parametrize("error", [QueueFull(3), NotReady("stuck"), Draining()])
def test_what_is_refused_later_costs_nothing(error: Exception) -> None:
    """Its images are given back."""
    limits = limits_of(10)
    for _ in range(5):
        with pytest.raises(type(error)), limits.reserve("a", 4096, lambda: 7):
            raise error
    use(limits, 10)
    refusal(limits)


def test_what_a_client_gives_up_is_paid_for() -> None:
    """Otherwise asking and leaving would be a way past the limit."""
    limits = limits_of(10)
    with pytest.raises(GeneratorExit), limits.reserve("a", 10, lambda: 7):
        raise GeneratorExit
    refusal(limits)


def test_a_clock_that_goes_back_closes_nobody_out() -> None:
    """A key then waits for no longer than after its largest request."""
    clock = Clock()
    limits = limits_of(10, clock=clock)
    use(limits, 10)
    clock.now_s = 5.0
    assert refusal(limits).retry_after_s <= 1 + MAX_COUNT / 10
    use(limits, 10, "b")


def test_the_fields_are_structured_and_agree_with_retry_after() -> None:
    """As the draft has them: what is left, never less than nothing, and how long that holds."""
    clock = Clock()
    limits = limits_of(10, 50, clock)
    assert limits.fields("a") == {
        "RateLimit-Policy": '"images";q=10;qu="images";w=1, "in-flight";q=50;qu="concurrent-images"',
        "RateLimit": '"images";r=10;t=1, "in-flight";r=50',
    }
    with limits.reserve("a", 34, lambda: 7):
        assert limits.fields("a")["RateLimit"] == '"images";r=0;t=4, "in-flight";r=16'
    refused = refusal(limits)
    assert refused.headers["Retry-After"] == "3"
    assert refused.headers["RateLimit"] == '"images";r=0;t=3, "in-flight";r=50'
    clock.now_s += 2.6
    assert limits.fields("a")["RateLimit"].startswith('"images";r=2;t=1')
    assert limits_of(0.3).fields("a")["RateLimit-Policy"] == '"images";q=1;qu="images";w=4'


def test_ten_thousand_keys_have_limits_of_their_own() -> None:
    """None is refused for another's requests."""
    limits = limits_of(1)
    for number in range(10_000):
        use(limits, 1, f"key-{number}")
    assert all(refusal(limits, key=f"key-{number}").retry_after_s == 1 for number in (0, 4_999, 9_999))


def test_more_names_than_the_table_has_rows_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are limited together, rather than not at all."""
    monkeypatch.setattr("service.engine.key_limits.MAX_NAMES", 2)
    limits = limits_of(1)
    for name in ("a", "b", "c"):
        use(limits, 1, name)
    refusal(limits, key="d")


@pytest.fixture
def shared() -> Iterator[int]:
    """The file in which workers have their table."""
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


@pytest.mark.skipif(sys.platform == "win32", reason="a service has one worker there")
def test_workers_count_together(shared: int) -> None:
    """Whichever saw a name first, all have its row, also of names that they did not see."""
    clock = Clock()
    one, other = (limits_of(10, 20, clock, shared) for _ in range(2))
    use(one, 4, "a")
    use(other, 4, "b")
    use(other, 6, "a")
    with other.reserve("c", 3, lambda: 7):
        assert one.fields("c")["RateLimit"] == '"images";r=7;t=1, "in-flight";r=17'
    refusal(one, key="a")
    use(one, 6, "b")
    refusal(other, key="b")
    assert one.fields("a" * 64) == other.fields("b" * 64)


RACE = """
import sys
from service.engine.key_limits import KeyLimits
from service.errors import RateLimited
limits = KeyLimits(2000, 0, 1, int(sys.argv[1]), lambda: 1000.0)
print("ready", flush=True)
sys.stdin.readline()
accepted = 0
for _ in range(4000):
    try:
        with limits.reserve("a", 1, lambda: 1):
            accepted += 1
    except RateLimited:
        break
with limits.reserve(f"own-{sys.argv[2]}", 1, lambda: 1):
    print(accepted, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a service has one worker there")
def test_no_image_is_lost_or_given_twice_among_processes(shared: int) -> None:
    """Three processes take from one key at once: all together get exactly what it has."""
    races = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(shared), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[shared],
            text=True,
        )
        for number in range(3)
    ]
    for race in races:
        assert race.stdout is not None
        assert race.stdout.readline() == "ready\n"
    for race in races:
        assert race.stdin is not None
        race.stdin.write("go\n")
        race.stdin.flush()
    assert sum(int(race.communicate()[0]) for race in races) == 2000
    count = int.from_bytes(os.pread(shared, 8, 0), "little")
    assert count == 4
