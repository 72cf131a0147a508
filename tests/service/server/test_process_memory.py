"""The process returns free memory to the system, and collects garbage rarely."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from service.server import process_memory as memory
from service.server.process_memory import GC_THRESHOLDS, freeze_startup_objects
from service.settings import Settings

on_gnu = pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="GNU's"
)


def ran(program: str, *arguments: str) -> str:
    """The output of a program in a process of its own."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@on_gnu
def test_threads_share_one_heap() -> None:
    """Eight threads at work create no further heaps."""
    program = """
import ctypes, sys, threading
from service.server.process_memory import share_one_heap
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
if sys.argv[1] == "shared":
    share_one_heap()
both = threading.Barrier(8)
def work():
    libc.malloc(100_000)
    both.wait(60)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p.in_dll(libc, "stdout")
libc.malloc_info(0, file)
libc.fflush(file)
"""
    heaps = {}
    for kind in ("shared", "each"):
        heaps[kind] = ran(program, kind).count("<heap ")
    assert heaps["shared"] == 1
    assert heaps["each"] > 1


def test_the_collector_begins_once_the_bundles_are_loaded() -> None:
    """It is off during start-up; afterwards it visits new objects only, and rarely."""
    before = gc.isenabled(), gc.get_threshold()
    gc.disable()
    try:
        freeze_startup_objects()
        assert gc.isenabled()
        assert gc.get_threshold() == GC_THRESHOLDS
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.set_threshold(*before[1])
        (gc.enable if before[0] else gc.disable)()


@on_gnu
def test_what_a_peak_took_is_given_back() -> None:
    """A hundred megabytes that were freed below an object that stays are returned to the system."""
    program = """
import os
from pathlib import Path
from service.server.process_memory import trim_heap, share_one_heap
share_one_heap()
def mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = mib()
peak = [b"x" * size for size in range(99_000, 100_000)]
stays = b"y" * 100_000
del peak
print(mib() - before)
trim_heap()
print(mib() - before)
"""
    kept, still_kept = map(float, ran(program).split())
    assert kept > 50  # with `stays` above it, the C library by itself keeps it
    assert still_kept < 10


def test_a_server_gives_memory_back_again_and_again(
    live_server: Any, tiny_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done repeatedly, not only after the start."""
    times = []
    monkeypatch.setattr(memory, "TRIM_INTERVAL_S", 0.01)
    monkeypatch.setattr(memory, "trim_heap", lambda: times.append(1))
    with live_server(tiny_settings()).running() as server:
        so_far = len(times)
        server.wait_for(lambda: len(times) >= so_far + 3)
