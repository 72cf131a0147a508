"""One training step, in the order of the maths; the state that it moves, which saves and resumes; the loop around it.

Every random number of a run is a function of (seed, step): each step seeds its generator anew, the order of the images
is a permutation for each (seed, epoch), and scoring has random streams of its own. So a checkpoint needs no generator's
state, and a resumed run computes the same bits as an uninterrupted one.

The two kinds of updates differ as the paper and its published code do:

- `alternating`, Algorithm 1: k times, m noise samples, m images and a step down D's loss; then m fresh noise samples
  and a step down G's loss, through the D that has just moved.
- `simultaneous`, the published code: one mini-batch of noise and images, one forward pass with one set of dropout
  masks, both gradients from it, then both nets move at once. G's gradient sees D before its update and the same noise.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.data.load import Dataset
from models.evaluation.metric_suite import FrechetOnValidation, rows_wanted
from models.inference.noise import sampled_labels
from models.networks import (
    Dropout,
    MLPGenerator,
    TrainedDiscriminator,
    TrainedGenerator,
    build_networks,
    drop,
    fill_fixup,
    fill_uniform,
)
from models.spec import AdamSpec, ImageSpec, LatentSpec, SGDSpec, TrainingOptions, half_cosine
from models.training.augmentation import Augmentation
from models.training.losses import LOSSES, gradient_penalty
from models.training.torchrun.ranks import Alone

Optimiser = torch.optim.SGD | torch.optim.Adam


class TrainingError(RuntimeError):
    """The run cannot go on, and the message says why. The last checkpoint is still good."""


class DivergedError(TrainingError):
    """A loss or a weight is no longer a finite number."""


@dataclass
class Report:
    """Means over the steps since the last report. `d_real` and `d_fake` are of σ(logit), with dropout as in training.

    `seconds` is the time of the whole run, with scoring and saving; `images_per_s` counts real images while training.
    """

    step: int
    seconds: float
    d_loss: float
    g_loss: float
    d_real: float
    d_fake: float
    images_per_s: float


@dataclass(frozen=True)
class Selection:
    """A rule by which a run chooses the weights that it publishes. It looks at validation images only."""

    rule: str
    short: str  # format of the score in one line
    higher_is_better: bool

    def prefers(self, new: float, old: float) -> bool:
        """Whether a new score is better than an old one. NaN never is."""
        return new > old if self.higher_is_better else new < old

    @property
    def worst(self) -> float:
        """A score that every other one beats."""
        return -math.inf if self.higher_is_better else math.inf


SELECTIONS = {
    "parzen": Selection(
        "highest validation Parzen log-likelihood", "log-likelihood {:.1f} nats", higher_is_better=True
    ),
    "frechet": Selection("lowest validation Fréchet distance", "Fréchet distance {:.3g}", higher_is_better=False),
}


@dataclass
class Best:
    """The weights with the best score on the validation images so far, which the bundle will hold."""

    step: int = 0
    score: float = math.nan
    metadata: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Tensor] = field(default_factory=dict)
    discriminator: dict[str, Tensor] = field(default_factory=dict)


class State:
    """All that a run has computed so far: both nets, G's average, both optimisers, the step, and the best weights.

    Raises:
        TrainingError: The options need labels or more images than the data has, the nets can't make such images, or
            the ranks can't share a mini-batch.
    """

    def __init__(
        self, options: TrainingOptions, dataset: Dataset, device: torch.device, ranks: Alone | None = None
    ) -> None:
        self.ranks = ranks or Alone()
        if options.batch_size % self.ranks.size:
            raise TrainingError(
                f"{self.ranks.size} processes can't share mini-batches of {options.batch_size} images: "
                "--batch-size takes a multiple"
            )
        self.options = options
        self.device = device
        self.step = 0
        self.seconds = 0.0
        self.selection = SELECTIONS[options.selection]
        self.best = Best(score=self.selection.worst)
        self.scored_step = 0  # the last one whose weights were scored
        self.frechet: FrechetOnValidation | None = None  # built at the first score
        self.data = DeviceDataset(dataset, options, device)
        self.augmentation = Augmentation(options.augment, device)
        self.image = image_spec(dataset)
        self.classes = len(dataset.label_names or ()) if options.conditional else 0
        if options.selection == "frechet" and min(rows_wanted(dataset), len(dataset.validation.images)) < 2:
            raise TrainingError(
                f"{dataset.name} is too small for the Fréchet distance: 20 images are the least; "
                "--selection parzen takes fewer"
            )
        self.generator, self.discriminator = self.empty_nets()
        self.average = (
            self.empty_nets()[0].requires_grad_(requires_grad=False) if options.ema_half_life_images else None
        )
        initialise(self.generator, self.discriminator, options, self.data.mean_image())
        if self.average is not None:
            self.average.load_state_dict(self.generator.state_dict())
        self.g_optimiser = _optimiser(self.generator, options.generator_optimiser)
        self.d_optimiser = _optimiser(self.discriminator, options.discriminator_optimiser)

    def empty_nets(self) -> tuple[TrainedGenerator, TrainedDiscriminator]:
        """Both nets for the options and data, with uninitialised weights."""
        try:
            nets = build_networks(self.options.network, self.image, self.options.latent, self.classes)
        except ValueError as error:
            raise TrainingError(f"{error}: --image-size S makes them so, and the mlp presets take any") from None
        for net in nets:
            net.to_empty(device=self.device)
        return nets

    @property
    def latent(self) -> LatentSpec:
        """The options' latent, with the training data's label frequencies where the nets see labels."""
        frequencies = self.data.label_frequencies(self.classes)
        return self.options.latent.model_copy(update={"label_frequencies": frequencies})

    @property
    def ema_generator(self) -> TrainedGenerator:
        """The generator that is scored and published: the moving average, if one is kept."""
        return self.generator if self.average is None else self.average

    @property
    def is_score_due(self) -> bool:
        """Whether these weights are still to be scored: at multiples of `score_every`, and at the end."""
        options = self.options
        return self.step > self.scored_step and (self.step % options.score_every == 0 or self.step >= options.steps)

    def sample_labels(self, count: int) -> Tensor | None:
        """Labels of images 0 … count − 1 of seed 0, as frequent as in the training data; None for nets without."""
        labels = sampled_labels(self.latent, 0, 0, count)
        return None if labels is None else torch.from_numpy(labels)

    def is_finite(self) -> bool:
        """Whether every weight of both nets is finite. The last loss cannot tell, as the last update came after it."""
        # If one weight is not finite, an extreme is not either; isfinite() on all weights would copy them.
        nets = self.generator, self.discriminator
        extremes = [extreme for net in nets for p in net.parameters() for extreme in torch.aminmax(p.detach())]
        return bool(torch.stack(extremes).isfinite().all())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, by a flat name."""
        named = {
            **_prefixed("generator", self.generator.state_dict()),
            **_prefixed("discriminator", self.discriminator.state_dict()),
            **_prefixed("best.generator", self.best.generator),
            **_prefixed("best.discriminator", self.best.discriminator),
            **_prefixed("augmentation", self.augmentation.tensors()),
        }
        if self.average is not None:
            named |= _prefixed("average", self.average.state_dict())
        for name, optimiser in (("g_optimiser", self.g_optimiser), ("d_optimiser", self.d_optimiser)):
            for index, slots in optimiser.state_dict()["state"].items():
                tensors = {f"{index}.{slot}": value for slot, value in slots.items() if value is not None}
                named |= _prefixed(name, tensors)
        return named

    def metadata(self) -> dict[str, Any]:
        """The state's numbers that are not tensors."""
        best = self.best
        return {"step": self.step, "seconds": self.seconds, "scored_step": self.scored_step, "best_step": best.step,
                "best_score": best.score, "best_facts": best.metadata}  # fmt: skip

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Restore a saved state.

        Raises:
            TrainingError: The nets or the kinds of optimisers are not those of the saved run.
        """
        if reason := self.misfit(tensors):
            raise TrainingError(f"the checkpoint does not fit these options: {reason}")
        try:
            self._load(tensors, metadata)
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise TrainingError(f"the checkpoint does not fit these options: {reason[:300]}") from None

    def misfit(self, tensors: dict[str, Tensor]) -> str | None:
        """Why a checkpoint's nets are not these nets, in a clause; None where they are."""
        for name, net in (("generator", self.generator), ("discriminator", self.discriminator)):
            here = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
            there = {key: tuple(tensor.shape) for key, tensor in _under(name, tensors).items()}
            for key in sorted(here.keys() | there.keys()):
                if here.get(key) != there.get(key):
                    was, now = (_shape_words(shapes.get(key)) for shapes in (there, here))
                    return (f"its {name} has other shapes, as nets for other classes, images or options have "
                            f"({key} was {was} and would be {now})")  # fmt: skip
        return None

    def _load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.generator.load_state_dict(_under("generator", tensors))
        self.discriminator.load_state_dict(_under("discriminator", tensors))
        if self.average is not None:
            self.average.load_state_dict(_under("average", tensors))
        for name, optimiser in (("g_optimiser", self.g_optimiser), ("d_optimiser", self.d_optimiser)):
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(name, tensors).items():
                index, slot = key.split(".", 1)
                slots.setdefault(int(index), {})[slot] = value
            if any(("exp_avg" in found) != isinstance(optimiser, torch.optim.Adam) for found in slots.values()):
                raise KeyError(f"{name} is of another kind")
            optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
        self.augmentation.load(_under("augmentation", tensors))
        self.step = int(metadata["step"])
        self.seconds = metadata["seconds"]
        self.scored_step = int(metadata.get("scored_step", metadata["best_step"]))  # older checkpoints don't say
        self.best = Best(
            int(metadata["best_step"]),
            metadata["best_score"],
            metadata["best_facts"],
            _under("best.generator", tensors),
            _under("best.discriminator", tensors),
        )


