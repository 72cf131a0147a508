"""Which folders hold bundles."""

import os
from pathlib import Path

from models.bundle import MANIFEST, BundleError


def find_bundles(root: Path) -> tuple[list[Path], dict[Path, BundleError]]:
    """Sub-folders that hold a manifest, by name, and why others can't be read. Hidden ones are left out.

    Whatever is called a manifest counts: whoever reads it says what is wrong with it. Hidden folders are temporary.

    Raises:
        BundleError: The folder can't be read.
    """
    try:
        folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise BundleError(root, error.strerror or type(error).__name__) from None
    found: list[Path] = []
    unreadable: dict[Path, BundleError] = {}
    for folder in folders:
        try:
            os.lstat(folder / MANIFEST)
            folder.name.encode()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable[folder] = BundleError(folder, error.strerror or type(error).__name__)
        except UnicodeEncodeError:
            unreadable[folder] = BundleError(folder, "its name is not UTF-8")  # which no reply could give
        else:
            found.append(folder)
    return found, unreadable
