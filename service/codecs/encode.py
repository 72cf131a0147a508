"""Encodes images in the formats of a reply.

With one build of the encoders the bytes depend on the images and the arguments alone: they hold no dates and no host
names. `ENCODERS` identifies the build, for cache validators.

Pillow writes all formats but grey PNGs, which most requests ask for. Those models/inference/png.py writes, in a fifth
of Pillow's time for a 28×28 digit and for a large grid (benchmarks/serving/pieces.py).
"""

import base64
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features  # noqa: F401 - imported now, so that the first request does not wait for it
from PIL import __version__ as pillow_version
from zlib_ng import zlib_ng

from models.inference.noise import Float32
from models.inference.pixels import UInt8, grid
from models.inference.png import grey_png, write_colour_png
from service.codecs.recipe import PictureFormat, mark

Format = Literal["png", "webp", "jpeg", "json", "zip", "npy"]

# In order of preference, for clients that accept several equally.
MEDIA_TYPES: dict[Format, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "json": "application/json",
    "zip": "application/zip",
    "npy": "application/x-npy",
}
# Called again and again while a file is encoded; what it raises ends the work, for which nobody may wait any longer.
Check = Callable[[], object]
# Formats that hold a single picture, with the longest side in pixels that each allows.
MAX_SIDE: dict[Format, int] = {"png": 2**31 - 1, "webp": 16383, "jpeg": 65500}

# libwebp works on all of a picture in one call, which nobody can end: for so many pixels a second or two.
MAX_WEBP_PIXELS = 2**24
# What encoding holds at its peak, as measured on noise, whose files are as large as its pixels: the images, laid out,
# in Pillow's form, as a file, as base64; in all as much as so many copies of the images. libwebp takes more, the most
# for each pixel of the picture that it works on.
_COPIES, _WEBP_COPIES, _WEBP_PIXEL_BYTES = 5, 7, 28

_VERSIONS = " ".join(
    [f"pillow-{pillow_version}", f"numpy-{np.__version__}", f"zlib-ng-{zlib_ng.ZLIBNG_VERSION}"]
    + [f"{name}-{features.version(name)}" for name in ("zlib", "libjpeg_turbo", "webp")]
    + ["json-2"]  # counts the changes to what our JSON says
)
# A constant date, so that the same request always gives the same archive. ZIP can express none earlier.
_NO_DATE = (1980, 1, 1, 0, 0, 0)


class RenderOptions(NamedTuple):
    """How images are laid out and encoded.

    Attributes:
        format: Of the file.
        columns: Images in each row of the grid, for formats that hold a single picture.
        scale: Every pixel becomes scale × scale pixels.
    """

    format: Format
    columns: int
    scale: int


class SampleMetadata(NamedTuple):
    """What images were drawn from; the JSON format says it beside them, latents only where there are some.

    Attributes:
        seed, first_index: None for images of given latents, which have no recipe.
        is_marked: Whether pictures say that they were generated, and by which recipe.
        select: How they were chosen among candidates.
    """

    bundle: str
    version: str
    seed: int | None
    first_index: int | None
    labels: list[int] | None
    label_names: list[str] | None = None
    latents: Float32 | None = None
    truncation: float = 1.0
    is_marked: bool = False
    select: str = "none"


