"""Endless batches of images for torch's DataLoader. Needs torch: pip install gan-client[torch]."""

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from gan_client.client import Client
from gan_client.core.batches import Rebatcher, shard_spans
from gan_client.core.calls import Drawing, SampleOptions
from gan_client.results import UInt8


class ImageBatches(IterableDataset[Tensor | tuple[Tensor, Tensor]]):
    """Batch after batch for ever: uint8 (batch_size, c, h, w); with `labels` pairs of these and int64 (batch_size,).

    Give it to a DataLoader with `batch_size=None`. Each rank gets batches of its own, and so does each worker; a rank's
    batches are the same, in the same order, with any number of workers. The bundle's version is looked up when the
    object is made. Name it (`mnist@0123456789ab`) where every rank is to have the same.

    Args:
        url, key: As for `Client`.
        batch_size: Images in a batch. All of them are asked for in one request, if the service takes it.
        seed: The images are those of this seed, from `first_index` on.
        labels: Classes by index; they take turns.
        bundle: name, or name@version.
        rank, world_size: Default: those of torch.distributed, where it is in use.
        options: See `SampleOptions`.
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 256,
        *,
        key: str | None = None,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        bundle: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Unpack[SampleOptions],
    ) -> None:
        self._service = url, key
        self._batch_size = batch_size
        self._drawing = Drawing(None, seed, labels, options, endless=True)
        # Asked here, because a worker that is not forked knows nothing of it.
        in_use = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if in_use else 0
        self._ranks = world_size if world_size is not None else torch.distributed.get_world_size() if in_use else 1
        if not 0 <= self._rank < self._ranks:
            raise ValueError(f"rank {self._rank} of {self._ranks}")
        with Client(url, key) as client:
            (part,) = client.parts(self._drawing.pages(bundle, [(0, 1)]))
        self._bundle = part.bundle

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        """The batches of this rank, and of this worker where there are several."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = worker * self._ranks + self._rank  # workers take turns, as the DataLoader asks them
        spans = shard_spans(self._batch_size, first, workers * self._ranks)
        batches = Rebatcher(self._batch_size)
        with Client(*self._service) as client:  # one that was there before a fork would share its sockets
            numbers = shard_spans(self._batch_size, first, workers * self._ranks)
            for part in client.parts(self._drawing.pages(self._bundle, spans)):
                for batch in batches.add(part.value):
                    yield self._tensors(batch, next(numbers)[0])

    def _tensors(self, batch: UInt8, start: int) -> Tensor | tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(batch, 3, 1)))
        labels = self._drawing.labels_of((start, len(batch)))
        return images if labels is None else (images, torch.tensor(labels))
