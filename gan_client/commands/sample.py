"""gan-client sample: draws any number of images into a folder; run again, it goes on."""

import argparse
import asyncio
import json
import secrets
import sys
import time
from contextlib import aclosing
from pathlib import Path

from gan_client.async_client import AsyncClient
from gan_client.commands.folder import Folder, FolderError, Manifest, differences, read_manifest, write_manifest
from gan_client.core.calls import SEED_LIMIT, Drawing, Label


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--count", type=int, required=True, help="images to draw")
    parser.add_argument("--out", type=Path, required=True, help="the folder; one that was begun is gone on with")
    parser.add_argument("--seed", type=int, help="fixes the images; default: a new one, or the folder's")
    parser.add_argument("--first-index", type=int, default=0, help="where within the seed to begin; default 0")
    parser.add_argument(
        "--labels",
        type=_labels,
        metavar="LABELS",
        help='classes by index or name, which take turns: 3 or 0,1,cat or, with commas in a name, ["cat, small", 3]',
    )
    parser.add_argument("--bundle", help="name or name@version; default: the service's, or the folder's")
    parser.add_argument("--truncation", type=float, default=1.0, help="over 0 and up to 1: less varied; default 1")
    parser.add_argument("--scale", type=int, default=1, help="every pixel becomes this many both ways; default 1")
    parser.add_argument("--files", choices=["png", "npy"], default="png", help="a PNG file each, or arrays of many")
    parser.add_argument("--shard-size", type=int, default=1024, help="images in an npy file; default 1024")


def run(arguments: argparse.Namespace, client: AsyncClient) -> int:
    """Fill the folder."""
    if min(arguments.count, arguments.shard_size) < 1:
        raise ValueError("--count and --shard-size are at least 1")
    try:
        asyncio.run(_fill(arguments, client))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on.", file=sys.stderr)
        return 130
    return 0


async def _fill(arguments: argparse.Namespace, client: AsyncClient) -> None:
    async with client:
        manifest = read_manifest(arguments.out)
        if manifest is None:
            manifest = await _begin(arguments, client)
        else:
            _check(arguments, manifest)
        await _draw(Folder(arguments.out, manifest), client)


async def _begin(arguments: argparse.Namespace, client: AsyncClient) -> Manifest:
    """Draw one image, which shows that all options are right, and which version there is; then begin the folder."""
    seed = secrets.randbelow(SEED_LIMIT) if arguments.seed is None else arguments.seed
    options = {name: getattr(arguments, name) for name in ("first_index", "truncation", "scale")}
    labels = arguments.labels and arguments.labels[:1]
    [image] = await client.sample(1, seed, labels, arguments.bundle, **options)
    manifest = Manifest(
        bundle=image.info["bundle"],
        asked_bundle=arguments.bundle,
        seed=seed,
        count=arguments.count,
        labels=arguments.labels,
        files=arguments.files,
        shard_size=arguments.shard_size,
        **options,
    )
    write_manifest(arguments.out, manifest)
    return manifest


def _check(arguments: argparse.Namespace, manifest: Manifest) -> None:
    """Refuse to mix what was begun with something else."""
    names = ("seed", "first_index", "count", "labels", "truncation", "scale", "files", "shard_size")
    found = differences(manifest, {name: getattr(arguments, name) for name in names})
    if arguments.labels is None and manifest.labels is not None:
        found.append(f"labels are {manifest.labels} there")
    if arguments.bundle not in {None, manifest.bundle, manifest.asked_bundle}:
        found.append(f"bundle is {manifest.bundle!r} there, not {arguments.bundle!r}")
    if found:
        raise FolderError(f"{arguments.out} was begun with other options: {'; '.join(found)}")


async def _draw(folder: Folder, client: AsyncClient) -> None:
    """Draw what is missing."""
    manifest, spans = folder.manifest, folder.missing()
    options = {"first_index": manifest.first_index, "truncation": manifest.truncation, "scale": manifest.scale}
    drawing = Drawing(None, manifest.seed, manifest.labels, options, endless=True)
    progress = _Progress(manifest.count, manifest.count - sum(count for _, count in spans))
    progress.say(f"{manifest.bundle}, seed {manifest.seed}, to {folder.path}")
    try:
        async with aclosing(client.parts(drawing.pages(manifest.bundle, spans))) as parts:
            async for part in parts:
                await asyncio.to_thread(folder.write, part.span, part.value)
                progress.add(part.span[1])
    finally:
        folder.close()
    progress.say(f"{manifest.count:,} images are in {folder.path}")


class _Progress:
    """A line that is written over on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, count: int, done: int) -> None:
        self._count, self._done, self._drawn = count, done, 0
        self._start = self._last = time.monotonic()
        self._is_terminal = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """A line that stays."""
        print(f"\r\x1b[K{text}" if self._is_terminal else text, file=sys.stderr)

    def add(self, images: int) -> None:
        """So many more are there."""
        self._done += images
        self._drawn += images
        now = time.monotonic()
        if now - self._last < (0.1 if self._is_terminal else 10):
            return
        self._last = now
        rate = self._drawn / (now - self._start)
        left_s = (self._count - self._done) / rate
        line = f"{self._done:,} of {self._count:,} images, {rate:,.0f}/s, {left_s:,.0f} s left"
        print(f"\r\x1b[K{line}" if self._is_terminal else line, end="" if self._is_terminal else "\n", file=sys.stderr)
        sys.stderr.flush()


def _labels(text: str) -> list[Label]:
    """As in a query: joined by commas, where digits are an index; or a list in JSON."""
    if text.startswith("["):
        return _labels_in_json(text)
    return [int(label) if label.isdecimal() and label.isascii() else label for label in text.split(",")]


def _labels_in_json(text: str) -> list[Label]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    if not labels or not all(type(label) in {int, str} for label in labels):
        raise argparse.ArgumentTypeError(f"{text} is no list of indices and names in JSON")
    return list(labels)
