"""The losses against numbers worked out by hand, the naive formulas, extreme logits, and the paper's theory."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.losses import (
    discriminator_loss,
    nonsaturating_generator_loss,
    saturating_generator_loss,
)

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
