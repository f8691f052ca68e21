"""The log of an attempt as people read it: a line for each event, on standard output."""

from __future__ import annotations

import contextlib
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from grit_core.events import (
    AdapterSaved,
    CheckpointSaved,
    Compacted,
    Evaluated,
    RetentionEvaluated,
    RowsChecked,
    StepCompleted,
    StepSkipped,
    TrainingFailed,
    TrainingFinished,
    TrainingStarted,
    TrainingStopped,
    Warned,
)

if TYPE_CHECKING:
    from typing import TextIO

    from grit_core.events import TrainingEvent

STEP_SECONDS: Final = 1.0
"""Shortest time between two lines about steps; a log must not grow with the speed of training."""


class AttemptLog:
    """Writes events to a text file, most of all to standard output."""

    def __init__(self, out: TextIO, *, step_seconds: float = STEP_SECONDS) -> None:
        """Take the file.

        Args:
            out: The file; that its disk is full is no reason to end a training.
            step_seconds: Shortest time between two lines about steps or rows.
        """
        self._out = out
        self._step_seconds = step_seconds
        self._counted_at = float("-inf")

    def write(self, event: TrainingEvent) -> None:
        """Write an event's line, if it has one and it is due."""
        line = describe_event(event)
        if line is None or (
            isinstance(event, StepCompleted | RowsChecked) and not self._due(event)
        ):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00")
        with contextlib.suppress(OSError):
            self._out.write(f"{now}Z {' '.join(line.split())}\n")
            self._out.flush()

    def _due(self, event: StepCompleted | RowsChecked) -> bool:
        now = time.monotonic()
        if isinstance(event, StepCompleted):
            is_last = event.step >= event.total_steps
        else:
            is_last = event.done >= event.total
        if not is_last and now - self._counted_at < self._step_seconds:
            return False
        self._counted_at = now
        return True


def describe_event(event: TrainingEvent) -> str | None:
    """Return a line about an event; none where it says nothing to a person."""
    pattern = _LINES.get(type(event))
    return None if pattern is None else pattern.format(e=event)


_LINES: Final[dict[type, str]] = {
    RowsChecked: "checked {e.done} of {e.total} rows",
    TrainingStarted: "training from step {e.start_step} of {e.total_steps} on {e.device} in"
    " {e.precision}: {e.num_rows} rows, {e.num_eval_rows} held out",
    StepCompleted: "step {e.step}/{e.total_steps} loss {e.train_loss:.4f}"
    " lr {e.learning_rate:.2e} {e.tokens_per_second:,.0f} tokens/s",
    Evaluated: "step {e.step}: evaluation loss {e.eval_loss:.4f}",
    RetentionEvaluated: "step {e.step}: retention loss {e.when} training {e.loss:.4f}",
    StepSkipped: "step {e.step} skipped: {e.reason}",
    CheckpointSaved: "step {e.step}: checkpoint saved",
    Warned: "warning: {e.message}",
    Compacted: "compacted {e.parameters_before:,} to {e.parameters_after:,} parameters",
    AdapterSaved: "adapter saved: {e.trainable_parameters:,} parameters",
    TrainingStopped: "stopped at step {e.step}: {e.reason}",
    TrainingFinished: "finished at step {e.step}: loss {e.train_loss:.4f}",
    TrainingFailed: "failed: {e.message} {e.hint}",
}
"""A pattern for each kind of event that is worth a line."""
