"""Looks for image files that take long: mutates files by their structure, and goes on from those that took longest.

    python -m benchmarks.faults.slow_images [--seconds 120] [--seed 0]

For each format it begins with what is known to be slow (floods of segments, thousands of scans, codes for every block)
and mutates from there. Three times are reported apart: the walk that cuts out all but the pixels, whose longest step
holds up the event loop; decoding on the event loop; and decoding in a process of its own, whose time has a bound, and
its memory too.
"""

import argparse
import contextlib
import gc
import io
import itertools
import random
import re
import struct
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.tools.report import Check, finish, parser, table
from models.images.image_file import QUICK_BYTES, ImageFile, ImageFileError, parse_image_file
from service.codecs.decoders import Decoders
from service.codecs.picture import Shape, decode_picture
from service.errors import ServiceError
from service.server.process_memory import GC_THRESHOLDS

SHAPE = Shape(28, 28, 1, 16_000_000)
TIMEOUT_S, MAX_BYTES, MIB = 2.0, 32 * 2**20, 2**20
KEPT = 12  # files of a format from which others are made
STEP_MS, QUICK_MS, WALK_MS_PER_MIB, APART_S, MEMORY_MIB = 5.0, 20.0, 100.0, 4.0, 550
MARKERS = (0xC0, 0xC2, 0xC4, 0xC9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE, 0xD9, 0xFF)
CHUNKS = (b"IDAT", b"tEXt", b"zTXt", b"iCCP", b"eXIf", b"PLTE", b"tRNS", b"fdAT", b"acTL", b"IEND")
WEBP_CHUNKS = (b"VP8X", b"ANMF", b"EXIF", b"XMP ", b"ICCP", b"ALPH", b"junk")

Parts = list[bytes]


class Found(NamedTuple):
    """A file and what it took, in seconds."""

    parts: Parts
    size: int
    walk_s: float
    step_s: float
    decode_s: float
    how: str
    memory: int = 0  # bytes that its decoder process had in use at most; 0 where it had none, or has ended

    def score(self) -> float:
        """Seconds for its size; what is small counts as a kilobyte or two."""
        return (self.walk_s + self.decode_s) / (self.size + 2048) + 1e-3 * self.step_s


