"""Every format decodes to the images that were encoded, and the bytes are the same every time."""

import base64
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.inference.pixels import UInt8
from service.codecs.encode import (
    MAX_WEBP_PIXELS,
    MEDIA_TYPES,
    Format,
    RenderOptions,
    SampleMetadata,
    encode,
    encoding_bytes,
    most_encoding_bytes,
    picture_size,
)
from service.http.schemas import SampleReply

ROOT = Path(__file__).parents[3]
ORIGIN = SampleMetadata("tiny", "0123456789ab", 7, 3, [1, 0, 1, 0, 1], ["b", "a", "b", "a", "b"])
GREY = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 1), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)


def pixels(file: bytes) -> UInt8:
    with Image.open(io.BytesIO(file)) as picture:
        array = np.asarray(picture)
    return array[..., np.newaxis] if array.ndim == 2 else array


def drawn(images: UInt8, columns: int, scale: int) -> UInt8:
    """A grid made by a plain loop over the pixels."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    canvas = np.zeros((rows * h * scale, columns * w * scale, c), np.uint8)
    for y in range(canvas.shape[0]):
        for x in range(canvas.shape[1]):
            row, column = y // (h * scale), x // (w * scale)
            if row * columns + column < n:
                canvas[y, x] = images[row * columns + column, y // scale % h, x // scale % w]
    return canvas


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize(("columns", "scale"), [(3, 1), (5, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize("form", ["png", "webp"])
def test_a_picture_holds_every_pixel(images: UInt8, columns: int, scale: int, form: Format) -> None:
    """PNG and WebP are lossless: their pixels are those of a grid made by a plain loop."""
    picture = pixels(encode(images, RenderOptions(form, columns, scale), ORIGIN))
    expected = drawn(images, columns, scale)
    np.testing.assert_array_equal(picture, np.broadcast_to(expected, picture.shape))  # WebP's grey has three channels
    assert picture.shape[:2] == picture_size(RenderOptions(form, columns, scale), 5, 4, 6)


def test_one_image_is_a_picture_of_its_own_size() -> None:
    """A picture of one image is that image."""
    np.testing.assert_array_equal(pixels(encode(GREY[:1], RenderOptions("png", 1, 1), ORIGIN)), GREY[0])


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (3, 1000), (700, 5)])
def test_grey_pngs_are_whole_files(size: tuple[int, int]) -> None:
    """A reader of our own finds the right chunks, checksums and pixels in PNGs that are written without Pillow."""
    image = np.random.default_rng(2).integers(0, 256, (1, *size, 1), dtype=np.uint8)
    file = encode(image, RenderOptions("png", 1, 1), ORIGIN)
    chunks, place = [], 8
    while place < len(file):
        (length,) = struct.unpack(">I", file[place : place + 4])
        body = file[place + 4 : place + 8 + length]
        assert struct.unpack(">I", file[place + 8 + length : place + 12 + length]) == (zlib.crc32(body),)
        chunks.append(body[:4])
        place += 12 + length
    assert (file[:8], chunks) == (b"\x89PNG\r\n\x1a\n", [b"IHDR", b"IDAT", b"IEND"])
    with Image.open(io.BytesIO(file)) as picture:
        assert (picture.mode, picture.size) == ("L", size[::-1])
    np.testing.assert_array_equal(pixels(file), image[0])


def test_jpeg_comes_close() -> None:
    """JPEG is the one lossy format; smooth images survive it nearly unchanged."""
    smooth = np.linspace(0, 255, 16 * 16 * 4).reshape(4, 16, 16, 1).astype(np.uint8)
    picture = pixels(encode(smooth, RenderOptions("jpeg", 2, 1), ORIGIN))
    assert np.abs(picture.astype(int) - drawn(smooth, 2, 1)).max() < 40


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
def test_npy_is_the_array(images: UInt8) -> None:
    """It is uint8 (n, h, w, c) in C order, with `scale` applied."""
    array = np.load(io.BytesIO(encode(images, RenderOptions("npy", 3, 1), ORIGIN)))
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, images)
    scaled = np.load(io.BytesIO(encode(images, RenderOptions("npy", 3, 2), ORIGIN)))
    np.testing.assert_array_equal(scaled, np.kron(images, np.ones((1, 2, 2, 1), np.uint8)))


def test_zip_holds_one_png_an_image() -> None:
    """Names count from zero, and the PNGs are stored without further compression."""
    with zipfile.ZipFile(io.BytesIO(encode(COLOUR, RenderOptions("zip", 3, 1), ORIGIN))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{n:06d}.png" for n in range(5)]
        for info, image in zip(archive.infolist(), COLOUR, strict=True):
            assert info.compress_type == zipfile.ZIP_STORED
            np.testing.assert_array_equal(pixels(archive.read(info)), image)


def test_json_says_where_images_come_from() -> None:
    """The JSON has all fields of the documented schema."""
    body = encode(GREY, RenderOptions("json", 3, 1), ORIGIN)
    reply = SampleReply.model_validate_json(body)
    assert set(json.loads(body)) == set(SampleReply.model_fields) - {"latents"}
    assert (reply.bundle, reply.version, reply.seed, reply.first_index) == ("tiny", "0123456789ab", 7, 3)
    assert reply.labels == [1, 0, 1, 0, 1]
    for text, image in zip(reply.images, GREY, strict=True):
        np.testing.assert_array_equal(pixels(base64.b64decode(text)), image)


@pytest.mark.parametrize("form", list(MEDIA_TYPES))
def test_the_same_images_are_the_same_bytes(form: Format) -> None:
    """No date or counter gets into the bytes, so a cached reply stays equal to a new one."""
    look = RenderOptions(form, 3, 2)
    assert encode(GREY, look, ORIGIN) == encode(GREY.copy(), look, ORIGIN)


@pytest.mark.parametrize("form", ["json", "zip"])
def test_whoever_waits_no_longer_can_end_the_work(form: Format) -> None:
    """Between two of many files."""
    asked = list[None]()

    def check() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        encode(GREY, RenderOptions(form, 1, 1), ORIGIN, check)
    assert len(asked) == 3


# Encodes noise, which no format makes smaller, and says for each format what was held at the peak and what is reserved.
PEAKS = """
import ctypes, json
import numpy as np
from service.codecs.animation import SequenceOptions, encode_sequence
from service.codecs.encode import RenderOptions, SampleMetadata, encode, encoding_bytes

def kibibytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key))

def peak_bytes(work):
    work(2)  # what libraries set up once
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = kibibytes("VmRSS")
    work(64)
    return 1024 * (kibibytes("VmHWM") - before)

found = {}
for channels in (1, 3):
    images = np.random.default_rng(0).integers(0, 256, (64, 192, 192, channels), dtype=np.uint8)
    about = SampleMetadata("tiny", "0123456789ab", 7, 0, None)
    for form in ("png", "webp", "jpeg", "json"):
        peak = peak_bytes(lambda count: encode(images[:count], RenderOptions(form, 8, 1), about))
        found[f"{form} {channels}"] = peak + images.nbytes, encoding_bytes(form, images.nbytes, 64 * 192 * 192)
    for form in ("gif", "webp", "apng"):
        peak = peak_bytes(lambda count: encode_sequence(images[:count], SequenceOptions(form, 1, 2000)))
        found[f"way {form} {channels}"] = peak + images.nbytes, encoding_bytes(form, images.nbytes, 192 * 192)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell the peak")
def test_a_reply_reserves_what_its_encoder_takes() -> None:
    """Of every format, grey and in colour: the peak of a process that encodes noise is what is reserved, or less."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for what, (peak, reserved) in json.loads(done.stdout).items():
        assert peak <= reserved + 2**22, what  # a little of the heap is always left over


def test_the_largest_reply_has_room() -> None:
    """Whatever the settings allow can be reserved, if nobody else holds anything."""
    for pixels in (1, 10**6, 64 * 10**6, 10**9):
        for form in (*MEDIA_TYPES, "gif", "apng"):
            picture = min(pixels, MAX_WEBP_PIXELS) if form == "webp" else pixels
            assert encoding_bytes(form, 3 * pixels, picture) <= most_encoding_bytes(pixels)
