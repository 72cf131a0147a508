"""The public keys whose bundles are served, from the file that GAN_BUNDLE_KEYS_FILE names."""

from models.signing import PublicKeys, SigningError, parse_public_keys
from service.settings import Settings, SettingsError, lines_of, variable


def read_bundle_keys(settings: Settings) -> PublicKeys | None:
    """The keys by id; None where the setting names no file, and so no signature is asked for.

    Raises:
        SettingsError: The file can't be read, a line can't be understood, or it holds no key.
    """
    file = settings.bundle_keys_file
    if file is None:
        return None
    try:
        return parse_public_keys(lines_of("bundle_keys_file", file))
    except SigningError as error:
        raise SettingsError(f"{variable('bundle_keys_file')}: {file}: {error}") from None
