"""Signed bundles: what a signature is over, which bundles are refused and why, and the commands that make them."""

import base64
import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.__main__ import main
from models.bundle import (
    GENERATOR,
    MANIFEST,
    SAMPLES,
    Bundle,
    BundleError,
    read_bundle,
    read_manifest,
    record_evaluation,
    sign_bundle,
    write_bundle,
)
from models.signing import SigningError, new_key, parse_public_keys

Json = dict[str, Any]
PEM, LINE = new_key()
OTHER_PEM, OTHER_LINE = new_key()
TRUSTED = parse_public_keys([LINE])
ID = LINE.split()[0]


@pytest.fixture
def folder(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    """A bundle that nobody has signed."""
    return Path(shutil.copytree(tiny_bundles["tiny"].folder, tmp_path / "tiny"))


def raw_of(folder: Path) -> Json:
    raw: Json = json.loads((folder / MANIFEST).read_bytes())
    return raw


def rewrite(folder: Path, change: Callable[[Json], object]) -> None:
    """Change the manifest's JSON in place."""
    raw = raw_of(folder)
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def refusal(folder: Path) -> str:
    """Why a reader who trusts the key refuses the bundle; told alike by whoever reads the manifest alone."""
    with pytest.raises(BundleError) as caught:
        read_bundle(folder, trusted=TRUSTED)
    with pytest.raises(BundleError) as of_manifest:
        read_manifest(folder, TRUSTED)
    assert str(of_manifest.value) == str(caught.value)
    return caught.value.reason


def test_a_signed_bundle_is_read_by_who_trusts_its_key(folder: Path) -> None:
    """Its version stays, and those who ask for no signature read it as ever."""
    before = read_bundle(folder)
    assert sign_bundle(folder, PEM) == ID
    read = read_bundle(folder, trusted=TRUSTED)
    assert (read.version, read.signers) == (before.version, frozenset(TRUSTED.values()))
    assert read_bundle(folder).signers == frozenset()


def test_others_can_verify_a_signature(folder: Path, tmp_path: Path) -> None:
    """With openssl and what docs/bundle-format.md says, from the manifest's text alone."""
    sign_bundle(folder, PEM)
    raw = raw_of(folder)
    statement = json.dumps(
        {
            "created": raw["created"],
            "files": {name: raw["files"][name] for name in sorted(raw["files"])},
            "name": raw["name"],
            "version": read_bundle(folder).version,
        },
        separators=(",", ":"),
        sort_keys=True,
    )
    assert statement.startswith('{"created":"2026-01-02T03:04:05Z","files":{"discriminator.safetensors":{"bytes":')
    (tmp_path / "key").write_bytes(PEM)
    (tmp_path / "statement").write_text(statement)
    (tmp_path / "signature").write_bytes(base64.b64decode(raw["signature"][0]["sig"]))
    done = subprocess.run(
        ["openssl", "pkeyutl", "-verify", "-rawin", *("-inkey", "key", "-in", "statement", "-sigfile", "signature")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "Signature Verified Successfully", done.stderr


def test_recording_scores_breaks_no_signature(folder: Path) -> None:
    """Scores are no part of what is signed."""
    sign_bundle(folder, PEM)
    record_evaluation(read_bundle(folder), {"parzen": {"log_likelihood": 225}})
    assert read_bundle(folder, trusted=TRUSTED).manifest.evaluation


def test_one_key_signs_once_and_others_beside_it(folder: Path) -> None:
    """A signature replaces an earlier one of the same key; any one valid one is enough, so that keys can be changed."""
    for pem in (PEM, OTHER_PEM, PEM):
        sign_bundle(folder, pem)
    assert set(read_bundle(folder).manifest.signatures) == {ID, OTHER_LINE.split()[0]}
    for lines in ([LINE], [OTHER_LINE], [LINE, OTHER_LINE]):
        trusted = parse_public_keys(lines)
        assert read_bundle(folder, trusted=trusted).signers == frozenset(trusted.values())
    rewrite(folder, lambda raw: raw["signature"][1].update(sig=raw["signature"][0]["sig"]))
    assert read_bundle(folder, trusted=parse_public_keys([LINE, OTHER_LINE])).signers == frozenset(TRUSTED.values())


def test_an_unsigned_bundle_is_refused(folder: Path) -> None:
    """The reason says so, in words that a client may read."""
    assert refusal(folder) == "it is not signed, and only signed bundles are loaded here"


def test_a_bundle_that_a_stranger_signed_is_refused(folder: Path) -> None:
    """The reason names the key; so it does where the stranger takes the id of a trusted key."""
    sign_bundle(folder, OTHER_PEM)
    assert refusal(folder) == f"it is signed by {OTHER_LINE.split()[0]}, and no such key is trusted here"
    rewrite(folder, lambda raw: raw["signature"][0].update(key=ID))
    assert refusal(folder) == f"the signature by {ID} is not of this bundle as it is now"


CHANGES: dict[str, Callable[[Json], object]] = {
    "name": lambda raw: raw.update(name="other"),
    "created": lambda raw: raw.update(created="2036-01-02T03:04:05Z"),
    "calibration": lambda raw: raw.update(
        calibration={"scale": 0.5, "offset": -0.25, "auc": 0.9, "expected_calibration_error": 0.02}
    ),
    "weights": lambda raw: raw["files"][GENERATOR].update(sha256="0" * 64),
    "samples": lambda raw: raw["files"][SAMPLES].update(bytes=1),
    "signature": lambda raw: raw["signature"][0].update(sig="A" * 86 + "=="),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_after_it_was_signed_is_refused(folder: Path, change: Callable[[Json], object]) -> None:
    """Whatever decides what is served: name and age, by which names get a meaning, weights, and what is versioned."""
    sign_bundle(folder, PEM)
    rewrite(folder, change)
    assert refusal(folder) == f"the signature by {ID} is not of this bundle as it is now"


def test_other_weights_beside_a_signed_manifest_are_refused(
    folder: Path, tiny_bundles: dict[str, Bundle], make_tiny: Callable[..., Bundle], tmp_path: Path
) -> None:
    """A signature covers the files by their sha256."""
    sign_bundle(folder, PEM)
    image = tiny_bundles["tiny"].manifest.image
    other = make_tiny(tmp_path / "other", image, None, None, seed=1)
    shutil.copy(other.folder / GENERATOR, folder / GENERATOR)
    with pytest.raises(BundleError, match=r"generator\.safetensors: sha256"):
        read_bundle(folder, trusted=TRUSTED)
    shutil.copy(folder / MANIFEST, other.folder / MANIFEST)  # the signed manifest moves to the other weights
    with pytest.raises(BundleError, match=r"\.safetensors: sha256"):
        read_bundle(other.folder, trusted=TRUSTED)


def entries(count: int) -> list[Json]:
    return [{"key": f"k{number}", "sig": "A" * 86 + "=="} for number in range(count)]


@pytest.mark.parametrize(
    "signature",
    [
        *([], "x", {}, [1], [{"key": "a"}]),
        [{"key": "a", "sig": "A" * 86 + "==", "more": 1}],
        [{"key": "a", "sig": "A" * 88}],  # 66 bytes
        [{"key": "a", "sig": "?" * 86 + "=="}],
        [{"key": "a b", "sig": "A" * 86 + "=="}],
        [{"key": "a" * 65, "sig": "A" * 86 + "=="}],
        entries(1) * 2,
        entries(17),
        entries(5_000),
    ],
    ids=range(13),
)
def test_malformed_signatures_are_refused(folder: Path, signature: Any) -> None:
    """By every reader, whether it asks for signatures or not, before any is checked."""
    rewrite(folder, lambda raw: raw.update(signature=signature))
    with pytest.raises(BundleError, match="signature"):
        read_bundle(folder)


def test_no_more_signatures_are_added_than_are_read(folder: Path) -> None:
    """The manifest then stays as it was."""
    rewrite(folder, lambda raw: raw.update(signature=entries(16)))
    with pytest.raises(BundleError, match="signature"):
        sign_bundle(folder, PEM)
    assert len(read_bundle(folder).manifest.signatures) == 16


def test_nobody_signs_what_cannot_be_read(folder: Path) -> None:
    """A damaged bundle is refused, and its manifest stays as it was."""
    before = (folder / MANIFEST).read_bytes()
    (folder / GENERATOR).write_bytes(b"")
    with pytest.raises(BundleError):
        sign_bundle(folder, PEM)
    assert (folder / MANIFEST).read_bytes() == before


def test_a_bundle_that_is_written_from_a_signed_ones_facts_is_not_signed(folder: Path, tmp_path: Path) -> None:
    """Nobody can have signed it yet."""
    sign_bundle(folder, PEM)
    signed = read_bundle(folder)
    facts = signed.manifest.model_dump(exclude={"format", "files"})
    nets = signed.generator.state_dict(), signed.discriminator.state_dict()
    write_bundle(tmp_path / "new", facts, *nets, (folder / SAMPLES).read_bytes())
    assert "signature" not in raw_of(tmp_path / "new")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "holds no key"),
        (["# none", ""], "holds no key"),
        ([ID], "line 1: needs to be ID KEY"),
        ([LINE, f"{LINE} comment"], "line 2: needs to be ID KEY"),
        (["# a", LINE, f"{ID} {OTHER_LINE.split()[1]}"], "line 3: the id .* stands in the file already"),
        (["a/b " + LINE.split()[1]], "line 1: needs an id"),
        (["a " + LINE.split()[1][:-4]], "line 1: needs 32 bytes in base64"),
        (["a größe"], "line 1: needs 32 bytes in base64"),
        (["a =" + LINE.split()[1][1:]], "line 1: needs 32 bytes in base64"),
    ],
)
def test_keys_that_cannot_be_used_are_refused(lines: list[str], reason: str) -> None:
    """The message says where."""
    with pytest.raises(SigningError, match=reason):
        parse_public_keys(lines)


# The commands


def test_the_commands_make_a_key_and_a_signed_bundle(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The private key is for its owner alone, the public file is the line for the service, and inspect tells."""
    old = os.umask(0)
    try:
        assert main(["keygen", "--out", str(tmp_path / "key")]) == 0
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    trusted = parse_public_keys((tmp_path / "key.pub").read_text().splitlines())
    [key_id] = trusted
    capsys.readouterr()
    assert main(["sign", str(folder), "--key", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out == f"tiny@{read_bundle(folder).version}: signed by {key_id}\n"
    assert read_bundle(folder, trusted=trusted).signers == frozenset(trusted.values())
    assert main(["inspect", str(folder), "--json"]) == 0
    assert [one["key"] for one in json.loads(capsys.readouterr().out)["signature"]] == [key_id]


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_keygen_overwrites_nothing(there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where one of its files is there already, that one stays and the other is not written."""
    (tmp_path / there).write_text("mine")
    assert main(["keygen", "--out", str(tmp_path / "key")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / there}: File exists\n"
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def openssl(*arguments: str) -> bytes:
    done = subprocess.run(["openssl", *arguments], capture_output=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "not a private key as PEM"),
        (lambda: b"\0" * 2**20, "not a private key as PEM"),
        (LINE.encode, "not a private key as PEM"),
        (lambda: openssl("genpkey", "-algorithm", "x25519"), "not an ed25519 key"),
        (
            lambda: openssl("genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:word"),
            "the key needs a password, and only keys without one can be used",
        ),
    ],
    ids=["empty", "zeros", "public", "x25519", "password"],
)
def test_a_key_that_cannot_sign_is_one_line(
    make: Callable[[], bytes], reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle stays as it was, and nothing of the key is shown."""
    before = (folder / MANIFEST).read_bytes()
    (tmp_path / "key").write_bytes(make())
    assert main(["sign", str(folder), "--key", str(tmp_path / "key")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'key'}: {reason}\n"
    assert (folder / MANIFEST).read_bytes() == before


def test_a_key_of_openssl_signs_too(folder: Path, tmp_path: Path) -> None:
    """Keys are in the common format."""
    (tmp_path / "key").write_bytes(openssl("genpkey", "-algorithm", "ed25519"))
    assert main(["sign", str(folder), "--key", str(tmp_path / "key")]) == 0


def test_a_table_tells_the_signers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal; nobody where there is none."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for signer in ("nobody", ID):
        assert main(["inspect", str(folder)]) == 0
        assert f"signed by             {signer}\n" in capsys.readouterr().out
        sign_bundle(folder, PEM)
