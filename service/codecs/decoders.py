"""Decodes what takes long away from the event loop: large images in processes that can be ended, arrays on threads.

As many at a time as there are threads, each with a process of its own once it needs one. The processes keep the bound
on an image's time and memory themselves (decoder.py); here it is noticed that one has ended, its image is told so, and
the next one gets a new process.
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

from service.codecs.decoder import REPLIES, REPLY, REQUEST
from service.codecs.image_file import ImageFile, broken
from service.codecs.picture import Decoded, Shape
from service.codecs.time_slices import Apart, Turns, timed
from service.errors import Invalid, NotReady, ServiceError

# Copies of all pixels that decoding, turning, and laying transparency on a ground have at once, each of four bytes.
_COPIES, _PIXEL_BYTES = 6, 4
_PATIENCE = (
    10  # times as many seconds by the clock: a process that is stopped, or waits for a disk, uses none of its own
)
_LIBRARIES_BYTES = 64 * 2**20
# One thread is all that a codec needs; what libraries reserve for more counts as memory.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ROOT = str(Path(__file__).parents[2])

log = logging.getLogger(__name__)


class Decoders:
    """Does work apart, a number of pieces at a time.

    Args:
        count: How many.
        seconds: Of the processor, for one image.
        max_pixels: Of one image.
        max_bytes: Of a file.
    """

    def __init__(self, count: int, *, seconds: float, max_pixels: int, max_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoder")
        self._free = count
        self._turns = Turns()
        self._seconds = seconds
        self._memory = _COPIES * _PIXEL_BYTES * max_pixels + 2 * max_bytes + _LIBRARIES_BYTES
        self._own = threading.local()  # a thread's process
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._late: set[subprocess.Popen[bytes]] = set()  # those that were ended for it
        self._is_closed = False

    async def run(self, apart: Apart) -> tuple[Any, float]:
        """The result of this work, and the seconds that it took once it had its turn."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(apart.cost)
        job = self._threads.submit(timed(apart.work))
        loop = asyncio.get_running_loop()

        def end(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(self._give_back)

        job.add_done_callback(end)  # also where nobody waits for it any longer: until then its thread is taken
        return await asyncio.wrap_future(job)

    async def _wait(self, cost: float) -> None:
        turn = self._turns.wait(time.monotonic(), cost)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came in this very step
                self._give_back()
            raise

    def _give_back(self) -> None:
        if not self._turns.next():
            self._free += 1

    def decode(self, file: ImageFile, shape: Shape) -> Decoded:
        """As `decode_picture`, in a process of its own. Called on one of our threads, by `run`.

        Raises:
            Invalid: Also where it took more time than an image may.
            TooLarge: See there.
            NotReady: No process can be started, or it does not run.
        """
        try:
            process = self._process()
        except OSError as reason:  # no memory, no file number, no process is left
            log.error("no decoder can be started: %s", reason)  # noqa: TRY400 - the reason is all there is to know
            raise NotReady("no decoder can be started") from None
        length = sum(map(len, file.pieces))
        request = REQUEST.pack(file.format.encode(), file.orientation, *shape, file.width, file.height, length)
        timer = threading.Timer(_PATIENCE * self._seconds, self._end_late, [process])
        timer.start()
        assert process.stdin is not None  # noqa: S101 - they are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.writelines([request, *file.pieces])
            process.stdin.flush()
            kind, converted, size = REPLY.unpack(_read(process.stdout, REPLY.size))
            content = _read(process.stdout, size)
        except (OSError, EOFError):
            raise self._ended(process) from None
        finally:
            timer.cancel()
        if kind == 0:
            pixels = np.frombuffer(content, np.uint8).reshape(shape.height, shape.width, shape.channels)
            return Decoded(pixels, bool(converted))
        error: ServiceError = REPLIES[kind](content.decode())
        raise error

    def _process(self) -> subprocess.Popen[bytes]:
        """The running thread's."""
        process: subprocess.Popen[bytes] | None = getattr(self._own, "process", None)
        if process is None or process.poll() is not None:
            if process is not None:
                self._forget(process)
            process = self._own.process = subprocess.Popen(  # noqa: S603 - ourselves
                # Without the working directory among the places that modules come from.
                [sys.executable, "-P", "-m", "service.codecs.decoder", str(self._seconds), str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a log that nobody reads must not stop it
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join([_ROOT, *sys.path[1:]])},
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
            self._processes.add(process)
            if self._is_closed:
                process.kill()
        return process

    def _end_late(self, process: subprocess.Popen[bytes]) -> None:
        self._late.add(process)
        process.kill()

    def _ended(self, process: subprocess.Popen[bytes]) -> ServiceError:
        """Why a process ended while it had an image."""
        code = process.wait()
        took_long = code == -signal.SIGPROF or process in self._late
        self._forget(process)
        self._own.process = None
        if took_long:
            return Invalid(f"Decoding the image took more than {self._seconds:g} s.")
        if not self._is_closed:
            log.error("a decoder ended with exit code %d", code)
        return broken() if code < 0 else NotReady("a decoder can't run")  # a signal may be the image's fault

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        self._processes.discard(process)
        self._late.discard(process)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent has nowhere to go
                if pipe is not None:
                    pipe.close()

    def close(self) -> None:
        """Decode nothing more. What is being decoded is broken off, and its thread tells who waits."""
        self._is_closed = True
        for process in list(self._processes):
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in list(self._processes):
            process.wait()
            self._forget(process)


def _read(pipe: IO[bytes], size: int) -> bytes:
    content = pipe.read(size)
    if len(content) < size:
        raise EOFError
    return content
