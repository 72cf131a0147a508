"""The paper's game in one dimension, where every density is known: Figure 1, and §4.1's theory put to the test.

Data x are N(0, 1), noise z is uniform on (0, 1). For a fixed G the best D is D* = p_data / (p_data + p_g)
(proposition 1), and the value of the game under it is

    C(G) = ∫ p_data log D* + p_g log(1 − D*) dx = −log 4 + 2·JSD(p_data ‖ p_g),

whose only minimum, −log 4, is at p_g = p_data, where D* = ½ (theorem 1). `play` runs Algorithm 1 with the package's own
losses, freezes G at three stages, trains D further, and measures how far D is from D*. D = ½ alone would prove nothing,
since an untrained D outputs that too; so at the end another D is trained from scratch.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.spec import half_cosine
from models.training.losses import discriminator_loss, saturating_generator_loss

Float64s = NDArray[np.float64]

GRID_STEP = 0.01
# Where densities and D are evaluated, in standard deviations of x.
GRID: Float64s = np.arange(-600, 601, dtype=np.float64) * GRID_STEP
P_DATA: Float64s = np.exp(-np.square(GRID) / 2) / math.sqrt(2 * math.pi)
ARROWS: Float64s = (np.arange(25) + 0.5) / 25  # the z from which the figure's arrows start
OPTIMUM = -math.log(4)

LARGEST_GAP = 0.05  # of D from D*, and of the fresh D from ½
START_VALUE = -1.2  # C(G) must begin above this, or there is little to learn
_BANDWIDTH = 0.06  # of the Gaussian that smooths p_g's histogram; these densities have no detail so narrow
_SAMPLES_OF_A_FRAME = 200_000
_WARM_UP = 20  # D's updates before panel (a)
_D_RATE, _G_RATE = 5e-3, 1e-3


@dataclass(frozen=True)
class ToyOptions:
    """What the numbers depend on.

    Attributes:
        seed: Decides everything that is drawn.
        steps: Generator updates, with one update of D before each.
        batch_size: Algorithm 1's m.
        d_updates: Updates of D while G is frozen.
        samples: Samples in each estimate of p_g.
    """

    seed: int = 0
    steps: int = 2_000
    batch_size: int = 2_048
    d_updates: int = 1_500
    samples: int = 1_000_000


@dataclass(frozen=True)
class View:
    """The game at one moment, for a picture: p_g and D over `GRID`, and G(z) of the `ARROWS`."""

    step: int
    p_g: Float64s
    d: Float64s
    arrows: Float64s


@dataclass(frozen=True)
class Stage:
    """G frozen after `step` updates. `gaps` has D's largest distance from D* after some numbers of updates of D alone.

    `value` is C(G), integrated from the densities; `jsd` the Jensen-Shannon divergence in nats that it means.
    """

    name: str
    step: int
    value: float
    jsd: float
    gaps: list[tuple[int, float]]

    @property
    def gap(self) -> float:
        """D's largest distance from D* after its last update."""
        return self.gaps[-1][1]


@dataclass(frozen=True)
class FreshDiscriminator:
    """A D that was trained from scratch against the final G, as independent evidence.

    `value` is V(D, G), the mean of log D(x) + log(1 − D(G(z))) over as many draws as p_g has; `from_half` the largest
    distance of D from ½. Both distances are taken where p_data + p_g is at least 1 % of its peak.
    """

    value: float
    gap: float
    from_half: float


@dataclass(frozen=True)
class ToyResult:
    """The result of `play`: numbers, and the views for the pictures."""

    options: ToyOptions
    stages: list[Stage]
    fresh: FreshDiscriminator
    panels: list[View] = field(repr=False)
    frames: list[View] = field(repr=False)

    def claims(self) -> dict[str, bool]:
        """What theory says about a game played to its end, and whether it holds."""
        start, end = self.stages[0], self.stages[-1]
        held = {
            f"with G frozen at the {stage.name}, D comes within {LARGEST_GAP} of p_data / (p_data + p_g)": stage.gap
            < LARGEST_GAP
            for stage in self.stages
        }
        return held | {
            f"C(G) is at least {START_VALUE} at the start": start.value >= START_VALUE,
            "C(G) is within 2 % of −log 4 at the end": abs(end.value - OPTIMUM) <= 0.02 * -OPTIMUM,
            "a fresh D finds a value within 2 % of that C(G)": abs(self.fresh.value - end.value) <= 0.02 * -OPTIMUM,
            f"a fresh D is within {LARGEST_GAP} of ½": self.fresh.from_half < LARGEST_GAP,
        }

    def record(self) -> dict[str, Any]:
        """The numbers as plain data. The same options give the same numbers, up to the last bits of the machine."""
        return {
            "options": asdict(self.options),
            "optimum": OPTIMUM,
            "stages": [asdict(stage) for stage in self.stages],
            "fresh_discriminator": asdict(self.fresh),
            "claims": self.claims(),
        }


