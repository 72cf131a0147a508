"""Writes and reads weights on disk; refuses what does not verify.

A bundle is a folder: `manifest.json`, `generator.safetensors`, `samples.png` and, but for generators that came without
one, `discriminator.safetensors`; where an encoder was trained for it, `encoder.safetensors`. Data only: no pickle, no
class paths. It is written beside its place, synced and renamed, so that a reader finds the old one or the new one and
never a mixture (where a system can't swap two folders in one step, for a moment neither). A reader reads each file
once, so that the bytes that it uses are those whose checksum it verified.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import AwareDatetime, Field, JsonValue, ValidationError, model_validator
from pydantic_core import to_json
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from models.files import replace_file, replaced_folder, write_synced
from models.images.preparation import Preparation
from models.inference.drawing import draw_images, images_of
from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8, encode_png
from models.networks import Discriminator, Encoder, Generator, build_encoder, build_networks
from models.signing import KEY_ID, SIGNATURE, PublicKeys, SigningError, sign, valid_signers
from models.spec import Calibration, GraphSpec, ImageSpec, LatentSpec, NetworkSpec, Spec, check_image

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
GENERATOR = "generator.safetensors"
DISCRIMINATOR = "discriminator.safetensors"
ENCODER = "encoder.safetensors"
SAMPLES = "samples.png"
WEIGHTS = (DISCRIMINATOR, ENCODER, GENERATOR)
MAX_MANIFEST_BYTES = 1 << 20
_STORED = (torch.float32, torch.float16)  # what weights may be on disk; in memory they are float32
MAX_SIGNATURES = 16
MAX_LABEL = 255  # characters; no folder's name has more, and a reply holds one for each of its images
NAME_PATTERN = "^[a-z0-9][a-z0-9._-]{0,63}$"
NOT_A_NAME = ".discriminator"  # what a name may not end in: the Open Inference Protocol calls a bundle's D so
FILES = (MANIFEST, GENERATOR, DISCRIMINATOR, ENCODER, SAMPLES)
# What ends by itself: too many open files, or a disk that does not answer.
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE})
_VERSIONED = ("format", "network", "image", "latent", "labels", "calibration", "preparation")


class BundleError(ValueError):
    """The folder is not a bundle that can be trusted; the message says which file and why, in one line.

    Args:
        path: The file, or the folder.
        reason: Why, without paths of this machine, because clients read it.
        is_passing: Whether the next try may succeed though nothing changes in the folder.
    """

    def __init__(self, path: Path, reason: str, *, is_passing: bool = False) -> None:
        super().__init__(path, reason)
        self.path = path
        self.is_passing = is_passing
        # Some reasons quote a damaged file, whose words may be of any length.
        self.reason = shorten(_printable(reason), 400, placeholder=" …")

    def __str__(self) -> str:
        """The message for the log."""
        return f"{_printable(str(self.path))}: {self.reason}"

    def relative_to(self, root: Path) -> str:
        """The message with a path relative to `root`, for readers who need not know where the bundles lie."""
        place = self.path.relative_to(root)
        return f"{_printable(place.as_posix())}: {self.reason}" if place.parts else self.reason


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


class FileRecord(Spec):
    """What a file of the bundle must be."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Signature(Spec):
    """By one key: its id, and 64 bytes in base64. What is signed: `statement_of`."""

    key: str = Field(pattern=KEY_ID)
    sig: str = Field(pattern=SIGNATURE)


