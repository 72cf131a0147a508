"""A training step against the equations by hand, the order of the images, schedules, and resuming to the last bit."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.bundle import read_bundle
from models.data.load import Dataset, Split, load_dataset
from models.evaluation.parzen import validation_log_likelihood
from models.inference.pixels import to_pixels
from models.spec import (
    PRESETS,
    AdamSpec,
    ConvDiscriminatorSpec,
    ConvGeneratorSpec,
    ConvSpec,
    LatentSpec,
    MaxoutDiscriminatorSpec,
    MLPGeneratorSpec,
    MLPSpec,
    PenaltySpec,
    SGDSpec,
    TrainingOptions,
)
from models.training import publishing, trainer
from models.training.publishing import Score
from models.training.run_folder import RunDir
from models.training.trainer import DeviceDataset, State, TrainingError, train, train_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NETWORK = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(9, 8)),
    discriminator=MaxoutDiscriminatorSpec(units=(7, 6), pieces=3),
)
SGD = SGDSpec(lr=0.1, decay=1.01, min_lr=1e-6, momentum=0.5, final_momentum=0.7, momentum_epochs=4)
ADAM = AdamSpec(lr=0.01, beta1=0.5, beta2=0.999)


def small(**changes: Any) -> TrainingOptions:
    """Options of a run that takes milliseconds; the initial weights are large, so that a few steps show."""
    options: dict[str, Any] = {
        "preset": "small",
        "network": NETWORK,
        "latent": LatentSpec(dim=5, distribution="uniform"),
        "steps": 30,
        "batch_size": 4,
        "update": "alternating",
        "generator_loss": "nonsaturating",
        "generator_optimiser": SGD,
        "discriminator_optimiser": SGD,
        "generator_init": 0.5,
        "discriminator_init": 0.5,
        "score_every": 10,
    }
    return TrainingOptions(**options | changes)


def images(count: int = 60, *shape: int, labels: int = 0) -> Dataset:
    """Random images (h, w, c), brighter towards the right, divided 80/10/10, with or without labels."""
    h, w, c = shape or (3, 4, 1)
    random = np.random.default_rng(count)
    ramp = np.linspace(0.2, 1, w)[:, None]
    rows = (random.random((count, h, w, c)) * ramp * 255).astype(np.uint8)
    marks = np.arange(count, dtype=np.int64) % labels if labels else None

    def split(part: slice) -> Split:
        return Split(rows[part], None if marks is None else marks[part])

    tenth = count // 10
    names = tuple("abcdefghij"[:labels]) or None
    parts = split(slice(2 * tenth, None)), split(slice(tenth)), split(slice(tenth, 2 * tenth))
    return Dataset("random", *parts, names, hashlib.sha256(rows.tobytes()).hexdigest())


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """As documented: half of a 64-bit BLAKE2b of the run's seed, the purpose and its number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest(), "big") >> 1


def copied(state: State) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def assert_same(one: State, other: State) -> None:
    """Both states are equal to the last bit, in all but the clock."""
    tensors = other.tensors()
    assert one.tensors().keys() == tensors.keys()
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, tensors[name]), name
    assert repr(one.metadata() | {"seconds": 0}) == repr(other.metadata() | {"seconds": 0})  # as text: NaN equals NaN


# --- One step, by hand -------------------------------------------------------------------------------------------