def picture_size(render: RenderOptions, count: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of the picture that holds `count` images of this height and width."""
    return math.ceil(count / render.columns) * height * render.scale, render.columns * width * render.scale


def encoding_bytes(form: str, size: int, pixels: int) -> int:
    """Memory to reserve for images of `size` bytes and for encoding them, in pictures of so many pixels each."""
    return _WEBP_COPIES * size + _WEBP_PIXEL_BYTES * pixels if form == "webp" else _COPIES * size


def most_encoding_bytes(pixels: int) -> int:
    """The most that a reply of so many pixels can reserve: of an animation in colour."""
    return encoding_bytes("webp", 3 * pixels, min(pixels, MAX_WEBP_PIXELS))


def encode(images: UInt8, render: RenderOptions, metadata: SampleMetadata, check: Check = bool) -> bytes:
    """Encode images, uint8 (n, h, w, c) with n ≥ 1, as the body of a reply."""
    match render.format:
        case "png" | "webp" | "jpeg":
            file = encode_picture(lay_out(images, render), render.format, check)
            if not metadata.is_marked:
                return file
            return mark(file, render.format, _recipe(metadata, 0, len(images), render, render.format))
        case "json":
            return _json(_files(images, render, metadata, check), metadata)
        case "zip" | "npy":
            return STREAMED[render.format](len(images), images.shape[1:], render.scale).encode(images, metadata, check)


def lay_out(images: UInt8, render: RenderOptions) -> UInt8:
    """The picture (h, w, c) that holds these images, before it is encoded."""
    scaled = _scaled(images, render.scale)
    return grid(scaled, render.columns) if len(scaled) > 1 else scaled[0]


def picture_pixels(images: UInt8, render: RenderOptions) -> UInt8:
    """The pixels (h, w, c) that the file of a picture gives back; only a JPEG's are not those that were encoded."""
    picture = lay_out(images, render)
    if render.format != "jpeg":
        return picture
    with Image.open(io.BytesIO(encode_picture(picture, "jpeg")), formats=["JPEG"]) as decoded:
        return np.asarray(decoded).reshape(*picture.shape[:2], -1)


def _scaled(images: UInt8, scale: int) -> UInt8:
    return images.repeat(scale, axis=1).repeat(scale, axis=2) if scale > 1 else images


def _files(images: UInt8, render: RenderOptions, metadata: SampleMetadata, check: Check) -> Iterator[bytes]:
    """Each image as a PNG of its own."""
    single = render._replace(columns=1)
    for place in range(len(images)):
        check()
        file = encode_picture(lay_out(images[place : place + 1], single), "png", check)
        yield mark(file, "png", _recipe(metadata, place, 1, single, "png")) if metadata.is_marked else file


def _recipe(
    metadata: SampleMetadata, place: int, count: int, render: RenderOptions, form: PictureFormat
) -> bytes | None:
    """What makes a picture of images place … place + count − 1, a `Recipe` as JSON; None for images of given latents.

    Written by hand: a pydantic model takes five times as long, which a small picture would notice.
    """
    if metadata.seed is None or metadata.first_index is None:
        return None
    labels, shown = None if metadata.labels is None else metadata.labels[place : place + count], "null"
    if labels:
        shown = f"[{labels[0]}]" if len(set(labels)) == 1 else f"[{','.join(map(str, labels))}]"
    layout = "strip" if render.columns == count > 1 else "grid"
    return (
        f'{{"bundle":"{metadata.bundle}@{metadata.version}","seed":{metadata.seed},'
        f'"first_index":{metadata.first_index + place},"count":{count},"labels":{shown},'
        f'"truncation":{metadata.truncation!r},"select":"{metadata.select}","layout":"{layout}","columns":{render.columns},'
        f'"scale":{render.scale},"format":"{form}"}}'
    ).encode("ascii")


class CheckedFile(io.BytesIO):
    """A file in memory that calls `check` at every write: Pillow writes most formats in pieces of 64 KiB."""

    def __init__(self, check: Check) -> None:
        super().__init__()
        self._check = check

    def write(self, data: Any, /) -> int:
        """Append to the file."""
        self._check()
        return super().write(data)


def encode_picture(image: UInt8, form: PictureFormat, check: Check = bool) -> bytes:
    """One image (h, w, c) as a file."""
    if form == "png" and image.shape[2] == 1:
        return grey_png(image)
    picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
    if form == "jpeg" and picture.mode == "RGBA":  # which it can't hold
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "#000000"), picture).convert("RGB")
    del image  # of colours Pillow has a copy, and nobody else may need the array: a fifth of all that is held here
    out = CheckedFile(check)
    match form:
        case "png":
            write_colour_png(picture, out)
        case "webp":  # lossless, so that the pixels are exact; effort balances time and size
            is_exact = picture.mode == "RGBA"  # also where nothing is seen
            picture.save(out, "webp", lossless=True, quality=20, method=1, exact=is_exact)
        case "jpeg":
            picture.save(out, "jpeg", quality=90)
    return out.getvalue()


