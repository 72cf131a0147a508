"""What calls give back, beside images and arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one image among several has no result."""

    status: int
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How real an image looks to the discriminator.

    Attributes:
        probability_real: If as many images are real as generated.
        logit: The discriminator's raw output.
        label: The class that the bundle names, if it has classes and none was given.
        is_calibrated: Whether `probability_real` comes from the bundle's calibration.
        is_converted: Whether the image had another size or colour mode than the bundle's.
        hint: In words, why the image can't be what was meant.
        error: Why there is no verdict; the numbers are then None.
    """

    probability_real: float | None = None
    logit: float | None = None
    label: str | None = None
    is_calibrated: bool = True
    is_converted: bool = False
    hint: str | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """Where in the generator's latent space an image lies.

    Attributes:
        latent: float32 (dim,).
        mse: The mean squared error between the image and what the generator draws from the latent.
        image: What the generator draws from the latent.
        error: Why there is no encoding; the others are then None.
        label: Of a bundle with classes, the class that the image is drawn as.
    """

    latent: Float32 | None = None
    mse: float | None = None
    image: Image.Image | None = None
    error: Problem | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a picture is what its recipe gives.

    Attributes:
        verdict: `identical`, `within_one_level`, `different`, `no_recipe` or `unknown_bundle`.
        recipe: What the picture says that it was made from; None where it does not.
        error: Why there is no verdict; the others are then None.
    """

    verdict: str | None = None
    recipe: Mapping[str, Any] | None = None
    error: Problem | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A generator, with its discriminator, that the service has.

    Attributes:
        is_default: Whether it answers where no bundle is named.
        labels: The names of its classes, in order; None if it has none.
        metadata: All that the service says of it.
    """

    name: str
    version: str
    height: int
    width: int
    channels: int
    labels: tuple[str, ...] | None
    is_default: bool
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def pinned(self) -> str:
        """name@version: as the `bundle` of a call it stays what it is, whatever is loaded later."""
        return f"{self.name}@{self.version}"
