"""Follow a job: a live bar on a terminal, a line now and then elsewhere."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from grit_client.commands.tables import duration
from grit_client.terminal_text import printable

if TYPE_CHECKING:
    from grit_client.answers import Job
    from grit_client.client import GritClient

LINES_PER_JOB = 10
"""Progress lines of a job where there is no terminal."""


class Numbers(ProgressColumn):
    """Loss, evaluation loss, learning rate, speed, time left."""

    def render(self, task: Task) -> Text:
        """Show what is known."""
        return Text(numbers(task.fields.get("progress") or {}), style="dim")


def numbers(progress: Mapping[str, Any]) -> str:
    """The numbers of a running job in one line."""
    parts = [
        _part("loss {:.4f}", progress.get("train_loss")),
        _part("eval {:.4f}", progress.get("eval_loss")),
        _part("lr {:.2e}", progress.get("learning_rate")),
        _part("{:,.0f} tok/s", progress.get("tokens_per_second")),
        _part("{} left", duration(progress.get("remaining_seconds"))),
    ]
    return "  ".join(part for part in parts if part)


def follow(
    client: "GritClient",
    job: str,
    *,
    console: Console,
    on_state: "Callable[[Job], None] | None" = None,
) -> "Job":
    """Show a job's progress until it has ended, and return its last state.

    Args:
        client: The service.
        job: The job's id.
        console: Where a bar or lines are shown.
        on_state: Called with each state, and then nothing is shown.
    """
    shown: Bar | Lines | None = None
    if on_state is None:
        shown = Bar(console) if console.is_terminal else Lines(console)
    context: AbstractContextManager[object] = shown.context if shown is not None else nullcontext()
    last: Job = {}
    with context:
        for last in client.watch(job):
            if on_state is not None:
                on_state(last)
            if shown is not None:
                shown.show(last)
    return last


class Bar:
    """One live line."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", style="cyan", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.fields[steps]}"),
            Numbers(),
            console=console,
        )
        self._task: TaskID = self._bar.add_task("...", total=None, steps="?", progress={})
        self.context: AbstractContextManager[object] = self._bar

    def show(self, job: "Job") -> None:
        """Show the job's state."""
        progress = job.get("progress") or {}
        done, total = way(job)  # a compression has no steps: the bar pulses
        self._bar.update(
            self._task,
            description=describe(job),
            completed=done,
            total=total,
            steps=total if total is not None else "?",
            progress=progress,
            refresh=True,
        )


class Lines:
    """A line for each change of status, and for every tenth of the way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: tuple[str, int] | None = None
        self.context: AbstractContextManager[object] = nullcontext()

    def show(self, job: "Job") -> None:
        """Write a line if it says something new."""
        progress = job.get("progress") or {}
        done, total = way(job)
        tenth = done * LINES_PER_JOB // total if total else 0
        news = (describe(job), tenth)
        if news == self._said:
            return
        self._said = news
        line = f"{describe(job)}  {done}/{total or '?'}  {numbers(progress)}"
        self._console.print(line.rstrip(), markup=False, soft_wrap=True)


def way(job: Mapping[str, Any]) -> tuple[int, int | None]:
    """How far the job has come, and has to go: in rows while they are checked, then in steps."""
    progress = job.get("progress") or {}
    names = ("step", "total_steps")
    if job.get("phase") == "checking":
        names = ("checked_rows", "rows_to_check")
    done, total = (progress.get(name) or 0 for name in names)
    return done, total or None


def describe(job: Mapping[str, Any]) -> str:
    """The job's status, its phase, and why it waits."""
    status = printable(str(job["status"]))
    queue = job.get("queue") or {}
    if status == "queued" and queue.get("reason"):
        return printable(f"{status} ({queue['reason']})")
    if status == "queued" and queue.get("position"):
        return f"{status} (place {queue['position']})"
    phase = job.get("phase")
    return f"{status} ({phase})" if phase and phase != status and status == "running" else status


def _part(pattern: str, value: object) -> str:
    return "" if value is None else pattern.format(value)