class Reference:
    """The two nets, losses and optimisers written out once more in float64, a line for an equation."""

    def __init__(self, state: State) -> None:
        self.options = state.options
        self.classes = state.classes
        self.g = {n: t.double().requires_grad_() for n, t in copied(state).items() if n.startswith("generator/")}
        self.d = {n: t.double().requires_grad_() for n, t in copied(state).items() if n.startswith("discriminator/")}
        self.moments: dict[str, tuple[Tensor, Tensor, int]] = {}
        self.data = state.data
        self.step = 0

    def generator(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z): two ReLU layers and a sigmoid."""
        x = self.labelled(z, labels)
        for layer in ("layers.0", "layers.1"):
            x = (x @ self.g[f"generator/{layer}.weight"].T + self.g[f"generator/{layer}.bias"]).clamp(min=0)
        return 1 / (1 + torch.exp(-(x @ self.g["generator/output.weight"].T + self.g["generator/output.bias"])))

    def discriminator(self, x: Tensor, labels: Tensor | None, masks: torch.Generator) -> Tensor:
        """D(x) as a probability, with the masks that the step's generator of random numbers gives next."""
        x = self.labelled(x, labels)
        for layer, keep in (("layers.0.linear", 0.8), ("layers.1.linear", 0.5), ("output", 0.5)):
            kept = torch.empty(x.shape, dtype=torch.float32).bernoulli_(keep, generator=masks)
            x = x * kept.double() / keep
            x = x @ self.d[f"discriminator/{layer}.weight"].T + self.d[f"discriminator/{layer}.bias"]
            if layer != "output":
                x = x.reshape(len(x), -1, 3).amax(dim=2)
        return torch.sigmoid(x[:, 0])

    def labelled(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """x, with the label's one-hot vector behind it."""
        return x if labels is None else torch.cat([x, torch.eye(self.classes, dtype=torch.float64)[labels]], dim=1)

    def noise(self, rng: torch.Generator) -> Tensor:
        """z, uniform on ±√3."""
        u = torch.rand(self.options.batch_size, self.options.latent.dim, generator=rng)
        return (2 * u.double() - 1) * math.sqrt(3)

    def g_loss(self, fake: Tensor) -> Tensor:
        """What G minimises."""
        if self.options.generator_loss == "saturating":
            return torch.log(1 - fake).mean()
        return -torch.log(fake).mean()

    def d_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """What D minimises."""
        return -(torch.log(real).mean() + torch.log(1 - fake).mean()) * self.options.d_loss_scale

    def class_loss(self, x: Tensor, labels: Tensor | None) -> Tensor | float:
        """−log softmax of the label's score: linear in the hidden units, without dropout, that see no label."""
        if labels is None:
            return 0.0
        x = torch.cat([x, torch.zeros(len(x), self.classes, dtype=torch.float64)], dim=1)
        for layer in ("layers.0.linear", "layers.1.linear"):
            x = x @ self.d[f"discriminator/{layer}.weight"].T + self.d[f"discriminator/{layer}.bias"]
            x = x.reshape(len(x), -1, 3).amax(dim=2)
        if not self.options.class_loss:
            x = x.detach()
        scores = x @ self.d["discriminator/class_head.weight"].T + self.d["discriminator/class_head.bias"]
        shares = torch.exp(scores) / torch.exp(scores).sum(dim=1, keepdim=True)
        return -torch.log(shares[torch.arange(len(x)), labels]).mean() * (self.options.class_loss or 1.0)

    def take(self, turn: int) -> tuple[Tensor, Tensor | None]:
        """A turn's images, flat, and their labels."""
        pixels, labels = self.data.take(turn * self.options.batch_size, self.options.batch_size)
        return pixels.double().flatten(1), labels

    def train_step(self) -> None:
        """One generator update and its discriminator's, as the paper or its published code has it."""
        rng = torch.Generator().manual_seed(derived_seed(self.options.seed, "step", self.step))
        if self.options.update == "alternating":
            for turn in range(self.options.d_steps):
                x, labels = self.take(self.step * self.options.d_steps + turn)
                fake = self.generator(self.noise(rng), labels).detach()
                d_real = self.discriminator(x, labels, rng)
                d_loss = self.d_loss(d_real, self.discriminator(fake, labels, rng))
                self.descend(self.d, d_loss + self.class_loss(x, labels))
            self.descend(self.g, self.g_loss(self.discriminator(self.generator(self.noise(rng), labels), labels, rng)))
        else:
            x, labels = self.take(self.step)
            d_real = self.discriminator(x, labels, rng)
            d_fake = self.discriminator(self.generator(self.noise(rng), labels), labels, rng)
            g_slopes = torch.autograd.grad(self.g_loss(d_fake), list(self.g.values()), retain_graph=True)
            d_slopes = torch.autograd.grad(
                self.d_loss(d_real, d_fake) + self.class_loss(x, labels), list(self.d.values())
            )
            self.move(self.g, g_slopes)
            self.move(self.d, d_slopes)
        self.step += 1

    def descend(self, weights: dict[str, Tensor], loss: Tensor) -> None:
        """Move against the loss's gradient."""
        self.move(weights, torch.autograd.grad(loss, list(weights.values())))

    def move(self, weights: dict[str, Tensor], slopes: tuple[Tensor, ...]) -> None:
        """One step of SGD with momentum on the paper's schedules, or of Adam (Kingma & Ba 2015, algorithm 1)."""
        spec = self.options.generator_optimiser
        for (name, weight), slope in zip(weights.items(), slopes, strict=True):
            m, v, t = self.moments.get(name, (torch.zeros_like(weight), torch.zeros_like(weight), 0))
            t += 1
            if isinstance(spec, SGDSpec):
                epoch = self.step * self.options.d_steps * self.options.batch_size // len(self.data)
                momentum = 0.5 + 0.2 * min(epoch / 4, 1)
                m = momentum * m + slope
                change = max(0.1 / 1.01**self.step, 1e-6) * m
            else:
                m, v = 0.5 * m + 0.5 * slope, 0.999 * v + 0.001 * slope**2
                change = 0.01 * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            self.moments[name] = m, v, t
            weight.data -= change


@pytest.mark.parametrize("optimiser", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    ("labels", "class_loss"), [(0, 0.0), (3, 0.0), (3, 0.7)], ids=["plain", "conditional", "head teaches"]
)
@pytest.mark.parametrize("generator_loss", ["nonsaturating", "saturating"])
@pytest.mark.parametrize(
    ("update", "d_steps"),
    [("alternating", 1), ("alternating", 3), ("simultaneous", 1)],
    ids=["k=1", "k=3", "simultaneous"],
)
def test_a_step_equals_the_equations(
    update: str, d_steps: int, generator_loss: str, labels: int, class_loss: float, optimiser: SGDSpec | AdamSpec
) -> None:
    """Three steps of either update give the weights that Algorithm 1, or the published code, gives in float64."""
    options = small(
        update=update,
        d_steps=d_steps,
        generator_loss=generator_loss,
        conditional=bool(labels),
        class_loss=class_loss,
        d_loss_scale=0.5 if update == "simultaneous" else 1.0,
        generator_optimiser=optimiser,
        discriminator_optimiser=optimiser,
        seed=2**53 - 1,
    )
    state = State(options, images(20, labels=labels), CPU)  # 16 images to train on: the epochs change
    before = copied(state)
    reference = Reference(state)
    for _ in range(3):
        train_step(state)
        reference.train_step()
    for name, expected in (reference.g | reference.d).items():
        after = state.tensors()[name]
        assert not torch.equal(after, before[name]), f"{name} did not move"
        torch.testing.assert_close(after.double(), expected.detach(), atol=2e-5, rtol=1e-4)


def test_the_step_reports_its_losses_and_the_discriminators_means() -> None:
    """What is shown is of the step's own batch: D's loss, G's loss, D's mean on data and on samples."""
    state = State(small(update="simultaneous"), images(), CPU)
    reference = Reference(state)
    rng = torch.Generator().manual_seed(derived_seed(0, "step", 0))
    x, _ = reference.take(0)
    real = reference.discriminator(x, None, rng)
    fake = reference.discriminator(reference.generator(reference.noise(rng), None), None, rng)
    expected = [reference.d_loss(real, fake), reference.g_loss(fake), real.mean(), fake.mean()]
    assert train_step(state).tolist() == pytest.approx([float(figure.detach()) for figure in expected], abs=1e-5)


# --- Beginning ---------------------------------------------------------------------------------------------------


def test_the_first_weights_are_as_published() -> None:
    """Uniform within their bounds, biases zero, but G's last: the logit of each pixel's mean over the data."""
    dataset = images(200, 3, 4, 1)
    dataset.train.images[:, 0, 0] = 0
    dataset.train.images[:, 1, 1] = 255
    state = State(small(generator_init=0.05, discriminator_init=0.005), dataset, CPU)
    for net, bound in ((state.generator, 0.05), (state.discriminator, 0.005)):
        for name, parameter in net.named_parameters():
            if name.endswith("weight"):
                assert 0.8 * bound < parameter.abs().max() <= bound
                assert abs(parameter.mean()) < bound / 2
            elif name != "output.bias" or net is state.discriminator:
                assert not parameter.any()
    mean = dataset.train.images.astype(np.float64).mean(axis=0).ravel() / 255
    clipped = mean.clip(1e-7, 1 - 1e-7)
    bias = state.generator.output.get_parameter("bias").detach().double().numpy()
    np.testing.assert_allclose(bias, np.log(clipped / (1 - clipped)), rtol=2e-2)  # float32 near 1
    inner = (mean > 0) & (mean < 1)
    np.testing.assert_allclose(bias[inner], np.log(mean[inner] / (1 - mean[inner])), atol=1e-5)


def test_a_seed_fixes_a_run() -> None:
    """Equal seeds give equal bits after ten steps, and another seed other weights from the start."""
    one, same, other = (State(small(seed=seed), images(), CPU) for seed in (1, 1, 2))
    assert not torch.equal(one.tensors()["generator/output.weight"], other.tensors()["generator/output.weight"])
    for state in (one, same):
        for _ in range(10):
            train_step(state)
    assert_same(one, same)


def test_a_conditional_run_needs_labels() -> None:
    """Data without labels is refused before anything is computed."""
    with pytest.raises(TrainingError, match="small is class-conditional, and random has no labels"):
        State(small(conditional=True), images(), CPU)


def test_labels_that_are_not_asked_for_are_left_alone() -> None:
    """An unconditional run on labelled data makes plain nets."""
    state = State(small(), images(labels=3), CPU)
    train_step(state)
    assert state.classes == 0
    assert state.data.labels is None


# --- Order of the images -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), batch=st.integers(1, 90), seed=st.integers(0, 2**53 - 1))
def test_every_image_comes_exactly_once_an_epoch(count: int, batch: int, seed: int) -> None:
    """Batches of any size walk through one permutation after another, and an image's label comes with it."""
    rows = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    empty = Split(rows[:0], None)
    dataset = Dataset("x", Split(rows, np.arange(count)), empty, empty, tuple(map(str, range(count))), "")
    data = DeviceDataset(dataset, small(seed=seed, conditional=True), CPU)
    batches = [data.take(start, batch) for start in range(0, 3 * count, batch)]
    taken = torch.cat([pixels.flatten() * 255 for pixels, _ in batches]).round().to(torch.int64)
    assert torch.equal(taken, torch.cat([labels for _, labels in batches if labels is not None]))
    epochs = taken[: 3 * count].view(3, count)
    for epoch in range(3):
        assert sorted(epochs[epoch].tolist()) == list(range(count))
        rng = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
        assert torch.equal(epochs[epoch], torch.randperm(count, generator=rng))
    start = 2 * count
    again = DeviceDataset(dataset, small(seed=seed), CPU).take(start, count)[0]  # from the middle, as after a resume
    assert torch.equal((again.flatten() * 255).round().to(torch.int64), epochs[2])


# --- Schedules and the average -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "lr", "momentum"),
    [
        (0, 0.1, 0.5),
        (1, 0.1 / 1.000004, 0.5),
        (499, 0.0998006, 0.5),
        (500, 0.0998002, 0.5008),  # 500 updates of 100 are an epoch of 50,000 images
        (25_000, 0.0904837, 0.54),
        (62_500, 0.0778801, 0.6),
        (125_000, 0.0606532, 0.7),
        (250_000, 0.0367880, 0.7),
        (10_000_000, 1e-6, 0.7),
    ],
)
def test_the_paper_schedules(step: int, lr: float, momentum: float) -> None:
    """The rate is divided by 1.000004 an update down to 1e-6; momentum goes from ½ to 0.7 over 250 epochs."""
    pixel = np.zeros((50_000, 1, 1, 1), np.uint8)
    tiny = Dataset("pixel", Split(pixel, None), Split(pixel[:1], None), Split(pixel[:1], None), None, "")
    state = State(PRESETS["mlp-paper"].model_copy(update={"network": NETWORK}), tiny, CPU)
    state.step = step
    train_step(state)
    for optimiser in (state.g_optimiser, state.d_optimiser):
        group = optimiser.param_groups[0]
        assert group["lr"] == pytest.approx(lr, rel=2e-6)
        assert group["momentum"] == pytest.approx(momentum)


