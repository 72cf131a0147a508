"""A real GPU: the same bits in any batch and on both threads, no growing memory, the CPU's noise."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.bundle import Bundle, write_bundle
from models.networks import build_networks
from models.spec import PRESETS, ImageSpec
from service.engine.batching.batch import BatchSlice
from service.engine.device import Precision
from service.engine.engine import Engine
from service.engine.gpu.cuda_graphs import GraphedNet, GraphRecorder
from service.engine.gpu.noise import image_keys
from service.engine.payloads import DiscriminatePayload, SamplePayload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(params=["tiny", "rgb", "cond", "mnist", "conv rgb"])
def folder(
    request: pytest.FixtureRequest, tiny_bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bundle of each kind, convolutions among them, in a process in which nothing has failed to be recorded."""
    monkeypatch.setattr(GraphRecorder, "works", True)
    if request.param == "mnist":
        return Path(__file__).parents[4] / "bundles" / "mnist"
    if request.param != "conv rgb":
        return tiny_bundles[request.param].folder
    options, image = PRESETS["conv-ns"], ImageSpec(channels=3, height=32, width=32)
    first, second = (
        {name: 0.05 * torch.randn(tensor.shape) for name, tensor in net.state_dict().items()}
        for net in build_networks(options.network, image, options.latent)
    )
    facts = dict.fromkeys(("labels", "calibration")) | {"training": {}, "evaluation": {}}
    facts |= {"name": "conv", "created": "2026-01-02T03:04:05Z", "image": image, "latent": options.latent}
    write_bundle(tmp_path / "conv", facts | {"network": options.network}, first, second, np.zeros((4, 4, 3), np.uint8))
    return tmp_path / "conv"


def labels_of(one: Bundle, count: int) -> Any:
    names = one.manifest.labels
    return None if names is None else np.arange(count) % len(names)


def test_a_gpu_gives_rows_the_same_bits_in_any_batch_and_its_memory_stays(folder: Path) -> None:
    """Alone and in the largest batch; a thousand batches later as much memory is reserved as before."""
    engine = Engine("cuda", exact=True, cuda_graphs=True)
    one = engine.load(folder, {})
    assert isinstance(one.sample.tiles.run.net, GraphedNet)  # type: ignore[attr-defined]
    assert isinstance(one.discriminate.tiles.run.net, GraphedNet)  # type: ignore[attr-defined]
    most = one.sample.most_rows
    labels = labels_of(one, most)
    images = SamplePayload(1, 0, labels, 1.0)
    whole = one.sample.run([BatchSlice(images, 0, most)])
    judged = one.discriminate.run([BatchSlice(DiscriminatePayload(whole, labels), 0, most)])
    before = engine.memory()["reserved"]
    for n in range(1000):
        row = n * most // 1000
        np.testing.assert_array_equal(one.sample.run([BatchSlice(images, row, row + 1)])[0], whole[row])
        alone = one.discriminate.run([BatchSlice(DiscriminatePayload(whole, labels), row, row + 1)])
        np.testing.assert_array_equal(alone[0], judged[row])
    assert engine.memory()["reserved"] == before


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpus_two_threads_do_not_disturb_each_other(folder: Path, *, cuda_graphs: bool) -> None:
    """Batches of both at once, each on a stream of its own: every image has the bits that it has alone."""
    engine = Engine("cuda", exact=True, cuda_graphs=cuda_graphs)
    one = engine.load(folder, {})
    labels = labels_of(one, 5000)
    payload = SamplePayload(1, 0, labels, 1.0)
    whole = one.sample.run([BatchSlice(payload, 0, 5000)])

    async def story() -> None:
        slices = [
            BatchSlice(payload, start, start + rows)
            for rows in (1, 5, 64, 300, 700, 4096)
            for start in range(0, 900, 9)
        ]
        runs = [engine.threads[n % 2].run(one.sample.run, [part]) for n, part in enumerate(slices)]
        for part, images in zip(slices, await asyncio.gather(*runs), strict=True):
            np.testing.assert_array_equal(images, whole[part.start : part.stop])

    asyncio.run(story())
    for thread in engine.threads:
        thread.stop()


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_gpus_own_noise_is_the_cpus(folder: Path, *, cuda_graphs: bool) -> None:
    """But for last bits, which a grey level may show."""
    free = Engine("cuda", exact=False, cuda_graphs=cuda_graphs).load(folder, {})
    exact = Engine("cpu", exact=True).load(folder, {})
    assert free.sample.draw is image_keys
    labels = labels_of(exact, 300)
    part = BatchSlice(SamplePayload(2**53 - 1, 5, labels, 0.7), 0, 300)
    ours, theirs = (one.sample.run([part]).astype(int) for one in (free, exact))
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_of_a_gpu_say_how_far_they_are_off(
    tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture, precision: Precision
) -> None:
    """As on a CPU."""
    caplog.set_level("INFO")
    Engine("cuda", exact=True, precision=precision).load(tiny_bundles["cond"].folder, {})
    assert f"cond in {precision}: 64 images differ from float32's by" in caplog.text
