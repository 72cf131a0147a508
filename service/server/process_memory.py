"""What the process keeps of the system's memory, and what the garbage collector looks at."""

import asyncio
import contextlib
import ctypes
import gc
import sys

GARBAGE = 10_000, 10, 10  # new objects, young and middle collections before the collector looks
GIVE_BACK_EVERY_S = 30.0
_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Let all threads take memory from one heap, so that what one has freed serves the next: 10 MB less.

    Otherwise GNU's C library gives each a heap of its own, and keeps what is free there.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def settle() -> None:
    """Take all that start-up built, torch's hundred thousands of objects, out of the garbage collector's sight.

    It would look at them again and again for as long as the process lives: a quarter of a small request's time. What
    requests leave behind is freed by its counts; the collector needs to look only now and then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    gc.enable()
    give_back()  # what warming up took and freed: 50 MB


def give_back() -> None:
    """Give what is free in the heap back to the system.

    The C library does so for the heap's end alone. Whatever else was ever taken at once, by the worst coincidence of
    requests so far, would stay with the process, and its resident memory would creep up for days with nothing lost.
    It takes a millisecond for ten megabytes, in which no thread gets memory; so it may as well be the event loop's.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


async def keep_giving_back() -> None:
    """`give_back` now and then, until cancelled."""
    while True:
        await asyncio.sleep(GIVE_BACK_EVERY_S)
        give_back()