class Manifest(Spec):
    """Everything about a bundle but the numbers themselves.

    `training` and `evaluation` are for people and dashboards; nothing is rebuilt from them, so they may grow.
    """

    format: Literal[1]
    name: str = Field(pattern=NAME_PATTERN)
    created: AwareDatetime
    network: NetworkSpec
    image: ImageSpec
    latent: LatentSpec
    labels: tuple[Annotated[str, Field(max_length=MAX_LABEL)], ...] | None = Field(min_length=1, fail_fast=True)
    calibration: Calibration | None
    preparation: Preparation | None = None  # UNDECLARED, in bundles of before there was one
    files: dict[str, FileRecord]
    training: dict[str, JsonValue]
    evaluation: dict[str, JsonValue]
    signature: tuple[Signature, ...] | None = Field(None, min_length=1, max_length=MAX_SIGNATURES, fail_fast=True)

    @model_validator(mode="after")
    def _parts_agree(self) -> "Manifest":
        nets = [GENERATOR, *[DISCRIMINATOR] * self.has_discriminator, *[ENCODER] * self.has_encoder]
        if set(self.files) != {*nets, SAMPLES}:
            raise ValueError(f"files must be {', '.join(nets)} and {SAMPLES}")
        if self.calibration is not None and not self.has_discriminator:
            raise ValueError("calibration is a discriminator's")
        if self.name.endswith(NOT_A_NAME):
            raise ValueError(f"name must not end in {NOT_A_NAME}")
        check_image(self.network, self.image)
        colour = "grey" if self.image.channels == 1 else "rgb"  # uploads are never transparent: they get a background
        if self.preparation is not None and self.preparation.colour != colour:
            raise ValueError(f"preparation.colour must be {colour}, as the image has {self.image.channels} channels")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from one another")
        if len(self.signatures) < len(self.signature or ()):
            raise ValueError("signature: a key stands in it twice")
        self._check_frequencies()
        return self

    def _check_frequencies(self) -> None:
        frequencies = self.latent.label_frequencies
        if (frequencies is None) != (self.labels is None):
            raise ValueError("latent.label_frequencies go with labels")
        if self.labels is not None and frequencies is not None:
            if len(frequencies) != len(self.labels):
                raise ValueError("latent.label_frequencies must be as many as labels")
            if abs(sum(frequencies) - 1) > 1e-6:
                raise ValueError("latent.label_frequencies must sum to 1")

    @property
    def has_discriminator(self) -> bool:
        """Whether it has both nets; a generator that was trained elsewhere may come alone."""
        return not isinstance(self.network, GraphSpec) or self.network.discriminator is not None

    @property
    def has_encoder(self) -> bool:
        """Whether it has a net that finds an image's latent."""
        return self.network.encoder is not None

    @property
    def signatures(self) -> dict[str, str]:
        """Each signature by its key's id."""
        return {one.key: one.sig for one in self.signature or ()}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle in memory: its nets in eval mode, without gradients, on one device.

    `judge` is its discriminator and `encoder` what finds an image's latent, if it has them.
    `signers` are the trusted keys that have signed it; none where no signature was asked for.
    """

    folder: Path
    manifest: Manifest
    version: str
    generator: Generator
    judge: Discriminator | None
    encoder: Encoder | None
    signers: frozenset[bytes]

    @property
    def name(self) -> str:
        """The manifest's name."""
        return self.manifest.name

    @property
    def discriminator(self) -> Discriminator:
        """D.

        Raises:
            BundleError: There is none.
        """
        if self.judge is None:
            raise BundleError(self.folder, "the bundle has no discriminator")
        return self.judge

    def draw(
        self, count: int, *, seed: int = 0, first_index: int = 0, labels: int | str | Sequence[int | str] | None = None
    ) -> UInt8:
        """Images first_index … first_index + count − 1 of a seed: uint8 (count, h, w, c).

        They are those that the service gives in float32.

        Args:
            count: Images.
            seed, first_index: Which; each 0 … 2⁵³ − 1.
            labels: One for all or one for each image, by number or name. A bundle with labels draws them from the seed,
                at the frequencies of its training data, where none are given.

        Raises:
            ValueError: A number out of range, unknown labels, or not one for each image.
        """
        if count < 1 or not (0 <= seed < 2**53 and 0 <= first_index < 2**53):
            raise ValueError(f"no images: count {count}, seed {seed}, first_index {first_index}")
        numbers = None if labels is None else self._label_numbers(labels, count)
        latent = self.manifest.latent
        return draw_images(self.generator, latent, count, seed=seed, first_index=first_index, labels=numbers)

    def images(self, latents: Float32, labels: Int64 | None = None) -> UInt8:
        """(n, dim) latents, n ≥ 1, and (n,) labels where the bundle has some → uint8 (n, h, w, c)."""
        return images_of(self.generator, latents, labels)

    def _label_numbers(self, labels: int | str | Sequence[int | str], count: int) -> Int64:
        names = self.manifest.labels or ()
        asked = [labels] * count if isinstance(labels, int | str) else list(labels)
        if len(asked) != count:
            raise ValueError(f"{len(asked)} labels for {count} images")
        if not names:
            raise ValueError(f"{self.name} has no labels")
        if unknown := [label for label in asked if label not in names and label not in range(len(names))]:
            raise ValueError(f"{self.name} has the labels {', '.join(names)}, not {unknown[0]!r}")
        return np.array([names.index(label) if isinstance(label, str) else label for label in asked], np.int64)


