"""Runs slow decoding off the event loop: arrays on worker threads, large images in processes, which can be killed.

There is a fixed number of threads, and each starts a process of its own at its first image. A process bounds the time
and memory of an image by itself (decoder.py). When one ends, its image gets an error, and the thread starts another
process for its next image.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from models.images.image_file import BROKEN, ImageFile
from service.codecs.decoder import REPLIES, REPLY, request_of
from service.codecs.picture import Decoded, Shape
from service.codecs.time_slices import FairQueue, OffLoopWork, timed_call
from service.errors import Invalid, NotReady, ServiceError

# Decoding, rotating and compositing hold up to so many copies of all pixels at once, each pixel in four bytes.
_COPIES, _PIXEL_BYTES = 6, 4
# Seconds by the clock for each second of processor time that an image may take. A process that is stopped, or waits for
# a disk, uses no processor time, and would never reach that limit.
_WALL_SECONDS_PER_CPU_SECOND = 10
_LIBRARIES_BYTES = 64 * 2**20
# A codec needs one thread only. Memory that libraries reserve for more threads would count against the limit.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ROOT = str(Path(__file__).parents[2])

log = logging.getLogger(__name__)


class Decoders:
    """Worker threads, each with a decoder process, that run a bounded number of calls at a time.

    Args:
        count: Number of threads, and so of calls at a time.
        seconds: Processor time that decoding one image may take.
        max_pixels: Largest image, in pixels.
        max_bytes: Largest file, in bytes.

    Attributes:
        processes: Those that are running.
    """

    def __init__(self, count: int, *, seconds: float, max_pixels: int, max_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoder")
        self._free = count  # threads
        self._queue = FairQueue()
        self._seconds = seconds
        self._memory = _COPIES * _PIXEL_BYTES * max_pixels + 2 * max_bytes + _LIBRARIES_BYTES
        self._local = threading.local()  # each thread's process
        self.processes: set[subprocess.Popen[bytes]] = set()
        self._timed_out: set[subprocess.Popen[bytes]] = set()  # killed by the timer
        self._is_closed = False

    async def run(self, call: OffLoopWork) -> tuple[Any, float]:
        """Wait for a free thread and do the work on it; returns its result and its seconds without that wait."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(call.cost)
        job = self._threads.submit(timed_call, call.work)
        loop = asyncio.get_running_loop()

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits for the thread
                loop.call_soon_threadsafe(self._release_thread)

        job.add_done_callback(end)  # not when this coroutine ends: if it is cancelled, the thread is still busy
        return await asyncio.wrap_future(job)

    async def _wait(self, cost: float) -> None:
        turn = self._queue.wait(time.monotonic(), cost)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the turn came just before the cancellation: pass it on
                self._release_thread()
            raise

    def _release_thread(self) -> None:
        if not self._queue.wake_next():
            self._free += 1

    def decode(self, file: ImageFile, shape: Shape) -> Decoded:
        """Do `decode_picture` in this thread's decoder process. To be called by `run`, on one of its threads.

        Raises:
            Invalid: The image can't be decoded, or not within the time allowed.
            TooLarge: It has too many pixels.
            NotReady: The process can't be started, or ended with an error.
        """
        try:
            process = self._process()
        except OSError as reason:  # out of memory, file descriptors or processes
            log.error("no decoder can be started: %s", reason)  # noqa: TRY400 - the reason is all there is to know
            raise NotReady("no decoder can be started") from None
        timer = threading.Timer(_WALL_SECONDS_PER_CPU_SECOND * self._seconds, self._kill_late, [process])
        timer.start()
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.writelines([request_of(file, shape), *file.pieces])
            process.stdin.flush()
            kind, converted, size = REPLY.unpack(_read(process.stdout, REPLY.size))
            content = _read(process.stdout, size)
        except (OSError, EOFError):
            raise self._error_after_exit(process) from None
        finally:
            timer.cancel()
        if kind == 0:
            pixels = np.frombuffer(content, np.uint8).reshape(shape.height, shape.width, shape.channels)
            return Decoded(pixels, bool(converted))
        error: ServiceError = REPLIES[kind](content.decode())
        raise error

    def _process(self) -> subprocess.Popen[bytes]:
        """The decoder process of the current thread; started if it has none that runs."""
        process: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if process is None or process.poll() is not None:
            if process is not None:
                self._forget(process)
            process = self._local.process = subprocess.Popen(  # noqa: S603 - our own module
                # -P: no modules are imported from the working directory.
                [sys.executable, "-P", "-m", "service.codecs.decoder", str(self._seconds), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a pipe that nothing reads would block the process once full
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join([_ROOT, *sys.path[1:]])},
                start_new_session=True,  # so that Ctrl-C in a terminal does not reach it
            )
            self.processes.add(process)
            if self._is_closed:
                process.kill()
        return process

    def _kill_late(self, process: subprocess.Popen[bytes]) -> None:
        self._timed_out.add(process)
        process.kill()

    def _error_after_exit(self, process: subprocess.Popen[bytes]) -> ServiceError:
        """The error for the image that a process was decoding when it ended."""
        code = process.wait()
        has_timed_out = code == -signal.SIGPROF or process in self._timed_out
        self._forget(process)
        self._local.process = None
        if has_timed_out:
            return Invalid(f"Decoding the image took more than {self._seconds:g} s.")
        if not self._is_closed:
            log.error("a decoder ended with exit code %d", code)
        return Invalid(BROKEN) if code < 0 else NotReady("a decoder can't run")  # a crash may be the image's fault

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        self.processes.discard(process)
        self._timed_out.discard(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unsent data can't be flushed
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """Kill all decoder processes and stop the threads. Images that are being decoded get an error."""
        self._is_closed = True
        for process in list(self.processes):
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in list(self.processes):
            process.wait()
            self._forget(process)


def _read(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