def picture(width: int, height: int, mode: str = "RGB", *, noise: bool = True) -> Image.Image:
    """Noise, or nothing."""
    rng = np.random.default_rng(0)
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(rng.integers(0, 256 if noise else 1, shape, np.uint8), mode)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """As a file."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(code: int, data: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def split_png(file: bytes) -> Parts:
    """Its signature and its chunks."""
    parts, at = [file[:8]], 8
    while at < len(file):
        end = at + 12 + int.from_bytes(file[at : at + 4], "big")
        parts.append(file[at:end])
        at = end
    return parts


def split_jpeg(file: bytes) -> Parts:
    """Its start and its segments, a scan with what follows it."""
    places = [
        0,
        *(at for at in range(2, len(file) - 1) if file[at] == 0xFF and file[at + 1] in MARKERS[:-1]),
        len(file),
    ]
    return [file[begin:end] for begin, end in itertools.pairwise(places)]


def split_webp(file: bytes) -> Parts:
    """Its head and its chunks."""
    parts, at = [file[:12]], 12
    while at < len(file):
        size = int.from_bytes(file[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        parts.append(file[at:end])
        at = end
    return parts


def progressive(width: int, height: int, scans: int) -> bytes:
    """A JPEG whose last scan is there so many times more: each goes over all of it."""
    *head, last, end = split_jpeg(saved(picture(width, height, "L", noise=False), "jpeg", progressive=True))
    return b"".join([*head, *[last] * scans, end])


def run_length(width: int, height: int) -> bytes:
    """A BMP of runs of one pixel each."""
    rows = b"\1\7" * (width * height) + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = bytes(1024)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(rows), 0, 0, 54 + 1024) + info + palette + rows


def beginnings() -> dict[str, list[Parts]]:
    """What is known to be slow, or was, and ordinary files to begin from."""
    tiny, small, large = picture(64, 48), picture(200, 150), picture(2000, 1500)
    flat = picture(4000, 4000, "L", noise=False)
    jpeg, png = split_jpeg(saved(small, "jpeg")), split_png(saved(small, "png"))
    webp = split_webp(saved(small, "webp", lossless=True))
    exif = segment(0xE1, b"Exif\0\0ab")
    return {
        "jpeg": [
            jpeg,
            split_jpeg(saved(tiny, "jpeg")),
            split_jpeg(saved(picture(256, 256, "L", noise=False), "jpeg")),
            split_jpeg(saved(large, "jpeg", progressive=True)),
            [jpeg[0], exif * (8 * MIB // len(exif)), *jpeg[1:]],
            [jpeg[0], exif * 9000, *jpeg[1:]],
            [jpeg[0], segment(0xFE, b"") * (MIB // 4), *jpeg[1:]],
            [jpeg[0], segment(0xDB, b"") * 9000, *jpeg[1:]],
            [jpeg[0], b"\xff" * (8 * MIB), *jpeg[1:]],
            [*jpeg[:-1], b"\xff\x00" * (4 * MIB), jpeg[-1]],
            [*jpeg[:-1], b"\xff\xd0" * (4 * MIB), jpeg[-1]],
            [progressive(4000, 4000, 5000)],
            [progressive(256, 256, 1000)],
            [progressive(65500, 240, 9000)],
        ],
        "png": [
            png,
            split_png(saved(tiny, "png")),
            split_png(saved(picture(256, 256, "RGBA", noise=False), "png")),
            split_png(saved(large.convert("RGBA"), "png")),
            split_png(saved(flat, "png")),
            [*png[:2], chunk(b"tEXt", b"a\0b") * 9000, *png[2:]],
            [*png[:2], chunk(b"tEXt", b"a\0b") * (MIB // 16), *png[2:]],
            [*png[:2], chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(30 * MIB))) * 50, *png[2:]],
            [*png[:2], chunk(b"IDAT", b"") * 9000, *png[2:]],
            [*png[:2], chunk(b"PLTE", bytes(768)) * 9000, *png[2:]],
        ],
        "webp": [
            webp,
            split_webp(saved(tiny, "webp")),
            split_webp(saved(small, "webp")),
            split_webp(saved(large.convert("RGBA"), "webp", lossless=True)),
            split_webp(saved(picture(16383, 970, "L", noise=False).convert("RGB"), "webp", lossless=True, method=0)),
            [*webp, b"junk\0\0\0\0" * (MIB // 8)],
            [webp[0], b"EXIF\x02\0\0\0ab" * 9000, *webp[1:]],
        ],
        "bmp": [
            [saved(small, "bmp")],
            [saved(tiny, "bmp")],
            [run_length(255, 255)],
            [run_length(4000, 1000)],
            [run_length(2, 8000)],
        ],
    }


def mutate(parts: Parts, form: str, rng: random.Random) -> Parts:
    """Parts doubled, dropped, moved, made anew, or with other bytes."""
    parts = list(parts)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(parts))
        match rng.randrange(6):
            case 0:
                parts.insert(place, parts[place] * rng.choice([1, 10, 100]))
            case 1 if len(parts) > 2:
                parts.pop(place)
            case 2:
                parts.insert(rng.randrange(len(parts)), parts.pop(place))
            case 3:
                parts.insert(place, fresh(form, rng) * rng.choice([1, 20, 400]))
            case _:
                part = bytearray(parts[place][: 4 * MIB])
                for _ in range(rng.randint(1, 8)):
                    if part:
                        part[rng.randrange(min(len(part), 4096))] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
                parts[place] = mend(bytes(part), form)
    while sum(map(len, parts)) > MAX_BYTES:
        parts.pop(max(range(len(parts)), key=lambda place: len(parts[place])))
    return parts or [b""]


def fresh(form: str, rng: random.Random) -> bytes:
    """A part that was not there."""
    data = rng.randbytes(rng.choice([0, 2, 8, 64, 1000]))
    match form:
        case "jpeg":
            return segment(rng.choice(MARKERS), data)
        case "png":
            return chunk(rng.choice(CHUNKS), zlib.compress(data * 1000))
        case "webp":
            return rng.choice(WEBP_CHUNKS) + len(data).to_bytes(4, "little") + data
        case _:
            return data


def mend(part: bytes, form: str) -> bytes:
    """A PNG's chunk with the right checksum, without which nobody looks at it."""
    return chunk(part[4:8], part[8:-4]) if form == "png" and len(part) >= 12 else part


def measure(parts: Parts, decoders: Decoders) -> Found:
    """What a file takes."""
    file = b"".join(parts)
    steps = parse_image_file(file)
    began = last = time.thread_time()
    longest_s = 0.0
    image: ImageFile | None = None
    try:
        while image is None:
            try:
                next(steps)
            except StopIteration as end:
                image = end.value
            now = time.thread_time()
            longest_s, last = max(longest_s, now - last), now
    except ImageFileError as error:
        return Found(parts, len(file), time.thread_time() - began, longest_s, 0.0, str(error)[:40])
    walk_s = time.thread_time() - began
    if image.width * image.height > SHAPE.max_pixels:
        return Found(parts, len(file), walk_s, longest_s, 0.0, "too large")
    decode: Callable[[ImageFile, Shape], object] = decode_picture if image.is_quick else decoders.decode
    how = "at once" if image.is_quick else "apart"
    forget_peaks(decoders)
    began = time.perf_counter()
    try:
        decode(image, SHAPE)
    except ServiceError as error:
        how += f": {error}"
    seconds = time.perf_counter() - began
    return Found(parts, len(file), walk_s, longest_s, seconds, how, 0 if image.is_quick else peak_of(decoders))


