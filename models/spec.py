"""Describes a network and a training run: frozen, checked data that a manifest or an options file can hold.

Nothing here computes. A network is rebuilt from its `NetworkSpec` and image, latent and label facts alone;
a training run is repeated from its `TrainingOptions`. Presets are rows of a table at the end.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Spec(BaseModel):
    """Base of everything that is written into a manifest: unknown fields and lax types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Width = Annotated[int, Field(ge=1, le=65536)]  # numbers in one layer; bounded, so that no manifest overflows a shape


class ImageSpec(Spec):
    """Shape of one image. Inside the nets pixels are float32 in [0, 1], (n, channels, height, width)."""

    channels: Literal[1, 3]
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

    `sampler` names the algorithm from (seed, index) to these numbers; see models/sampler.py. A changed algorithm
    gets a new name, so that a bundle's seeds mean the same images for ever. `label_frequencies` are the training
    data's, in the order of the labels: what a conditional net's labels are drawn from where a request names none.
    """

    dim: Width
    distribution: Literal["normal", "uniform"]  # uniform on (−√3, √3)
    sampler: Sampler = "philox4x64-10/1"
    label_frequencies: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None


class MLPGeneratorSpec(Spec):
    """z → ReLU layers → sigmoid pixels. The paper: hidden 1200, 1200."""

    hidden: tuple[Width, ...] = Field(min_length=1, max_length=16)


class MaxoutDiscriminatorSpec(Spec):
    """x → maxout layers (Goodfellow et al. 2013) → one logit. The paper: units 240, 240 with 5 pieces each.

    Dropout keeps an input of the first layer with probability `keep_input`, an input of any later layer with
    `keep_hidden`, and divides what it keeps by that probability.
    """

    units: tuple[Width, ...] = Field(min_length=1, max_length=16)
    pieces: int = Field(ge=1, le=64)
    keep_input: float = Field(0.8, gt=0, le=1)
    keep_hidden: float = Field(0.5, gt=0, le=1)


class NetworkSpec(Spec):
    """Both nets of a bundle. With labels, both take the label as a one-hot vector beside their input."""

    family: Literal["mlp"]
    generator: MLPGeneratorSpec
    discriminator: MaxoutDiscriminatorSpec


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
    """Adam (Kingma & Ba 2015)."""

    kind: Literal["adam"] = "adam"
    lr: float = Field(gt=0)
    beta1: float = Field(0.5, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)


class TrainingOptions(Spec):
    """Everything that decides what a run computes. Two runs with equal options and data compute the same.

    Attributes:
        conditional: Both nets see the label; the data must have labels.
        update: `alternating` is the paper's Algorithm 1: `d_steps` updates of D, each with its own noise and data,
            then one of G with fresh noise. `simultaneous` is the published code: one mini-batch of noise and data,
            both gradients from the same forward pass, both nets updated together (`d_steps` is 1).
        d_steps: Algorithm 1's k.
        generator_loss: What G minimises: `nonsaturating` −log D(G(z)), `saturating` log(1 − D(G(z))).
        d_loss_scale: Factor on D's loss; the published code has 0.5, the paper 1.
        batch_size: Algorithm 1's m: as many noise samples and as many images in every mini-batch.
        generator_init, discriminator_init: Weights start uniform in ±this.
        output_bias_from_data: G's last bias starts at the logit of each pixel's mean over the training images.
        ema_half_life_images: Generated images after which a weight's share in the average of G's weights has
            halved; 0 keeps no average. The bundle gets the average where there is one.
        score_every: Steps between two scores on the validation images; the bundle gets the weights that scored best.
        selection: What that score is: `parzen`, the log-likelihood of the Parzen window, or `frechet`, the Fréchet
            distance in the features of a classifier of the data's labels (untrained where there are none).
    """

    preset: str
    network: NetworkSpec
    latent: LatentSpec
    conditional: bool = False
    seed: int = Field(0, ge=0, lt=2**53)
    steps: int = Field(ge=1)  # generator updates
    batch_size: int = Field(100, ge=1)
    update: Literal["alternating", "simultaneous"]
    d_steps: int = Field(1, ge=1)
    generator_loss: Literal["nonsaturating", "saturating"]
    d_loss_scale: float = Field(1.0, gt=0)
    generator_optimiser: SGDSpec | AdamSpec = Field(discriminator="kind")
    discriminator_optimiser: SGDSpec | AdamSpec = Field(discriminator="kind")
    generator_init: float = Field(0.05, gt=0)
    discriminator_init: float = Field(0.005, gt=0)
    output_bias_from_data: bool = True
    ema_half_life_images: int = Field(0, ge=0)
    score_every: int = Field(2_500, ge=1)
    selection: Literal["parzen", "frechet"] = "parzen"

    @model_validator(mode="after")
    def _one_pass_has_one_discriminator_step(self) -> "TrainingOptions":
        if self.update == "simultaneous" and self.d_steps != 1:
            raise ValueError("d_steps counts the discriminator's turns of the alternating update; simultaneous has one")
        return self


_PAPER_NETWORK = NetworkSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(1200, 1200)),
    discriminator=MaxoutDiscriminatorSpec(units=(240, 240), pieces=5),
)
_PAPER_SGD = SGDSpec(lr=0.1, decay=1.000004, min_lr=1e-6, momentum=0.5, final_momentum=0.7, momentum_epochs=250)

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
}