def test_the_average_forgets_by_half_lives() -> None:
    """After as many images as the half-life, the first weights have half their share left: a sum written out."""
    state = State(small(ema_half_life_images=12), images(), CPU)
    assert state.average is not None
    keep = 0.5 ** (4 / 12)
    expected = state.generator.output.weight.detach().clone()
    for _ in range(6):
        train_step(state)
        expected = keep * expected + (1 - keep) * state.generator.output.weight.detach()
    torch.testing.assert_close(state.average.output.weight.detach(), expected)
    assert keep**3 == pytest.approx(0.5)
    assert state.ema_generator is state.average


# --- The loop ----------------------------------------------------------------------------------------------------


def test_reports_come_at_every_step_that_something_is_due() -> None:
    """Multiples of each interval, of the scoring interval, and the end; a report is the mean over its steps."""
    state, twin = (State(small(steps=23), images(), CPU) for _ in range(2))
    reports = list(train(state, 23, report_every=(7, 9)))
    assert [report.step for report in reports] == [7, 9, 10, 14, 18, 20, 21, 23]
    figures = torch.stack([train_step(twin) for _ in range(7)]).mean(dim=0)
    first = reports[0]
    assert [first.d_loss, first.g_loss, first.d_real, first.d_fake] == pytest.approx(figures.tolist(), rel=1e-5)
    assert all(report.images_per_s > 0 for report in reports)
    assert [report.seconds for report in reports] == sorted(report.seconds for report in reports)


