"""The least that any start needs: importing torch and FastAPI, reading the weights, running each net once.

    python -m benchmarks.serving.bare FOLDER_OF_BUNDLES

Prints its resident bytes after the imports, and a line when it is warm.
"""

import os
import sys

import fastapi  # noqa: F401 - for its time and its memory
import torch

ROWS = 64  # in the batch that warms


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:  # noqa: PTH123 - pathlib would be one more import
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def warm(folder: str) -> None:
    """Read a bundle, make images and judge them."""
    from models.bundle import read_bundle  # noqa: PLC0415 - not among what is imported for its memory
    from models.inference.noise import draw_latents  # noqa: PLC0415

    bundle = read_bundle(folder)
    labels = None if bundle.manifest.labels is None else torch.zeros(ROWS, dtype=torch.int64)
    images = bundle.generator(torch.from_numpy(draw_latents(bundle.manifest.latent, 0, 0, ROWS)), labels)
    bundle.discriminator(*(given for given in (images, labels) if given is not None))


def main() -> None:
    """All of it."""
    print(resident_bytes(), flush=True)
    for entry in sorted(os.scandir(sys.argv[1]), key=lambda entry: entry.name):
        if entry.is_dir():
            warm(entry.path)
    print("warm", flush=True)


if __name__ == "__main__":
    main()
