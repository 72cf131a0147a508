"""The nets against naive loops and NumPy, dropout's mean, labels, and the numbers of the paper's experiment."""

from typing import TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.networks import Maxout, MaxoutDiscriminator, MLPGenerator, build_networks, drop
from models.spec import PRESETS, ImageSpec, LatentSpec, MaxoutDiscriminatorSpec, MLPGeneratorSpec, MLPSpec

IMAGE = ImageSpec(channels=3, height=4, width=5)
NETWORK = MLPSpec(
    family="mlp",
    generator=MLPGeneratorSpec(hidden=(9, 7)),
    discriminator=MaxoutDiscriminatorSpec(units=(6, 5), pieces=3),
)


N = TypeVar("N", bound=nn.Module)


def filled(net: N, seed: int = 0) -> N:
    """A net off the meta device, with normal weights of this seed."""
    rng = torch.Generator().manual_seed(seed)
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        parameter.data.normal_(generator=rng)
    return net.requires_grad_(requires_grad=False)


def nets(classes: int = 0) -> tuple[MLPGenerator, MaxoutDiscriminator]:
    generator, discriminator = build_networks(NETWORK, IMAGE, LatentSpec(dim=6, distribution="normal"), classes)
    assert isinstance(generator, MLPGenerator)
    assert isinstance(discriminator, MaxoutDiscriminator)
    return filled(generator), filled(discriminator, 1)