class ToyGenerator(nn.Module):
    """z in (0, 1) → x: a line and a small tanh net, both of log(z / (1 − z)).

    A smooth function of a bounded number has a density that ends in a cliff. D* jumps there, which no continuous D can
    do. The logit maps the interval to the whole line. The net starts at 0 and the line away from the data, so p_g
    begins as a logistic density, too far to the left and too narrow.
    """

    def __init__(self, rng: torch.Generator, width: int = 16) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
        _initialise(self.net, rng)
        with torch.no_grad():
            self.line.weight.fill_(0.25)
            self.line.bias.fill_(-1.2)
            for parameter in self.net[-1].parameters():
                parameter.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """(n, 1) → (n, 1)."""
        logits = torch.logit(z)
        x: Tensor = self.line(logits) + self.net(logits)
        return x


def discriminator(rng: torch.Generator, width: int = 32) -> nn.Sequential:
    """x (n, 1) → logit (n, 1): two tanh layers, the first with its bends spread evenly over the range of x."""
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    _initialise(net, rng)
    with torch.no_grad():
        weight, bias = net[0].parameters()
        weight.copy_(3.0 * torch.randint(2, (width, 1), generator=rng) - 1.5)
        bias.copy_(1.5 * torch.linspace(-4, 4, width))
    return net


class Game:
    """Both nets and two random generators: one for training, one for measuring, which so never changes the training."""

    def __init__(self, options: ToyOptions) -> None:
        self.options = options
        self.step = 0
        self.rng = torch.Generator().manual_seed(options.seed)
        self.measure_rng = torch.Generator().manual_seed(options.seed + 1)
        self.generator = ToyGenerator(self.rng)
        self.discriminator = discriminator(self.rng)

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """z: (count, 1), uniform on (0, 1), both ends excluded."""
        return torch.rand(count, 1, generator=rng).clamp_(2.0**-24, 1 - 2.0**-24)

    def train_discriminator(self, net: nn.Module, optimiser: torch.optim.Adam) -> None:
        """One ascent of D's stochastic gradient: m noise samples and m data samples."""
        m = self.options.batch_size
        with torch.no_grad():
            fake = self.generator(self.noise(m, self.rng))
        real = torch.randn(m, 1, generator=self.rng)
        logits = net(torch.cat([real, fake])).squeeze(1)
        _descend(discriminator_loss(logits[:m], logits[m:]), net, optimiser)

    def train_on(self, net: nn.Module, checkpoints: list[int]) -> Iterator[int]:
        """Train a D while G stays; yields at each number of updates in the ascending `checkpoints`."""
        optimiser = _adam(net, beta1=0.9)
        for update in range(checkpoints[-1] + 1):
            if update in checkpoints:
                yield update
            _set_rate(optimiser, _D_RATE, update / checkpoints[-1])
            if update < checkpoints[-1]:
                self.train_discriminator(net, optimiser)

    def alternate(self) -> Iterator[int]:
        """Algorithm 1 with k = 1; yields the number of G's updates after each."""
        generator, m, steps = self.generator, self.options.batch_size, self.options.steps
        # Without momentum, each net responds to what the other does now, not to what it did before.
        g_optimiser, d_optimiser = _adam(generator, beta1=0.0), _adam(self.discriminator, beta1=0.0)
        for step in range(steps):
            _set_rate(d_optimiser, _D_RATE, step / steps)
            _set_rate(g_optimiser, _G_RATE, step / steps)
            self.train_discriminator(self.discriminator, d_optimiser)
            logits = self.discriminator(generator(self.noise(m, self.rng))).squeeze(1)
            _descend(saturating_generator_loss(logits), generator, g_optimiser)
            self.step = step + 1
            yield self.step

    @torch.no_grad()
    def density(self, samples: int) -> Float64s:
        """p_g over `GRID`: a smoothed histogram of G's samples."""
        counts = np.zeros(len(GRID))
        edges = np.append(GRID, GRID[-1] + GRID_STEP) - GRID_STEP / 2
        chunk = 100_000
        for done in range(0, samples, chunk):
            x = self.generator(self.noise(min(chunk, samples - done), self.measure_rng))
            counts += np.histogram(x.numpy(), edges)[0]
        reach = np.arange(-4 * _BANDWIDTH, 4 * _BANDWIDTH + GRID_STEP / 2, GRID_STEP)
        kernel = np.exp(-np.square(reach / _BANDWIDTH) / 2)
        smoothed: Float64s = np.convolve(counts, kernel / kernel.sum(), mode="same") / (samples * GRID_STEP)
        return smoothed

    def view(self, net: nn.Module | None = None, p_g: Float64s | None = None) -> View:
        """The present view, with the game's own D if no other is given."""
        with torch.no_grad():
            arrows = self.generator(torch.tensor(ARROWS, dtype=torch.float32)[:, None])
        return View(
            self.step,
            self.density(_SAMPLES_OF_A_FRAME) if p_g is None else p_g,
            output(self.discriminator if net is None else net),
            arrows.squeeze(1).double().numpy(),
        )


