"""Make a key, and sign bundles with it, for services that load only signed ones."""

import argparse
from pathlib import Path

from models.bundle import read_manifest, sign_bundle
from models.commands.arguments import Subparsers
from models.files import create_file
from models.signing import MAX_PRIVATE_BYTES, SigningError, new_key


def add_to(commands: Subparsers) -> None:
    """Name the two commands, and say what their lines may hold."""
    keygen = commands.add_parser("keygen", help="make a key to sign bundles with")
    keygen.set_defaults(run=make_key)
    keygen.add_argument("--out", type=Path, required=True, metavar="KEY",
                        help="file of the private key; KEY.pub gets the line for GAN_BUNDLE_KEYS_FILE")  # fmt: skip
    sign = commands.add_parser("sign", help="add a signature to a bundle's manifest")
    sign.set_defaults(run=sign_one)
    sign.add_argument("bundle", type=Path)
    sign.add_argument("--key", type=Path, required=True, help="file of the private key")


def make_key(arguments: argparse.Namespace) -> int:
    """Write both files; a file that is there is kept, and nothing is written then."""
    private: Path = arguments.out
    public = private.with_name(f"{private.name}.pub")
    pem, line = new_key()
    create_file(private, pem, mode=0o600)
    try:
        create_file(public, line.encode(), mode=0o644)
    except OSError:
        private.unlink()
        raise
    print(f"{private}: the private key. Keep it where bundles are signed, and nowhere else.")
    print(f"{public}: the line for the file that GAN_BUNDLE_KEYS_FILE names, key {line.split()[0]}.")
    return 0


def sign_one(arguments: argparse.Namespace) -> int:
    """Verify a bundle, and add the key's signature to its manifest."""
    with arguments.key.open("rb") as file:
        pem = file.read(MAX_PRIVATE_BYTES)
    try:
        key_id = sign_bundle(arguments.bundle, pem)
    except SigningError as error:
        raise SigningError(f"{arguments.key}: {error}") from None
    manifest, version = read_manifest(arguments.bundle)
    print(f"{manifest.name}@{version}: signed by {key_id}")
    return 0
