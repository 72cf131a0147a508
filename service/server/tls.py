"""TLS: makes what new connections are encrypted with of the certificate and key that the settings name."""

import ssl
import stat
from pathlib import Path

from service.settings import Settings, SettingsError, variable

HANDSHAKE_S = 10.0  # a client that has not finished its handshake by then is disconnected


def read_tls(settings: Settings) -> ssl.SSLContext | None:
    """Read the certificate and its key; None where the settings name none.

    Raises:
        SettingsError: A file can't be used; the message is one line that says which and why.
    """
    certificate_file, key_file = settings.tls_cert_file, settings.tls_key_file
    if certificate_file is None or key_file is None:
        return None
    certificate, key = _readable("tls_cert_file", certificate_file), _readable("tls_key_file", key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it costs as much as a handshake, and clients could ask for many
    context.set_alpn_protocols(["http/1.1"])

    def no_password() -> str:  # otherwise OpenSSL would ask at the terminal
        raise SettingsError(f"{key}: is encrypted; write the key without a password")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(certificate_file)
    except (ssl.SSLError, OSError):
        raise SettingsError(f"{certificate}: holds no certificates in PEM") from None
    try:
        context.load_cert_chain(certificate_file, key_file, no_password)
    except (ssl.SSLError, OSError) as error:
        raise SettingsError(_why_not(error, certificate, key)) from None
    return context


def _readable(field: str, file: Path) -> str:
    """The file's name for messages, once it is known to be readable."""
    source = f"{variable(field)}: {file}"
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be read once, by one worker
            raise SettingsError(f"{source}: is not a regular file")
        with file.open("rb"):
            return source
    except OSError as error:
        raise SettingsError(f"{source}: {error.strerror}") from None


def _why_not(error: OSError, certificate: str, key: str) -> str:
    """Why a readable key can't be used with a certificate in PEM."""
    reason = getattr(error, "reason", None)
    if reason == "KEY_VALUES_MISMATCH":
        return f"{key}: is not the key of {certificate}"
    if reason is None:
        return f"{key}: holds no private key in PEM"
    return f"{certificate}: {reason.lower().replace('_', ' ')}"  # such as EE_KEY_TOO_SMALL
