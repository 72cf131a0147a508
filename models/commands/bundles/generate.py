"""Draw many images of a bundle into shards of a data set; run again, it goes on."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Self, get_args

from models.bundle import Bundle
from models.commands.arguments import Subparsers, bundle_of, positive, whole
from models.commands.signals import StopOnSignal
from models.exchange.bulk.formats import require_installed
from models.exchange.bulk.plan import (
    BALANCE,
    ENCODINGS,
    FREQUENCY,
    INDEX_LIMIT,
    MAX_SHARDS,
    BulkOptions,
    Encoding,
    Format,
    Manifest,
    OptionsError,
    resolve_labels,
)
from models.exchange.bulk.processes import make_by_processes, processors
from models.exchange.bulk.ray_tasks import connected, make_by_ray
from models.exchange.bulk.run import Maker, Progress, generate
from models.exchange.bulk.storage import storage_of
from models.exchange.bulk.worker import Task
from models.training.report import duration

WRONG_OPTIONS, INTERRUPTED = 2, 130
SHARD_SIZE = 10_000
REDRAWN_EVERY_S, PLAIN_EVERY_S = 0.5, 30.0  # on a terminal, and elsewhere
STOPPING = "Stopping: what is whole stays, and the same command goes on."


def add_to(commands: Subparsers) -> None:
    """Name the command, and say what its line may hold."""
    generate = commands.add_parser("generate", help="draw many images into shards of a data set")
    generate.set_defaults(run=run)
    generate.add_argument("bundle", type=Path)
    generate.add_argument("--count", type=positive, required=True, metavar="N", help="images 0 to N − 1 of the seed")
    generate.add_argument("--out", required=True, metavar="DIR_or_URI", help="a folder, or a URI that fsspec knows, as "
                          "s3://bucket/folder; one that was begun with these options is gone on with")  # fmt: skip
    generate.add_argument("--format", choices=get_args(Format), default="webdataset", help="(default webdataset)")
    generate.add_argument("--encoding", choices=get_args(Encoding), help="of images: png in webdataset, raw in npy, "
                          "raw (the default) or png in parquet")  # fmt: skip
    generate.add_argument("--shard-size", type=positive, default=SHARD_SIZE, metavar="N",
                          help=f"images in a shard (default {SHARD_SIZE})")  # fmt: skip
    generate.add_argument("--workers", type=positive, metavar="N", help="processes, of this machine or, with --ray, of "
                          "the cluster (default: one for each processor)")  # fmt: skip
    generate.add_argument("--seed", type=whole, default=0, metavar="S", help="(default 0)")
    generate.add_argument("--labels", default=FREQUENCY, metavar="LABELS", help=f"{FREQUENCY} (the default): as often "
                          f"as in the training data; {BALANCE}: all of them take turns; or those that take turns, by "
                          'index or name: 3 or 0,1,cat or, with commas in a name, ["cat, small", 3]')  # fmt: skip
    generate.add_argument("--ray", metavar="ADDRESS", help="have the Ray cluster of this address make the shards")


def run(arguments: argparse.Namespace) -> int:
    """Make the shards that are missing."""
    bundle = bundle_of(arguments)
    try:
        options = _options(arguments, bundle)
        require_installed(options.format)
        storage = storage_of(arguments.out)
        task = Task(arguments.bundle.absolute(), arguments.out, options)
        manifest = bundle.manifest
        empty = Manifest(options=options, image=manifest.image, labels=manifest.labels, software=(), shards=())
        stop = StopOnSignal(STOPPING)
        with (
            _maker(arguments) as make,
            stop,
            _Display() as display,
            closing(generate(task, empty, storage, make, stop.is_set)) as progress,
        ):
            for one in progress:
                display.show(one)
    except OptionsError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_OPTIONS
    made = f"{one.written:,} of them made in {display.seconds:,.1f} s" if one.written else "all of them were there"
    if not one.is_done:
        print(f"Stopped: {one.found + one.written:,} of {one.images:,} images are in {arguments.out}; the same command "
              "goes on.")  # fmt: skip
        return INTERRUPTED
    print(f"{arguments.out}: {one.images:,} images of {options.bundle} in {options.shards:,} shards; {made}")
    return 0


def _options(arguments: argparse.Namespace, bundle: Bundle) -> BulkOptions:
    """What decides the bytes of the shards.

    Raises:
        OptionsError: The options contradict one another, or the bundle.
    """
    encodings = ENCODINGS[arguments.format]
    if arguments.encoding not in {None, *encodings}:
        raise OptionsError(f"images in {arguments.format} are {' or '.join(encodings)}, not {arguments.encoding}")
    if arguments.count > INDEX_LIMIT:
        raise OptionsError("--count: a seed has 2⁵³ images")
    options = BulkOptions(
        bundle=f"{bundle.name}@{bundle.version}",
        count=arguments.count,
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        format=arguments.format,
        encoding=arguments.encoding or encodings[0],
        labels=resolve_labels(arguments.labels, bundle.manifest.labels),
    )
    if options.shards > MAX_SHARDS:
        raise OptionsError(f"these are {options.shards:,} shards, and {MAX_SHARDS:,} are the most: choose a larger "
                           "--shard-size")  # fmt: skip
    return options


@contextmanager
def _maker(arguments: argparse.Namespace) -> Iterator[Maker]:
    """Who makes the shards."""
    if arguments.ray is None:
        yield partial(make_by_processes, workers=arguments.workers or processors())
        return
    with connected(arguments.ray) as ray:  # before signals are ours, for Ray takes SIGTERM
        yield partial(make_by_ray, ray=ray, workers=arguments.workers)


class _Display:
    """Images, rate and time left: a line that is written over on a terminal, elsewhere one every 30 s."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def __enter__(self) -> Self:
        return self

    def show(self, progress: Progress) -> None:
        """Show how far it is, where that is due."""
        drawn, now = max(progress.drawn, progress.written), time.monotonic()
        if not drawn or now - self._shown < (REDRAWN_EVERY_S if self._is_terminal else PLAIN_EVERY_S):
            return
        self._shown, rate, there = now, drawn / self.seconds, progress.found + drawn
        left = duration(round((progress.images - there) / rate))
        line = f"{there:,} of {progress.images:,} images, {rate:,.0f}/s, {left} left"
        print(f"\r\x1b[K{line}" if self._is_terminal else line, end="" if self._is_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def __exit__(self, *_: object) -> None:
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
