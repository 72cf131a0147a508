"""What a person sees of a run: the progress bar and the tables. The record of a run is rundir's."""

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.evaluation.metric_suite import Figure
from models.evaluation.parzen import ParzenScore
from models.training.health import Alarm
from models.training.trainer import Best, Report, Selection

PLAIN_EVERY = 20  # reports between two lines where there is no terminal to redraw


class TrainingDisplay:
    """A progress bar with losses, D's means, images/s and time left; a plain line now and then without a terminal."""

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
        """Bring the bar up to date; tell of an alarm once, when it is raised, and keep its name in the bar."""
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


def show_scores(name: str, row: ParzenScore, *, heading: bool) -> None:
    """Print one row of the Parzen table, as soon as it is known."""
    if heading:
        print(f"Parzen-window log-likelihood of {row.test_rows:,} test images, in nats, from {row.samples:,} samples")
        print(f"{'samples':<22}{'paper grid':>18}{'σ':>8}{'fine grid':>18}{'σ':>8}")
    paper, fine = (f"{f.log_likelihood:.1f} ± {f.standard_error:.1f}" for f in (row.paper, row.fine))
    print(f"{name:<22}{paper:>18}{row.paper.sigma:>8.3f}{fine:>18}{row.fine.sigma:>8.3f}", flush=True)


BETTER = {"higher": "↑", "lower": "↓", "0": "→ 0", "½": "→ ½", "floor": "→ floor"}


def show_figures(figures: list[Figure], *, heading: bool) -> None:
    """Print some rows of the suite's table, as soon as they are known."""
    if heading:
        print(f"{'figure':<26}{'better':>8}{'generated':>22}{'floor':>12}{'real':>12}")
    for figure in figures:
        value = f"{figure.value:.4g}"
        if figure.standard_error is not None:
            value += f" ± {figure.standard_error:.2g}"
        floor, real = ("–" if number is None else f"{number:.4g}" for number in (figure.floor, figure.real))
        note = f"  ({figure.note})" if figure.note else ""
        print(f"{figure.name:<26}{BETTER[figure.better]:>8}{value:>22}{floor:>12}{real:>12}{note}", flush=True)


class Status:
    """One line on stderr that says what is being computed; each phase once where there is no terminal."""

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
        """Say the phase, and how far it is where that is known."""
        if self._console.is_terminal:
            self._status.update(f"{phase} {done}/{of}" if of else phase)
        elif phase != self._phase:
            print(phase, file=sys.stderr, flush=True)
        self._phase = phase
