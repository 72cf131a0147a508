"""Makes a shard: the images of its number, in its format, in its place."""

import hashlib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from PIL import features
from zlib_ng import zlib_ng

from models.bundle import Bundle, BundleError, read_bundle
from models.exchange.bulk.formats import WRITERS, Block, Shard
from models.exchange.bulk.plan import BulkError, BulkOptions, FileRecord, Made, ShardRecord
from models.exchange.bulk.storage import storage_of
from models.inference.drawing import Drawing
from models.inference.noise import draw_latents
from models.inference.tiles import REFERENCE_TILE

MOST_BLOCK_IMAGES, MOST_BLOCK_BYTES = 1024, 2**24
Told = Callable[[int], object]


class Task(NamedTuple):
    """What a data set is made of. Whoever makes shards finds the bundle at the same path."""

    bundle: Path
    place: str
    options: BulkOptions


def make_shard(task: Task, number: int, told: Told = bool) -> Made:
    """Write a shard of the data set, and say what it is.

    Args:
        task: The data set.
        number: Which shard.
        told: Called with the number of images after each block of them. What it raises ends the work, and there is
            no shard.

    Raises:
        BulkError, OSError: It can't be made here.
    """
    bundle, drawing = _ready(task.bundle, task.options.bundle)
    indices, image = task.options.indices_of(number), bundle.manifest.image
    shard = Shard(task.options, image, len(indices))
    names = task.options.files_of(number)
    with storage_of(task.place).new_files(names) as paths:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            WRITERS[task.options.format](files, shard, _blocks(bundle, drawing, task.options, indices, told))
        records = {name: _record(path) for name, path in zip(names, paths, strict=True)}
    return Made(ShardRecord(first_index=indices.start, images=len(indices), files=records), software(task.options))


def made_or_reason(task: Task, number: int, told: Told = bool) -> Made | str:
    """As `make_shard`, with one line in place of an error, for another process to read; of our bugs, the traceback."""
    try:
        return make_shard(task, number, told)
    except (EOFError, ConnectionError):  # of `told`
        raise
    except OSError as error:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part) or str(error)
    except (BulkError, MemoryError) as error:
        return str(error) or "there is not enough memory"
    except Exception:  # noqa: BLE001 - it is raised again where it is read
        return traceback.format_exc()


@lru_cache(maxsize=1)
def _ready(folder: Path, expected: str) -> tuple[Bundle, Drawing]:
    """The bundle, read once in a process.

    Raises:
        BulkError: Here is another one, or none that can be trusted.
    """
    try:
        bundle = read_bundle(folder)
    except BundleError as error:
        raise BulkError(str(error)) from None
    found = f"{bundle.name}@{bundle.version}"
    if found != expected:
        raise BulkError(f"{folder} is {found} here, not {expected}")
    return bundle, Drawing(bundle.generator)


def _blocks(bundle: Bundle, drawing: Drawing, options: BulkOptions, indices: range, told: Told) -> Iterator[Block]:
    """The images, some at a time: whole tiles, in bounded memory."""
    latent, size = bundle.manifest.latent, bundle.manifest.image.size
    most = min(MOST_BLOCK_IMAGES, max(1, MOST_BLOCK_BYTES // size // REFERENCE_TILE) * REFERENCE_TILE)
    for start in range(indices.start, indices.stop, most):
        part = range(start, min(start + most, indices.stop))
        labels = options.labels_of(latent, part)
        try:
            images = drawing(draw_latents(latent, options.seed, start, len(part)), labels)
        except FloatingPointError as error:
            raise BulkError(f"images {part.start} to {part.stop - 1}: {error}") from None
        yield Block(start, images, labels)
        told(len(part))


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def software(options: BulkOptions) -> dict[str, str]:
    """What else decides bytes: pixels' last bits, and what the encoders make of them."""
    versions = {
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": str(torch.__version__),
    }
    if options.encoding == "png":
        versions |= {"zlib": features.version("zlib") or "", "zlib-ng": zlib_ng.ZLIBNG_VERSION}
    if options.format == "parquet":
        import pyarrow as pa  # noqa: PLC0415 - of the extra

        versions["pyarrow"] = pa.__version__
    return versions
