"""Batches for torch: nobody gets another's, and the workers' number changes nothing."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gan_client import Client, UnknownBundleError
from gan_client.dataset import ImageBatches


def some(batches: Any, count: int) -> list[Any]:
    """The first batches of an iterable."""
    iterator: Iterator[Any] = iter(batches)
    return list(islice(iterator, count))


def expected(live: Any, count: int, **options: Any) -> torch.Tensor:
    """The same images in one array, as torch has them."""
    with Client(live.url) as client:
        return torch.from_numpy(np.moveaxis(client.sample_array(count, 3, **options), 3, 1).copy())


def test_batches_are_the_images_of_the_seed(live: Any) -> None:
    """In order, channels first."""
    batches = some(ImageBatches(live.url, 70, seed=3, bundle="rgb", first_index=9), 3)
    assert [batch.shape for batch in batches] == [(70, 3, 6, 10)] * 3
    assert torch.equal(torch.cat(batches), expected(live, 210, bundle="rgb", first_index=9))


def test_ranks_share_the_images_without_overlap(live: Any) -> None:
    """The ranks' batches in turn are the seed's."""
    ranks = [some(ImageBatches(live.url, 5, seed=3, rank=rank, world_size=3), 4) for rank in range(3)]
    in_turn = [ranks[rank][number] for number in range(4) for rank in range(3)]
    assert torch.equal(torch.cat(in_turn), expected(live, 60))


def test_labels_take_turns(live: Any) -> None:
    """Each batch has those of its images."""
    options: dict[str, Any] = {"seed": 3, "labels": [2, 0], "bundle": "cond"}
    batches = some(ImageBatches(live.url, 5, rank=1, world_size=2, **options), 2)
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == [0, 2, 0, 2, 0, 0, 2, 0, 2, 0]
    assert labels.dtype == torch.int64
    whole = expected(live, 20, bundle="cond", labels=[2, 0] * 10)
    assert torch.equal(images, torch.cat([whole[5:10], whole[15:20]]))


def test_a_batch_may_be_larger_than_a_request(live: Any, live_server: Any, tiny_settings: Any) -> None:
    """It is put together again."""
    with live_server(tiny_settings(max_count=10)).running() as server:
        (batch,) = some(ImageBatches(server.url, 35, seed=3), 1)
        assert torch.equal(batch, expected(live, 35))


def test_a_mistake_is_found_where_the_batches_are_made(live: Any) -> None:
    """Not in a worker, an hour later."""
    with pytest.raises(UnknownBundleError):
        ImageBatches(live.url, bundle="none")
    with pytest.raises(ValueError, match="rank 3 of 3"):
        ImageBatches(live.url, rank=3, world_size=3)


@pytest.mark.slow
def test_workers_change_nothing(live: Any) -> None:
    """A DataLoader gives a rank's batches in their order, whichever of its processes draws them."""
    batches = ImageBatches(live.url, 5, seed=3, rank=1, world_size=2)
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert torch.equal(torch.stack(some(loader, 7)), torch.stack(some(batches, 7)))
