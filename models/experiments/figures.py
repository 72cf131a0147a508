"""Pictures of a bundle: the paper's, of ways between latents (Figure 3) and of samples and their nearest images
(Figure 2); samples by class; and a run's samples as it went on.
"""  # noqa: D205

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from models.bundle import Bundle
from models.inference.noise import Int64, PathMethod, draw_labels, draw_latents, latent_path
from models.inference.pixels import UInt8, encode_png, grid

_GAP = 2  # white pixels before the column of nearest images
_SIDE = 8  # images in a row, and rows, of a run's pictures of samples


def interpolation(bundle: Bundle, seeds: list[int], steps: int, method: PathMethod, label: str | None = None) -> UInt8:
    """Interpolate between the latents of image 0 of each seed and the next: uint8 (n, h, w, c).

    Each pair of seeds gives `steps` images with both ends; a seed between two pairs comes once. A seed's own image is
    that of `bundle.draw(1, seed=seed, labels=label)`, bit for bit. A bundle with labels uses `label` for all images. If
    that is None, each image has the label that its nearer seed draws.

    Raises:
        ValueError: Fewer than two seeds or steps, a seed out of range, or a label that the bundle does not have.
    """
    if len(seeds) < 2:
        raise ValueError("a way leads from one seed to another: give two or more")
    for seed in seeds:
        bundle.draw(1, seed=seed, labels=label)  # checks the seed and the label
    ends = [draw_latents(bundle.manifest.latent, seed, 0, 1)[0] for seed in seeds]
    parts = [latent_path(start, stop, steps, method) for start, stop in pairwise(ends)]
    latents = np.concatenate([parts[0], *(part[1:] for part in parts[1:])])
    return bundle.images(latents, _labels_of_path(bundle, seeds, steps, label))


def _labels_of_path(bundle: Bundle, seeds: list[int], steps: int, label: str | None) -> Int64 | None:
    frequencies, names = bundle.manifest.latent.label_frequencies, bundle.manifest.labels
    count = (len(seeds) - 1) * (steps - 1) + 1
    if frequencies is None or names is None:
        return None
    if label is not None:
        return np.full(count, names.index(label), np.int64)
    drawn = np.concatenate([draw_labels(frequencies, seed, 0, 1) for seed in seeds])
    return drawn[(2 * np.arange(count) + steps - 1) // (2 * (steps - 1))]  # of the nearer seed


@dataclass(frozen=True)
class Neighbour:
    """A sample and its nearest training image, by index, and √Σ(a − b)² of their pixels in [0, 1]."""

    sample: int
    training_image: int
    distance: float


def neighbours(bundle: Bundle, train: UInt8, *, seed: int, rows: int, columns: int) -> tuple[UInt8, list[Neighbour]]:
    """Rows of samples, each followed by the training image that is nearest to the row's last sample.

    The samples are images 0, 1, … of the seed, not picked by hand. Nearest is by Euclidean distance of pixels, as in
    the paper; of two equally near images the first counts.

    Args:
        bundle: Draws the samples.
        train: Its training images, uint8 (n, h, w, c).
        seed: Of the samples.
        rows, columns: Of samples, at least 1 each.

    Returns:
        The picture, uint8 (height, width, c), with a white line before the last column; and that column's neighbours.
    """
    samples = bundle.draw(rows * columns, seed=seed)
    last = range(columns - 1, rows * columns, columns)
    found = [Neighbour(index, *nearest(samples[index], train)) for index in last]
    left = grid(samples, columns)
    right = grid(train[[one.training_image for one in found]], 1)
    line = np.full((left.shape[0], _GAP, left.shape[2]), 255, np.uint8)
    return np.concatenate([left, line, right], axis=1), found


def nearest(image: UInt8, images: UInt8) -> tuple[int, float]:
    """Index of the image nearest to one (h, w, c) among (n, h, w, c), and the distance; exact, a copy's is 0."""
    squared = [
        np.square(chunk.astype(np.int32) - image).sum(axis=(1, 2, 3), dtype=np.int64)
        for chunk in np.array_split(images, -(-len(images) // 5_000))
    ]
    distances = np.concatenate(squared)
    index = int(distances.argmin())
    return index, float(np.sqrt(distances[index])) / 255


def by_class(bundle: Bundle, *, seed: int, columns: int) -> UInt8:
    """The seed's images 0, 1, … as each of the bundle's labels, a row for each: uint8 (height, width, c)."""
    rows = [bundle.draw(columns, seed=seed, labels=label) for label in bundle.manifest.labels or ()]
    return grid(np.concatenate(rows), columns)


def evolution(pictures: Sequence[Path], columns: int) -> UInt8:
    """The first images of each of a run's pictures of samples, a row for each: uint8 (height, width, c)."""
    rows = [_images_in(picture)[:columns] for picture in pictures]
    return grid(np.concatenate(rows), len(rows[0]))


def _images_in(path: Path) -> UInt8:
    """The images of a square picture, in reading order: uint8 (n, h, w, c)."""
    with Image.open(path) as opened:
        picture = np.asarray(opened)
    h, w = picture.shape[0] // _SIDE, picture.shape[1] // _SIDE
    return picture.reshape(_SIDE, h, _SIDE, w, -1).swapaxes(1, 2).reshape(_SIDE**2, h, w, -1)


def png(picture: UInt8, scale: int = 1) -> bytes:
    """A picture (h, w, c) as a PNG, enlarged by a whole factor."""
    large = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    return encode_png(large)
