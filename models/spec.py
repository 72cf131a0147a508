"""Describes a network and a training run: frozen, checked data that a manifest or an options file can hold.

No network is computed here. It is rebuilt from its `NetworkSpec`, its image and latent and the number of labels alone;
a training run is repeated from its `TrainingOptions`. Presets are rows of a table at the end.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator


class Spec(BaseModel):
    """Base of everything that is written into a manifest: unknown fields and lax types are refused.

    A sequence of any length is read with `fail_fast`: to collect every error of a hostile one would take seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Width = Annotated[int, Field(ge=1, le=65536)]  # numbers in a layer; bounded, so that no manifest's shapes overflow


class ImageSpec(Spec):
    """Shape of one image. Inside the nets pixels are float32 in [0, 1], (n, channels, height, width)."""

    channels: Literal[1, 3, 4]  # grey, RGB, RGBA
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.height, self.width

    @property
    def size(self) -> int:
        """Numbers in one image."""
        return self.channels * self.height * self.width


Sampler = Literal["philox4x64-10/1"]


class LatentSpec(Spec):
    """The noise z that G turns into an image: `dim` independent numbers of mean 0 and variance 1.

    `sampler` names the algorithm from (seed, index) to these numbers; see inference/noise.py. A changed algorithm
    gets a new name, so that a bundle's seeds go on meaning the same images. `label_frequencies` are the training
    data's, in the order of the labels: what a conditional net's labels are drawn from where a request names none.
    `noise` are more numbers for each image, of the same distribution, which the net takes beside z; no truncation
    changes them.
    """

    dim: Width
    noise: int = Field(0, ge=0, le=2**24)
    distribution: Literal["normal", "uniform"]  # uniform on (−√3, √3)
    sampler: Sampler = "philox4x64-10/1"
    label_frequencies: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(None, fail_fast=True)


class MLPGeneratorSpec(Spec):
    """z → ReLU layers → sigmoid pixels. The paper: hidden 1200, 1200."""

    hidden: tuple[Width, ...] = Field(min_length=1, max_length=16, fail_fast=True)


class MaxoutDiscriminatorSpec(Spec):
    """x → maxout layers (Goodfellow et al. 2013) → one logit. The paper: units 240, 240 with 5 pieces each.

    Dropout keeps an input of the first layer with probability `keep_input`, an input of any later layer with
    `keep_hidden`, and divides what it keeps by that probability.
    """

    units: tuple[Width, ...] = Field(min_length=1, max_length=16, fail_fast=True)
    pieces: int = Field(ge=1, le=64)
    keep_input: float = Field(0.8, gt=0, le=1)
    keep_hidden: float = Field(0.5, gt=0, le=1)


class EncoderSpec(Spec):
    """x → 3×3 convolutions, each halving the sides, down to 7 or less → a hidden layer → z; with labels, their scores.

    The first has `width` channels, and each other one twice its neighbour's, up to four times as many.
    """

    width: Width
    hidden: Width


class NetsSpec(Spec):
    """Base of the families: a net that finds an image's latent may go with the nets of each."""

    encoder: EncoderSpec | None = None

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_there(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an encoder the JSON is that of before there were any, and so is a bundle's version."""
        whole: dict[str, Any] = serialise(self)
        if self.encoder is None:
            whole.pop("encoder", None)
        return whole


class MLPSpec(NetsSpec):
    """The paper's nets. With labels, both take the label as a one-hot vector beside their input."""

    family: Literal["mlp"]
    generator: MLPGeneratorSpec
    discriminator: MaxoutDiscriminatorSpec


class ResidualSpec(Spec):
    """Stages of residual blocks without normalisation (R3GAN: Huang et al. 2024, §3), one stage for each image size.

    The stage of the smallest size has `width` channels, and each larger one half of its neighbour's, but never fewer
    than `narrowest`. A block is 1×1, 3×3 and 1×1 convolutions, `expansion` times as wide inside; the 3×3 one mixes
    `group` channels with one another.
    """

    width: Width
    narrowest: Width
    blocks: int = Field(ge=1, le=16)  # in each stage
    expansion: int = Field(2, ge=1, le=8)
    group: Width = 16

    @model_validator(mode="after")
    def _groups_fit(self) -> "ResidualSpec":
        if self.narrowest > self.width:
            raise ValueError("narrowest is more than width")
        if any(channels * self.expansion % self.group for channels in self.channels(16)):
            raise ValueError("a stage's channels times expansion must be a multiple of group")
        return self

    def channels(self, stages: int) -> tuple[int, ...]:
        """Channels of this many stages, from the smallest size to the largest."""
        return tuple(max(self.width >> stage, self.narrowest) for stage in range(stages))


class ConvGeneratorSpec(ResidualSpec):
    """z, and with labels an embedding of `embedding` numbers beside it → residual stages, growing → sigmoid pixels."""

    embedding: Width = 32


class ConvDiscriminatorSpec(ResidualSpec):
    """x → residual stages, shrinking → features → one logit; with labels by projection (Miyato & Koyama 2018)."""


class ConvSpec(NetsSpec):
    """Convolutional nets for square images of 16 to 128 pixels a side."""

    family: Literal["conv"]
    generator: ConvGeneratorSpec
    discriminator: ConvDiscriminatorSpec


ValueName = Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]{0,127}$")]  # of a value in a graph
Attribute = int | float | str | tuple[int, ...] | tuple[float, ...]
MAX_GRAPH_SIDE = 1024  # pixels of an image's side


