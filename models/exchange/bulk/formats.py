"""Writes a shard's images into open files: WebDataset's tar, Parquet, NumPy's arrays.

Bytes depend on the images and the labels alone, for files hold no dates and no names of machines; those of PNGs on the
build of zlib-ng, of Parquet on pyarrow's version. Each writer takes blocks of images as they are drawn, so a shard is
never held as a whole.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from models.exchange.bulk.plan import BulkError, BulkOptions, Format
from models.inference.noise import Int64
from models.inference.pixels import UInt8
from models.inference.png import fast_png
from models.spec import ImageSpec

GROUP_BYTES = 2**26  # of pixels in a row group of Parquet, which is written as a whole
_BLOCK = 512  # tar's


class Block(NamedTuple):
    """Some images of a shard: first_index, …; uint8 (n, h, w, c), and (n,) labels where there are some."""

    first_index: int
    images: UInt8
    labels: Int64 | None


class Shard(NamedTuple):
    """What a writer is told of the shard beside its images.

    Attributes:
        options: Of the data set.
        image: Shape of an image.
        images: How many there are.
    """

    options: BulkOptions
    image: ImageSpec
    images: int


def write_webdataset(files: Sequence[BinaryIO], _: Shard, blocks: Iterator[Block]) -> None:
    """A tar whose members are, for each image, `%012d.png` and, where there are labels, `%012d.cls`: the digits."""
    [file] = files
    size, parts = 0, list[bytes]()
    for first_index, images, labels in blocks:
        for place, image in enumerate(images):
            parts += tar_member(f"{first_index + place:012d}.png", fast_png(image))
            if labels is not None:
                parts += tar_member(f"{first_index + place:012d}.cls", b"%d" % labels[place])
        size += sum(map(len, parts))
        file.write(b"".join(parts))
        parts.clear()
    file.write(bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % tarfile.RECORDSIZE))  # the end, and tar's usual padding


def tar_member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Head, content and padding of a file in a tar.

    Heads differ in name, size and checksum, the sum of all bytes. These are filled into a head that `tarfile` has made:
    to have it make each one would take three times as long as to encode a small PNG.
    """
    digits = b"%011o" % len(content)
    filled = name.encode("ascii")
    total = _HEAD_SUM + sum(filled) + sum(digits)
    head = b"".join([filled, _HEAD[len(filled) : 124], digits, _HEAD[135:148], b"%06o\0" % total, _HEAD[155:]])
    return head, content, bytes(-len(content) % _BLOCK)


# USTAR: name at 0, size at 124, checksum at 148, which counts as eight spaces in itself.
_HEAD = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_HEAD_SUM = sum(_HEAD) - sum(_HEAD[124:135]) - sum(_HEAD[148:156]) + 8 * ord(" ")


def write_npy(files: Sequence[BinaryIO], shard: Shard, blocks: Iterator[Block]) -> None:
    """An array uint8 (n, h, w, c), and where there are labels, one of them beside it: int64 (n,)."""
    image = shard.image
    shapes = (shard.images, image.height, image.width, image.channels), (shard.images,)
    for file, shape, kind in zip(files, shapes, ("|u1", "<i8"), strict=False):
        np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    for block in blocks:
        files[0].write(block.images.data)
        if block.labels is not None:
            files[1].write(block.labels.astype("<i8").data)


def write_parquet(files: Sequence[BinaryIO], shard: Shard, blocks: Iterator[Block]) -> None:
    """Columns `index`, `image` and, where there are labels, `label`; an image is a PNG or its pixels, row by row.

    The metadata `gan-service` say as JSON how pixels are laid out. Small shards have a single row group.
    """
    pa, pq = _pyarrow()
    image, is_raw = shard.image, shard.options.encoding == "raw"
    columns = [("index", pa.int64()), ("image", pa.binary(image.size if is_raw else -1))]
    if shard.options.labels is not None:
        columns.append(("label", pa.int64()))
    layout = {
        "encoding": shard.options.encoding,
        "dtype": "uint8",
        "shape": [image.height, image.width, image.channels],
    }
    schema = pa.schema(columns, {"gan-service": json.dumps(layout)})
    with pq.ParquetWriter(
        files[0], schema, compression="zstd", use_dictionary=False, write_statistics=["index"]
    ) as out:
        for first_index, images, labels in _joined(blocks, GROUP_BYTES):
            indices = np.arange(first_index, first_index + len(images))
            if is_raw:
                pixels = pa.py_buffer(images.data)
                stored = pa.Array.from_buffers(pa.binary(image.size), len(images), [None, pixels])
            else:
                stored = pa.array([fast_png(one) for one in images], pa.binary())
            arrays = [pa.array(indices), stored, *([] if labels is None else [pa.array(labels)])]
            out.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=len(images))


def _joined(blocks: Iterator[Block], most_bytes: int) -> Iterator[Block]:
    """Consecutive blocks as fewer larger ones, which end once they have so many bytes."""
    held = list[Block]()
    for block in blocks:
        held.append(block)
        if sum(one.images.nbytes for one in held) >= most_bytes:
            yield _concatenated(held)
            held.clear()
    if held:
        yield _concatenated(held)


def _concatenated(blocks: Sequence[Block]) -> Block:
    labels = [block.labels for block in blocks if block.labels is not None]
    images = np.concatenate([block.images for block in blocks])
    return Block(blocks[0].first_index, images, np.concatenate(labels) if labels else None)


def require_installed(form: Format) -> None:
    """See that what a format needs is there.

    Raises:
        BulkError: It is not.
    """
    if form == "parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - of the extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ModuleNotFoundError:
        raise BulkError("Parquet needs pyarrow: the bulk extra brings it") from None
    return pa, pq


WRITERS: dict[Format, Callable[[Sequence[BinaryIO], Shard, Iterator[Block]], None]] = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "npy": write_npy,
}
