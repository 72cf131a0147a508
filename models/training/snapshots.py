"""What a run shows of itself while it goes on: samples, a bundle to look at, and the report."""

import time
from dataclasses import dataclass
from typing import Any

from models.data.load import Dataset
from models.files import remove_folder
from models.training import publishing
from models.training.report import write_report
from models.training.run_folder import RunDir
from models.training.tensorboard import TensorBoard
from models.training.trainer import State

GRID_IMAGES = 64
EARLY, LATER_EVERY = (50, 100, 200), 500  # steps
REPORT_SHARE = 0.02  # of the time at most goes into reports, whose charts may cost more than the steps between


def is_sample_due(step: int, every: int | None) -> bool:
    """Whether samples are drawn at this step: often at first, when most happens, unless `every` says otherwise."""
    return step % every == 0 if every else step in EARLY or step % LATER_EVERY == 0


@dataclass
class Snapshots:
    """Takes snapshots of a run: a grid of samples, `preview/` while there is no `bundle/`, and the report.

    They draw no random number of the training's and change nothing in it.
    """

    state: State
    dataset: Dataset
    run: RunDir
    record: dict[str, Any]
    board: TensorBoard | None = None

    def __post_init__(self) -> None:
        self._next_report = 0.0  # by the monotonic clock

    def begin(self) -> None:
        """Show real images beside the samples to come and, before the first step, the samples of untrained nets."""
        self.run.save_real(publishing.real_beside(self.state, self.dataset.train, GRID_IMAGES))
        if not self.state.step:
            self.take()

    def take(self) -> None:
        """Show the present state. The report may wait for a later time."""
        images = publishing.draw(self.state, GRID_IMAGES)
        picture = self.run.save_samples(self.state.step, images)
        if self.board is not None:
            self.board.add_samples(self.state.step, images)
        if not self.run.bundle.exists():
            name = self.record["name"]
            publishing.publish_preview(self.state, self.dataset, self.run.preview, name, self.record, picture)
        self.report()

    def add_row(self, row: dict[str, Any]) -> None:
        """Show a row of stats.jsonl to whoever looks elsewhere than at the folder."""
        if self.board is not None:
            self.board.add_row(row)

    def report(self, *, must: bool = False) -> None:
        """Write the report, unless the one before was too dear for a new one already."""
        started = time.monotonic()
        if must or started >= self._next_report:
            write_report(self.run)
            ended = time.monotonic()
            self._next_report = ended + (ended - started) / REPORT_SHARE

    def end(self) -> None:
        """The bundle is there: the preview has no use any more."""
        remove_folder(self.run.preview)
        self.report(must=True)
