"""Builds both nets of a bundle from what its manifest says of them."""

from typing import overload

import torch

from models.networks.families import ConvDiscriminator, ConvGenerator, MaxoutDiscriminator, MLPGenerator
from models.networks.graph import GraphDiscriminator, GraphGenerator
from models.spec import ConvSpec, GraphSpec, ImageSpec, LatentSpec, MLPSpec, NetworkSpec, check_image

TrainedGenerator = MLPGenerator | ConvGenerator  # here
TrainedDiscriminator = MaxoutDiscriminator | ConvDiscriminator
Generator = TrainedGenerator | GraphGenerator
Discriminator = TrainedDiscriminator | GraphDiscriminator


@overload
def build_networks(
    network: MLPSpec | ConvSpec, image: ImageSpec, latent: LatentSpec, classes: int = 0
) -> tuple[TrainedGenerator, TrainedDiscriminator]: ...


@overload
def build_networks(
    network: NetworkSpec, image: ImageSpec, latent: LatentSpec, classes: int = 0
) -> tuple[Generator, Discriminator | None]: ...


def build_networks(
    network: NetworkSpec, image: ImageSpec, latent: LatentSpec, classes: int = 0
) -> tuple[Generator, Discriminator | None]:
    """The nets that the specs describe, on the meta device: they have shapes, and the caller's numbers later.

    `classes` is the number of labels, 0 for nets without. Only a graph may be without a discriminator.

    Raises:
        ValueError: The family can't make such images, or the graph is none that can be run.
    """
    check_image(network, image)
    with torch.device("meta"):
        if isinstance(network, MLPSpec):
            return (
                MLPGenerator(network.generator, image, latent.dim, classes),
                MaxoutDiscriminator(network.discriminator, image, classes),
            )
        if isinstance(network, GraphSpec):
            judge = network.discriminator
            return (
                GraphGenerator(network, image, latent, classes),
                None if judge is None else GraphDiscriminator(judge, image, classes),
            )
        return (
            ConvGenerator(network.generator, image, latent.dim, classes),
            ConvDiscriminator(network.discriminator, image, classes),
        )
