"""Image files that were made to hurt their decoder: each gets its own answer, and none costs anybody else's."""

import itertools
import logging
import random
import struct
import zlib
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from benchmarks.faults import slow_images
from benchmarks.faults.slow_images import chunk, picture, progressive, run_length, saved, segment
from service.app import create_app
from service.codecs.decoders import Decoders
from service.settings import Settings

MIB = 2**20
MUTANTS = 25  # of each format
MAX_SIDE = 4000  # whose square is as many pixels as may be sent

Files = dict[str, tuple[bytes, bool | None]]  # and whether it can be decoded, where that is for us to say

# PNG

SIGNATURE, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")


def png(
    size: tuple[int, int] = (8, 8),
    kind: int = 0,
    depth: int = 8,
    *,
    before: bytes = b"",
    data: bytes | None = None,
    interlaced: bool = False,
) -> bytes:
    """Of zeros, with chunks before its pixels; `kind` is 0 for grey, 2 for RGB, 3 for a palette, 6 for RGBA."""
    width, height = size
    row = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind, 1) + 7) // 8
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced))
    packed = zlib.compress(bytes(row * height)) if data is None else data
    return SIGNATURE + head + before + chunk(b"IDAT", packed) + END


def packed(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


PALETTE = chunk(b"PLTE", bytes(range(6)))
LOOP = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHII", 0x8769, 4, 1, 8) + struct.pack(">I", 8)


def pngs() -> Files:
    return {
        "cut short": (saved(picture(64, 64), "png")[:-1000], False),
        "no pixels": (SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)) + END, False),
        "nothing but its signature": (SIGNATURE, False),
        "2³¹ − 1 pixels a side": (png((2**31 - 1, 2**31 - 1), data=b""), False),
        "2³² − 1 pixels a side": (SIGNATURE + chunk(b"IHDR", b"\xff" * 8 + b"\x08\0\0\0\0"), False),
        "no pixels a side": (png((0, 0)), False),
        "as large as may be, of 16 KB": (png((MAX_SIDE, MAX_SIDE)), True),
        "a header that lies": (png((3000, 3000), data=packed(8)), False),
        "a wrong checksum": (png()[:-16] + b"\0\0\0\0" + END, True),
        "pixels that go on for 64 MiB": (png(data=packed(64 * MIB)), True),
        "pixels that are no deflate": (png(data=b"\xff" * 100), False),
        "sixteen bits": (png(depth=16), True),
        "sixteen bits of colour": (png(kind=2, depth=16), True),
        "a palette and its transparency": (png(kind=3, depth=1, before=PALETTE + chunk(b"tRNS", b"\0\x80")), True),
        "a transparency longer than its palette": (png(kind=3, before=PALETTE + chunk(b"tRNS", bytes(999))), False),
        "no palette": (png(kind=3), False),
        "a palette that ends within a colour": (png(kind=3, before=chunk(b"PLTE", b"12345")), None),
        "a depth that there is not": (png(depth=3), False),
        "a colour type that there is not": (png(kind=5), False),
        "interlaced": (png(kind=2, interlaced=True, data=packed(8 * 8 * 3 + 15)), True),
        "a text of 8 MiB": (png(before=chunk(b"tEXt", b"a\0" + b"b" * 8 * MIB)), True),
        "a text that unpacks to 64 MiB": (png(before=chunk(b"zTXt", b"a\0\0" + packed(64 * MIB))), True),
        "an international one": (png(before=chunk(b"iTXt", b"a\0\1\0\0\0" + packed(64 * MIB))), True),
        "a profile that unpacks to 64 MiB": (png(before=chunk(b"iCCP", b"a\0\0" + packed(64 * MIB))), True),
        "a profile that is none": (png(before=chunk(b"iCCP", b"\0\0\0\0")), True),
        "ten thousand texts": (png(before=chunk(b"tEXt", b"a\0b") * 9_990), True),
        "too many texts": (png(before=chunk(b"tEXt", b"a\0b") * 10_001), False),
        "EXIF that leads to itself": (png(before=chunk(b"eXIf", LOOP)), True),
        "four thousand million frames": (png(before=chunk(b"acTL", b"\xff" * 8)), True),
        "a chunk that ends behind the file": (png()[:-12] + b"\xff\xff\xff\xff" + b"tEXt", None),
        "a chunk without a name": (png(before=b"\0\0\0\0\0\0\0\0\0\0\0\0"), True),
    }


# JPEG

JPEG = saved(picture(16, 16), "jpeg")
GREY_JPEG = saved(picture(16, 16, "L"), "jpeg")
FRAME = JPEG.index(b"\xff\xc0")


