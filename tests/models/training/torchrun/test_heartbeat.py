"""Beats of ranks that share a store: whose silence is noticed, after how long, and that a wish to stop reaches all."""

import threading

import torch.distributed as dist

from models.training.torchrun.heartbeat import BEAT_S, SILENT_BEATS, Heartbeat


def hearts(size: int) -> list[Heartbeat]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [Heartbeat(store, rank, size) for rank in range(size)]


def test_a_minute_of_silence_is_noticed_by_all_others() -> None:
    """One rank of three is stopped: both others name it after the same number of beats, and neither names the other."""
    assert BEAT_S <= 10
    assert BEAT_S * SILENT_BEATS == 60
    hopeful, other, _ = hearts(3)
    hopeful.beat()
    other.beat()
    for _ in range(SILENT_BEATS - 1):
        assert hopeful.beat() == other.beat() == []
    assert hopeful.beat() == other.beat() == [2]


def test_a_pause_that_ends_in_time_is_forgotten() -> None:
    """A process that was stopped for less than a minute, and continued, is one like the others."""
    one, other = hearts(2)
    one.beat()
    for _ in range(3):
        for _ in range(SILENT_BEATS - 1):
            assert one.beat() == []
        other.beat()


def test_whoever_slept_does_not_take_the_others_for_silent() -> None:
    """Its own beats count, not the time: after any pause it hears what they have said since."""
    sleeper, other = hearts(2)
    sleeper.beat()
    for _ in range(10 * SILENT_BEATS):
        other.beat()  # which finds the sleeper silent, and rightly so
    assert sleeper.beat() == []


def test_a_wish_to_stop_reaches_all_ranks() -> None:
    """A signal to one rank sets the flags of all, whatever they are doing."""
    ranks, flags = hearts(3), [threading.Event() for _ in range(3)]
    for heart, flag in zip(ranks, flags, strict=True):
        heart.watch(flag)
        heart.beat()
    assert not any(flag.is_set() for flag in flags)
    flags[1].set()
    for heart in (ranks[1], ranks[0], ranks[2]):
        heart.beat()
    assert all(flag.is_set() for flag in flags)
