"""A bundle reads back as it was written or is refused in one line that says why; a kill never leaves half of one."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from models.bundle import (
    DISCRIMINATOR,
    ENCODER,
    GENERATOR,
    MANIFEST,
    SAMPLES,
    Bundle,
    BundleError,
    read_bundle,
    record_evaluation,
    write_bundle,
)
from models.images.preparation import Preparation
from models.networks import build_encoder, build_networks
from models.spec import EncoderSpec, ImageSpec, LatentSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec

FILES = (MANIFEST, GENERATOR, DISCRIMINATOR, ENCODER, SAMPLES)
Json = dict[str, Any]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small bundle with every part, conditional and calibrated. Many tests share it: copy it before you change it."""
    network = MLPSpec(
        family="mlp",
        generator=MLPGeneratorSpec(hidden=(32,)),
        discriminator=MaxoutDiscriminatorSpec(units=(16,), pieces=2),
        encoder=EncoderSpec(width=2, hidden=8),
    )
    image = ImageSpec(channels=1, height=8, width=8)
    latent = LatentSpec(dim=12, distribution="normal", label_frequencies=(0.2, 0.3, 0.5))
    rng = torch.Generator().manual_seed(0)
    generator, discriminator, encoder = (
        {name: torch.randn(tensor.shape, generator=rng) for name, tensor in net.state_dict().items()}
        for net in (*build_networks(network, image, latent, 3), build_encoder(network, image, latent, 3))
        if net is not None
    )
    facts = {
        "name": "cond",
        "created": "2026-01-02T03:04:05Z",
        "network": network,
        "image": image,
        "latent": latent,
        "labels": ["cat", "dog", "owl"],
        "calibration": {"scale": 0.5, "offset": -0.25, "auc": 0.9, "expected_calibration_error": 0.02},
        "training": {"preset": "none", "steps": 0},
        "evaluation": {},
    }
    picture = np.zeros((8, 8, 1), np.uint8)
    folder = tmp_path_factory.mktemp("bundles") / "cond"
    return write_bundle(folder, facts, generator, discriminator, picture, encoder)


@pytest.fixture
def folder(original: Bundle, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(original.folder, tmp_path / "cond"))


def manifest_of(folder: Path) -> Json:
    raw: Json = json.loads((folder / MANIFEST).read_bytes())
    return raw


def rewrite(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the manifest's JSON in place."""
    raw = manifest_of(folder)
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def forge(folder: Path, name: str, content: bytes) -> None:
    """Put another file in, with the manifest's word for it: only a look inside can tell."""
    (folder / name).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(folder, lambda raw: raw["files"].update({name: record}))


def facts_of(bundle: Bundle) -> Json:
    facts = bundle.manifest.model_dump()
    return {key: facts[key] for key in facts if key not in {"format", "files"}}


def encoder_of(bundle: Bundle) -> dict[str, torch.Tensor]:
    assert bundle.encoder is not None
    return bundle.encoder.state_dict()


def write_again(target: Path, bundle: Bundle, **changes: Any) -> Bundle:
    """Write the bundle's facts and weights at another place."""
    samples = np.zeros((8, 8, 1), np.uint8)
    nets = bundle.generator.state_dict(), bundle.discriminator.state_dict()
    return write_bundle(target, facts_of(bundle) | changes, *nets, samples, encoder_of(bundle))


def only_bundles(parent: Path) -> bool:
    """Whether no temporary folder was left beside the bundles."""
    return not [path for path in parent.iterdir() if path.name.startswith(".")]


# --- Round trip and version --------------------------------------------------------------------------------------


def test_a_bundle_reads_back_as_it_was_written(original: Bundle, tmp_path: Path) -> None:
    """Facts, weights to the bit, the picture, and nets that are ready: eval mode, no gradients, float32."""
    written = write_again(tmp_path / "again", original)
    read = read_bundle(tmp_path / "again")
    assert read.version == written.version == original.version
    assert read.manifest == written.manifest
    assert facts_of(read) == facts_of(original)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(FILES)
    for one, other in ((read.generator, original.generator), (read.discriminator, original.discriminator)):
        assert not one.training
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
            assert tensor.dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in one.parameters())
    assert only_bundles(tmp_path)
    assert (tmp_path / "again").stat().st_mode & 0o555 == 0o555  # another user serves it


