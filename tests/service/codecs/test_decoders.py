"""Slow images are decoded in processes with bounded time and memory, and do not hold up quick ones."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.images.image_file import ImageFile, parse_image_file
from models.images.preparation import UNDECLARED, Preparation
from service.app import create_app
from service.codecs.decoder import FITS
from service.codecs.decoders import Decoders
from service.codecs.picture import Decoded, Shape, decode_picture
from service.codecs.time_slices import OffLoopWork, run_steps
from service.errors import Invalid, TooLarge

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
SHAPE = Shape(6, 8, 1, 10**8)
RNG = np.random.default_rng(0)


def image(picture: Image.Image, form: str = "png", **options: object) -> ImageFile:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return run_steps(parse_image_file(out.getvalue()))


NOISE = Image.fromarray(RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8))
ORDINARY = image(NOISE)
TRANSPARENT = Image.fromarray(RNG.integers(0, 256, (300, 400, 4), dtype=np.uint8))


def endless() -> ImageFile:
    """A small JPEG that repeats its last scan two thousand times, each over 16 million pixels."""
    found = image(Image.new("L", (4000, 4000)), "jpeg", progressive=True)
    *head, end = found.pieces
    scan = next(piece for piece in reversed(head) if bytes(piece[:2]) == b"\xff\xda")
    return found._replace(pieces=[*head, *[scan] * 2000, end])


@asynccontextmanager
async def running(count: int = 1, seconds: float = 60, **limits: int) -> AsyncIterator[Decoders]:
    decoders = Decoders(count, seconds=seconds, **{"max_pixels": 10**8, "max_bytes": 2**25} | limits)
    try:
        yield decoders
    finally:
        decoders.close()


async def decode(decoders: Decoders, file: ImageFile, shape: Shape = SHAPE) -> Decoded:
    result, _ = await decoders.run(OffLoopWork(partial(decoders.decode, file, shape), file.cost))
    assert isinstance(result, Decoded)
    return result


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp"])
async def test_a_process_gives_the_same_pixels(form: str) -> None:
    """A process gives the same pixels as a decoder on the event loop."""
    async with running() as decoders:
        for shape in (SHAPE, Shape(300, 400, 3, 10**6)):
            there, here = await decode(decoders, image(NOISE, form), shape), decode_picture(image(NOISE, form), shape)
            np.testing.assert_array_equal(there.pixels, here.pixels)
            assert there.converted == here.converted
        turned = ORDINARY._replace(orientation=6)
        np.testing.assert_array_equal((await decode(decoders, turned)).pixels, decode_picture(turned, SHAPE).pixels)
        for fit in FITS:
            shape = SHAPE._replace(preparation=Preparation(fit, "#123456"))
            there, here = await decode(decoders, image(TRANSPARENT), shape), decode_picture(image(TRANSPARENT), shape)
            np.testing.assert_array_equal(there.pixels, here.pixels)
        array = ImageFile("L", [RNG.bytes(600 * 400)], 600, 400, 1, 0, is_quick=False)
        np.testing.assert_array_equal((await decode(decoders, array)).pixels, decode_picture(array, SHAPE).pixels)


async def test_a_process_refuses_as_the_event_loop_does() -> None:
    """A broken image and one that is too large get different errors, and the next one is decoded."""
    async with running() as decoders:
        with pytest.raises(Invalid, match="broken"):
            await decode(decoders, ORDINARY._replace(pieces=[ORDINARY.data[:9999]]))
        with pytest.raises(TooLarge, match="400×300 pixels; the most is 100"):
            await decode(decoders, ORDINARY, SHAPE._replace(max_pixels=100))
        assert (await decode(decoders, ORDINARY)).converted


@pytest.mark.slow
async def test_an_image_that_takes_too_long_is_ended_and_the_next_one_decoded() -> None:
    """The system kills its process, whatever codec it is in."""
    async with running(seconds=0.5) as decoders:
        for _ in range(2):
            with pytest.raises(Invalid, match=r"took more than 0\.5 s"):
                await decode(decoders, endless())
        assert (await decode(decoders, ORDINARY)).converted


@pytest.mark.slow
async def test_an_image_that_takes_too_much_memory_is_refused() -> None:
    """A process may take the memory of the largest image allowed, and no more."""
    async with running(max_pixels=10**6) as decoders:
        with pytest.raises(Invalid, match="too much memory"):
            await decode(decoders, image(Image.new("RGBA", (9000, 9000))))
        assert (await decode(decoders, ORDINARY)).converted


def test_a_process_starts_small() -> None:
    """There may be several of them, each started for an image that waits."""
    program = "import sys, service.codecs.decoder; print(*{'torch', 'pydantic', 'fastapi', 'asyncio'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize("preparation", [UNDECLARED, Preparation("pad", "#123456")], ids=["undeclared", "declared"])
@pytest.mark.parametrize("mode", ["RGBA", "I;16", "CMYK", "P"])
async def test_the_largest_image_allowed_has_the_memory_it_takes(mode: str, preparation: Preparation) -> None:
    """In every colour mode, rotated by its orientation."""
    async with running(max_pixels=4_000_000) as decoders:
        form = "jpeg" if mode == "CMYK" else "png"
        options = {"progressive": True} if form == "jpeg" else {} if mode == "RGBA" else {"transparency": 0}
        largest = image(Image.new(mode, (2000, 2000)), form, **options)
        shape = Shape(6, 8, 3, 4_000_000, preparation)
        await decode(decoders, largest._replace(orientation=6), shape)


async def test_a_process_that_was_ended_from_outside_is_replaced(until: Any, caplog: pytest.LogCaptureFixture) -> None:
    """When the system kills it between two images, for memory say, the next image gets a new one."""
    async with running() as decoders:
        await decode(decoders, ORDINARY)
        [process] = decoders.processes
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: process.poll() is not None)
        assert (await decode(decoders, ORDINARY)).converted
        assert not caplog.records


@pytest.mark.slow
async def test_a_process_that_was_stopped_is_killed_and_replaced() -> None:
    """It uses no processor time, so a timer by the clock kills it."""
    async with running(seconds=0.1) as decoders:
        await decode(decoders, ORDINARY)
        [process] = decoders.processes
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(Invalid, match="took more than"):
            await decode(decoders, ORDINARY)
        assert (await decode(decoders, ORDINARY)).converted


async def test_processes_end_with_the_service() -> None:
    """A busy process ends too, and so does the thread that waits for it."""
    threads = threading.active_count()
    async with running(2) as decoders:
        busy = asyncio.create_task(decode(decoders, endless()))
        await decode(decoders, ORDINARY)
        processes = list(decoders.processes)
        assert len(processes) == 2
    with pytest.raises(Invalid):
        await busy
    assert all(process.returncode is not None for process in processes)
    assert threading.active_count() <= threads + 2


async def test_cheap_work_does_not_wait_for_all_expensive_work() -> None:
    """Turns go alternately to the cheapest and to the oldest; a cancelled caller's thread becomes free again."""
    gate, done = threading.Event(), list[str]()
    async with running(1) as decoders:

        def work(name: str) -> OffLoopWork:
            def call() -> None:
                assert gate.wait(60)
                done.append(name)

            return OffLoopWork(call, 1 if name == "cheap" else 100)

        first = asyncio.create_task(decoders.run(work("first")))
        await asyncio.sleep(0)
        expensive = [asyncio.create_task(decoders.run(work(f"expensive {n}"))) for n in range(6)]
        await asyncio.sleep(0)
        cheap = asyncio.create_task(decoders.run(work("cheap")))
        await asyncio.sleep(0)
        expensive[0].cancel()
        first.cancel()  # it is running: its thread is free once it has ended
        gate.set()
        await asyncio.gather(cheap, *expensive[1:])
        assert done.index("cheap") <= 2
        assert sorted(done) == sorted(["first", "cheap", *(f"expensive {n}" for n in range(1, 6))])
        await decoders.run(work("last"))


@pytest.mark.slow
async def test_slow_images_get_their_own_answer_and_an_ordinary_one_is_judged(
    start: Any, tiny_settings: Any, problem: Any
) -> None:
    """Eight at once with a long deadline are each refused, and an ordinary one beside them is answered."""
    slow = {"content": endless().data, "headers": {"Content-Type": "image/jpeg", "X-Timeout-Ms": "120000"}}
    ordinary = {"content": ORDINARY.data, "headers": {"Content-Type": "image/png"}}
    async with start(create_app(tiny_settings(decode_timeout_s=0.2))) as client:
        refused = [asyncio.create_task(client.post("/discriminate", **slow)) for _ in range(8)]
        await asyncio.sleep(0)
        assert (await client.post("/discriminate", **ordinary)).json()["results"][0]["converted"]
        for reply in await asyncio.gather(*refused):
            assert "took more than 0.2 s" in problem(reply, 422, "invalid")
