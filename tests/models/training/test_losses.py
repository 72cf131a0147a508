"""The losses against numbers worked out by hand, the naive formulas, extreme logits, and the paper's theory."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.networks import ConvDiscriminator
from models.spec import ConvDiscriminatorSpec, ImageSpec
from models.training.losses import (
    LOSSES,
    discriminator_loss,
    gradient_penalty,
    hinge_discriminator_loss,
    hinge_generator_loss,
    nonsaturating_generator_loss,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
    saturating_generator_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LN2, LN3, LN4 = 0.6931471805599453, 1.0986122886681098, 1.3862943611198906
logits = st.lists(st.floats(-15, 15), min_size=1, max_size=20).map(lambda row: torch.tensor(row, dtype=torch.float64))


def test_the_losses_of_two_rows_are_those_on_paper() -> None:
    """D(x) = ¾, ½ and D(G(z)) = ¼, ½ have logits ln 3, 0 and −ln 3, 0: each mean is of two logarithms of fractions."""
    real, fake = torch.tensor([LN3, 0.0]), torch.tensor([-LN3, 0.0])
    # −½(ln ¾ + ln ½) − ½(ln ¾ + ln ½) = ln 8/3
    assert discriminator_loss(real, fake).item() == pytest.approx(math.log(8 / 3))
    # −½(ln ¼ + ln ½) = ½ ln 8
    assert nonsaturating_generator_loss(fake).item() == pytest.approx(1.5 * LN2)
    # ½(ln ¾ + ln ½) = ½ ln ⅜
    assert saturating_generator_loss(fake).item() == pytest.approx(0.5 * math.log(3 / 8))


def test_a_discriminator_that_cannot_tell_costs_ln_4() -> None:
    """At D = ½ everywhere the value of the game is −log 4, and the two generator losses are ± log 2."""
    undecided = torch.zeros(7)
    assert discriminator_loss(undecided, undecided).item() == pytest.approx(LN4)
    assert nonsaturating_generator_loss(undecided).item() == pytest.approx(LN2)
    assert saturating_generator_loss(undecided).item() == pytest.approx(-LN2)


@given(real=logits, fake=logits)
def test_losses_equal_the_naive_formulas(real: Tensor, fake: Tensor) -> None:
    """In float64, where σ has not rounded to 0 or 1 yet, the equations of the paper give the same numbers."""
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
    torch.testing.assert_close(
        discriminator_loss(real, fake), -(torch.log(d_real).mean() + torch.log(1 - d_fake).mean()), rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(nonsaturating_generator_loss(fake), -torch.log(d_fake).mean(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(saturating_generator_loss(fake), torch.log(1 - d_fake).mean(), rtol=1e-7, atol=1e-9)


def gradient(loss: Callable[[Tensor], Tensor], *values: float) -> list[float]:
    """dloss/dlogit for float32 logits."""
    x = torch.tensor(values, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(x), x)
    row: list[float] = slope.tolist()
    return row


def test_extreme_logits_keep_finite_losses_and_gradients() -> None:
    """Where the sigmoid has long rounded to 0 or 1, the loss is the logit itself and D still hears what is wrong."""
    wrong = torch.tensor([-1e4]), torch.tensor([1e4])
    right = torch.tensor([1e4]), torch.tensor([-1e4])
    assert discriminator_loss(*wrong).item() == pytest.approx(2e4)
    assert discriminator_loss(*right).item() == 0
    assert gradient(lambda x: discriminator_loss(x[:1], x[1:]), -1e4, 1e4) == [-1, 1]
    assert gradient(lambda x: discriminator_loss(x[:1], x[1:]), 1e4, -1e4) == [0, 0]


def test_only_the_nonsaturating_loss_teaches_a_generator_that_is_seen_through() -> None:
    """§3: where D is sure that the samples are fake, log(1 − D) is flat and −log D has its full slope."""
    assert gradient(nonsaturating_generator_loss, -1e4, 0.0, 1e4) == pytest.approx([-1 / 3, -1 / 6, 0])
    assert gradient(saturating_generator_loss, -1e4, 0.0, 1e4) == pytest.approx([0, -1 / 6, -1 / 3])


def test_both_generator_losses_have_the_same_minimum() -> None:
    """Both fall as D is fooled more: they share a fixed point and differ in the strength of the gradient."""
    for loss in (nonsaturating_generator_loss, saturating_generator_loss):
        assert all(slope < 0 for slope in gradient(loss, -5.0, -1.0, 0.0, 1.0, 5.0))


def test_the_optimal_discriminator_is_the_ratio_of_densities() -> None:
    """Proposition 1: D trained on a known pair of distributions ends at p_data / (p_data + p_g) in every state.

    Over a discrete pair the expectation is exact: a state counts as often as its share of the rows. The loss is then
    −C(G) = log 4 − 2·JSD (theorem 1).
    """
    p_data, p_g = torch.tensor([1, 2, 5, 8]), torch.tensor([8, 4, 2, 2])
    table = torch.zeros(4, requires_grad=True)  # D's logit in each state
    real, fake = torch.arange(4).repeat_interleave(p_data), torch.arange(4).repeat_interleave(p_g)
    optimiser = torch.optim.LBFGS([table], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = discriminator_loss(table[real], table[fake])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]

    data, g = p_data / p_data.sum(), p_g / p_g.sum()
    torch.testing.assert_close(torch.sigmoid(table.detach()), data / (data + g), atol=1e-4, rtol=0)
    middle = (data + g) / 2
    divergence = ((data * (data / middle).log()).sum() + (g * (g / middle).log()).sum()) / 2
    value = -discriminator_loss(table[real], table[fake]).item()
    assert value == pytest.approx(-LN4 + 2 * divergence.item(), abs=1e-5)


def test_equal_distributions_leave_nothing_to_tell() -> None:
    """Where p_g = p_data no logits beat D = ½: the gradient is zero there and the value is −log 4."""
    table = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 1, 1, 2, 2, 2])
    loss = discriminator_loss(table[rows], table[rows])
    (slope,) = torch.autograd.grad(loss, table)
    assert loss.item() == pytest.approx(LN4)
    torch.testing.assert_close(slope, torch.zeros(3, dtype=torch.float64), atol=1e-15, rtol=0)


def test_the_hinge_losses_of_two_rows_are_those_on_paper() -> None:
    """D hears of real logits under 1 and of generated ones over −1, and G of every one."""
    real, fake = torch.tensor([0.25, 3.0]), torch.tensor([-0.5, -7.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0.75 + 0) / 2 + (0.5 + 0) / 2)
    assert hinge_generator_loss(fake).item() == pytest.approx(3.75)
    assert gradient(lambda x: hinge_discriminator_loss(x[:2], x[2:]), 0.25, 3.0, -0.5, -7.0) == [-0.5, 0, 0.5, 0]


def test_the_relativistic_losses_judge_pairs() -> None:
    """Two pairs with d(x) − d(G(z)) = ln 3 and −ln 3: the real one is known with ¾ and ¼, for D and for G."""
    real, fake = torch.tensor([5 + LN3, 0.0]), torch.tensor([5.0, LN3])
    expected = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert relativistic_discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert relativistic_generator_loss(real, fake).item() == pytest.approx(expected)
    apart = torch.tensor([3.0, 3.0]), torch.tensor([-3.0, -3.0])
    assert relativistic_discriminator_loss(*apart).item() == pytest.approx(0, abs=0.01)
    assert relativistic_generator_loss(*apart).item() == pytest.approx(6, abs=0.01)
    # Swapping two rivals changes what a pair says: rows are pairs, and not two heaps.
    assert relativistic_discriminator_loss(real, fake.flip(0)).item() != pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_every_game_pulls_its_players_apart(name: str) -> None:
    """D's loss falls where real logits rise and generated ones fall; G's falls where generated logits rise."""
    game = LOSSES[name]
    real, fake = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.4])
    slopes = gradient(lambda x: game.discriminator(x[:2], x[2:]), *real.tolist(), *fake.tolist())
    assert all(slope < 0 for slope in slopes[:2])
    assert all(slope > 0 for slope in slopes[2:])
    assert all(slope < 0 for slope in gradient(lambda x: game.generator(real, x), *fake.tolist()))
    in_g = gradient(lambda x: game.generator(x, fake) + 0 * x.sum(), *real.tolist())
    assert any(in_g) == game.paired


def conv_discriminator(seed: int) -> ConvDiscriminator:
    """A small D in float64, with classes, whose every weight counts."""
    spec = ConvDiscriminatorSpec(width=4, narrowest=4, blocks=1, group=2)
    net = ConvDiscriminator(spec, ImageSpec(channels=1, height=16, width=16), 2).double()
    rng = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.4, generator=rng)
    return net


def test_the_penalty_is_half_the_mean_square_of_finite_differences() -> None:
    """Every pixel of every image moved by a hair, both ways: the slopes, squared and summed, are the penalty."""
    net, rng = conv_discriminator(0), torch.Generator().manual_seed(1)
    images = torch.rand(3, 1, 16, 16, generator=rng, dtype=torch.float64, requires_grad=True)
    labels, hair = torch.tensor([0, 1, 1]), 1e-6
    got = gradient_penalty(net(images, labels), images)
    squares = 0.0
    with torch.no_grad():
        for image, label in zip(images, labels, strict=True):
            moves = hair * torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
            slopes = (net(image + moves, label.expand(256)) - net(image - moves, label.expand(256))) / (2 * hair)
            squares += float(slopes.square().sum())
    assert got.item() > 1e-4
    assert got.item() == pytest.approx(squares / (2 * 3), rel=1e-5)  # a kink of D may lie within a hair


def test_the_penalty_teaches_d_what_finite_differences_say() -> None:
    """Its gradient by D's weights, through the second derivative, is the slope of the penalty itself."""
    net, rng = conv_discriminator(2), torch.Generator().manual_seed(3)
    images = torch.rand(2, 1, 16, 16, generator=rng, dtype=torch.float64, requires_grad=True)
    labels, hair = torch.tensor([1, 0]), 1e-6
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1 and not name.startswith("class_head")}
    slopes = torch.autograd.grad(gradient_penalty(net(images, labels), images), list(weights.values()))
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        direction = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            weight.data += sign * hair * direction
            values.append(gradient_penalty(net(images, labels), images).item())
            weight.data -= sign * hair * direction
        assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * hair), rel=1e-4), name
