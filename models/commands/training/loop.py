"""The loop of the train command: steps, and what comes between them: figures, checkpoints, snapshots and scores."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from models.commands.signals import Interrupted, StopOnSignal
from models.training import publishing, trainer
from models.training.health import Alarm, HealthError, HealthMonitor, Probe, row_of
from models.training.publishing import Show
from models.training.snapshots import Snapshots, is_sample_due
from models.training.trainer import Report

if TYPE_CHECKING:
    from models.training.progress import TrainingProgress

REPORT_EVERY = 50  # steps


class TrainingLoop:
    """Trains to the end, to a signal or to an alarm; monitors, saves, shows and scores on the way.

    A checkpoint comes before each score, which may take minutes: whatever ends it, the run goes on with that score.

    Args:
        snapshots: Of the run that is trained.
        sample_every: Steps; None has samples often at first.
        alarms: `stop`, `warn` or `off`.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        stop: StopOnSignal,
        progress: "TrainingProgress",
        *,
        checkpoint_every: int,
        sample_every: int | None,
        alarms: str,
    ) -> None:
        self.snapshots, self.state, self.run_folder = snapshots, snapshots.state, snapshots.run
        self.stop, self.progress = stop, progress
        self.checkpoint_every, self.sample_every, self.alarms = checkpoint_every, sample_every, alarms
        options = self.state.options
        self.probe = Probe(self.state, snapshots.dataset)
        self.monitor = HealthMonitor(
            options.batch_size * options.d_steps, self.run_folder.stats(), augment=options.augment
        )
        self._is_last = False

    def run(self) -> None:
        """Take the steps.

        Raises:
            Interrupted: A signal came. The work is saved.
            HealthError: An alarm.
        """
        state = self.state
        self.snapshots.begin()
        if state.is_score_due:  # what ended the run before came in the midst of it
            self._score()
        state.ranks.go_on()
        for report in trainer.train(
            *(state, state.options.steps),
            report_every=reports(self.checkpoint_every, self.sample_every),
            stopped=self._stopped,
            stepped=self.progress.stepped,
        ):
            self._record(report)
            is_saved = self._is_last or state.is_score_due or state.step % self.checkpoint_every == 0
            if is_saved:
                self._save()
            if is_saved or is_sample_due(state.step, self.sample_every):
                self.snapshots.take()
            if self._is_last:
                raise Interrupted
            if state.is_score_due:
                self._score()
            state.ranks.go_on()
        self.stop.check()

    def _stopped(self) -> bool:
        """Whether a signal has come to any rank. One that comes later has the next step to finish."""
        self._is_last = self.state.ranks.any(flag=self.stop.is_set())
        return self._is_last

    def shown(self, what: str) -> Show:
        """Show how far something has come, and leave it where a signal has come."""

        def show(part: str, done: int, of: int) -> None:
            self.stop.check()
            self.progress.between(f"{what}: {part}", done, of)

        return show

    def _record(self, report: Report) -> None:
        """Write and show the figures, with those of the run's health where they are due."""
        state, run = self.state, self.run_folder
        row = asdict(report) | state.augmentation.row()
        raised: list[Alarm] = []
        if self.alarms != "off" and state.step % self.probe.every(REPORT_EVERY) == 0:
            health = self.probe.look()
            raised = self.monitor.see(state.step, health)
            row |= row_of(health) | ({"alarms": [str(alarm) for alarm in raised]} if raised else {})
        run.append_stats(row)
        self.snapshots.add_row(row)
        self.progress.show(report, state.best, state.selection, raised)
        if self.alarms == "stop" and raised and raised[0].stop:
            kept = run.go_back(self.monitor.good_step)
            self.snapshots.report(must=True)
            raise HealthError(_words_of_end(state.step, raised[0], kept))

    def _save(self) -> None:
        state = self.state
        self.run_folder.save_checkpoint(state.step, state.tensors(), state.metadata(), self.monitor.good_step)

    def _score(self) -> None:
        state = self.state
        scored = publishing.score(state, self.snapshots.dataset, self.shown("scoring"))
        publishing.keep_if_best(state, scored)
        row = {"step": state.step, "seconds": round(state.seconds, 3), **scored.stats()}
        self.run_folder.add_to_stats(row)
        self.snapshots.add_row(row)
        self._save()  # so that it is not computed again
        self.snapshots.report()


def reports(checkpoint_every: int, sample_every: int | None) -> Sequence[int]:
    """At multiples of which numbers something comes between two steps, beside scores."""
    return REPORT_EVERY, checkpoint_every, *([sample_every] if sample_every else ())


def _words_of_end(step: int, alarm: Alarm, kept: int | None) -> str:
    if kept is None:
        return f"stopped at step {step}, before the first checkpoint: {alarm}"
    return (f"stopped at step {step}: {alarm}. The checkpoint of step {kept} is kept: --resume --steps {kept} makes a "
            "bundle of the best until then, --resume --alarms warn goes on in spite of it")  # fmt: skip
