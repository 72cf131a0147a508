"""Nets as devices run them fastest compute what the nets' modules compute, whatever the family."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models.bundle import Bundle, read_bundle
from models.inference import onnx_nets
from models.inference.bfloat16 import HalfLayer, in_bfloat16
from models.inference.fast_nets import Verdicts, fast_discriminator, fast_encoder, fast_generator
from models.inference.noise import draw_latents
from models.inference.onnx_nets import discriminator_graph, generator_graph
from models.inference.pixels import grey_levels
from models.networks import Discriminator, Encoder, Generator, build_networks
from models.spec import PRESETS, EncoderSpec, ImageSpec

EMBEDDED = Path(__file__).parents[3] / "bundles"
Kind = tuple[str, ImageSpec, int]  # preset, images, classes
Nets = tuple[Generator, Discriminator]
Rows = tuple[torch.Tensor, torch.Tensor | None]

# Sides whose stages double, and sides whose stages don't; grey and colour; with classes and without.
KINDS: list[Kind] = [
    ("mlp-paper", ImageSpec(channels=1, height=9, width=9), 0),
    ("mlp-paper", ImageSpec(channels=3, height=8, width=8), 4),
    ("conv-ns", ImageSpec(channels=1, height=28, width=28), 10),
    ("conv-ns", ImageSpec(channels=3, height=25, width=25), 0),
    ("conv-ns", ImageSpec(channels=1, height=37, width=37), 2),
]
ROWS = 20


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]} {kind[1].shape} {kind[2]}")
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def nets(kind: Kind) -> Nets:
    """Both nets of a kind with random weights and biases."""
    preset, image, classes = kind
    rng = torch.Generator().manual_seed(0)
    built = build_networks(PRESETS[preset].network, image, PRESETS[preset].latent, classes)
    for net in built:
        net.to_empty(device="cpu").requires_grad_(requires_grad=False)
        for weight in net.parameters():
            weight.normal_(0, weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.1, generator=rng)
    return built


@pytest.fixture(scope="module")
def rows(kind: Kind) -> Rows:
    """Latents for the generator, and labels where it has classes."""
    preset, _, classes = kind
    latents = torch.from_numpy(draw_latents(PRESETS[preset].latent, 3, 0, ROWS))
    return latents, torch.arange(ROWS) % classes if classes else None


def test_no_family_is_left_out() -> None:
    """A new one needs graphs, which are compared only if a kind of it is among these."""
    assert {PRESETS[preset].network.family for preset, *_ in KINDS} == {one.network.family for one in PRESETS.values()}


@torch.inference_mode()
def test_a_generator_of_any_family_makes_the_same_images(nets: Nets, rows: Rows) -> None:
    """Pixels agree to the last bits, and levels are the pixels rounded."""
    generator, _ = nets
    fast = fast_generator(generator)
    pixels = fast(*rows)
    torch.testing.assert_close(pixels, generator(*rows), rtol=0, atol=1e-5)
    assert torch.equal(fast.levels(*rows), grey_levels(pixels))


def test_nets_of_two_gibibytes_are_run_by_torch(nets: Nets, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph holds so much. Here the bound is lower, and the nets are exactly what torch computes."""
    monkeypatch.setattr(onnx_nets, "MOST_WEIGHT_BYTES", 0)
    generator, discriminator = nets
    latents, labels = rows
    pixels = generator(latents, labels)
    assert torch.equal(fast_generator(generator)(latents, labels), pixels)
    assert torch.equal(fast_discriminator(discriminator)(pixels, labels), Verdicts(discriminator)(pixels, labels))


def test_a_graph_holds_less_than_two_gibibytes() -> None:
    """The weights are counted, whether or not memory holds them."""
    assert onnx_nets.fits_graph(nn.Linear(2**16, 2**12, device="meta"))
    assert not onnx_nets.fits_graph(nn.Linear(2**16, 2**13, device="meta"))


