"""There is one way to an image, and what the embedded bundles draw on it stays."""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from models.bundle import Bundle, read_bundle
from models.inference.drawing import draw_images, images_of, logits_of
from models.inference.noise import sampled_labels
from models.inference.pixels import to_pixels
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec

ROOT = Path(__file__).parents[3]
KNOWN = json.loads((ROOT / "tests" / "data" / "embedded-images.json").read_bytes())
KIND = " ".join(
    [
        f"onnxruntime {onnxruntime.__version__}",
        f"torch {torch.__version__}",
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
    ]
)


@pytest.fixture(scope="module", params=["mnist", "mnist-mlp"])
def embedded(request: pytest.FixtureRequest) -> Bundle:
    return read_bundle(ROOT / "bundles" / request.param)


def test_the_embedded_bundles_draw_what_they_always_drew(embedded: Bundle) -> None:
    """A seed means the same images for ever: to the byte on kinds of machines that are known, elsewhere to a level."""
    known = KNOWN["bundles"][embedded.name]
    assert embedded.version == known["version"]
    images = embedded.draw(KNOWN["count"], seed=KNOWN["seed"], first_index=KNOWN["first_index"])
    if KIND in known["sha256"]:
        assert hashlib.sha256(images.tobytes()).hexdigest() == known["sha256"][KIND]
    with np.load(ROOT / "tests" / "data" / "embedded-images.npz") as first:
        expected = first[embedded.name].astype(int)
    assert np.abs(images[: len(expected)] - expected).max() <= 1


def test_a_verdict_is_the_same_alone_and_among_others(embedded: Bundle) -> None:
    """D's logits of bytes, each with its label, are what the plain net says, to the last bits."""
    discriminator, manifest = embedded.discriminator, embedded.manifest
    images, labels = embedded.draw(70), sampled_labels(manifest.latent, 0, 0, 70)
    images.setflags(write=False)  # as those of a decoder are
    logits = logits_of(discriminator, images, labels)
    alone = logits_of(discriminator, images[66:67], None if labels is None else labels[66:67])
    np.testing.assert_array_equal(alone, logits[66:67])
    with torch.inference_mode():
        plain = discriminator(to_pixels(images), None if labels is None else torch.from_numpy(labels))
    np.testing.assert_allclose(logits, plain.numpy(), rtol=1e-4, atol=1e-4)


def test_pixels_that_are_no_numbers_become_no_bytes() -> None:
    """Whatever byte stood for them would pass for an image."""
    options, image = PRESETS["mlp-paper"], ImageSpec(channels=1, height=8, width=8)
    generator, _ = build_networks(options.network, image, options.latent)
    generator.to_empty(device="cpu")
    for parameter in generator.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not numbers"):
        draw_images(generator, options.latent, 3)


def test_drawing_leaves_torch_as_it_was(embedded: Bundle) -> None:
    """Threads and precision are the caller's own again, whether there were images or not."""
    threads, has_tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = True
    try:
        embedded.draw(1)
        with pytest.raises((RuntimeError, ValueError)):
            images_of(embedded.generator, np.zeros((1, 3), np.float32))
        assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == (2, True)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = has_tf32
