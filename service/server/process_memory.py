"""Tunes the C heap and the garbage collector of the process."""

import asyncio
import contextlib
import ctypes
import gc
import sys

GC_THRESHOLDS = 10_000, 10, 10  # of the three generations
TRIM_INTERVAL_S = 30.0
_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, so that one can reuse what another has freed; saves 10 MB.

    By default GNU's C library gives each thread a heap of its own and keeps free memory in each.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def freeze_startup_objects() -> None:
    """Exclude the objects of start-up, hundreds of thousands and mostly torch's, from garbage collection.

    Visiting them again and again took a quarter of a small request's time. The objects of requests are freed by
    reference counting, so the collector needs to run only rarely.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    gc.enable()
    trim_heap()  # 50 MB that warm-up allocated and freed


def trim_heap() -> None:
    """Return free memory in the heap to the system.

    By itself the C library returns only the end of the heap. Memory that requests once needed would stay with the
    process, and its resident memory would grow for days without any leak. Trimming takes a millisecond for ten
    megabytes. No thread can allocate meanwhile, so it might as well run on the event loop.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


async def keep_trimming_heap() -> None:
    """Call `trim_heap` every `TRIM_INTERVAL_S`, until cancelled."""
    while True:
        await asyncio.sleep(TRIM_INTERVAL_S)
        trim_heap()