def version_of(manifest: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 over the canonical JSON of everything that decides what a bundle computes.

    `manifest` is the parsed JSON. Covered are `format`, `network`, `image`, `latent`, `labels`, `calibration`,
    `preparation` where there is one, and `weights`: the sha256 of each weight file by name. Keys sorted, no spaces,
    ASCII.
    """
    covered = {key: manifest[key] for key in _VERSIONED if key != "preparation" or manifest.get(key) is not None}
    covered["weights"] = {name: manifest["files"][name]["sha256"] for name in WEIGHTS if name in manifest["files"]}
    return hashlib.sha256(_canonical_json(covered)).hexdigest()[:12]


def statement_of(manifest: Mapping[str, Any]) -> bytes:
    """What a signature is over: the canonical JSON of `name`, `created`, `version` and `files`.

    `manifest` is the parsed JSON. The version stands in for what it covers, and each file's sha256 for the file; so
    `evaluation` and `training` may change without a new signature.
    """
    signed = {key: manifest[key] for key in ("name", "created", "files")}
    return _canonical_json({**signed, "version": version_of(manifest)})


def _canonical_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_bundle(
    folder: Path | str,
    device: torch.device | str = "cpu",
    known: Mapping[str, Bundle] = MappingProxyType({}),
    trusted: PublicKeys | None = None,
) -> Bundle:
    """Verify a folder and rebuild its nets on the device.

    If one of those `known` by name has the same version, no nets are built: that bundle is returned, with the folder
    and the manifest as they are now.

    Args:
        folder: Of the bundle.
        device: For its nets.
        known: Bundles by name.
        trusted: Keys of which at least one must have signed it; None asks for no signature.

    Raises:
        BundleError: Another format, a checksum or size that differs, missing or surplus tensors, wrong shapes or
            types, NaN or Inf, a file that is missing or not what its name says, or no valid signature.
    """
    folder = Path(folder)
    raw, manifest = _read_manifest(folder / MANIFEST)
    signers = _signers_of(raw, manifest, trusted, folder)
    contents = {name: _read_verified(folder / name, record) for name, record in manifest.files.items()}
    version, same = version_of(raw), known.get(manifest.name)
    if same is not None and same.version == version:
        is_unchanged = (same.folder, same.manifest, same.signers) == (folder, manifest, signers)
        return same if is_unchanged else replace(same, folder=folder, manifest=manifest, signers=signers)
    shape = manifest.network, manifest.image, manifest.latent, len(manifest.labels or ())
    try:
        (generator, discriminator), encoder = build_networks(*shape), build_encoder(*shape)
    except ValueError as error:  # what a graph is worth is known once its net is built
        raise BundleError(folder / MANIFEST, f"network: {error}") from None
    for net, name in ((generator, GENERATOR), (discriminator, DISCRIMINATOR), (encoder, ENCODER)):
        if net is not None:
            _fill(net, contents[name], folder / name)
            net.to(device)
    return Bundle(folder, manifest, version, generator, discriminator, encoder, signers)


def _signers_of(
    raw: Mapping[str, Any], manifest: Manifest, trusted: PublicKeys | None, folder: Path
) -> frozenset[bytes]:
    """The trusted keys that have signed a bundle; none where no signature is asked for.

    Raises:
        BundleError: None of them has.
    """
    if trusted is None:
        return frozenset()
    try:
        return valid_signers(statement_of(raw), manifest.signatures, trusted)
    except SigningError as error:
        raise BundleError(folder / MANIFEST, str(error)) from None


def read_manifest(folder: Path, trusted: PublicKeys | None = None) -> tuple[Manifest, str]:
    """What a folder's manifest says, and the version that it makes. Nothing else in the folder is looked at.

    Raises:
        BundleError: It can't be read, or a reader would refuse it; see `read_bundle`.
    """
    raw, manifest = _read_manifest(folder / MANIFEST)
    _signers_of(raw, manifest, trusted, folder)
    return manifest, version_of(raw)


def read_object(path: Path) -> dict[str, Any]:
    """A small file with a JSON object.

    Raises:
        BundleError: It can't be read, or it is something else.
    """
    return _parse_object(_read_small(path), path)[0]


def _read_manifest(path: Path) -> tuple[dict[str, Any], Manifest]:
    return _parse_manifest(_read_small(path), path)


def _read_small(path: Path) -> bytes:
    with _opened(path) as (file, _):
        return file.read(MAX_MANIFEST_BYTES + 1) or b""  # None from a file of /proc without content


def _parse_object(content: bytes, path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, and its text without anything that is not JSON."""
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(path, f"larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        raw = json.loads(content, object_pairs_hook=_object)
        text = json.dumps(raw, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BundleError(path, f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BundleError(path, "not a JSON object")
    return raw, text


def _parse_manifest(content: bytes, path: Path) -> tuple[dict[str, Any], Manifest]:
    """The JSON as it stands, and what it says."""
    raw, text = _parse_object(content, path)
    found = json.dumps(raw.get("format"))
    if found != json.dumps(FORMAT):  # compared as text, because True and 1.0 equal 1
        raise BundleError(path, f"format {found:.40}; this program reads format {FORMAT}")
    try:
        return raw, Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(path, f"{where or 'manifest'}: {first['msg']}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that comes twice is refused, because readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _manifest_bytes(raw: Mapping[str, Any]) -> bytes:
    return (json.dumps(raw, indent=1, ensure_ascii=False) + "\n").encode()


def _read_verified(path: Path, record: FileRecord) -> bytes:
    """The file's bytes, whose size and checksum are those of the manifest."""
    with _opened(path) as (file, size):
        if size != record.bytes:  # before reading: a wrong file may be of any size
            raise BundleError(path, f"{size} bytes, the manifest says {record.bytes}")
        content = file.read(size)  # and no more, should it be growing
    digest = hashlib.sha256(content).hexdigest()
    if digest != record.sha256:
        raise BundleError(path, f"sha256 {digest[:12]}…, the manifest says {record.sha256[:12]}…")
    return content


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file to read, and its size. A pipe would let us wait, and a device might never end.

    Raises:
        BundleError: It is not a regular file, or it can't be opened or read.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())  # of the open file: the name may belong to another one by now
            if not stat.S_ISREG(found.st_mode):
                raise BundleError(path, "not a regular file")
            yield file, found.st_size
    except OSError as error:
        is_passing = error.errno in _PASSING
        raise BundleError(path, error.strerror or type(error).__name__, is_passing=is_passing) from None


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe's writer, and without making a terminal our own."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _fill(net: nn.Module, content: bytes, path: Path) -> None:
    """Check the file's tensors, and give them to a net that is on the meta device."""
    try:
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(path, f"not a safetensors file: {error}") from None
    expected = net.state_dict()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise BundleError(path, f"tensors missing: {', '.join(missing)}")
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise BundleError(path, f"surplus tensors: {', '.join(surplus)}")
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            raise BundleError(path, f"{name} has shape {shape}, the network needs {wanted}")
        if tensor.dtype not in _STORED:
            raise BundleError(path, f"{name} is {tensor.dtype}, the network needs torch.float32 or torch.float16")
        if not torch.isfinite(tensor).all():
            raise BundleError(path, f"{name} holds NaN or Inf")
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    net.requires_grad_(requires_grad=False).eval()


def write_bundle(
    folder: Path,
    metadata: Mapping[str, Any],
    generator: Mapping[str, Tensor],
    discriminator: Mapping[str, Tensor] | None,
    samples: UInt8 | bytes,
    encoder: Mapping[str, Tensor] | None = None,
) -> Bundle:
    """Write a bundle at `folder`, replacing one that is there, and read it back.

    Args:
        folder: Where the bundle will be; its parent is made.
        metadata: The manifest's fields but `format`, `files` and `signature`, which nobody can have made yet.
        generator, discriminator, encoder: State dictionaries of the nets that the metadata describe, float32 or
            float16. None for a discriminator or an encoder that they don't.
        samples: A picture of what G makes, uint8 (h, w, c), or as a PNG.

    Raises:
        BundleError: What was handed in would be refused by a reader. Nothing has changed at `folder`.
        OSError: The disk. Nothing has changed at `folder`.
    """
    contents = {
        GENERATOR: _tensor_bytes(generator),
        **({} if discriminator is None else {DISCRIMINATOR: _tensor_bytes(discriminator)}),
        **({} if encoder is None else {ENCODER: _tensor_bytes(encoder)}),
        SAMPLES: samples if isinstance(samples, bytes) else encode_png(samples),
    }
    files = {name: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for name, c in contents.items()}
    facts = to_json({**metadata, "format": FORMAT, "files": files, "signature": None})
    _, manifest = _parse_manifest(facts, folder / MANIFEST)
    raw = manifest.model_dump(mode="json", exclude={"signature"})
    if manifest.preparation is None:
        del raw["preparation"]
    if not manifest.latent.noise:  # as before there was any: the version of the same bundle stays the same
        del raw["latent"]["noise"]
    contents[MANIFEST] = _manifest_bytes(raw)
    with replaced_folder(folder) as temporary:
        for name, content in contents.items():
            write_synced(temporary / name, content)
        read_bundle(temporary)
    return read_bundle(folder)


def record_evaluation(bundle: Bundle, scores: Mapping[str, Any]) -> None:
    """Add scores to the manifest in the bundle's folder. The version stays.

    Raises:
        BundleError: The folder holds another version by now, or a reader would refuse the scores. Nothing has changed.
        OSError: The disk. Nothing has changed.
    """
    path = bundle.folder / MANIFEST
    raw, manifest = _read_manifest(path)
    if version_of(raw) != bundle.version:
        raise BundleError(path, f"was {bundle.version} when it was scored and is {version_of(raw)}")
    content = _manifest_bytes(raw | {"evaluation": {**manifest.evaluation, **scores}})
    _parse_manifest(content, path)
    replace_file(path, content)


def sign_bundle(folder: Path, private_key: bytes) -> str:
    """Add the key's signature to the manifest, in place of an earlier one of the same key; returns the key's id.

    The version stays, and so do the signatures of other keys.

    Args:
        folder: Of a bundle, which is verified first: nobody signs what can't be read.
        private_key: ed25519, as PEM.

    Raises:
        BundleError: The bundle would be refused, or has changed meanwhile, or has `MAX_SIGNATURES` of other keys.
        SigningError: The key can't be used.
        OSError: The disk. In all three cases nothing has changed.
    """
    bundle, path = read_bundle(folder), folder / MANIFEST
    raw, manifest = _read_manifest(path)
    if manifest != bundle.manifest:
        raise BundleError(path, "has changed while the bundle was verified")
    key_id, signature = sign(statement_of(raw), private_key)
    signatures = manifest.signatures | {key_id: signature}
    content = _manifest_bytes(raw | {"signature": [{"key": key, "sig": sig} for key, sig in signatures.items()]})
    _parse_manifest(content, path)
    replace_file(path, content)
    return key_id


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
