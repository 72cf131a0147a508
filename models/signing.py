"""Signs statements and checks signatures: ed25519, by the package `cryptography`.

A key has an id, by which a signature names it. The ids of our own keys are the first 16 hex digits of the sha256 of the
public key. Whoever verifies has a file of public keys that it trusts, a line `id base64` for each.

`cryptography` is imported where a signature is made or checked, and so only by those who use signatures.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable, Mapping

KEY_ID = "^[A-Za-z0-9._-]{1,64}$"
SIGNATURE = "^[A-Za-z0-9+/]{86}==$"  # 64 bytes in base64
PUBLIC_BYTES = 32
MAX_PRIVATE_BYTES = 2**14  # of a file with a private key; ours have 119

PublicKeys = Mapping[str, bytes]  # by id


class SigningError(ValueError):
    """A key can't be used; the message is one line, without the key."""


def parse_public_keys(lines: Iterable[str]) -> dict[str, bytes]:
    """The keys of a file, by id; empty lines and those that begin with # hold none.

    Raises:
        SigningError: A line is not `id base64`, an id stands twice, or there is no key.
    """
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 2:
            raise SigningError(f"line {number}: needs to be ID KEY, as in a file that `models keygen` writes")
        key_id, encoded = fields
        if not re.fullmatch(KEY_ID, key_id):
            raise SigningError(f"line {number}: needs an id of at most 64 letters, digits, dots, dashes, underscores")
        if key_id in keys:
            raise SigningError(f"line {number}: the id {key_id} stands in the file already")
        keys[key_id] = _public_bytes(encoded, number)
    if not keys:
        raise SigningError("holds no key")
    return keys


def _public_bytes(encoded: str, number: int) -> bytes:
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != PUBLIC_BYTES:
        raise SigningError(f"line {number}: needs {PUBLIC_BYTES} bytes in base64, an ed25519 public key")
    return key


def valid_signers(statement: bytes, signatures: Mapping[str, str], trusted: PublicKeys) -> frozenset[bytes]:
    """The trusted keys that have signed this statement.

    Args:
        statement: What was signed.
        signatures: By the key's id, in base64.
        trusted: The keys that count.

    Raises:
        SigningError: There is none. It says whether there is no signature, none by a trusted key, or a wrong one.
    """
    if not signatures:
        raise SigningError("it is not signed, and only signed bundles are loaded here")
    known = {key_id: trusted[key_id] for key_id in signatures if key_id in trusted}
    if not known:
        raise SigningError(f"it is signed by {_some(signatures)}, and no such key is trusted here")
    signers = frozenset(key for key_id, key in known.items() if _is_valid(key, signatures[key_id], statement))
    if not signers:
        raise SigningError(f"the signature by {_some(known)} is not of this bundle as it is now")
    return signers


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


def _is_valid(key: bytes, signature: str, statement: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - see above
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(base64.b64decode(signature), statement)
    except (InvalidSignature, ValueError):  # the latter of bytes that are no public key
        return False
    return True


def new_key() -> tuple[bytes, str]:
    """A new private key, as PEM (PKCS 8, as `openssl genpkey -algorithm ed25519` writes it), and its public line."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415

    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes_raw()
    return pem, f"{key_id_of(public)} {base64.b64encode(public).decode()}\n"


def key_id_of(public: bytes) -> str:
    """The id of a public key of ours."""
    return hashlib.sha256(public).hexdigest()[:16]


def sign(statement: bytes, pem: bytes) -> tuple[str, str]:
    """The id of a private key, and its signature of a statement in base64.

    Raises:
        SigningError: It is not an ed25519 key as PEM, or it needs a password.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    try:
        private = load_pem_private_key(pem, password=None)
    except (ValueError, UnsupportedAlgorithm):
        raise SigningError("not a private key as PEM") from None
    except TypeError:
        raise SigningError("the key needs a password, and only keys without one can be used") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise SigningError("not an ed25519 key")
    public = private.public_key().public_bytes_raw()
    return key_id_of(public), base64.b64encode(private.sign(statement)).decode()
