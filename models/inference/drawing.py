"""The one way to an image: rows through a net in reference tiles, as the service computes them.

`Bundle.draw`, a run's scores and calibration, and `evaluate` come here, so what is judged is what clients get.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.inference.fast_nets import fast_discriminator, fast_encoder, fast_generator
from models.inference.noise import Float32, Int64, LatentRange, beside_noise, draw_latents, sampled_labels
from models.inference.pixels import UInt8, grey_levels, unit_levels
from models.inference.tiles import REFERENCE_TILE, Tiles
from models.networks import Discriminator, Encoder, Generator
from models.spec import LatentSpec


def draw_images(
    generator: Generator,
    latent: LatentSpec,
    count: int,
    *,
    seed: int = 0,
    first_index: int = 0,
    labels: Int64 | None = None,
) -> UInt8:
    """Images first_index … first_index + count − 1 of a seed: uint8 (count, h, w, c).

    Labels that are not given are drawn from the seed where the latent has frequencies. Errors are those of `images_of`.
    """
    if labels is None:
        labels = sampled_labels(latent, seed, first_index, count)
    latents, drawn = draw_latents(latent, seed, first_index, count), [LatentRange(seed, first_index, count)]
    return images_of(generator, beside_noise(latent, latents, drawn), labels)


def images_of(generator: Generator, latents: Float32, labels: Int64 | None = None) -> UInt8:
    """(n, dim) latents, n ≥ 1, and (n,) labels where the net has classes → uint8 (n, h, w, c). See `Drawing`."""
    return Drawing(generator)(latents, labels)


class Drawing:
    """A generator made ready once, for many calls.

    A latent's bytes are the same alone and among others, and the service's, which runs only batches of sizes that are
    proven to give the reference tile's bits.
    """

    def __init__(self, generator: Generator) -> None:
        self._device = next(generator.parameters()).device
        self._fast = fast_generator(generator)

    def __call__(self, latents: Float32, labels: Int64 | None = None) -> UInt8:
        """(n, dim) latents, n ≥ 1, and (n,) labels where the net has classes → uint8 (n, h, w, c).

        Raises:
            FloatingPointError: Some of the pixels are not numbers.
        """
        finite = []

        def levels(rows: Tensor, labels: Tensor | None) -> Tensor:
            pixels = self._fast(rows, labels)
            finite.append(pixels.isfinite().all())
            return grey_levels(pixels)

        with _as_served():
            tiles = Tiles(levels, [REFERENCE_TILE])
            images = tiles(torch.from_numpy(latents).to(self._device), _on(self._device, labels))
            if not torch.stack(finite).all():
                raise FloatingPointError("some of the generator's pixels are not numbers")
            array: UInt8 = images.cpu().numpy()
            return array


def logits_of(discriminator: Discriminator, images: UInt8, labels: Int64 | None = None) -> Float32:
    """D's logits (n,) of uint8 images (n, h, w, c), n ≥ 1, with (n,) labels where the net has classes."""
    device = next(discriminator.parameters()).device
    fast = fast_discriminator(discriminator)

    def logits(levels: Tensor, labels: Tensor | None) -> Tensor:
        return fast(unit_levels(levels), labels)[:, 0]

    with _as_served():
        tiles = Tiles(logits, [REFERENCE_TILE])
        array: Float32 = tiles(torch.tensor(images, device=device), _on(device, labels)).cpu().numpy()
        return array


def codes_of(encoder: Encoder, images: UInt8) -> tuple[Float32, Int64 | None]:
    """Where uint8 images (n, h, w, c), n ≥ 1, lie in latent space: (n, dim), and (n,) labels where E finds classes."""
    device = next(encoder.parameters()).device
    fast = fast_encoder(encoder)
    with _as_served():
        tiles = Tiles(lambda levels, _: fast(unit_levels(levels)), [REFERENCE_TILE])
        codes: Float32 = tiles(torch.tensor(images, device=device)).cpu().numpy()
    latents: Float32 = codes[:, : encoder.dim].copy()
    return latents, codes[:, encoder.dim :].argmax(axis=1) if encoder.classes else None


def logits_beside(
    discriminator: Discriminator, latent: LatentSpec, real: UInt8, labels: Int64 | None, generated: UInt8
) -> tuple[Tensor, Tensor]:
    """What the service says of real images with these labels, and of generated ones: the first of seed 0, with theirs.

    Labels are left out for nets without classes.
    """
    asked = sampled_labels(latent, 0, 0, len(generated))
    of_real = logits_of(discriminator, real, None if asked is None else labels)
    return torch.from_numpy(of_real), torch.from_numpy(logits_of(discriminator, generated, asked))


def _on(device: torch.device, labels: Int64 | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels).to(device)


@contextmanager
def _as_served() -> Iterator[None]:
    """One thread, and on a GPU no tf32: a sum that threads share, or of rounded numbers, has other last bits.

    And no gradients.
    """
    threads, has_tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = has_tf32
