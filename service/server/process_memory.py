"""How much memory the process keeps, and which objects the garbage collector looks at."""

import asyncio
import contextlib
import ctypes
import gc
import sys

GARBAGE = 10_000, 10, 10  # the thresholds of the three generations
GIVE_BACK_EVERY_S = 30.0
_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, so that what one frees another can use: 10 MB less.

    By default GNU's C library gives threads heaps of their own, and keeps free memory in each.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def settle() -> None:
    """Keep the garbage collector from looking at what start-up built: hundreds of thousands of objects, mostly torch's.

    Looking at them again and again took a quarter of a small request's time. What requests leave behind is freed by
    reference counts, so the collector needs to run only now and then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)
    gc.enable()
    give_back()  # 50 MB, which the warm-up took and freed


def give_back() -> None:
    """Give free memory of the heap back to the system.

    By itself the C library gives back only the end of the heap. The rest of the largest amount that requests ever
    needed at once would stay with the process, and its resident memory would creep up for days without any leak.
    It takes a millisecond for ten megabytes. No thread can allocate meanwhile, so the event loop may as well do it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


async def keep_giving_back() -> None:
    """Call `give_back` now and then, until cancelled."""
    while True:
        await asyncio.sleep(GIVE_BACK_EVERY_S)
        give_back()
