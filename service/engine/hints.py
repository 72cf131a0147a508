"""Hints for images that can't be what was meant, told from pixels alone: blank ones, and those with inverted ground.

A bundle's own images say what is usual for it. Where they have no clear ground, as photos have none, no ground is odd.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.inference.pixels import UInt8

BLANK = "The image is blank as D sees it: one colour all over, so that the verdict means nothing."
DARK_ON_LIGHT = "The image is dark on light, and this bundle's images are light on dark: invert it."
LIGHT_ON_DARK = "The image is light on dark, and this bundle's images are dark on light: invert it."

_FLAT_LEVELS = 8  # between the least and the greatest value of a channel: JPEG leaves as much of one colour
_DARK, _LIGHT = 85, 170  # under and over these a value is clearly dark or light, whatever else is in the image
_BORDER_SHARE = 0.75  # of an image's border that is clearly dark or light where its ground is
_IMAGES_SHARE = 0.9  # of a bundle's images that have the ground which is then usual for it


@dataclass(frozen=True)
class Hints:
    """What is usual for a bundle's images: their ground, None where it is neither dark nor light, and being blank."""

    ground: Literal["dark", "light"] | None
    has_blank: bool

    @classmethod
    def of(cls, images: UInt8) -> "Hints":
        """What is usual for images (n, h, w, c) that the bundle's generator drew."""
        border = _border(images)
        ground: Literal["dark", "light"] | None = None
        if _are_mostly(border < _DARK).mean() >= _IMAGES_SHARE:
            ground = "dark"
        elif _are_mostly(border > _LIGHT).mean() >= _IMAGES_SHARE:
            ground = "light"
        return cls(ground, bool(_are_blank(images).any()))

    def find(self, images: UInt8) -> dict[int, str]:
        """The hint for each of these images (n, h, w, c) that needs one, by its place."""
        found: dict[int, str] = {}
        if self.ground is not None:
            border, is_dark = _border(images), self.ground == "dark"
            # Between them it is what the rest of the image is not: paper in a photo is seldom white, nor ink black.
            middle = np.clip(_middle(images), _DARK, _LIGHT)
            odd = _are_mostly(border > middle if is_dark else border < middle)
            found |= dict.fromkeys(np.flatnonzero(odd).tolist(), DARK_ON_LIGHT if is_dark else LIGHT_ON_DARK)
        if not self.has_blank:
            found |= dict.fromkeys(np.flatnonzero(_are_blank(images)).tolist(), BLANK)
        return found


def _border(images: UInt8) -> UInt8:
    """The values of each image's border: (n, values)."""
    edges = images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]
    return np.concatenate([edge.reshape(len(images), -1) for edge in edges], axis=1)


def _middle(images: UInt8) -> NDArray[np.float64]:
    """The value half way between the least and the greatest of each image: (n, 1)."""
    least, greatest = images.min(axis=(1, 2, 3)), images.max(axis=(1, 2, 3))
    middle: NDArray[np.float64] = (least.astype(np.float64) + greatest)[:, np.newaxis] / 2
    return middle


def _are_mostly(border: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For which images this holds on most of the border: (n,)."""
    mostly: NDArray[np.bool_] = np.count_nonzero(border, axis=1) >= _BORDER_SHARE * border.shape[1]
    return mostly


def _are_blank(images: UInt8) -> NDArray[np.bool_]:
    """Which images have about one value in each channel: (n,)."""
    channels = [images[..., channel] for channel in range(images.shape[3])]
    spread = np.max([channel.max(axis=(1, 2)) - channel.min(axis=(1, 2)) for channel in channels], axis=0)
    blank: NDArray[np.bool_] = spread <= _FLAT_LEVELS
    return blank