def framed(height: int, width: int, precision: int = 8) -> bytes:
    """A small JPEG that says that it is another size."""
    return JPEG[: FRAME + 4] + struct.pack(">BHH", precision, height, width) + JPEG[FRAME + 9 :]


def jpegs() -> Files:
    return {
        "cut short": (saved(picture(200, 200), "jpeg")[:3000], False),
        "nothing but its start": (b"\xff\xd8\xff", False),
        "2¹⁶ − 1 pixels a side": (framed(65_535, 65_535), False),
        "a header that lies": (framed(3000, 3000), None),
        "no lines": (framed(0, 16), False),
        "twelve bits": (framed(16, 16, 12), False),
        "CMYK": (saved(Image.new("CMYK", (16, 16), (1, 2, 3, 4)), "jpeg"), True),
        "CMYK without Adobe's word": (saved(Image.new("CMYK", (16, 16)), "jpeg").replace(b"Adobe", b"adobE"), True),
        "a frame of nine components": (JPEG[: FRAME + 9] + b"\x09" + JPEG[FRAME + 10 :], False),
        "no tables": (JPEG[:2] + JPEG[FRAME:], False),
        "two frames": (JPEG[:FRAME] + JPEG[FRAME : FRAME + 19] + JPEG[FRAME:], None),
        "progressive": (saved(picture(64, 64), "jpeg", progressive=True), True),
        "scans without number": (progressive(MAX_SIDE, MAX_SIDE, 5000), False),
        "two hundred scans of a small one": (progressive(16, 16, 200), True),
        "a segment shorter than its length": (JPEG[:2] + b"\xff\xe1\0\1" + JPEG[2:], False),
        "EXIF that leads to itself": (JPEG[:2] + segment(0xE1, b"Exif\0\0" + LOOP) + JPEG[2:], True),
        "EXIF within EXIF": (JPEG[:2] + segment(0xE1, b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" * 500) + JPEG[2:], True),
        "8 MiB of fill": (JPEG[:2] + b"\xff" * 8 * MIB + JPEG[2:], True),
        "a comment for each kilobyte of 8 MiB": (JPEG[:2] + segment(0xFE, bytes(1020)) * 8192 + JPEG[2:], True),
        "too many empty comments": (JPEG[:2] + segment(0xFE, b"") * 10_001 + JPEG[2:], False),
        "another picture in its thumbnail": (JPEG[:2] + segment(0xE1, b"Exif\0\0" + GREY_JPEG) + JPEG[2:], True),
        "a second one behind it": (JPEG + GREY_JPEG * 100, True),
        "restarts": (JPEG[:-2] + b"\xff\xd0" * 50_000 + JPEG[-2:], None),
    }


# WebP and BMP

WEBP, LOSSLESS = saved(picture(16, 16), "webp"), saved(picture(16, 16), "webp", lossless=True)
FRAMES = [picture(16, 16), picture(16, 16, noise=False)]
ANIMATED = saved(FRAMES[0], "webp", save_all=True, append_images=FRAMES[1:])


def webps() -> Files:
    return {
        "cut short": (WEBP[:-30], False),
        "nothing but its head": (b"RIFF\xff\xff\xff\xffWEBP", False),
        "animated": (ANIMATED, True),
        "a canvas of 2²⁴ a side": (
            b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + WEBP[12:],
            False,
        ),
        "a canvas larger than its picture": (
            b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\0\0" * 2 + WEBP[12:],
            False,
        ),
        "a lossless one as large as may be": (
            saved(Image.new("RGB", (MAX_SIDE, MAX_SIDE)), "webp", lossless=True),
            True,
        ),
        "a length of 2³²": (WEBP[:16] + b"\xff\xff\xff\xff" + WEBP[20:], None),
        "lossless noise": (LOSSLESS[:30] + random.Random(0).randbytes(4000), None),  # noqa: S311 - repeatable
        "an alpha plane that is none": (b"RIFF\xff\0\0\0WEBPALPH\x04\0\0\0\xff\xff\xff\xff" + WEBP[12:], None),
    }


def bmp(width: int = 8, height: int = 8, bits: int = 8, compression: int = 0, data: bytes | None = None) -> bytes:
    """With a palette of 256 colours."""
    rows = bytes((width * bits + 31) // 32 * 4 * abs(height)) if data is None else data
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + info + bytes(1024) + rows


def bmps() -> Files:
    return {
        "from top to bottom": (bmp(height=-8), True),
        "−2³¹ lines": (bmp(height=-(2**31), data=b""), False),
        "2³¹ pixels a side": (bmp(2**31 - 1, 2**31 - 1, data=b""), False),
        "a negative width": (bmp(-8, 8, data=bytes(64)), False),
        "a header that lies": (bmp(3000, 3000, data=bytes(64)), False),
        "runs": (bmp(compression=1, data=(b"\x08\x01\0\0" * 8) + b"\0\1"), True),
        "runs of one pixel, as many as may be": (run_length(MAX_SIDE, MAX_SIDE // 2), False),
        "a run that leaps out of the picture": (bmp(compression=1, data=b"\0\2\xff\xff\x01\x01\0\1"), None),
        "runs that never end": (bmp(compression=1, data=b"\0\0" * 100_000), None),
        "runs of half bytes": (bmp(bits=4, compression=2, data=b"\x08\x11\0\0" * 8 + b"\0\1"), None),
        "a compression that there is not": (bmp(compression=99), False),
        "masks of nothing": (bmp(bits=32, compression=3), None),
        "a palette of 2³² colours": (bmp()[:46] + b"\xff" * 4 + bmp()[50:], None),
        "pixels behind its end": (bmp()[:10] + b"\xff\xff\xff\x7f" + bmp()[14:], False),
        "a header of 2³² bytes": (bmp()[:14] + b"\xff" * 4 + bmp()[18:], False),
        "the oldest header": (b"BM\x1a\0\0\0\0\0\0\0\x1a\0\0\0\x0c\0\0\0\xff\xff\xff\xff\1\0\x18\0", False),
        "nothing but its name": (b"BM", False),
    }


def others() -> Files:
    return {
        "GIF": (saved(picture(8, 8), "gif"), False),
        "TIFF": (saved(picture(8, 8), "tiff"), False),
        "ICO": (saved(picture(16, 16), "ico"), False),
        "SVG that fetches": (
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/livez"/></svg>',
            False,
        ),
        "Postscript that runs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/etc/passwd) run\n", False),
        "a web page": (b"<html>", False),
        "nothing": (b"", False),
    }


def hostile() -> Files:
    """All of them, each with its form in its name."""
    forms: dict[str, Files] = {"PNG": pngs(), "JPEG": jpegs(), "WebP": webps(), "BMP": bmps(), "other": others()}
    return {f"{form}: {name}": file for form, files in forms.items() for name, file in files.items()}


@pytest.fixture(scope="module")
def app(tiny_settings: Callable[..., Settings]) -> FastAPI:
    """Slow files have half a second each, so that the tests end soon."""
    return create_app(tiny_settings(decode_timeout_s=0.5, max_body_bytes=128 * MIB))


@pytest.mark.slow
@pytest.mark.anyio
async def test_each_file_of_a_form_has_its_own_answer(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them in one request, and an ordinary one behind each: what can be decoded is judged, those in any case."""
    ordinary = saved(Image.fromarray(np.full((8, 8), 128, np.uint8)), "png")
    corpus = hostile()
    files = [file for one, _ in corpus.values() for file in (one, ordinary)]
    form = [("images", (f"{number}", file)) for number, file in enumerate(files)]
    reply = await client.post("/discriminate", files=form, headers={"X-Timeout-Ms": "120000"})
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    answers = dict(zip(corpus, results[::2], strict=True))
    assert not {
        name: answers[name]
        for name, (_, is_decoded) in corpus.items()
        if is_decoded is not None and ("error" not in answers[name]) != is_decoded
    }
    codes = {answer["error"]["code"] for answer in answers.values() if "error" in answer}
    assert codes == {"invalid", "too_large"}
    assert all(result == results[1] for result in results[1::2])
    assert "error" not in results[1]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture(scope="module")
def beginnings() -> dict[str, list[slow_images.Parts]]:
    """The small ones of the files that a search for slow ones begins with."""
    every = slow_images.beginnings().items()
    return {form: [parts for parts in files if sum(map(len, parts)) < MIB // 4] for form, files in every}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp"])
def test_no_mutant_ends_its_decoder(
    beginnings: dict[str, list[slow_images.Parts]], form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A small search for slow files: those that cost most are changed again, and each has an answer."""
    small = beginnings[form]
    rng = random.Random(0)  # noqa: S311 - repeatable
    decoders = Decoders(1, seconds=0.1, max_pixels=slow_images.SHAPE.max_pixels, max_bytes=slow_images.MAX_BYTES)
    try:
        tried = list(itertools.islice(slow_images.search(form, small, 3600, rng, decoders), len(small) + MUTANTS))
    finally:
        decoders.close()
    assert any(found.how == "at once" for found in tried)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
