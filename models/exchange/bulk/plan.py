"""What decides the bytes of a data set's shards, and what is recorded of them."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from models.inference.noise import Int64, sampled_labels
from models.spec import ImageSpec, LatentSpec, Spec

Format = Literal["webdataset", "parquet", "npy"]
Encoding = Literal["png", "raw"]

FREQUENCY, BALANCE = "frequency", "balance"
INDEX_LIMIT = 2**53
MAX_SHARDS = 10**6  # their names have six digits, so that they sort
SHARD_NAME = re.compile(r"shard-[0-9]{6}\.[a-z.]+")
# What a format's images can be, the usual way first, and the ends of a shard's files: the second has the labels.
ENCODINGS: dict[Format, tuple[Encoding, ...]] = {"webdataset": ("png",), "parquet": ("raw", "png"), "npy": ("raw",)}
ENDS: dict[Format, tuple[str, ...]] = {
    "webdataset": ("tar",),
    "parquet": ("parquet",),
    "npy": ("npy", "labels.npy"),
}


class BulkError(RuntimeError):
    """The data set can't be made; the message is one line. What is finished stays, and a second run goes on."""


class OptionsError(BulkError):
    """The options are wrong, or others than those with which the folder was begun. Nothing was changed."""


class BulkOptions(Spec):
    """Everything that decides the bytes of the shards, but for the versions of the software.

    Attributes:
        bundle: name@version.
        count: Images 0 … count − 1 of the seed.
        shard_size: Images in each shard but the last.
        labels: Numbers of classes that take turns, image by image; or drawn from the seed at the training data's
            frequencies; None for a bundle without labels.
    """

    bundle: str
    count: int = Field(ge=1, le=INDEX_LIMIT)
    seed: int = Field(ge=0, lt=INDEX_LIMIT)
    shard_size: int = Field(ge=1)
    format: Format
    encoding: Encoding
    labels: tuple[int, ...] | Literal["frequency"] | None

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.count // self.shard_size)

    def indices_of(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def files_of(self, shard: int) -> list[str]:
        """The names of a shard's files."""
        ends = ENDS[self.format] if self.labels is not None else ENDS[self.format][:1]
        return [f"shard-{shard:06d}.{end}" for end in ends]

    def labels_of(self, latent: LatentSpec, indices: range) -> Int64 | None:
        """The labels of these images."""
        if isinstance(self.labels, tuple):
            return np.array(self.labels, np.int64)[np.arange(indices.start, indices.stop) % len(self.labels)]
        return sampled_labels(latent, self.seed, indices.start, len(indices))


class FileRecord(Spec):
    """What a file must be."""

    sha256: str
    bytes: int


class ShardRecord(Spec):
    """A finished shard: images first_index … first_index + images − 1, and its files by name."""

    first_index: int
    images: int
    files: dict[str, FileRecord]


class Manifest(Spec):
    """A data set, as it is recorded.

    `software` has the versions that shards were made with, and the processors' instructions; with more than one of
    them, pixels may be a grey level off, and files of one content may differ in their bytes.
    """

    format: Literal[1] = 1
    options: BulkOptions
    image: ImageSpec
    labels: tuple[str, ...] | None
    software: tuple[dict[str, str], ...]
    shards: tuple[ShardRecord, ...]


class Made(NamedTuple):
    """A shard that was just made, and with what."""

    record: ShardRecord
    software: dict[str, str]


def read_record(content: bytes, place: str) -> Manifest:
    """The manifest of a data set, or what there is of it so far.

    Raises:
        OptionsError: It is something else.
    """
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        raise OptionsError(f"{place} is not the record of a data set of images: choose another folder") from None


def require_same(options: BulkOptions, begun: BulkOptions, place: str) -> None:
    """See that a folder was begun with these options.

    Raises:
        OptionsError: It was not.
    """
    asked, there = options.model_dump(), begun.model_dump()
    if found := [f"{name} is {_said(there[name])} there, not {_said(asked[name])}" for name in asked
                 if asked[name] != there[name]]:  # fmt: skip
        raise OptionsError(f"{place} was begun with other options: {'; '.join(found)}")


def _said(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 100 else f"{text[:100]} …"


def resolve_labels(text: str, names: Sequence[str] | None) -> tuple[int, ...] | Literal["frequency"] | None:
    """What `--labels` means for a bundle with these labels.

    Raises:
        OptionsError: The bundle has none, or not this one.
    """
    if names is None:
        if text != FREQUENCY:
            raise OptionsError("labels: this bundle has no labels")
        return None
    if text == FREQUENCY:
        return "frequency"
    return tuple(range(len(names))) if text == BALANCE else tuple(_indices(text, names))


def _indices(text: str, names: Sequence[str]) -> Iterator[int]:
    """Indices of classes that are named as in a query: joined by commas, where digits are an index; or in JSON."""
    is_json = text.startswith(("[", '"'))
    for label in _parsed(text) if is_json else [_number_or_name(word, names) for word in text.split(",")]:
        index = label if isinstance(label, int) else names.index(label) if label in names else -1
        if not 0 <= index < len(names):
            known = ", ".join(f"{place} ({name[:100]})" for place, name in enumerate(names[:20]))
            raise OptionsError(f"labels: {_said(label)} is not one of {known}{', …' if len(names) > 20 else ''}")
        yield index


def _number_or_name(word: str, names: Sequence[str]) -> int | str:
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        return word
    if word in names and names.index(word) != int(word):
        raise OptionsError(f'labels: {word} is an index, and also the name of another class: write [{word}] for the '
                           f'index, ["{word}"] for the name')  # fmt: skip
    return int(word)


def _parsed(text: str) -> list[int | str]:
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError):
        labels = None
    labels = [labels] if isinstance(labels, str) else labels
    if not labels or not isinstance(labels, list) or not all(type(label) in {int, str} for label in labels):
        raise OptionsError(f"labels: {_said(text)} is no list of indices and names in JSON")
    return labels