def forget_peaks(decoders: Decoders) -> None:
    """Have the system measure the processes' memory from here on."""
    for process in decoders.processes:
        with contextlib.suppress(OSError):  # it has ended
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def peak_of(decoders: Decoders) -> int:
    """The most bytes that a decoder process has had in use since then."""
    peaks = [0]
    for process in decoders.processes:
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peaks += [1024 * int(found[1])] if found else []
    return max(peaks)


def search(form: str, first: list[Parts], seconds: float, rng: random.Random, decoders: Decoders) -> Iterator[Found]:
    """Every file that was tried."""
    best: list[Found] = []
    until = time.monotonic() + seconds
    waiting = list(first)
    while waiting or time.monotonic() < until:
        parts = waiting.pop() if waiting else mutate(rng.choice(best).parts, form, rng)
        found = measure(parts, decoders)
        yield found
        best = sorted([*best, found], key=Found.score, reverse=True)[:KEPT]


def main() -> int:
    """Search each format in turn."""
    arguments = options()
    gc.freeze()  # as the service does once it has started: or the collector looks at all of torch now and then
    gc.set_threshold(*GC_THRESHOLDS)
    rng = random.Random(arguments.seed)  # noqa: S311 - repeatable, not secret
    decoders = Decoders(1, seconds=TIMEOUT_S, max_pixels=SHAPE.max_pixels, max_bytes=MAX_BYTES)
    rows, worst = [], defaultdict[str, float](float)
    first = beginnings()
    try:
        for form, parts in first.items():
            tried = list(search(form, parts, arguments.seconds / len(first), rng, decoders))
            at_once = [found for found in tried if found.how.startswith("at once")]
            apart = [found for found in tried if found.how.startswith("apart")]
            row = {
                "step": max(found.step_s for found in tried),
                "walk": max(found.walk_s / max(found.size, MIB) * MIB for found in tried),
                "at once": max((found.decode_s for found in at_once), default=0),
                "apart": max((found.decode_s for found in apart), default=0),
                "memory": max((found.memory for found in apart), default=0),
            }
            for name, value in row.items():
                worst[name] = max(worst[name], value)
            slowest = max(at_once, key=lambda found: found.decode_s, default=None)
            dearest = max(apart, key=lambda found: found.decode_s / max(found.size, MIB), default=None)
            rows.append(
                {
                    "format": form,
                    "files": len(tried),
                    "longest step ms": f"{1e3 * row['step']:.2f}",
                    "walk ms/MiB": f"{1e3 * row['walk']:.2f}",
                    "at once": len(at_once),
                    "slowest ms": f"{1e3 * row['at once']:.2f}",
                    "of bytes": slowest.size if slowest else "",
                    "apart": len(apart),
                    "slowest s": f"{row['apart']:.2f}",
                    "s/MiB": f"{dearest.decode_s / max(dearest.size, MIB) * MIB:.2f}" if dearest else "",
                    "ended": sum("took more" in found.how for found in apart),
                    "memory MiB": round(row["memory"] / MIB),
                }
            )
    finally:
        decoders.close()
    table(rows)
    checks = [
        Check(
            f"no step of the walk over {STEP_MS:g} ms", f"{1e3 * worst['step']:.2f} ms", worst["step"] < STEP_MS / 1e3
        ),
        Check(
            f"the walk under {WALK_MS_PER_MIB:g} ms/MiB",
            f"{1e3 * worst['walk']:.2f}",
            worst["walk"] < WALK_MS_PER_MIB / 1e3,
        ),
        Check(
            f"nothing of up to {QUICK_BYTES} bytes at once over {QUICK_MS:g} ms",
            f"{1e3 * worst['at once']:.2f} ms",
            worst["at once"] < QUICK_MS / 1e3,
        ),
        Check(f"no decoder over {MEMORY_MIB} MiB", f"{worst['memory'] / MIB:.0f}", worst["memory"] < MEMORY_MIB * MIB),
        Check(f"nothing apart over {APART_S:g} s", f"{worst['apart']:.2f} s", worst["apart"] < APART_S),
    ]
    return finish("slow_images", {"formats": rows, "seed": arguments.seed}, checks)


def options() -> argparse.Namespace:
    """The command line."""
    made = parser((__doc__ or "").splitlines()[0], seconds=120)
    made.add_argument("--seed", type=int, default=0, help="of the changes")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())
