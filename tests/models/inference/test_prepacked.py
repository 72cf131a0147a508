"""Prepacked nets compute what the nets compute, in another order of the sums and without a copy of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.bundle import Bundle, read_bundle
from models.inference.noise import draw_latents
from models.inference.prepacked import HalfLayer, PrepackedLinear, PrepackedMaxout, find_kernels, prepacked
from models.networks import Maxout

EMBEDDED = Path(__file__).parents[3] / "bundles"


@pytest.fixture(scope="module", params=["mnist-mlp", "mnist"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return read_bundle(EMBEDDED / request.param)


def test_prepacked_nets_agree_within_one_grey_level(bundle: Bundle) -> None:
    """Both nets of the embedded bundles: pixels, logits, and what the class head says."""
    names, fast = bundle.manifest.labels, bundle.prepacked()
    labels = None if names is None else torch.arange(64) % len(names)
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 3, 0, 64))
    with torch.inference_mode():
        images = bundle.generator(latents, labels)
        assert (fast.generator(latents, labels) - images).abs().max() < 1 / 255
        torch.testing.assert_close(
            fast.discriminator(images, labels), bundle.discriminator(images, labels), rtol=1e-4, atol=1e-4
        )
        if labels is not None:
            found = [net.judge(images, torch.full((64,), -1))[1] for net in (fast.discriminator, bundle.discriminator)]
            assert torch.equal(*found)


def test_images_from_python_are_those_of_the_prepacked_nets(bundle: Bundle) -> None:
    """What a script draws is what the service gives, whichever of the two nets the bundle holds."""
    np.testing.assert_array_equal(bundle.draw(5, seed=7), bundle.prepacked().draw(5, seed=7))


def test_the_given_net_stays_as_it_was() -> None:
    """Only linear layers are replaced, in a twin that shares all else, and prepacking twice changes nothing more."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    twin = prepacked(net)
    assert isinstance(net[2], nn.Linear)
    assert isinstance(twin[2], PrepackedLinear)
    assert twin[0].weight is net[0].weight
    assert twin[2].bias is net[2].bias
    assert prepacked(twin)[2].weight is twin[2].weight


@pytest.mark.parametrize("half", [False, True])
def test_prepacking_twice_does_it_once_and_needs_no_gradients(bundle: Bundle, *, half: bool) -> None:
    """Numbers can be taken from what either net says outside of inference mode too."""
    once = bundle.prepacked(half=half)
    twice = once.prepacked(half=half)
    for net, again in ((once.generator, twice.generator), (once.discriminator, twice.discriminator)):
        assert [type(module) for module in net.modules()] == [type(module) for module in again.modules()]
        assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("half", [False, True])
def test_maxout_of_another_order_is_the_same_maxout(*, half: bool) -> None:
    """Which of a unit's linear functions are neighbours makes no difference to the largest."""
    layer = Maxout(inputs=7, units=6, pieces=5)
    with torch.inference_mode():
        rows = torch.randn(9, 7)
        allowed = 0.05 if half else 1e-6
        torch.testing.assert_close(PrepackedMaxout(layer, half=half)(rows), layer(rows), rtol=allowed, atol=allowed)


def test_in_bfloat16_both_nets_say_nearly_the_same(bundle: Bundle) -> None:
    """Each layer's numbers have 8 significant bits; what comes of it are a few grey levels, and other bits."""
    names, half = bundle.manifest.labels, bundle.prepacked(half=True)
    labels = None if names is None else torch.arange(64) % len(names)
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 3, 0, 64))
    with torch.inference_mode():
        images = bundle.generator(latents, labels)
        off = 255 * (half.generator(latents, labels) - images).abs()
        assert off.max() > 0
        assert off.mean() < 1
        torch.testing.assert_close(
            half.discriminator(images, labels), bundle.discriminator(images, labels), rtol=0.05, atol=0.1
        )
    layers = [module for module in half.generator.modules() if isinstance(module, HalfLayer)]
    convolutions = [module for module in bundle.generator.modules() if isinstance(module, nn.Conv2d)]
    linears = [module for module in bundle.generator.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == len(convolutions) + len(linears)
    assert {layer.layer.weight.dtype for layer in layers} == {torch.bfloat16}


def test_only_what_the_kernels_can_do_is_prepacked() -> None:
    """A layer in another precision, or on another device, stays as it is."""
    net = nn.Sequential(nn.Linear(4, 2, dtype=torch.float64), nn.Linear(4, 2, device="meta"))
    assert [type(layer) for layer in prepacked(net)] == [nn.Linear, nn.Linear]


def imprecise(weight: torch.Tensor, _: int) -> torch.Tensor:
    return weight + 1


OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


@pytest.mark.parametrize(
    "operators",
    [
        *(pytest.param({gone: None}, id=f"no {gone}") for gone in OPERATORS),
        pytest.param({"_reorder_linear_weight": imprecise}, id="another meaning"),
    ],
)
def test_where_torch_has_other_names_the_plain_layers_serve(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, operators: dict[str, object]
) -> None:
    """Private names come and go: then every layer is torch's own, in both precisions, and images are the same."""
    expected = bundle.draw(20, seed=7).astype(int)
    found = {name: getattr(torch.ops.mkldnn, name) for name in OPERATORS} | operators
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{name: one for name, one in found.items() if one}))
    find_kernels.cache_clear()
    try:
        for half in (False, True):
            nets = bundle.prepacked(half=half)
            layers = [*nets.generator.modules(), *nets.discriminator.modules()]
            assert not any(isinstance(layer, PrepackedLinear) for layer in layers)
        assert np.abs(bundle.draw(20, seed=7) - expected).max() <= 1
    finally:
        monkeypatch.undo()
        find_kernels.cache_clear()
