"""The numbers of stats.jsonl and the samples, written for TensorBoard too; needs the tensorboard extra."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from models.inference.pixels import UInt8, grid


class TensorBoard:
    """Event files in a folder. TensorBoard hides events after step `done`, which a killed run may have left behind.

    Raises:
        ModuleNotFoundError: The extra is not installed.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 — an extra

        self._writer = SummaryWriter(folder, purge_step=done + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of one row of stats.jsonl under their names."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def add_samples(self, step: int, images: UInt8) -> None:
        """Write images (n, h, w, c) as one square picture."""
        picture = grid(images, columns=max(1, int(len(images) ** 0.5)))
        self._writer.add_image("samples", picture, step, dataformats="HWC")
        self._writer.flush()
