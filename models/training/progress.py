"""What a person sees while a command runs: the progress bar, the tables of scores, and a status line."""

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from models.evaluation.metric_suite import SuiteScore
from models.evaluation.parzen import ParzenScore
from models.training.health import Alarm
from models.training.report import duration
from models.training.trainer import Best, Report, Selection

REDRAWN_EVERY_S = 0.5
PLAIN_EVERY_S = 30.0  # without a terminal


class _CutColumn(TextColumn):
    """A column that gives way to the others, as those do in rich that may wrap, and keeps to one line."""

    def render(self, task: Task) -> Text:
        """Its text."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class TrainingProgress:
    """A bar that moves with the steps, and a second one for what comes between them; without a terminal, plain lines.

    A plain line comes every 30 s, whatever is done.

    Args:
        steps, done: Of the run, and those of them that were computed before.
        clock: Seconds.
    """

    def __init__(self, steps: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=sys.stderr)
        self._live = self._console.is_terminal
        self._clock = clock
        self._steps, self._first, self._step = steps, done, done
        self._began = self._shown = clock()
        self._every_s = REDRAWN_EVERY_S if self._live else PLAIN_EVERY_S
        self._figures = self._phase = ""
        self._told: set[str] = set()
        self._progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(max(8, min(40, self._console.width // 8)), table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}"),
            _CutColumn("{task.fields[figures]}", table_column=Column()),  # the one that a narrow terminal cuts
            console=self._console,
            refresh_per_second=2,
            disable=not self._live,
        )
        self._task = self._progress.add_task("step", total=steps, completed=done, figures="", left="")
        self._between = self._progress.add_task("", total=None, figures="", left="", visible=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stepped(self, step: int) -> None:
        """A step was taken. This costs next to nothing, for it is shown now and then only."""
        self._step = step
        if self._phase:
            self._phase = ""
            self._progress.update(self._between, visible=False)
        if self._clock() - self._shown >= self._every_s:
            self._show()

    def show(self, report: Report, best: Best, selection: Selection, alarms: Sequence[Alarm] = ()) -> None:
        """Have new figures shown. An alarm is printed once, when it is raised; its name stays in the figures."""
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
        self._step, self._figures = report.step, figures
        if self._live:
            self._show()

    def between(self, phase: str, done: int, of: int) -> None:
        """Something other than a step is done at present, and this much of it, where that is known."""
        if self._live:
            if phase != self._phase:
                self._progress.reset(self._between)  # its clock too
            self._progress.update(self._between, description=phase, completed=done, total=of or None, visible=True)
        elif self._clock() - self._shown >= PLAIN_EVERY_S:
            print(f"step {self._step}/{self._steps}  {phase}{f' {done}/{of}' if of else ''}",
                  file=sys.stderr, flush=True)  # fmt: skip
            self._shown = self._clock()
        self._phase = phase

    def _show(self) -> None:
        self._shown = self._clock()
        taken, left = self._step - self._first, ""
        if taken and self._step < self._steps:
            seconds = (self._shown - self._began) / taken * (self._steps - self._step)
            left = f"{duration(max(1, round(seconds)))} left"
        if self._live:
            self._progress.update(self._task, completed=self._step, figures=self._figures, left=left)
        else:
            print("  ".join(part for part in (f"step {self._step}/{self._steps}", self._figures, left) if part),
                  file=sys.stderr, flush=True)  # fmt: skip


def show_parzen(name: str, row: ParzenScore, say: Callable[[str], None], *, heading: bool) -> None:
    """Say one row of the Parzen table."""
    if heading:
        say(f"Parzen-window log-likelihood of {row.test_rows:,} test images, in nats, from {row.samples:,} samples")
        say(f"{'samples':<22}{'paper grid':>18}{'σ':>8}{'fine grid':>18}{'σ':>8}")
    paper, fine = (f"{f.log_likelihood:.1f} ± {f.standard_error:.1f}" for f in (row.paper, row.fine))
    say(f"{name:<22}{paper:>18}{row.paper.sigma:>8.3f}{fine:>18}{row.fine.sigma:>8.3f}")


BETTER = {"higher": "↑", "lower": "↓", "0": "→ 0", "½": "→ ½", "floor": "→ floor"}


def show_scores(scores: list[SuiteScore], say: Callable[[str], None], *, heading: bool) -> None:
    """Say some rows of the metric suite's table."""
    if heading:
        say(f"{'score':<26}{'better':>8}{'generated':>22}{'floor':>12}{'real':>12}")
    for score in scores:
        value = f"{score.value:.4g}"
        if score.standard_error is not None:
            value += f" ± {score.standard_error:.2g}"
        floor, real = ("–" if number is None else f"{number:.4g}" for number in (score.floor, score.real))
        note = f"  ({score.note})" if score.note else ""
        say(f"{score.name:<26}{BETTER[score.better]:>8}{value:>22}{floor:>12}{real:>12}{note}")


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