@torch.inference_mode()
def test_a_discriminator_of_any_family_says_the_same(nets: Nets, rows: Rows) -> None:
    """Logits, and with classes the labels that were unknown, and the class head's scores."""
    generator, discriminator = nets
    latents, labels = rows
    pixels = generator(latents, labels)
    asked = None if labels is None else labels.where(torch.arange(ROWS) % 2 == 0, -1)
    said, plain = fast_discriminator(discriminator)(pixels, asked), Verdicts(discriminator)(pixels, asked)
    torch.testing.assert_close(said, plain, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("shape", "classes"), [((1, 28, 28), 10), ((3, 6, 10), 0), ((4, 37, 15), 2), ((1, 1, 1), 0)], ids=str
)
def test_an_encoder_finds_the_same_codes(
    shape: tuple[int, int, int], classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For images of any shape, with classes and without, and in parts where its values would be too many."""
    torch.manual_seed(0)
    channels, height, width = shape
    image = ImageSpec.model_validate({"channels": channels, "height": height, "width": width})
    net = Encoder(EncoderSpec(width=4, hidden=16), image, 5, classes)
    pixels = torch.rand(ROWS, *shape)
    codes = net(pixels)
    assert codes.shape == (ROWS, 5 + classes)
    torch.testing.assert_close(fast_encoder(net)(pixels), codes, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("models.inference.fast_nets.MOST_NUMBERS", 3 * net.largest)
    torch.testing.assert_close(fast_encoder(net)(pixels), codes, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(onnx_nets, "MOST_WEIGHT_BYTES", 0)
    torch.testing.assert_close(fast_encoder(net)(pixels), codes)


@torch.inference_mode()
def test_a_row_has_the_same_bits_alone_and_among_others(nets: Nets, rows: Rows) -> None:
    """Down to a single row, so that a lone request pays for one image."""
    (latents, labels), fast = rows, fast_generator(nets[0])
    whole = fast(latents, labels)
    verdicts = fast_discriminator(nets[1])
    judged = verdicts(whole, labels)
    for row in range(ROWS):
        place = slice(row, row + 1)
        given = None if labels is None else labels[place]
        assert torch.equal(fast(latents[place], given), whole[place])
        assert torch.equal(verdicts(whole[place], given), judged[place])


def test_the_graphs_are_sound_onnx(nets: Nets) -> None:
    """ONNX's own checker infers every shape and finds nothing wrong, and weights have their modules' names."""
    for graph in (generator_graph(nets[0]), discriminator_graph(nets[1])):
        model = onnx.load_from_string(graph)
        onnx.checker.check_model(model, full_check=True)
        assert {"output.weight", "output.bias"} <= {constant.name for constant in model.graph.initializer}


@pytest.fixture(scope="module", params=["mnist-mlp", "mnist"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return read_bundle(EMBEDDED / request.param)


def test_in_bfloat16_both_nets_say_nearly_the_same(bundle: Bundle) -> None:
    """Each layer's numbers have 8 significant bits; what comes of it are a few grey levels, and other bits."""
    names, generator = bundle.manifest.labels, fast_generator(bundle.generator, half=True)
    labels = None if names is None else torch.arange(64) % len(names)
    latents = torch.from_numpy(draw_latents(bundle.manifest.latent, 3, 0, 64))
    with torch.inference_mode():
        images = bundle.generator(latents, labels)
        off = 255 * (generator(latents, labels) - images).abs()
        assert off.max() > 0
        assert off.mean() < 1
        said, plain = (fast_discriminator(bundle.discriminator, half=half)(images, labels) for half in (True, False))
        torch.testing.assert_close(said[:, 0], plain[:, 0], rtol=0.05, atol=0.1)


def test_a_net_in_bfloat16_leaves_the_given_one_as_it_was() -> None:
    """Linear layers and convolutions are replaced in a twin that shares the rest."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    twin = in_bfloat16(net)
    assert isinstance(net[0], nn.Conv2d)
    assert isinstance(net[3], nn.Linear)
    assert [type(twin[place]) for place in (0, 3)] == [HalfLayer, HalfLayer]
    assert {layer.layer.weight.dtype for layer in twin.modules() if isinstance(layer, HalfLayer)} == {torch.bfloat16}
    assert twin[1].weight is net[1].weight
    np.testing.assert_allclose(twin(torch.ones(1, 1, 2, 2)).detach(), net(torch.ones(1, 1, 2, 2)).detach(), atol=0.05)