def test_a_stop_ends_after_the_step_with_a_report() -> None:
    """Whoever stops the loop gets a last report, of the step that was under way."""
    state = State(small(), images(), CPU)
    reports = list(train(state, 30, report_every=(50,), stopped=lambda: state.step == 3))
    assert [report.step for report in reports] == [3]


def test_real_images_stand_beside_samples_of_the_same_label() -> None:
    """Each time another image of the class, as long as there are some; without labels, evenly spaced ones."""
    dataset = images(100, labels=3)
    state = State(small(conditional=True), dataset, CPU)
    labels, split = state.sample_labels(40), dataset.train
    assert labels is not None
    assert split.labels is not None
    shown = publishing.real_beside(state, split, 40)
    places = [[*map(np.array_equal, split.images, [image] * len(split.images))].index(True) for image in shown]
    assert split.labels[places].tolist() == labels.tolist()
    assert len(set(places)) == 40
    plain = publishing.real_beside(State(small(), dataset, CPU), split, 5)
    np.testing.assert_array_equal(plain, split.images[[0, 19, 39, 59, 79]])


@pytest.mark.parametrize("optimiser", [SGDSpec(lr=1e30), AdamSpec(lr=1e38)], ids=["sgd", "adam"])
def test_numbers_that_are_no_longer_finite_end_the_run(optimiser: SGDSpec | AdamSpec) -> None:
    """Diverged weights are noticed at the next report, before anyone could save them."""
    options = small(generator_optimiser=optimiser, discriminator_optimiser=optimiser)
    state = State(options, images(), CPU)
    with pytest.raises(TrainingError, match="training diverged by step"):
        list(train(state, 30, report_every=(1,)))
    assert state.step < 30


