"""Any number of rows through a net in batches of a few proven sizes, so that a row's bits never depend on the others.

The result of a row of a matrix product may depend on how many rows there are: kernels differ in the order of their
sums, and some treat the rows of one batch differently. So rows are computed in tiles, which are batches of a few sizes,
padded with zeros. `Tiles.proven` admits a size only if it gives the reference tile's bits at every place in the tile.
A pixel is then a function of its latent alone, on one kind of device.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

REFERENCE_TILE = 64
TILE_SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGE_TILE, MOST_NUMBERS = 512, 2**22  # in a larger tile all images together have at most so many numbers
# On a CPU a row takes the same time in every tile but the smallest: larger ones gain nothing, and padding is lost.
CPU_TILE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Padding that costs less than another tile: on a CPU so small a share of the rows, on a GPU so many rows.
SPARE_SHARE, SPARE_ROWS_OF_GPU = 1 / 8, 256
LONG_S, LARGEST_OF_LONG = 0.01, 16  # a reference tile's time, and a CPU's largest tile where it takes longer


class Tiles:
    """Run a net on any number of rows through batches of few, proven sizes.

    Args:
        run: float32 (n, *row) tensor and (n,) int64 labels or None → (n, *out) tensor, for n in `sizes`.
        sizes: Batch sizes that may be run, rising. Each must give a row the same bits; `proven` finds them.
        most_padding: Rows of zeros that are cheaper than another tile, however few the others are.
    """

    def __init__(
        self, run: Callable[[Tensor, Tensor | None], Tensor], sizes: Sequence[int], most_padding: int = 0
    ) -> None:
        self.run = run
        self.sizes = tuple(sizes)
        self.most_padding = most_padding

    @classmethod
    def proven(
        cls,
        run: Callable[[Tensor, Tensor | None], Tensor],
        example: Tensor,
        labels: Tensor | None,
        candidates: Sequence[int] | None = None,
        expected: Tensor | None = None,
    ) -> "Tiles":
        """Tiles of those candidates that give every example row the reference tile's bits, wherever it stands.

        The order of a sum depends on the batch's size and on a row's place in it, never on the numbers: two orders that
        agree on thousands of random numbers are the same. `example` fills one reference tile, and `expected` is what
        that tile gives for it, where that is known. Every example row is run in every size, in two tiles where one
        holds them all. No row stands where it stood in the reference tile, which proves that the places there are alike
        too. If no candidate passes, rows are run one at a time.

        `candidates` rise; the default are the device's. On a CPU whose reference tile takes long they end below it:
        several small tiles take no longer, and less memory. On a GPU they end where its memory does, unless that is
        below `LARGE_TILE`.
        """
        if expected is None:
            expected = cls(run, [REFERENCE_TILE])(example, labels)
        agrees, reference_s = _compare(run, REFERENCE_TILE, example, labels, expected)
        if not agrees:
            return cls(run, [1])
        sizes = []
        for size in candidates or tile_sizes(example.device):
            if example.device.type == "cpu" and size > LARGEST_OF_LONG and reference_s > LONG_S:
                break
            try:
                if size == REFERENCE_TILE or _compare(run, size, example, labels, expected)[0]:
                    sizes.append(size)
            except torch.OutOfMemoryError:
                if size <= LARGE_TILE:
                    raise
                break
        return cls(run, sizes or [1], spare_rows(example.device))

    def split(self, rows: int) -> list[int]:
        """The sizes of the tiles that so many rows are computed in, in order."""
        sizes = list[int]()
        while rows > 0:
            sizes.append(self._size(rows))
            rows -= sizes[-1]
        return sizes

    def padded(self, rows: int) -> int:
        """Rows that are computed for so many, padding included."""
        largest = self.sizes[-1]
        rest = rows % largest
        return rows - rest + sum(self.split(rest))

    def __call__(self, rows: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, *row) → (n, *out), n ≥ 1, in order."""
        n = len(rows)
        if n in self.sizes:  # a lone request is most often one: the rest of this takes a tenth of its time
            return self.run(rows, labels)
        out, start = [], 0
        while start < n:
            size = self._size(n - start)
            stop = min(start + size, n)
            result = self.run(_pad(rows[start:stop], size), None if labels is None else _pad(labels[start:stop], size))
            out.append(result[: stop - start])
            start = stop
        return torch.cat(out) if len(out) > 1 else out[0]

    def _size(self, rest: int) -> int:
        """Size of the next tile: the smallest that holds the rest if it is nearly full, else the largest full one."""
        filled = max((size for size in self.sizes if size <= rest), default=self.sizes[0])
        most = rest + max(self.most_padding, int(SPARE_SHARE * rest))
        return next((size for size in self.sizes if rest <= size <= most), filled)


def tile_sizes(device: torch.device, numbers: int = 1) -> tuple[int, ...]:
    """Sizes of tiles that may pay on this device for images of so many numbers, rising."""
    if device.type == "cpu":
        return CPU_TILE_SIZES
    return tuple(size for size in TILE_SIZES if size <= max(LARGE_TILE, MOST_NUMBERS // numbers))


def spare_rows(device: torch.device) -> int:
    """Rows of padding that cost less on this device than another tile."""
    return 0 if device.type == "cpu" else SPARE_ROWS_OF_GPU


@torch.inference_mode()
def _compare(
    run: Callable[[Tensor, Tensor | None], Tensor], size: int, example: Tensor, labels: Tensor | None, expected: Tensor
) -> tuple[bool, float]:
    """Whether tiles of a size give every row its expected bits at other places, and the seconds that the fastest took.

    The seconds are this thread's processor time, so that other programs don't make a size look slow.
    """
    agrees, took_s = True, math.inf
    for start in range(0, REFERENCE_TILE if size <= REFERENCE_TILE else 2 * size, size):
        place = torch.arange(start, start + size, device=example.device)
        asked = (place + 1 + place // REFERENCE_TILE) % REFERENCE_TILE  # each round of the rows is shifted by one more
        given = example[asked], None if labels is None else labels[asked]
        started = time.thread_time()
        agrees &= torch.equal(run(*given), expected[asked])
        took_s = min(took_s, time.thread_time() - started)
    return agrees, took_s


def _pad(rows: Tensor, size: int) -> Tensor:
    missing = size - len(rows)
    return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing]) if missing else rows
