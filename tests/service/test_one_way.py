"""From training to serving an image is the same: what is scored, published and calibrated is what clients get."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.bundle import read_bundle
from models.data.load import Dataset, load_dataset
from models.evaluation.calibration import fit_calibration
from models.inference.noise import sampled_labels
from models.inference.pixels import UInt8
from models.spec import PRESETS
from models.training import publishing, trainer
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
IMAGES = 1_500  # of so many a few have pixels half-way between two levels, which other sums would turn


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="calibrations are fitted with the train extra")
    return load_dataset(str(ROOT / "tests" / "data" / "mnist-2000.npz"), None, seed=0)


def trained(name: str, digits: Dataset) -> trainer.State:
    """A run on the digits that has come as far as an embedded bundle."""
    bundle = read_bundle(ROOT / "bundles" / name)
    network, latent = bundle.manifest.network, bundle.manifest.latent.model_copy(update={"label_frequencies": None})
    options = PRESETS["conv-ns" if name == "mnist" else "mlp-paper"]
    options = options.model_copy(update={"network": network, "latent": latent, "ema_half_life_images": 0})
    state = trainer.State(options, digits, torch.device("cpu"))
    state.generator.load_state_dict(bundle.generator.state_dict())
    state.discriminator.load_state_dict(bundle.discriminator.state_dict())
    state.best = publishing.present(state, publishing.Score(0.0, {}))
    return state


def body_of(images: UInt8) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


async def logits_of(client: httpx.AsyncClient, images: UInt8, labels: Any) -> torch.Tensor:
    query = {} if labels is None else {"labels": ",".join(map(str, labels))}
    reply = await client.post(
        "/discriminate", params=query, content=body_of(images), headers={"Content-Type": "application/x-npy"}
    )
    return torch.tensor([result["logit"] for result in reply.json()["results"]], dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
async def test_what_is_scored_is_what_clients_get(tmp_path: Path, start: Any, digits: Dataset, name: str) -> None:
    """The images that a run scores, those of the bundle that it publishes and /sample's replies, byte for byte.

    And the calibration is the one that would be fitted to what /discriminate says.
    """
    state = trained(name, digits)
    bundle = publishing.publish(state, digits, tmp_path / name, name, {}, rule="best")
    drawn = bundle.draw(IMAGES)
    np.testing.assert_array_equal(publishing.draw(state, IMAGES), drawn)
    async with start(create_app(Settings(bundles=tmp_path, device="cpu"))) as client:
        reply = await client.get(f"/sample?count={IMAGES}&seed=0&format=npy")
        np.testing.assert_array_equal(np.load(io.BytesIO(reply.content)), drawn)
        real, count = digits.validation, len(digits.validation.images)
        asked = sampled_labels(bundle.manifest.latent, 0, 0, count)
        logits = (
            await logits_of(client, real.images, None if asked is None else real.labels),
            await logits_of(client, drawn[:count], asked),
        )
    assert fit_calibration(*logits) == bundle.manifest.calibration