def test_weights_in_half_precision_are_read_as_single(original: Bundle, tmp_path: Path) -> None:
    """Half the bytes on disk, and in memory float32 numbers that half precision can hold."""
    nets = original.generator, original.discriminator
    g, d = ({name: tensor.half() for name, tensor in net.state_dict().items()} for net in nets)
    samples = np.zeros((8, 8, 1), np.uint8)
    read = write_bundle(tmp_path / "half", facts_of(original), g, d, samples, encoder_of(original))
    for net, half in ((read.generator, g), (read.discriminator, d)):
        for name, tensor in net.state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, half[name].float())
    sizes = [(bundle.folder / GENERATOR).stat().st_size for bundle in (read, original)]
    assert sizes[0] < sizes[1]
    assert read.version != original.version


PREPARATION = {"fit": "pad", "background": "#102030", "resampling": "lanczos", "orientation": "exif", "colour": "grey"}


def test_a_preparation_is_part_of_the_version(original: Bundle, tmp_path: Path) -> None:
    """It decides what is judged. A bundle without one has the version that it always had, and says nothing of it."""
    assert "preparation" not in manifest_of(original.folder)
    written = write_again(tmp_path / "again", original, preparation=Preparation("pad", "#102030", colour="grey"))
    assert manifest_of(tmp_path / "again")["preparation"] == PREPARATION
    assert written.manifest.preparation == Preparation("pad", "#102030", colour="grey")
    assert written.version != original.version
    other = write_again(tmp_path / "other", original, preparation=Preparation("crop", "#102030", colour="grey"))
    assert other.version not in {written.version, original.version}


@pytest.mark.parametrize(
    "change",
    [
        {"fit": "stretch"},
        {"background": "white"},
        {"background": 0},
        {"resampling": "nearest"},
        {"orientation": "xmp"},
        {"colour": "rgb"},
        {"colour": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_preparation_that_means_nothing_is_refused(folder: Path, change: Json) -> None:
    """One that this program can't follow would judge other pixels than were trained on."""
    rewrite(folder, lambda raw: raw.update(preparation=PREPARATION))
    read_bundle(folder)
    rewrite(folder, lambda raw: raw.update(preparation=PREPARATION | change))
    with pytest.raises(BundleError, match="preparation"):
        read_bundle(folder)


def test_the_version_is_as_documented(original: Bundle) -> None:
    """Anyone can compute it from the manifest: twelve digits of a sha256 over canonical JSON."""
    raw = manifest_of(original.folder)
    covered = {key: raw[key] for key in ("format", "network", "image", "latent", "labels", "calibration")}
    covered["weights"] = {
        "generator.safetensors": hashlib.sha256((original.folder / GENERATOR).read_bytes()).hexdigest(),
        "discriminator.safetensors": hashlib.sha256((original.folder / DISCRIMINATOR).read_bytes()).hexdigest(),
        "encoder.safetensors": hashlib.sha256((original.folder / ENCODER).read_bytes()).hexdigest(),
    }
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    assert original.version == hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "other"},
        {"created": "2030-01-01T00:00:00Z"},
        {"training": {"steps": 7}},
        {"evaluation": {"parzen": 225.0}},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_what_does_not_change_an_image_does_not_change_the_version(original: Bundle, folder: Path, facts: Json) -> None:
    """A new name or score is the same bundle to a client's cache."""
    rewrite(folder, lambda raw: raw.update(facts))
    assert read_bundle(folder).version == original.version


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["network"]["discriminator"].update(keep_hidden=0.6),
        lambda raw: raw["latent"].update(distribution="uniform"),
        lambda raw: raw["latent"].update(label_frequencies=[0.2, 0.2, 0.6]),
        lambda raw: raw.update(labels=["cat", "dog", "cow"]),
        lambda raw: raw["calibration"].update(offset=0.5),
        lambda raw: raw.update(calibration=None),
        lambda raw: raw["image"].update(height=4, width=16),
    ],
    ids=["network", "distribution", "frequencies", "labels", "calibration", "no calibration", "image"],
)
def test_every_covered_field_changes_the_version(
    original: Bundle, folder: Path, change: Callable[[Json], object]
) -> None:
    """Whatever decides a pixel or a probability is in the version."""
    rewrite(folder, without_encoder)  # whose shapes would differ with the image's
    before = read_bundle(folder).version
    assert before != original.version
    rewrite(folder, change)
    assert read_bundle(folder).version != before