def play(options: ToyOptions, report: Callable[[Stage], None] = lambda _: None) -> ToyResult:
    """Play the whole game.

    First D alone is trained, as in the inner loop of Algorithm 1, until it is D* of the first G; then both alternate.
    The four panels are the paper's: a D that is only partly right; D = D*; G after some updates along D's gradient; the
    end.

    Args:
        options: What to play.
        report: Called with each stage as soon as it is measured.
    """
    game, stages = Game(options), list[Stage]()

    def freeze(name: str, net: nn.Module) -> list[View]:
        stage, views = _train_beside_frozen(game, name, net)
        stages.append(stage)
        report(stage)
        return views

    panels = [game.view() for _ in game.train_on(game.discriminator, [_WARM_UP])]
    frames = freeze("start", game.discriminator)
    panels.append(frames[-1])
    middle = max(1, options.steps // 40)
    shown = {round(options.steps ** (n / 40)) for n in range(41)}
    for step in game.alternate():
        if step in shown:
            frames.append(game.view())
        if step == middle:
            panels.append(game.view())
            freeze("middle", copy.deepcopy(game.discriminator))
    panels.append(freeze("end", copy.deepcopy(game.discriminator))[-1])
    return ToyResult(options, stages, _fresh(game), panels, frames)


def _train_beside_frozen(game: Game, name: str, net: nn.Module) -> tuple[Stage, list[View]]:
    """Train a D while G stays; returns how its distance from D* shrinks, and the views on the way."""
    checkpoints = sorted({game.options.d_updates * percent // 100 for percent in (0, 1, 3, 10, 30, 100)})
    p_g = game.density(game.options.samples)
    value = game_value(p_g)
    gaps, views = [], []
    for update in game.train_on(net, checkpoints):
        gaps.append((update, largest_gap(net, p_g)))
        views.append(game.view(net, p_g))
    return Stage(name, game.step, value, (value - OPTIMUM) / 2, gaps), views


def _fresh(game: Game) -> FreshDiscriminator:
    """Train a new D against the final G, and measure it."""
    net, samples = discriminator(game.measure_rng), game.options.samples
    for _ in game.train_on(net, [game.options.d_updates]):
        pass
    p_g = game.density(samples)
    with torch.no_grad():
        real = net(torch.randn(samples, 1, generator=game.measure_rng)).squeeze(1)
        fake = net(game.generator(game.noise(samples, game.measure_rng))).squeeze(1)
        value = -discriminator_loss(real, fake).item()
    from_half = np.abs(output(net) - 0.5)[measured(p_g)].max()
    return FreshDiscriminator(value, largest_gap(net, p_g), float(from_half))


def best_discriminator(p_g: Float64s) -> Float64s:
    """D* = p_data / (p_data + p_g) over `GRID` (proposition 1)."""
    return P_DATA / (P_DATA + p_g)


def game_value(p_g: Float64s) -> float:
    """C(G) in nats, integrated over `GRID`. Beyond it p_data is under 10⁻⁸, and p_g alone adds p_g·log 1 = 0."""
    total = P_DATA + p_g
    g_part = np.where(p_g > 0, p_g, 1) / total  # 0·log 0 is 0
    integrand = P_DATA * np.log(P_DATA / total) + p_g * np.log(g_part)
    return float(integrand.sum() * GRID_STEP)


def largest_gap(net: nn.Module, p_g: Float64s) -> float:
    """max |D − D*| where p_data + p_g is at least 1 % of its peak."""
    return float(np.abs(output(net) - best_discriminator(p_g))[measured(p_g)].max())


@torch.no_grad()
def output(net: nn.Module) -> Float64s:
    """D(x) over `GRID`."""
    d: Float64s = torch.sigmoid(net(torch.tensor(GRID, dtype=torch.float32)[:, None]).squeeze(1)).double().numpy()
    return d


def measured(p_g: Float64s) -> NDArray[np.bool_]:
    """Where p_data + p_g is at least 1 % of its peak over `GRID`: elsewhere D has seen next to no data."""
    total = P_DATA + p_g
    seen: NDArray[np.bool_] = total >= 0.01 * total.max()
    return seen


def _initialise(net: nn.Sequential, rng: torch.Generator) -> None:
    """Weights and biases uniform in ±1/√inputs."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=rng)


def _adam(net: nn.Module, beta1: float) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), betas=(beta1, 0.99), fused=True)


def _set_rate(optimiser: torch.optim.Adam, rate: float, progress: float) -> None:
    """Lower the rate to 0 along half a cosine, so that the noise of single batches averages out."""
    optimiser.param_groups[0]["lr"] = rate * half_cosine(progress)


def _descend(loss: Tensor, net: nn.Module, optimiser: torch.optim.Adam) -> None:
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
