"""What a person sees while a command runs: the progress bar, the tables of scores, and a status line."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.evaluation.metric_suite import SuiteScore
from models.evaluation.parzen import ParzenScore
from models.training.health import Alarm
from models.training.trainer import Best, Report, Selection

PLAIN_EVERY = 20  # without a terminal, one report in so many gets a line


class TrainingProgress:
    """A progress bar with losses, D's means, images/s and time left; without a terminal, a plain line now and then."""

    def __init__(self, steps: int, done: int) -> None:
        self._console = Console(file=sys.stderr)
        self._live = self._console.is_terminal
        self._reports = 0
        self._told: set[str] = set()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, report: Report, best: Best, selection: Selection, alarms: Sequence[Alarm] = ()) -> None:
        """Update the bar. An alarm is printed once, when it is raised; its name stays in the bar."""
        figures = (
            f"D loss {report.d_loss:.3f}  G loss {report.g_loss:.3f}  D(x) {report.d_real:.2f}  "
            f"D(G(z)) {report.d_fake:.2f}  {report.images_per_s:,.0f} images/s"
        )
        if best.step:
            figures += f"  best {selection.short.format(best.score)} at {best.step}"
        for alarm in alarms:
            figures += f"  {alarm.name.upper()}"
            if alarm.name not in self._told:
                self._console.print(
                    f"warning: step {report.step}: {alarm}", markup=False, highlight=False, soft_wrap=True
                )
        self._told = {alarm.name for alarm in alarms}
        self._progress.update(self._task, completed=report.step, figures=figures)
        self._reports += 1
        if not self._live and self._reports % PLAIN_EVERY == 0:
            total = self._progress.tasks[0].total or report.step
            left = (total - report.step) / max(report.step, 1) * report.seconds
            print(f"step {report.step}/{total:.0f}  {figures}  {left:.0f} s left", file=sys.stderr, flush=True)


def show_parzen(name: str, row: ParzenScore, *, heading: bool) -> None:
    """Print one row of the Parzen table."""
    if heading:
        print(f"Parzen-window log-likelihood of {row.test_rows:,} test images, in nats, from {row.samples:,} samples")
        print(f"{'samples':<22}{'paper grid':>18}{'σ':>8}{'fine grid':>18}{'σ':>8}")
    paper, fine = (f"{f.log_likelihood:.1f} ± {f.standard_error:.1f}" for f in (row.paper, row.fine))
    print(f"{name:<22}{paper:>18}{row.paper.sigma:>8.3f}{fine:>18}{row.fine.sigma:>8.3f}", flush=True)


BETTER = {"higher": "↑", "lower": "↓", "0": "→ 0", "½": "→ ½", "floor": "→ floor"}


def show_scores(scores: list[SuiteScore], *, heading: bool) -> None:
    """Print some rows of the metric suite's table."""
    if heading:
        print(f"{'score':<26}{'better':>8}{'generated':>22}{'floor':>12}{'real':>12}")
    for score in scores:
        value = f"{score.value:.4g}"
        if score.standard_error is not None:
            value += f" ± {score.standard_error:.2g}"
        floor, real = ("–" if number is None else f"{number:.4g}" for number in (score.floor, score.real))
        note = f"  ({score.note})" if score.note else ""
        print(f"{score.name:<26}{BETTER[score.better]:>8}{value:>22}{floor:>12}{real:>12}{note}", flush=True)


class Status:
    """A line on stderr that says what is being computed; without a terminal, one line for each phase."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._status = self._console.status("")
        self._phase = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._status.stop()

    def show(self, phase: str, done: int = 0, of: int = 0) -> None:
        """Say which phase it is, and how far along if that is known."""
        if self._console.is_terminal:
            self._status.update(f"{phase} {done}/{of}" if of else phase)
        elif phase != self._phase:
            print(phase, file=sys.stderr, flush=True)
        self._phase = phase