def without_encoder(raw: Json) -> None:
    del raw["network"]["encoder"], raw["files"][ENCODER]


@pytest.mark.parametrize("name", [GENERATOR, DISCRIMINATOR, ENCODER])
def test_other_weights_are_another_version(original: Bundle, folder: Path, name: str) -> None:
    """One weight of any net, one bit."""
    tensors = load_tensors((folder / name).read_bytes())
    tensors["output.bias"].view(torch.int32)[0] ^= 1
    forge(folder, name, save_tensors(tensors))
    assert read_bundle(folder).version != original.version


def test_scores_are_recorded_beside_each_other(original: Bundle, folder: Path) -> None:
    """Recording keeps the version and what was recorded before, and refuses what a reader would."""
    bundle = read_bundle(folder)
    record_evaluation(bundle, {"parzen": {"generator": 200.5}})
    record_evaluation(bundle, {"fld": 3})
    again = read_bundle(folder)
    assert again.manifest.evaluation == {"parzen": {"generator": 200.5}, "fld": 3}
    assert again.version == original.version
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="not JSON"):
        record_evaluation(bundle, {"parzen": float("nan")})
    with pytest.raises(BundleError, match="larger than"):
        record_evaluation(bundle, {"parzen": "x" * 2**20})
    assert (folder / MANIFEST).read_bytes() == before


def test_scores_of_a_bundle_that_was_replaced_meanwhile_are_refused(folder: Path) -> None:
    """Scoring takes minutes: the figures of one version are never written into another."""
    bundle = read_bundle(folder)
    rewrite(folder, lambda raw: raw.update(calibration=None))
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match=f"was {bundle.version} when it was scored"):
        record_evaluation(bundle, {"parzen": 1.0})
    assert (folder / MANIFEST).read_bytes() == before


# --- Refusals ----------------------------------------------------------------------------------------------------


def put(*path: str, value: object) -> Callable[[Json], None]:
    """A change that sets a nested field."""

    def change(raw: Json) -> None:
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    return change


REFUSED_FACTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "format 2": (put("format", value=2), r"format 2; this program reads format 1"),
    "format true": (put("format", value=True), "format true"),
    "format 1.0": (put("format", value=1.0), "format 1.0"),
    "no format": (lambda raw: raw.pop("format"), "format null"),
    "unknown field": (put("pickle", value=1), "pickle: Extra inputs are not permitted"),
    "unknown nested field": (
        put("network", "generator", "cls", value="os.system"),
        r"network.mlp.generator.cls: Extra",
    ),
    "unknown family": (put("network", "family", value="pickle"), r"network: Input tag 'pickle'"),
    "no network": (lambda raw: raw.pop("network"), "network: Field required"),
    "no labels": (lambda raw: raw.pop("labels"), "labels: Field required"),
    "no calibration": (lambda raw: raw.pop("calibration"), "calibration: Field required"),
    "another sampler": (put("latent", "sampler", value="mt19937"), r"latent.sampler: "),
    "two channels": (put("image", "channels", value=2), r"image.channels: "),
    "text for a number": (put("image", "height", value="8"), r"image.height: Input should be a valid integer"),
    "true for a number": (put("image", "height", value=True), r"image.height: Input should be a valid integer"),
    "no rows": (put("image", "height", value=0), r"image.height: "),
    "negative width": (put("network", "generator", "hidden", value=[-1]), r"network.mlp.generator.hidden.0: "),
    "enormous width": (put("network", "generator", "hidden", value=[10**12]), r"network.mlp.generator.hidden.0: "),
    "too many layers": (put("network", "generator", "hidden", value=[1] * 17), r"network.mlp.generator.hidden: "),
    "name with a path": (put("name", value="../cond"), "name: String should match"),
    "name with a line": (put("name", value="cond\n"), "name: String should match"),
    "created without zone": (put("created", value="2026-01-02T03:04:05"), "created: "),
    "created as a number": (put("created", value=1.7e9), "created: "),
    "labels twice": (put("labels", value=["cat", "cat", "owl"]), "labels must differ"),
    "a label of a page": (put("labels", value=["cat", "d" * 256, "owl"]), "labels.1: String should have at most 255"),
    "labels without frequencies": (put("latent", "label_frequencies", value=None), "label_frequencies go with labels"),
    "frequencies without labels": (put("labels", value=None), "label_frequencies go with labels"),
    "too few frequencies": (put("latent", "label_frequencies", value=[0.5, 0.5]), "as many as labels"),
    "frequencies that don't add up": (put("latent", "label_frequencies", value=[0.5, 0.5, 0.5]), "must sum to 1"),
    "negative scale": (put("calibration", "scale", value=-1.0), r"calibration.scale: "),
    "file missing in the list": (lambda raw: raw["files"].pop(SAMPLES), "files must be"),
    "file too many": (lambda raw: raw["files"].update({"../x": raw["files"][SAMPLES]}), "files must be"),
    "checksum": (
        put("files", GENERATOR, "sha256", value="0" * 64),
        "generator.safetensors: sha256 .* says 00",
    ),
    "size": (
        put("files", DISCRIMINATOR, "bytes", value=3),
        r"discriminator.safetensors: \d+ bytes, .* says 3",
    ),
    "checksum in capitals": (put("files", GENERATOR, "sha256", value="A" * 64), r"sha256: String should match"),
}