class GraphInput(Spec):
    """What a graph is fed for each row, and its shape without the rows.

    `latent` is z; `label` a class's number, `onehot` the same as a vector of the classes' length; `noise` are more
    numbers of the latent's kind, from a stream of their own, that no truncation changes; `image` are the pixels that a
    discriminator judges.
    """

    name: ValueName
    role: Literal["latent", "label", "onehot", "noise", "image"]
    shape: tuple[Width, ...] = Field(max_length=4, fail_fast=True)


class GraphNode(Spec):
    """One operator of models/networks/operators.py, with the names of the values that it reads and of its result.

    `name` is what the node was called where it comes from.
    """

    op: str = Field(pattern="^[A-Za-z0-9]{1,32}$")
    name: str = Field("", max_length=200)
    inputs: tuple[ValueName, ...] = Field((), max_length=64, fail_fast=True)
    attributes: dict[str, Attribute] = Field(default_factory=dict, max_length=16)
    output: ValueName


class GraphBody(Spec):
    """A net as the operators that it consists of, in the order in which they run. The last one's result is the net's.

    `weights` are the tensors of its file, with their shapes.
    """

    inputs: tuple[GraphInput, ...] = Field(min_length=1, max_length=64, fail_fast=True)
    weights: dict[ValueName, Annotated[tuple[Width, ...], Field(max_length=6)]] = Field(max_length=4096)
    nodes: tuple[GraphNode, ...] = Field(min_length=1, max_length=4096, fail_fast=True)


class GraphSpec(NetsSpec, GraphBody):
    """A generator that was trained elsewhere, (latents, labels) → pixels in [0, 1]; perhaps with its discriminator."""

    family: Literal["graph"]
    discriminator: GraphBody | None = None


TrainedSpec = Annotated[MLPSpec | ConvSpec, Field(discriminator="family")]  # both nets of a run
NetworkSpec = Annotated[MLPSpec | ConvSpec | GraphSpec, Field(discriminator="family")]  # the nets of a bundle


def stage_sizes(size: int) -> tuple[int, ...]:
    """Sides of a convolutional net's stages for square images of this side, rising: halved, rounded up, down to 4 to 7.

    28 has 7, 14, 28; 32 has 4, 8, 16, 32; 100 has 7, 13, 25, 50, 100.
    """
    sizes = [size]
    while sizes[0] > 7:
        sizes.insert(0, (sizes[0] + 1) // 2)
    return tuple(sizes)


def check_image(network: NetworkSpec, image: ImageSpec) -> None:
    """See that nets of this family can make such images.

    Raises:
        ValueError: They can't.
    """
    if isinstance(network, ConvSpec) and not (image.height == image.width and 16 <= image.height <= 128):
        raise ValueError(
            f"convolutional nets are for square images of 16 to 128 pixels a side, not {image.width}×{image.height}"
        )
    if isinstance(network, GraphSpec):
        if max(image.height, image.width) > MAX_GRAPH_SIDE:
            raise ValueError(f"graphs are for images of up to {MAX_GRAPH_SIDE} pixels a side")
    elif image.channels == 4:
        raise ValueError("only graphs make images with an alpha channel")


class Calibration(Spec):
    """Makes D's logit a probability: σ(scale·logit + offset), for equally many real and generated images."""

    scale: float = Field(gt=0)
    offset: float
    auc: float = Field(ge=0, le=1)
    expected_calibration_error: float = Field(ge=0, le=1)


class SGDSpec(Spec):
    """Stochastic gradient descent with classical momentum and the paper's two schedules.

    The learning rate is divided by `decay` after every step of a run and never falls under `min_lr`. Momentum rises
    linearly from `momentum` to `final_momentum` over the first `momentum_epochs` epochs, once an epoch.
    """

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0)
    decay: float = Field(1.0, ge=1)
    min_lr: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    final_momentum: float = Field(0.0, ge=0, lt=1)
    momentum_epochs: int = Field(0, ge=0)