# zlib-ng may compress differently on another processor, so a checksum of its output here is part of the build's name.
_SAMPLE = (np.arange(64 * 64) ** 2 % 251 % 17).astype(np.uint8).reshape(64, 64, 1)
ENCODERS = f"{_VERSIONS} png-{zlib_ng.crc32(grey_png(_SAMPLE)):08x}"


def _json(files: Iterable[bytes], metadata: SampleMetadata) -> bytes:
    head = json.dumps(
        {
            "bundle": metadata.bundle,
            "version": metadata.version,
            "seed": metadata.seed,
            "first_index": metadata.first_index,
            "labels": metadata.labels,
            "label_names": metadata.label_names,
        }
    )
    latents = "" if metadata.latents is None else f', "latents": [{", ".join(rows_as_json(metadata.latents))}]'
    # Joined once: json.dumps and encode would each make a copy of the images, which may be hundreds of megabytes.
    parts = [f'{head[:-1]}, "images": ['.encode()]
    for file in files:
        parts += [b'"', base64.b64encode(file), b'", ']
    parts[-1] = b'"'
    return b"".join([*parts, f"]{latents}}}".encode()])


def rows_as_json(rows: Float32) -> list[str]:
    """Each row of an array (n, m) as a list in JSON, in the shortest decimals that give each float32 back."""
    numbers = rows.ravel()
    # NumPy keeps the interpreter for as long as it writes numbers: a thousand take it a millisecond.
    pieces = [numbers[start : start + 1024].astype(str).tolist() for start in range(0, numbers.size, 1024)]
    texts, dim = list(chain.from_iterable(pieces)), rows.shape[1]
    return [f"[{', '.join(texts[start : start + dim])}]" for start in range(0, len(texts), dim)]


class NpyStream:
    """An array (count, h, w, c) in NumPy's format, written from images in several pieces.

    Args:
        count: Images in all.
        shape: (h, w, c) of each, before they are scaled.
        scale: Every pixel becomes scale × scale pixels.

    Attributes:
        size: Bytes of the whole file.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], scale: int) -> None:
        height, width, channels = shape
        whole = count, height * scale, width * scale, channels
        self._head, self._scale = _npy_head(whole), scale
        self.size = len(self._head) + math.prod(whole)

    def encode(self, images: UInt8, _: SampleMetadata, __: Check = bool) -> bytes:
        """The file's next bytes, which hold these images (n, h, w, c)."""
        head, self._head = self._head, b""
        return head + _scaled(images, self._scale).tobytes()


@lru_cache
def _npy_head(shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue()


class ZipStream:
    """An archive of PNGs, written from images in several pieces. The arguments are those of `NpyStream`.

    With the last image comes the archive's directory, without which no reader takes it for whole.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], scale: int) -> None:  # noqa: ARG002 - as of the other
        self._count, self._scale = count, scale
        self._number = 0
        self._tape = _Tape()
        self._archive = zipfile.ZipFile(cast("IO[bytes]", self._tape), "w", zipfile.ZIP_STORED)

    def encode(self, images: UInt8, metadata: SampleMetadata, check: Check = bool) -> bytes:
        """The file's next bytes, which hold these images (n, h, w, c); `metadata` is what they were drawn from."""
        for file in _files(images, RenderOptions("png", 1, self._scale), metadata, check):
            self._archive.writestr(zipfile.ZipInfo(f"{self._number:06d}.png", _NO_DATE), file)
            self._number += 1
        if self._number == self._count:
            self._archive.close()
        return self._tape.take()


class _Tape:
    """A file to write, as `zipfile` uses it, whose beginning can be taken away; what is left keeps its place."""

    def __init__(self) -> None:
        self._start = self._place = 0  # of what is left, and of what is written next
        self._left = bytearray()

    def take(self) -> bytes:
        """All that was written since the last time."""
        taken = bytes(self._left)
        self._start += len(taken)
        self._left.clear()
        return taken

    def write(self, data: bytes) -> int:
        begin = self._place - self._start
        self._left[begin : begin + len(data)] = data
        self._place += len(data)
        return len(data)

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, _: int = io.SEEK_SET) -> int:
        self._place = place
        return place

    def flush(self) -> None:
        pass


# Formats whose files can be written while their images are still being computed.
STREAMED: dict[str, type[NpyStream] | type[ZipStream]] = {"npy": NpyStream, "zip": ZipStream}