@pytest.mark.parametrize("case", REFUSED_FACTS)
def test_a_wrong_manifest_is_refused_with_the_reason(folder: Path, case: str) -> None:
    """The message names the file, the field and what is wrong with it, on one line."""
    change, reason = REFUSED_FACTS[case]
    rewrite(folder, change)
    with pytest.raises(BundleError, match=reason) as caught:
        read_bundle(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"format": 1}', "Field required"),
        (b'{"format": 1, "format": 1}', "a key comes twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"format":' + b"[" * 900 + b"]" * 900 + b"}", "format"),
        (b'{"format": 1, "name": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"format": 1e999}', "not JSON"),
        (b'{"format": 1, "name": "\\ud800"}', "manifest.json"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
    ],
    ids=["empty", "text", "bytes", "array", "null", "nothing else", "twice", "deep", "deep format", "long number",
         "infinity", "surrogate", "huge"],
)  # fmt: skip
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, content: bytes, reason: str) -> None:
    """Whatever stands in the file, the answer is a reason, never another exception."""
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=reason):
        read_bundle(folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused_anywhere(folder: Path, number: str) -> None:
    """The manifest is served as JSON: a NaN among free-form facts would break every client of /bundles."""
    text = (folder / MANIFEST).read_text().replace('"steps": 0', f'"steps": {number}')
    (folder / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="not JSON"):
        read_bundle(folder)


def test_a_refusal_can_be_told_without_saying_where_the_bundles_lie(folder: Path) -> None:
    """What a client reads begins below the folder of bundles, whatever it is that was refused."""
    (folder / GENERATOR).unlink()
    with pytest.raises(BundleError) as caught:
        read_bundle(folder)
    assert str(caught.value) == f"{folder}/{GENERATOR}: No such file or directory"
    assert caught.value.relative_to(folder.parent) == f"cond/{GENERATOR}: No such file or directory"
    assert BundleError(folder.parent, "it is empty").relative_to(folder.parent) == "it is empty"


def test_a_refusal_is_one_line_with_its_reason_whatever_files_are_called(tmp_path: Path) -> None:
    """Names may be long, hold line breaks, and be no text at all; what a file has a say in is cut short."""
    place = tmp_path / ("x" * 255) / ("y" * 255) / os.fsdecode(b"a\n\xff  b")
    error = BundleError(place, "why: " + "z " * 1000)
    for message in (str(error), error.relative_to(tmp_path)):
        assert message.isprintable()
        assert "/a    b: why: z z" in message
        assert len(message) < 1000 + len(str(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    """Gone, or a folder in its place."""
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: No such file"):
        read_bundle(folder)
    (folder / name).mkdir()
    with pytest.raises(BundleError, match=name):
        read_bundle(folder)


Place = Callable[[Path], object]


def pipe_at(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listen_at(path: Path) -> None:
    """A Unix socket there; its name alone is short enough for one."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


SPECIAL: dict[str, tuple[Place, str]] = {
    "pipe": (pipe_at, "not a regular file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "terminal": (lambda path: path.symlink_to("/dev/tty"), "(not a regular file|No such device)"),
    "socket": (listen_at, "(not a regular file|No such device|not supported)"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "circle of links": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "link to a pipe": (lambda path: path.symlink_to(pipe_at(path.with_suffix(".pipe"))), "not a regular file"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="such files are another matter there")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder: Path, name: str, kind: str) -> None:
    """A pipe would make its reader wait for ever, a device would never end."""
    make, reason = SPECIAL[kind]
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(BundleError, match=f"{re.escape(str(folder / name))}: {reason}"):
        read_bundle(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_to_regular_files_are_followed(folder: Path, original: Bundle, tmp_path: Path) -> None:
    """As Kubernetes lays its mounts: each file a link through a link to the folder of the moment."""
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(folder)
    for name in FILES:
        (mount / name).symlink_to(Path("..data") / name)
    (tmp_path / "link").symlink_to(mount)
    assert read_bundle(tmp_path / "link").version == original.version


def test_a_file_that_grows_while_it_is_read_is_read_as_far_as_the_manifest_says(
    folder: Path, original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it has become since its size was looked at."""
    grown = []

    def grow(descriptor: int) -> os.stat_result:
        found = os.stat(descriptor)
        for name in original.manifest.files:
            if (folder / name).stat().st_ino == found.st_ino:
                os.truncate(folder / name, 1 << 33)  # sparse: the disk need not have them
                grown.append(name)
        return found

    monkeypatch.setattr("models.bundle.os.fstat", grow)
    assert read_bundle(folder).version == original.version
    assert grown == list(original.manifest.files)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A mistyped path."""
    with pytest.raises(BundleError, match=r"nowhere/manifest.json: No such file"):
        read_bundle(tmp_path / "nowhere")


Tensors = dict[str, torch.Tensor]


def without_bias(tensors: Tensors) -> None:
    del tensors["output.bias"]


def with_surplus(tensors: Tensors) -> None:
    tensors["back\ndoor" * 500] = torch.zeros(1)


def other_shape(tensors: Tensors) -> None:
    tensors["output.bias"] = torch.zeros(3, 5)


def transposed(tensors: Tensors) -> None:
    tensors["output.weight"] = tensors["output.weight"].T.contiguous()


def with_nan(tensors: Tensors) -> None:
    tensors["output.weight"][0, 1] = torch.nan


def with_infinity(tensors: Tensors) -> None:
    tensors["output.bias"][0] = -torch.inf


def as_type(dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["output.bias"] = tensors["output.bias"].to(dtype)

    return change


@pytest.mark.parametrize("name", [GENERATOR, DISCRIMINATOR])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_bias, r"tensors missing: output\.bias"),
        (with_surplus, "surplus tensors: "),
        (other_shape, r"output\.bias has shape \(3, 5\), the network needs "),
        (transposed, r"output\.weight has shape "),
        (with_nan, r"output\.weight holds NaN or Inf"),
        (with_infinity, r"output\.bias holds NaN or Inf"),
        *[(as_type(dtype), r"output\.bias is torch\..*needs torch\.float32")
          for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.float8_e5m2)],
    ],
    ids=["missing", "surplus", "shape", "transposed", "nan", "inf", "f64", "bf16", "i32", "bool", "f8"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    folder: Path, name: str, change: Callable[[Tensors], None], reason: str
) -> None:
    """Correct checksums do not help: every tensor is there, alone, of its shape and type, and finite."""
    tensors = load_tensors((folder / name).read_bytes())
    change(tensors)
    forge(folder, name, save_tensors(tensors))
    with pytest.raises(BundleError, match=reason) as caught:
        read_bundle(folder)
    assert name in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 600


class Exploit:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("exploited"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Exploit()),
        b"",
        b"\x00" * 100,
        b"\xff" * 8 + b"{}",
        (5).to_bytes(8, "little") + b"hello",
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["pickle", "empty", "zeros", "huge header", "no JSON header", "no tensors"],
)
def test_other_bytes_in_place_of_weights_are_refused(
    folder: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but safetensors is ever read, and a pickle is never run."""
    monkeypatch.chdir(tmp_path)
    forge(folder, GENERATOR, content)
    with pytest.raises(BundleError, match=r"generator\.safetensors: (not a safetensors file|tensors missing)"):
        read_bundle(folder)
    assert not (tmp_path / "exploited").exists()


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_is_refused_or_changes_nothing_that_counts(
    original: Bundle, folder: Path, data: st.DataObject
) -> None:
    """Checksums catch a flip in the weights; a flipped manifest that reads has another version or the same facts."""
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((original.folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    for file in FILES:
        shutil.copyfile(original.folder / file, folder / file)
    (folder / name).write_bytes(content)
    try:
        read = read_bundle(folder)
    except BundleError:
        return
    assert name == MANIFEST
    if read.version == original.version:
        for field in ("network", "image", "latent", "labels", "calibration", "files"):
            assert getattr(read.manifest, field) == getattr(original.manifest, field)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_is_refused(original: Bundle, folder: Path, name: str, share: float) -> None:
    """Wherever it ends: only the manifest's last line break may be missing."""
    for file in FILES:
        shutil.copyfile(original.folder / file, folder / file)
    content = (original.folder / name).read_bytes().rstrip(b"\n" if name == MANIFEST else b"")
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(BundleError):
        read_bundle(folder)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just("F32"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["output.bias", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=3
            )
        ),
    ),
    body=st.binary(max_size=20),
)
def test_any_safetensors_header_is_read_or_refused(folder: Path, header: object, body: bytes) -> None:
    """A header made by anyone gives a reason, whatever types and offsets it claims."""
    text = json.dumps(header).encode()
    forge(folder, GENERATOR, len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(BundleError):
        read_bundle(folder)


# --- Writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Not A Name"}, "name: String should match"),
        ({"training": {"loss": float("nan")}}, "not JSON"),
        ({"labels": None}, "label_frequencies go with labels"),
    ],
    ids=["name", "nan", "labels"],
)
def test_what_a_reader_would_refuse_is_not_written(
    original: Bundle, tmp_path: Path, changes: Json, reason: str
) -> None:
    """The writer says why, in a reader's words, and the bundle that was there stays."""
    before = write_again(tmp_path / "kept", original)
    with pytest.raises(BundleError, match=reason):
        write_again(tmp_path / "kept", original, **changes)
    assert read_bundle(tmp_path / "kept").version == before.version
    assert only_bundles(tmp_path)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_weights_that_diverged_are_not_written(original: Bundle, tmp_path: Path, poison: float) -> None:
    """A run that went wrong cannot replace the good bundle of yesterday."""
    before = write_again(tmp_path / "kept", original)
    generator = {name: tensor.clone() for name, tensor in original.generator.state_dict().items()}
    generator["output.bias"][0] = poison
    with pytest.raises(BundleError, match="holds NaN or Inf"):
        write_bundle(
            tmp_path / "kept",
            facts_of(original),
            generator,
            original.discriminator.state_dict(),
            np.zeros((8, 8, 3), np.uint8),
            encoder_of(original),
        )
    assert read_bundle(tmp_path / "kept").version == before.version
    assert only_bundles(tmp_path)


@pytest.mark.parametrize("can_swap", [True, False], ids=["swap", "two renames"])
def test_a_new_bundle_takes_the_place_of_the_old(
    original: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_swap: bool
) -> None:
    """In one step where the system can, in two where not; nothing is left over either way."""
    if not can_swap:
        monkeypatch.setattr("models.files.exchange", lambda _one, _other: False)
    old = write_again(tmp_path / "place", original)
    (tmp_path / "place" / "note.txt").write_text("goes with the old bundle")
    new = write_again(tmp_path / "place", original, calibration=None)
    assert new.version != old.version
    assert read_bundle(tmp_path / "place").version == new.version
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == sorted(FILES)
    assert only_bundles(tmp_path)


def test_files_are_the_same_for_the_same_weights(original: Bundle, tmp_path: Path) -> None:
    """Tensors are written in the order of their names, so that equal weights have equal checksums and versions."""
    states = original.generator.state_dict(), original.discriminator.state_dict(), encoder_of(original)
    generator, discriminator, encoder = (dict(reversed(state.items())) for state in states)
    samples = np.zeros((8, 8, 1), np.uint8)
    again = write_bundle(tmp_path / "again", facts_of(original), generator, discriminator, samples, encoder)
    assert again.version == original.version


# The killer forks children that write A over B and B over A; each is killed with SIGKILL, either at its n-th call that
# opens, syncs, renames or removes something, or after a random time. What the place holds must always read whole.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np, torch
from models.bundle import read_bundle, write_bundle
torch.set_num_threads(1)
home, place = Path(sys.argv[1]), Path(sys.argv[2])
bundles = [read_bundle(home / name) for name in ("a", "b")]

def write(bundle):
    facts = bundle.manifest.model_dump(exclude={"format", "files"})
    nets = bundle.generator.state_dict(), bundle.discriminator.state_dict()
    write_bundle(place, facts, *nets, np.zeros((8, 8, 1), np.uint8), bundle.encoder.state_dict())

STEPS = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}

def die_at(step):
    left = [step]
    def count(event, *_):
        if event in STEPS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    fsync = os.fsync
    def counted(descriptor):
        count("open")
        fsync(descriptor)
    os.fsync = counted

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid

def check(reached):
    version = read_bundle(place).version  # raises where it is not whole
    assert version in {one.version for one in bundles}
    return version

write(bundles[0])
seen, step, finished = set(), 0, False
while not finished:
    new = next(one for one in bundles if one.version != check(step))
    def one(): die_at(step); write(new)
    finished = os.WIFEXITED(os.waitpid(child(one), 0)[1])
    seen.add(check(step) == new.version)
    step += 1
assert seen == {True, False}, seen
assert step > 20, step
def loop():
    while True:
        for one in bundles: write(one)
rng = random.Random(5)
for _ in range(40):
    pid = child(loop)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check(0)
print(step)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems swap two folders in two steps")
def test_a_kill_at_any_moment_of_writing_leaves_the_old_bundle_or_the_new(original: Bundle, tmp_path: Path) -> None:
    """SIGKILL before every single step of a replacement, and at random times: the folder always reads whole."""
    home, place = tmp_path / "home", tmp_path / "place"
    write_again(home / "a", original, name="killed")
    write_again(home / "b", original, name="killed", calibration=None)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, os.fspath(home), os.fspath(place / "killed")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


# --- Images --------------------------------------------------------------------------------------------------------


def test_an_image_is_the_same_alone_and_among_others(original: Bundle) -> None:
    """`draw` gives image i of a seed whatever else it is asked for; a folder's name is enough to read it."""
    bundle = read_bundle(str(original.folder))
    whole = bundle.draw(70, seed=3)
    assert whole.shape == (70, 8, 8, 1)
    assert whole.dtype == np.uint8
    np.testing.assert_array_equal(bundle.draw(1, seed=3, first_index=66)[0], whole[66])
    assert len({image.tobytes() for image in whole}) == 70
    assert (bundle.draw(1, seed=4) != whole[:1]).any()


def test_labels_are_given_by_number_or_name(original: Bundle) -> None:
    """One for all or one for each; without any, the seed draws them, and each class then occurs."""
    by_class = [original.draw(40, labels=label) for label in range(3)]
    np.testing.assert_array_equal(original.draw(40, labels="owl"), by_class[2])
    mixed = original.draw(40, labels=["dog", 0, *[2] * 38])
    np.testing.assert_array_equal(mixed, [by_class[1][0], by_class[0][1], *by_class[2][2:]])
    drawn = original.draw(40)
    found = [next(k for k in range(3) if (by_class[k][i] == drawn[i]).all()) for i in range(40)]
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize(
    ("count", "more", "reason"),
    [
        (0, {}, "count 0"),
        (1, {"seed": -1}, "seed -1"),
        (1, {"first_index": 2**53}, "first_index"),
        (2, {"labels": [1]}, "1 labels for 2 images"),
        (1, {"labels": "cow"}, "the labels cat, dog, owl, not 'cow'"),
        (1, {"labels": 3}, "not 3"),
        (1, {"labels": -1}, "not -1"),
    ],
)
def test_images_that_there_are_not_are_refused(original: Bundle, count: int, more: Json, reason: str) -> None:
    """In a sentence that names what was asked for."""
    with pytest.raises(ValueError, match=reason):
        original.draw(count, **more)


def test_labels_for_a_bundle_without_are_refused(tiny_bundles: dict[str, Bundle]) -> None:
    """Silence would pass for obedience."""
    with pytest.raises(ValueError, match="no labels"):
        tiny_bundles["tiny"].draw(1, labels=0)


def test_images_do_not_depend_on_the_number_of_threads() -> None:
    """A program that lets torch use every processor draws the same bytes as one that does not."""
    paper = read_bundle(Path(__file__).parents[2] / "bundles" / "mnist-mlp")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = paper.draw(1000, seed=7)
        torch.set_num_threads(2)
        np.testing.assert_array_equal(paper.draw(1000, seed=7), alone)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_reading_a_bundle_brings_no_compiler_along() -> None:
    """A second of start-up and 75 MB: what torch imports when a tensor on the meta device is filled."""
    program = f"""
import sys
from models.bundle import read_bundle
read_bundle({str(ROOT / "bundles/mnist")!r}).draw(1)
print([name for name in ("sympy", "torch._dynamo") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
