"""E, the net that goes the other way than G: from an image to the latent that G makes it from."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.networks.families import SLOPE
from models.spec import EncoderSpec, ImageSpec, LatentSpec, NetworkSpec

SMALL_SIDE = 7  # pixels: what the hidden layer sees is no larger


class Encoder(nn.Module):
    """Convolutions that halve the sides, a hidden layer, and a linear one; for images of any shape.

    Of a generator with classes it also finds the class, so that it needs nobody to name it.
    """

    def __init__(self, spec: EncoderSpec, image: ImageSpec, latent_dim: int, classes: int) -> None:
        super().__init__()
        self.dim, self.classes = latent_dim, classes
        channels, height, width = image.shape
        made = spec.width
        self.steps = nn.ModuleList()
        while not self.steps or max(height, width) > SMALL_SIDE:
            self.steps.append(nn.Conv2d(channels, made, 3, stride=2, padding=1))
            height, width = (height + 1) // 2, (width + 1) // 2
            channels, made = made, min(2 * made, 4 * spec.width)
        self.hidden = nn.Linear(channels * height * width, spec.hidden)
        self.output = nn.Linear(spec.hidden, latent_dim + classes)
        self.largest = spec.width * ((image.height + 1) // 2) * ((image.width + 1) // 2)  # numbers in a value of a row

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) pixels in [0, 1] → (n, dim + classes): latents, and beside them the classes' scores."""
        x = images
        for step in self.steps:
            x = F.leaky_relu(step(x), SLOPE)
        codes: Tensor = self.output(F.leaky_relu(self.hidden(x.flatten(1)), SLOPE))
        return codes


def build_encoder(network: NetworkSpec, image: ImageSpec, latent: LatentSpec, classes: int = 0) -> Encoder | None:
    """The encoder that goes with the nets, on the meta device as they are; None where there is none."""
    if network.encoder is None:
        return None
    with torch.device("meta"):
        return Encoder(network.encoder, image, latent.dim, classes)