class AdamSpec(Spec):
    """Adam (Kingma & Ba 2015). With finals, rate and beta2 move there over the options' `burn_in_images`."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(gt=0)
    beta1: float = Field(0.5, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    final_lr: float | None = Field(None, gt=0)
    final_beta2: float | None = Field(None, ge=0, lt=1)


def half_cosine(share: float) -> float:
    """From 1 to 0 along half a cosine, while the share goes from 0 to 1."""
    return (1 + math.cos(math.pi * share)) / 2


class PenaltySpec(Spec):
    """R1 and R2, zero-centred gradient penalties on real and on generated images (Mescheder et al. 2018, eq. 9, 10).

    Each adds γ/2·E‖∇D‖² to D's loss, the gradient of the logit by pixels in [0, 1]. Gamma moves from `gamma` to
    `final_gamma` over the options' `burn_in_images`. With `every` above 1 they are added in every so many updates of D
    and weigh as much more (lazy regularisation, Karras et al. 2020).
    """

    gamma: float = Field(gt=0)
    final_gamma: float | None = Field(None, gt=0)
    r1: bool = True
    r2: bool = True
    every: int = Field(1, ge=1)


AugmentName = Literal["none", "flip", "diffaugment", "ada"]
GameName = Literal["nonsaturating", "saturating", "hinge", "relativistic"]


class TrainingOptions(Spec):
    """Everything that decides what a run computes. Two runs with equal options and data compute the same.

    Attributes:
        conditional: Both nets see the label; the data must have labels.
        update: `alternating` is the paper's Algorithm 1: `d_steps` updates of D, each with its own noise and data,
            then one of G with fresh noise. `simultaneous` is the published code: one mini-batch of noise and data,
            both gradients from the same forward pass, both nets updated together (`d_steps` is 1).
        d_steps: Algorithm 1's k.
        generator_loss: What G minimises, and D with it: `nonsaturating` −log D(G(z)), `saturating` log(1 − D(G(z))),
            both with the logistic loss of D; `hinge`; `relativistic`. See models/training/losses.py.
        d_loss_scale: Factor on D's loss; the published code has 0.5, the paper 1.
        penalty: Gradient penalties on D; alternating updates only.
        class_loss: Factor on the class head's cross-entropy on real images, from which D's features learn too.
            With 0 only the head learns from it. Without labels there is no head.
        precision: Of the convolutions and matrix products in training; weights, losses and scores are float32.
        batch_size: Algorithm 1's m: as many noise samples and as many images in every mini-batch.
        generator_init, discriminator_init: The perceptrons' weights start uniform in ±this.
        output_bias_from_data: G's last bias starts at the logit of each pixel's mean over the training images, of
            each channel's for convolutional nets.
        burn_in_images: Real images over which rates, betas and gammas move to their finals, along half a cosine.
        ema_half_life_images: Generated images after which a weight's share in the average of G's weights has
            halved; 0 keeps no average. If there is one, the bundle gets it.
        score_every: Steps between two scores on the validation images; the bundle gets the weights that scored best.
        selection: What that score is: `parzen`, the log-likelihood of the Parzen window, or `frechet`, the Fréchet
            distance in the features of a classifier of the data's labels (untrained where there are none).
        init: The bundle whose weights the run begins with, as name@version; None for random ones.
        augment: How images are changed before D sees them. See models/training/augmentation.py.
    """

    preset: str
    network: TrainedSpec
    latent: LatentSpec
    conditional: bool = False
    seed: int = Field(0, ge=0, lt=2**53)
    steps: int = Field(ge=1)  # generator updates
    batch_size: int = Field(100, ge=1)
    update: Literal["alternating", "simultaneous"]
    d_steps: int = Field(1, ge=1)
    generator_loss: GameName
    d_loss_scale: float = Field(1.0, gt=0)
    penalty: PenaltySpec | None = None
    class_loss: float = Field(0.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    generator_optimiser: SGDSpec | AdamSpec = Field(discriminator="kind")
    discriminator_optimiser: SGDSpec | AdamSpec = Field(discriminator="kind")
    generator_init: float = Field(0.05, gt=0)
    discriminator_init: float = Field(0.005, gt=0)
    output_bias_from_data: bool = True
    burn_in_images: int = Field(0, ge=0)
    ema_half_life_images: int = Field(0, ge=0)
    score_every: int = Field(2_500, ge=1)
    selection: Literal["parzen", "frechet"] = "parzen"
    init: str | None = None
    augment: AugmentName = "none"

    @model_validator(mode="after")
    def _one_pass_has_one_discriminator_step(self) -> "TrainingOptions":
        if self.update == "simultaneous" and self.d_steps != 1:
            raise ValueError("d_steps counts the discriminator's turns of the alternating update; simultaneous has one")
        if self.update == "simultaneous" and self.penalty is not None:
            raise ValueError("gradient penalties go with the alternating update")
        return self


_PAPER_NETWORK = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(1200, 1200)),
    discriminator=MaxoutDiscriminatorSpec(units=(240, 240), pieces=5),
)
_PAPER_SGD = SGDSpec(lr=0.1, decay=1.000004, min_lr=1e-6, momentum=0.5, final_momentum=0.7, momentum_epochs=250)

# Small enough for two CPU cores: 0.4 M numbers, and few channels where the images are large.
_CONV_NETWORK = ConvSpec(
    family="conv",
    generator=ConvGeneratorSpec(width=64, narrowest=16, blocks=1),
    discriminator=ConvDiscriminatorSpec(width=64, narrowest=16, blocks=1),
)
_CONV_ADAM = AdamSpec(lr=1e-3, final_lr=1e-4, beta1=0.0, beta2=0.99)
_CONV_LOSSES: tuple[tuple[str, GameName, PenaltySpec], ...] = (
    # The classic: the paper's own loss, whose D is kept smooth around real images. The first to try.
    ("conv-ns", "nonsaturating", PenaltySpec(gamma=0.25, r2=False, every=4)),
    # D stops learning from images that it judges right by a margin; what large GANs of 2018 to 2022 were trained with.
    ("conv-hinge", "hinge", PenaltySpec(gamma=0.25, r2=False, every=4)),
    # R3GAN: D judges pairs, which leaves no classes of images out, and is smooth around generated images too.
    ("conv-r3", "relativistic", PenaltySpec(gamma=0.25, every=4)),
)

PRESETS: dict[str, TrainingOptions] = {
    # The nets, losses and schedules of the code published with the paper, whose update is simultaneous.
    "mlp-paper": TrainingOptions(
        preset="mlp-paper",
        network=_PAPER_NETWORK,
        latent=LatentSpec(dim=100, distribution="uniform"),
        steps=25_000,  # 50 epochs of 50,000 images; the published run had no end
        update="simultaneous",
        generator_loss="nonsaturating",
        d_loss_scale=0.5,
        generator_optimiser=_PAPER_SGD,
        discriminator_optimiser=_PAPER_SGD,
    ),
    # The same nets with Adam, Algorithm 1's turns and an average of G's weights: as far in 10 epochs of MNIST as
    # mlp-paper in 120. D learns at a quarter of G's rate; at equal rates it wins, and G makes nothing but ones.
    "mlp-adam": TrainingOptions(
        preset="mlp-adam",
        network=_PAPER_NETWORK,
        latent=LatentSpec(dim=100, distribution="normal"),
        steps=25_000,
        update="alternating",
        generator_loss="nonsaturating",
        generator_optimiser=AdamSpec(lr=4e-4),
        discriminator_optimiser=AdamSpec(lr=1e-4),
        ema_half_life_images=20_000,
        discriminator_init=0.02,
    ),
    **{
        preset: TrainingOptions(
            preset=preset,
            network=_CONV_NETWORK,
            latent=LatentSpec(dim=64, distribution="normal"),
            conditional=True,
            steps=10_000,
            batch_size=64,
            update="alternating",
            generator_loss=loss,
            penalty=penalty,
            class_loss=1.0,
            precision="bfloat16",
            generator_optimiser=_CONV_ADAM,
            discriminator_optimiser=_CONV_ADAM,
            burn_in_images=640_000,
            ema_half_life_images=30_000,
            selection="frechet",
        )
        for preset, loss, penalty in _CONV_LOSSES
    },
}


class RegressionOptions(Spec):
    """Everything that decides what training an encoder for a bundle computes.

    Attributes:
        encoder: The net.
        seed, steps, batch_size: Of its training. Images are drawn anew for every step.
        image_loss: Factor on the mean squared difference between an image and what G makes of its latent, beside that
            between latents, which is of the order of 1.
        optimiser: Its rate moves to the final one over all steps, along half a cosine.
    """

    preset: str
    encoder: EncoderSpec
    seed: int = Field(0, ge=0, lt=2**53)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    image_loss: float = Field(ge=0)
    optimiser: AdamSpec


# Of its own: it trains neither G nor D, but E for a bundle that has both.
LATENT_REGRESSOR = RegressionOptions(
    preset="latent-regressor",
    encoder=EncoderSpec(width=32, hidden=512),
    steps=5_000,
    batch_size=128,
    image_loss=10.0,
    optimiser=AdamSpec(lr=1e-3, final_lr=1e-5, beta1=0.9),
)