def test_weights_that_broke_in_the_last_update_are_noticed() -> None:
    """The loss is computed before the update, so a finite loss says nothing about the weights that will be saved."""
    state = State(small(), images(), CPU)
    step = iter(train(state, 30, report_every=(1,)))
    next(step)
    assert state.is_finite()
    with torch.no_grad():
        state.generator.output.get_parameter("bias")[0] = torch.inf  # sigmoid makes it a 1: every loss stays finite
    with pytest.raises(TrainingError, match="training diverged by step 2"):
        next(step)


@pytest.mark.parametrize("net", ["generator", "discriminator"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_weight_that_is_no_finite_number_is_found_wherever_it_is(net: str, odd: float) -> None:
    """Each tensor of both nets, at its first, a middle and its last place."""
    state = State(small(), images(), CPU)
    for parameter in getattr(state, net).parameters():
        numbers = parameter.detach().view(-1)
        for place in (0, len(numbers) // 2, len(numbers) - 1):
            before = numbers[place].item()
            numbers[place] = odd
            assert not state.is_finite()
            numbers[place] = before
            assert state.is_finite()


# --- Scores and the best -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", trainer.SELECTIONS)
def test_scoring_changes_nothing_and_repeats(selection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scores of the same weights are equal, and a run that was scored goes on like one that was not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = small(ema_half_life_images=20, selection=selection)
    scored, plain = (State(options, images(labels=2), CPU) for _ in range(2))
    for _ in range(3):
        train_step(scored)
        train_step(plain)
        assert publishing.score(scored, images(labels=2)) == publishing.score(scored, images(labels=2))
    assert_same(scored, plain)


def test_only_a_higher_score_is_kept() -> None:
    """The best is a copy: later steps don't move it, and an equal score doesn't replace it."""
    state = State(small(), images(), CPU)
    assert publishing.keep_if_best(state, Score(-5.0, {"sigma": 0.2}))
    kept = state.best.generator["output.weight"].clone()
    train_step(state)
    assert not publishing.keep_if_best(state, Score(-5.0, {"sigma": 0.3}))
    assert torch.equal(state.best.generator["output.weight"], kept)
    assert (state.best.step, state.best.metadata) == (0, {"sigma": 0.2})
    assert publishing.keep_if_best(state, Score(-4.0, {"sigma": 0.3}))
    assert (state.best.step, state.best.score) == (1, -4.0)
    assert not torch.equal(state.best.generator["output.weight"], kept)


def test_an_older_checkpoint_is_scored_again_where_it_does_not_say() -> None:
    """The same score comes out; the best weights are those of the last score that is sure."""
    old, state = State(small(), images(), CPU), State(small(), images(), CPU)
    for _ in train(old, 10):
        publishing.keep_if_best(old, publishing.score(old, images()))
    for _ in train(old, 20):
        pass
    metadata = old.metadata()
    del metadata["scored_step"]
    state.load(old.tensors(), metadata)
    assert (state.scored_step, state.is_score_due) == (10, True)
    publishing.keep_if_best(state, publishing.score(state, images()))
    assert not state.is_score_due


def test_a_lower_frechet_distance_is_the_better_one() -> None:
    """The direction belongs to the rule: here less is more, and what is no number is never the best."""
    state = State(small(selection="frechet"), images(), CPU)
    assert not publishing.keep_if_best(state, Score(float("nan"), {}))
    assert [publishing.keep_if_best(state, Score(value, {})) for value in (5.0, 6.0, 4.0)] == [True, False, True]
    assert state.best.score == 4.0


def test_a_generator_that_makes_no_numbers_has_no_score() -> None:
    """NaN pixels are one clear error, not a score that beats all others."""
    state = State(small(), images(), CPU)
    with torch.no_grad():
        state.generator.output.get_parameter("bias")[0] = torch.nan
    with pytest.raises(TrainingError, match="some of its pixels are not numbers"):
        publishing.score(state, images())


# --- Resuming ----------------------------------------------------------------------------------------------------

CONV = ConvSpec(
    family="conv",
    generator=ConvGeneratorSpec(width=4, narrowest=2, blocks=1, group=2, embedding=3),
    discriminator=ConvDiscriminatorSpec(width=4, narrowest=2, blocks=1, group=2),
)
RUNS = {
    "sgd simultaneous": small(update="simultaneous", d_loss_scale=0.5),
    "sgd without momentum": small(generator_optimiser=SGDSpec(lr=0.1), discriminator_optimiser=SGDSpec(lr=0.1)),
    "adam average k=2": small(
        generator_optimiser=ADAM, discriminator_optimiser=ADAM, ema_half_life_images=50, d_steps=2
    ),
    "conditional normal": small(conditional=True, latent=LatentSpec(dim=3, distribution="normal")),
    "mixed optimisers": small(generator_optimiser=ADAM, generator_loss="saturating"),
}


CONV_RUNS = {
    name: PRESETS[name].model_copy(
        update={
            "network": CONV,
            "latent": LatentSpec(dim=3, distribution="normal"),
            "steps": 12,
            "batch_size": 4,
            "score_every": 5,
            "burn_in_images": 40,
        }
    )
    for name in ("conv-ns", "conv-r3")
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONV_RUNS)
@pytest.mark.parametrize("cut", [3, 6])
def test_a_resumed_convolutional_run_is_the_uninterrupted_one(tmp_path: Path, name: str, cut: int) -> None:
    """Penalties, moving rates and bfloat16 included: to the last bit, through a file."""
    dataset = images(50, 16, 16, 1, labels=3)
    straight, first, second = (State(CONV_RUNS[name], dataset, CPU) for _ in range(3))
    go_on(straight, dataset, 12)
    go_on(first, dataset, cut)
    folder = RunDir(tmp_path)
    folder.begin({})
    folder.save_checkpoint(first.step, first.tensors(), first.metadata())
    found = folder.newest_checkpoint()
    assert found is not None
    second.load(*found)
    go_on(second, dataset, 12)
    assert_same(straight, second)


def test_rates_betas_and_gammas_move_with_the_images_seen() -> None:
    """Half a cosine over the burn-in, whatever `steps` is: the start, the middle, the end and ever after."""
    options = CONV_RUNS["conv-r3"].model_copy(
        update={
            "generator_optimiser": AdamSpec(lr=1e-3, final_lr=1e-4, beta1=0.0, beta2=0.9, final_beta2=0.99),
            "penalty": PenaltySpec(gamma=1.0, final_gamma=0.1, every=2),
        }
    )
    state = State(options, images(50, 16, 16, 1, labels=3), CPU)
    for step, lr, beta2 in ((0, 1e-3, 0.9), (5, 5.5e-4, 0.945), (10, 1e-4, 0.99), (99, 1e-4, 0.99)):
        state.step = step
        train_step(state)
        group = state.g_optimiser.param_groups[0]
        assert (group["lr"], group["betas"][1]) == (pytest.approx(lr), pytest.approx(beta2))
        assert state.d_optimiser.param_groups[0]["lr"] == pytest.approx(lr)
    state.step = 5
    assert trainer.penalty_weight(state, 6) == pytest.approx(2 * 0.55)  # every second update, and twice as heavy there
    assert trainer.penalty_weight(state, 7) == 0


def test_a_step_of_the_generator_leaves_the_discriminator_alone() -> None:
    """No gradient of D is computed in G's turn, and none is left behind by it."""
    state = State(CONV_RUNS["conv-r3"], images(50, 16, 16, 1, labels=3), CPU)
    asked: list[set[int]] = []
    before = torch.autograd.grad

    def spy(outputs: Tensor, inputs: Any, **options: Any) -> Any:
        asked.append({id(one) for one in (inputs if isinstance(inputs, list) else [inputs])})
        return before(outputs, inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", spy)
        train_step(state)
    g, d = ({id(p) for p in net.parameters()} for net in (state.generator, state.discriminator))
    assert asked[-2:] == [d, g]  # after the penalties' gradients by pixels
    assert not any(one & (d | g) for one in asked[:-2])


def test_images_that_convolutional_nets_cannot_make_are_refused() -> None:
    """Too small, or not square: said before anything is computed."""
    with pytest.raises(TrainingError, match="square images of 16 to 128 pixels a side, not 8×8"):
        State(CONV_RUNS["conv-ns"], images(50, 8, 8, 1, labels=3), CPU)


def go_on(state: State, dataset: Dataset, steps: int) -> None:
    for _ in train(state, steps):
        if state.step % state.options.score_every == 0:
            publishing.keep_if_best(state, publishing.score(state, dataset))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("cut", [1, 10, 17])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, run: str, cut: int) -> None:
    """Weights, averages, moments, the best and its score: through a file, into a state that knew nothing."""
    dataset = images(labels=3)
    straight = State(RUNS[run], dataset, CPU)
    go_on(straight, dataset, 30)

    first = State(RUNS[run], dataset, CPU)
    go_on(first, dataset, cut)
    folder = RunDir(tmp_path)
    folder.begin({})
    folder.save_checkpoint(first.step, first.tensors(), first.metadata())
    found = folder.newest_checkpoint()
    assert found is not None
    second = State(RUNS[run], dataset, CPU)
    second.load(*found)
    assert_same(first, second)
    go_on(second, dataset, 30)

    assert_same(straight, second)


# --- The product -------------------------------------------------------------------------------------------------


def test_a_conditional_run_in_colour_becomes_a_bundle(tmp_path: Path) -> None:
    """Images of 6 × 10 in RGB with three classes: no size is written into the trainer, and every fact is the run's."""
    dataset = images(100, 6, 10, 3, labels=3)
    options = small(conditional=True, ema_half_life_images=40)
    state = State(options, dataset, CPU)
    go_on(state, dataset, 30)
    bundle = publishing.publish(state, dataset, tmp_path / "bundle", "colours", {"preset": "small"}, rule="best")
    manifest = read_bundle(tmp_path / "bundle").manifest
    assert manifest.image.shape == (3, 6, 10)
    assert manifest.labels == ("a", "b", "c")
    counts = np.bincount(dataset.train.labels)  # type: ignore[arg-type]
    assert manifest.latent.label_frequencies == pytest.approx(tuple(counts / counts.sum()))
    assert manifest.training["steps"] == 30
    assert manifest.training["images_seen"] == 30 * 4
    assert manifest.training["selection"] == {
        "rule": "highest validation Parzen log-likelihood",
        "step": state.best.step,
    }
    for name, tensor in bundle.generator.state_dict().items():
        assert torch.equal(tensor, state.best.generator[name])


@pytest.mark.slow
def test_training_on_real_digits_beats_the_untrained_generator_by_far() -> None:
    """Half a minute on 1,600 real digits makes others, never seen, likelier by far than the untrained nets do.

    The margin is 75 to 80 nats, over an untrained generator that knows every pixel's mean already.
    """
    dataset = load_dataset(str(Path(__file__).parents[2] / "data" / "mnist-2000.npz"), None, seed=0)
    network = MLPSpec(
        family="mlp",
        generator=MLPGeneratorSpec(hidden=(200,)),
        discriminator=MaxoutDiscriminatorSpec(units=(64,), pieces=3),
    )
    options = small(
        network=network,
        latent=LatentSpec(dim=32, distribution="normal"),
        seed=1,
        batch_size=50,
        generator_optimiser=AdamSpec(lr=3e-4),
        discriminator_optimiser=AdamSpec(lr=3e-4),
        generator_init=0.05,
        discriminator_init=0.02,
        ema_half_life_images=10_000,
    )
    state = State(options, dataset, CPU)
    validation = to_pixels(dataset.validation.images)

    def log_likelihood() -> float:
        samples = to_pixels(publishing.draw(state, 2_000))
        return validation_log_likelihood(samples, validation).log_likelihood

    untrained = log_likelihood()
    for _ in range(1_750):
        train_step(state)
    assert log_likelihood() > untrained + 40