class DeviceDataset:
    """The training images on the device, as uint8, and the order in which a run takes them."""

    def __init__(self, dataset: Dataset, options: TrainingOptions, device: torch.device) -> None:
        self.images = torch.from_numpy(dataset.train.images).to(device).permute(0, 3, 1, 2).contiguous()
        labels = dataset.train.labels if options.conditional else None
        if options.conditional and labels is None:
            raise TrainingError(
                f"preset {options.preset} is class-conditional, and {dataset.name} has no labels: "
                "--unconditional trains without"
            )
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)
        self.seed = options.seed
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def mean_image(self) -> Tensor:
        """Mean of every pixel over the training images, (c, h, w) in [0, 1]."""
        return self.images.to(torch.float64).mean(dim=0).div_(255).to(torch.float32)

    def label_frequencies(self, classes: int) -> tuple[float, ...] | None:
        """Share of each label among the training images; None without labels."""
        if self.labels is None:
            return None
        counts: list[int] = torch.bincount(self.labels, minlength=classes).tolist()
        return tuple(count / len(self.labels) for count in counts)

    def take(self, start: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels start … start + count − 1 of the endless sequence of shuffled epochs."""
        n = len(self.images)
        places = torch.arange(start, start + count)
        epochs = range(start // n, (start + count - 1) // n + 1)
        rows = torch.cat([self._order(epoch)[places[places // n == epoch] % n] for epoch in epochs])
        rows = rows.to(self.images.device)
        pixels = self.images[rows].to(torch.float32).div_(255)
        return pixels, None if self.labels is None else self.labels[rows]

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            rng = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.images), generator=rng)
        return self._orders[epoch]


def image_spec(dataset: Dataset) -> ImageSpec:
    """Shape of a data set's images."""
    _, height, width, channels = dataset.train.images.shape
    return ImageSpec(channels=1 if channels == 1 else 3, height=height, width=width)


def initialise(
    generator: TrainedGenerator, discriminator: TrainedDiscriminator, options: TrainingOptions, mean: Tensor
) -> None:
    """Initialise both nets: perceptrons with weights uniform in ±init, convolutions by Fixup, biases 0.

    With `output_bias_from_data`, G's last bias is the logit of the mean pixel, so that its first images are as bright
    as the data, at every pixel or in every channel.
    """
    rng = torch.Generator().manual_seed(derived_seed(options.seed, "initialise", 0))
    if isinstance(generator, MLPGenerator):
        fill_uniform(generator, options.generator_init, rng)
        fill_uniform(discriminator, options.discriminator_init, rng)
    else:
        fill_fixup(generator, rng)
        fill_fixup(discriminator, rng)
    if options.output_bias_from_data:
        bias = generator.output.get_parameter("bias")
        bias.data.copy_(torch.logit(mean.reshape(len(bias), -1).mean(dim=1), eps=1e-7))


def train_step(state: State) -> Tensor:  # noqa: PLR0915 - it stays whole, in the order of the maths
    """One update of G and those of D that go with it. Returns (d_loss, g_loss, mean D(x), mean D(G(z))).

    On one rank of several, they are those of its rows.
    """
    options, data, m = state.options, state.data, state.options.batch_size
    generator, discriminator, loss = state.generator, state.discriminator, LOSSES[options.generator_loss]
    rng = torch.Generator(state.device).manual_seed(derived_seed(options.seed, "step", state.step))
    dropout = partial(drop, rng=rng, rank=state.ranks.rank, ranks=state.ranks.size)
    augment = partial(state.augmentation, rng=rng, ranks=state.ranks)
    low = torch.autocast(state.device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
    _schedule(state.g_optimiser, options.generator_optimiser, state)
    _schedule(state.d_optimiser, options.discriminator_optimiser, state)

    if options.update == "alternating":
        for turn in range(options.d_steps):
            update = state.step * options.d_steps + turn
            images, labels = data.take(*state.ranks.part(update * m, m))
            images = augment(images)  # before the penalties, which are by the pixels that D sees
            penalty, gamma = options.penalty, penalty_weight(state, update)
            with low:
                with torch.no_grad():
                    fake = augment(generator(_noise(state, rng), labels))
                images.requires_grad_(gamma > 0)
                fake = fake.float().requires_grad_(gamma > 0)
                real_logits, class_loss = _real_logits(state, images, labels, dropout)
                fake_logits = discriminator(fake, labels, dropout).float()
                d_loss = loss.discriminator(real_logits, fake_logits) * options.d_loss_scale
                total = d_loss + class_loss
                if penalty and gamma and penalty.r1:
                    total = total + gamma * gradient_penalty(real_logits, images)
                if penalty and gamma and penalty.r2:
                    total = total + gamma * gradient_penalty(fake_logits, fake)
            _descend(total, discriminator, state.d_optimiser, state.ranks)
            state.augmentation.see(real_logits, fake_logits, state.ranks, paired=loss.paired)
        with low:
            with torch.no_grad():
                rivals = discriminator(images, labels, dropout).float() if loss.paired else real_logits
            fake = augment(generator(_noise(state, rng), labels))
            fake_logits = discriminator(fake, labels, dropout).float()
            g_loss = loss.generator(rivals, fake_logits)
        _descend(g_loss, generator, state.g_optimiser, state.ranks)
    else:
        images, labels = data.take(*state.ranks.part(state.step * m, m))
        images = augment(images)
        with low:
            real_logits, class_loss = _real_logits(state, images, labels, dropout)
            fake = augment(generator(_noise(state, rng), labels))
            fake_logits = discriminator(fake, labels, dropout).float()
            d_loss = loss.discriminator(real_logits, fake_logits) * options.d_loss_scale
            g_loss = loss.generator(real_logits, fake_logits)
        g_gradients = torch.autograd.grad(g_loss, list(generator.parameters()), retain_graph=True)
        d_gradients = torch.autograd.grad(d_loss + class_loss, list(discriminator.parameters()))
        _apply(g_gradients, generator, state.g_optimiser, state.ranks)
        _apply(d_gradients, discriminator, state.d_optimiser, state.ranks)
        state.augmentation.see(real_logits, fake_logits, state.ranks, paired=loss.paired)

    state.step += 1
    if state.average is not None:
        keep = 0.5 ** (m / options.ema_half_life_images)
        average = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        average(list(state.average.parameters()), list(generator.parameters()), state.step)
    with torch.no_grad():
        return torch.stack([d_loss, g_loss, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()])


def train(
    state: State,
    steps: int,
    *,
    report_every: Sequence[int] = (50,),
    stopped: Callable[[], bool] = lambda: False,
    stepped: Callable[[int], None] = lambda _step: None,
) -> Iterator[Report]:
    """Step until `steps` generator updates are done or `stopped()`, and yield a report whenever the caller has work.

    That is at the multiples of each number in `report_every`, at those of `score_every`, and at the end. `stepped` is
    told of every step. Several ranks take the same steps and yield at the same ones, so `stopped` gives all one answer.

    Raises:
        DivergedError: A loss or a weight is no longer a finite number. The leader alone looks.
    """
    sums, counted = torch.zeros(4, device=state.device), 0
    started, seconds_before = time.perf_counter(), state.seconds
    resumed = started
    while state.step < steps:
        sums += train_step(state)
        counted += 1
        stepped(state.step)
        stop = stopped() or state.step == steps
        if not stop and all(state.step % every for every in (*report_every, state.options.score_every)):
            continue
        (means,) = state.ranks.mean([sums / counted])
        d_loss, g_loss, d_real, d_fake = means.tolist()
        if state.ranks.leads and not (math.isfinite(d_loss + g_loss) and state.is_finite()):
            raise DivergedError(f"training diverged by step {state.step}: loss of D {d_loss:.4g}, of G {g_loss:.4g}")
        now = time.perf_counter()
        state.seconds = seconds_before + now - started
        rate = counted * state.options.batch_size * state.options.d_steps / (now - resumed)
        yield Report(state.step, round(state.seconds, 3), d_loss, g_loss, d_real, d_fake, rate)
        if stop:
            return
        sums.zero_()
        counted, resumed = 0, time.perf_counter()


def _real_logits(
    state: State, images: Tensor, labels: Tensor | None, dropout: Dropout
) -> tuple[Tensor, Tensor | float]:
    """D's logits of real images, and the weighted cross-entropy of its class head; 0 without classes."""
    if labels is None:
        return state.discriminator(images, None, dropout).float(), 0.0
    weight = state.options.class_loss
    logits, _, scores = state.discriminator.judge(images, labels, dropout, detach=weight == 0)
    return logits.float(), F.cross_entropy(scores.float(), labels) * (weight or 1.0)


def penalty_weight(state: State, update: int) -> float:
    """The weight of the gradient penalties in this update of D; 0 if they are left out."""
    penalty = state.options.penalty
    if penalty is None or update % penalty.every:
        return 0.0
    return _moved(state, penalty.gamma, penalty.final_gamma) * penalty.every


def _moved(state: State, start: float, final: float | None) -> float:
    """A scheduled number by now: `start`, then half a cosine over the burn-in's images, then `final`."""
    if final is None:
        return start
    options = state.options
    seen = state.step * options.d_steps * options.batch_size
    share = min(seen / options.burn_in_images, 1.0) if options.burn_in_images else 1.0
    return final + (start - final) * half_cosine(share)


def _noise(state: State, rng: torch.Generator) -> Tensor:
    """(m, dim) latents of mean 0 and variance 1, or this rank's part of them."""
    shape = (state.options.batch_size, state.options.latent.dim)
    if state.options.latent.distribution == "normal":
        return state.ranks.mine(torch.randn(shape, generator=rng, device=state.device))
    z = torch.rand(shape, generator=rng, device=state.device)
    return state.ranks.mine(z).mul_(2).sub_(1).mul_(math.sqrt(3))


def _descend(loss: Tensor, net: nn.Module, optimiser: Optimiser, ranks: Alone) -> None:
    _apply(torch.autograd.grad(loss, list(net.parameters())), net, optimiser, ranks)


def _apply(gradients: tuple[Tensor, ...], net: nn.Module, optimiser: Optimiser, ranks: Alone) -> None:
    for parameter, gradient in zip(net.parameters(), ranks.mean(gradients), strict=True):
        # The fused kernels read a gradient in the order of its memory, whatever its strides say.
        parameter.grad = gradient.contiguous()
    optimiser.step()


def _optimiser(net: nn.Module, spec: SGDSpec | AdamSpec) -> Optimiser:
    if isinstance(spec, AdamSpec):
        return torch.optim.Adam(net.parameters(), lr=spec.lr, betas=(spec.beta1, spec.beta2), fused=True)
    return torch.optim.SGD(net.parameters(), lr=spec.lr, momentum=spec.momentum, fused=True)


def _schedule(optimiser: Optimiser, spec: SGDSpec | AdamSpec, state: State) -> None:
    """Set the rate and momentum, or the rate and betas, for the next step."""
    group = optimiser.param_groups[0]
    if isinstance(spec, AdamSpec):
        group["lr"] = _moved(state, spec.lr, spec.final_lr)
        group["betas"] = (spec.beta1, _moved(state, spec.beta2, spec.final_beta2))
        return
    epoch = state.step * state.options.d_steps * state.options.batch_size // len(state.data)
    share = min(epoch / spec.momentum_epochs, 1.0) if spec.momentum_epochs else 0.0
    group["momentum"] = spec.momentum + share * (spec.final_momentum - spec.momentum)
    group["lr"] = max(spec.lr / spec.decay**state.step, spec.min_lr)


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed of 63 bits for one purpose of a run, other than all others of that run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _shape_words(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "a number"


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