def numbers(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(inputs=st.integers(1, 5), units=st.integers(1, 4), pieces=st.integers(1, 4), seed=st.integers(0, 1000))
def test_maxout_equals_a_loop_over_units_and_pieces(inputs: int, units: int, pieces: int, seed: int) -> None:
    """Every unit is the largest of its own pieces, each a plain dot product and a bias."""
    layer = filled(Maxout(inputs, units, pieces), seed)
    x = numbers(3, inputs, seed=seed + 1)
    got = layer(x)
    weight, bias = layer.linear.weight.view(units, pieces, inputs), layer.linear.bias.view(units, pieces)
    for row in range(3):
        for unit in range(units):
            values = [
                sum(float(weight[unit, k, i]) * float(x[row, i]) for i in range(inputs)) + float(bias[unit, k])
                for k in range(pieces)
            ]
            assert float(got[row, unit]) == pytest.approx(max(values), abs=1e-5)


def test_the_generator_equals_its_equations_in_numpy() -> None:
    """Two ReLU layers and a sigmoid, written out in float64; the pixels come in channel, row, column order."""
    generator, _ = nets()
    z = numbers(4, 6)
    state = {name: tensor.double().numpy() for name, tensor in generator.state_dict().items()}
    x = z.double().numpy()
    for layer in ("layers.0", "layers.1"):
        x = np.maximum(x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"], 0)
    pixels = 1 / (1 + np.exp(-(x @ state["output.weight"].T + state["output.bias"])))
    np.testing.assert_allclose(generator(z).numpy(), pixels.reshape(4, 3, 4, 5), atol=1e-5)


def test_the_discriminator_equals_its_equations_in_numpy() -> None:
    """Two maxout layers and one linear logit, written out in float64, without dropout."""
    _, discriminator = nets()
    images = numbers(4, *IMAGE.shape)
    state = {name: tensor.double().numpy() for name, tensor in discriminator.state_dict().items()}
    x = images.double().numpy().reshape(4, -1)
    for layer in ("layers.0.linear", "layers.1.linear"):
        x = (x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).reshape(4, -1, 3).max(axis=2)
    logits = x @ state["output.weight"].T + state["output.bias"]
    got = discriminator(images)
    assert got.shape == (4,)
    np.testing.assert_allclose(got.numpy(), logits[:, 0], rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_mean() -> None:
    """What is kept is divided by the chance to be kept: 0 or 1/keep, and 1 on average."""
    dropped = drop(torch.ones(200_000), 0.8, torch.Generator().manual_seed(3))
    assert set(dropped.tolist()) == {0.0, 1.25}
    assert dropped.mean().item() == pytest.approx(1, abs=0.005)  # its deviation is 0.5/√200,000 ≈ 0.001


def test_keeping_everything_is_the_identity() -> None:
    """keep = 1 changes no bit."""
    x = numbers(10, 10)
    assert torch.equal(drop(x, 1.0, torch.Generator().manual_seed(0)), x)


def test_dropout_needs_a_generator_and_repeats_with_its_seed() -> None:
    """Without one D is a plain function, in train mode too; with one, the masks are those of the seed."""
    _, discriminator = nets()
    images = numbers(16, *IMAGE.shape)
    discriminator.train()
    assert torch.equal(discriminator(images), discriminator(images))
    first, again, other = (discriminator(images, None, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, discriminator(images))


def test_dropout_acts_on_the_input_and_on_every_hidden_layer() -> None:
    """The paper's D keeps 8 of 10 inputs and half of each later layer's: as many masks as layers, of those chances."""
    _, discriminator = nets()
    assert discriminator.keep == (0.8, 0.5, 0.5)
    images = numbers(2, *IMAGE.shape)
    rng = torch.Generator().manual_seed(11)
    x = images.flatten(1)
    for layer, keep in zip((*discriminator.layers, discriminator.output), discriminator.keep, strict=True):
        x = layer(drop(x, keep, rng))
    assert torch.equal(discriminator(images, None, torch.Generator().manual_seed(11)), x[:, 0])


def test_labels_stand_one_hot_beside_the_input() -> None:
    """A conditional net is the plain one on an input that ends with a 1 at the label's place."""
    generator, discriminator = nets(classes=3)
    labels = torch.tensor([2, 0])
    marks = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    z, images = numbers(2, 6), numbers(2, *IMAGE.shape)
    plain = MLPGenerator(NETWORK.generator, IMAGE, 9, 0)
    plain.load_state_dict(generator.state_dict())
    assert torch.equal(generator(z, labels), plain(torch.cat([z, marks], dim=1)))
    assert discriminator.layers[0].linear.in_features == IMAGE.size + 3  # type: ignore[union-attr]
    assert not torch.equal(discriminator(images, labels), discriminator(images, labels.flip(0)))


@pytest.mark.parametrize("classes", [0, 3])
def test_labels_are_refused_where_they_do_not_belong(classes: int) -> None:
    """Nets with classes need labels, and nets without take none: neither guesses."""
    generator, discriminator = nets(classes)
    labels = None if classes else torch.tensor([0, 1])
    with pytest.raises(ValueError, match="labels are needed by nets with classes"):
        generator(numbers(2, 6), labels)
    with pytest.raises(ValueError, match="labels are needed by nets with classes"):
        discriminator(numbers(2, *IMAGE.shape), labels)


def test_the_paper_preset_has_the_numbers_of_the_published_experiment() -> None:
    """Layer by layer and number by number: nets, dropout, losses, noise, batch, schedules, initial weights."""
    options = PRESETS["mlp-paper"]
    generator, discriminator = build_networks(
        options.network, ImageSpec(channels=1, height=28, width=28), options.latent
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    assert shapes["layers.0.weight"] == (1200, 100)
    assert shapes["layers.1.weight"] == (1200, 1200)
    assert shapes["output.weight"] == (784, 1200)
    assert sum(p.numel() for p in generator.parameters()) == 2_503_984
    shapes = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    assert shapes["layers.0.linear.weight"] == (240 * 5, 784)
    assert shapes["layers.1.linear.weight"] == (240 * 5, 240)
    assert shapes["output.weight"] == (1, 240)
    assert sum(p.numel() for p in discriminator.parameters() if p.dim() > 1) == 1_229_040
    assert sum(p.numel() for p in discriminator.parameters() if p.dim() == 1) == 2_401
    assert discriminator.keep == (0.8, 0.5, 0.5)
    assert (options.latent.dim, options.latent.distribution) == (100, "uniform")
    assert (options.batch_size, options.d_steps, options.update) == (100, 1, "simultaneous")
    assert (options.generator_loss, options.d_loss_scale) == ("nonsaturating", 0.5)
    assert (options.generator_init, options.discriminator_init) == (0.05, 0.005)
    assert options.output_bias_from_data
    assert options.ema_half_life_images == 0
    for optimiser in (options.generator_optimiser, options.discriminator_optimiser):
        assert optimiser.model_dump() == {
            "kind": "sgd",
            "lr": 0.1,
            "decay": 1.000004,
            "min_lr": 1e-6,
            "momentum": 0.5,
            "final_momentum": 0.7,
            "momentum_epochs": 250,
        }
