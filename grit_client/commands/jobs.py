"""`grit plan, submit, watch, jobs, job, logs, cancel, pause, resume, retry, start`."""

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grit_client.commands.choices import JobStatus
from grit_client.commands.names import resolve_dataset, resolve_job
from grit_client.commands.session import Session, with_session
from grit_client.errors import InvalidInput, UnknownName
from grit_client.terminal_text import printable, settle

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grit_client.answers import Job, Result
    from grit_client.client import GritClient

SpecFile = Annotated[Path, typer.Argument(help="File with the JSON of a job.", show_default=False)]
DatasetOption = Annotated[
    str | None,
    typer.Option(help="A dataset's id or name, or a file to upload first.", show_default=False),
]
RetentionOption = Annotated[
    str | None,
    typer.Option(
        help="What the model can do already: a dataset's id or name, or a file to upload. Its loss"
        " is measured before and after.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None, typer.Option(help="In place of the file's `model`.", show_default=False)
]
JobId = Annotated[str, typer.Argument(help="A job's id or name.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (plan, submit, watch, jobs, job, logs):
        app.command(rich_help_panel="Jobs")(command)
    for verb, text in (
        ("cancel", "Stop a job for good."),
        ("pause", "Stop a job at a checkpoint, to be resumed."),
        ("resume", "Go on with a paused job."),
        ("retry", "Run a failed or cancelled job again."),
        ("start", "Queue a job that was created with auto_start: false."),
    ):
        app.command(verb, help=text, rich_help_panel="Jobs")(_move(verb))


@with_session
def plan(
    session: Session,
    spec: SpecFile,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    retention_dataset: RetentionOption = None,
) -> None:
    """Show which layers a job would adapt, its parameters, memory and steps; nothing is created."""
    from grit_client.commands.plans import render_plan  # noqa: PLC0415 - not for `grit --help`

    with session.client() as client:
        body = _spec(session, client, spec, dataset, model, retention_dataset)
        answer = client.plan(body)
    session.emit(answer, lambda: render_plan(answer))


@with_session
def submit(  # noqa: PLR0913, PLR0917 - the options of the command
    session: Session,
    spec: SpecFile,
    dataset: DatasetOption = None,
    model: ModelOption = None,
    retention_dataset: RetentionOption = None,
    name: Annotated[str | None, typer.Option(help="The job's name.", show_default=False)] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key never creates two jobs.", show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end.")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Create a job from a JSON file."""
    with session.client() as client:
        body = _spec(session, client, spec, dataset, model, retention_dataset)
        if name is not None:
            body["name"] = name
        created = client.create_job(body, idempotency_key=idempotency_key)
        if not watch:
            session.emit(created, lambda: render_job(created))
            return
        session.note(f"Created {created['id']}.")
        follow_to_end(session, client, created["id"])


@with_session
def watch(session: Session, job: JobId) -> None:
    """Follow a job: step, loss, speed, time left; then its result. With --json, a line a change."""
    with session.client() as client:
        follow_to_end(session, client, resolve_job(client, job))


@with_session
def jobs(
    session: Session,
    status: Annotated[
        list[JobStatus] | None,
        typer.Option(
            help=f"Only this status, one of {', '.join(JobStatus)}; repeatable.",
            metavar="STATUS",
            show_default=False,
            case_sensitive=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Only jobs of this name.", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only this model.", show_default=False)] = None,
    device: Annotated[
        str | None, typer.Option(help="Only this device.", show_default=False)
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="Only this label, as key=value.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
) -> None:
    """List jobs."""
    labels = _labels(metadata or [])
    with session.client() as client:
        found = list(
            islice(
                client.list_jobs(
                    status=status or (), name=name, model=model, device=device, metadata=labels
                ),
                limit,
            )
        )
    session.emit(found, lambda: _render_jobs(found))


@with_session
def job(session: Session, job: JobId) -> None:
    """Show a job."""
    with session.client() as client:
        answer = client.get_job(resolve_job(client, job))
    session.emit(answer, lambda: render_job(answer))


@with_session
def logs(
    session: Session,
    job: JobId,
    attempt: Annotated[
        int | None, typer.Option(help="Its number; by default the newest.", min=1)
    ] = None,
    tail_bytes: Annotated[
        int | None, typer.Option(help="At most so much of the end.", min=1)
    ] = None,
    follow: Annotated[  # noqa: FBT002 - a flag
        bool,
        typer.Option("--follow", "-f", help="Go on as it grows, until the job has ended."),
    ] = False,
) -> None:
    """Show what the training process of an attempt wrote; while it runs, some seconds behind."""
    with session.client() as client:
        job = resolve_job(client, job)
        if follow:
            _follow_log(session, client, job, attempt=attempt, tail_bytes=tail_bytes)
            return
        text = client.logs(job, attempt=attempt, tail_bytes=tail_bytes)
    if session.as_json:
        session.emit({"job": job, "text": text})
    else:
        typer.echo(printable(settle(text)), nl=False)  # lines as they are, however long


def _follow_log(
    session: Session,
    client: "GritClient",
    job: str,
    *,
    attempt: int | None,
    tail_bytes: int | None,
) -> None:
    """Write a job's log as it grows; as JSON, one object for each line of it.

    Raises:
        InvalidInput: One attempt is named.
        KeyboardInterrupt: The user wants to see no more of it; the job goes on.
    """
    if attempt is not None:
        raise InvalidInput(
            "--follow shows the newest attempt and those after it; leave --attempt out."
        )
    shown = 0
    try:
        for part in client.follow_logs(job, tail_bytes=tail_bytes):
            if shown not in {0, part.attempt}:
                session.note(f"Attempt {part.attempt}:")
            shown = part.attempt
            if not session.as_json:
                typer.echo(printable(settle(part.text)), nl=False)
                continue
            for line in settle(part.text).splitlines():
                session.emit_line({"job": job, "attempt": part.attempt, "line": line})
    except KeyboardInterrupt:
        session.note(f"The job goes on. Again: grit logs {job} -f   End it: grit cancel {job}")
        raise


def _move(verb: str) -> Any:
    @with_session
    def move(session: Session, job: JobId) -> None:
        with session.client() as client:
            answer: Job = getattr(client, verb)(resolve_job(client, job))
        session.emit(answer, lambda: render_job(answer))

    return move


def _spec(
    session: Session,
    client: "GritClient",
    path: Path,
    dataset: str | None,
    model: str | None,
    retention_dataset: str | None,
) -> dict[str, Any]:
    from grit_client.commands.datasets import dataset_id  # noqa: PLC0415 - not for `grit --help`
    from grit_client.job_spec import read_spec  # noqa: PLC0415 - not for `grit --help`

    body = read_spec(path)
    if model is not None:
        if not model.strip():
            raise InvalidInput("--model is empty; give a model's id, or leave the option out.")
        folder = Path(model).expanduser()
        body["model"] = str(folder.absolute()) if folder.is_dir() else model
    options = {"dataset": dataset, "eval_dataset": None, "retention_dataset": retention_dataset}
    for name, given in options.items():
        if given is not None:
            option = f"--{name.replace('_', '-')}"
            body[name] = dataset_id(session, client, given, option=option)
        elif isinstance(body.get(name), str):
            # A name that nothing has is left to the service, which names every fault at once.
            with suppress(UnknownName):
                body[name] = resolve_dataset(client, body[name])
    return body


def follow_to_end(session: Session, client: "GritClient", job: str) -> None:
    """Show a job until it has ended, and then its last state; as JSON, one line for each state.

    Raises:
        JobFailed: It ended without an adapter.
        KeyboardInterrupt: The user wants to see no more of it; the job goes on.
    """
    from grit_client.commands.watching import follow  # noqa: PLC0415 - not for `grit --help`
    from grit_client.errors import JobFailed  # noqa: PLC0415 - not for `grit --help`

    try:
        last = follow(
            client,
            job,
            console=session.err,
            on_state=session.emit_line if session.as_json else None,
        )
    except KeyboardInterrupt:
        session.note(f"The job goes on. Again: grit watch {job}   End it: grit cancel {job}")
        raise
    if not session.as_json:
        session.emit(last, lambda: render_job(last))
    if last["status"] != "succeeded":
        raise JobFailed(last)


def _labels(pairs: list[str]) -> dict[str, str]:
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise InvalidInput(f"--metadata {pair!r} is not key=value.")
        labels[key] = value
    return labels


def _render_jobs(found: "list[Job]") -> "RenderableType":
    from grit_client.commands.tables import table, when  # noqa: PLC0415 - not for `grit --help`

    rows = []
    for item in found:
        progress = item.get("progress") or {}
        total = progress.get("total_steps")
        steps = f"{progress.get('step', 0)}/{total}" if total else None
        rows.append([
            item["id"], item.get("name"), item["status"], item.get("model"), item.get("device"),
            steps, progress.get("train_loss"), when(item.get("created_at")),
        ])  # fmt: skip
    columns = ["job", "name", "status", "model", "device", "steps", "loss", "created (UTC)"]
    return table(columns, rows, optional=("device", "loss", "model", "created (UTC)"))


def render_job(job: "Job") -> "RenderableType":
    """A job, for a person."""
    from grit_client.commands.tables import duration, facts, when  # noqa: PLC0415 - see above
    from grit_client.commands.watching import describe, numbers  # noqa: PLC0415 - see above

    progress, result = job.get("progress") or {}, job.get("result") or {}
    error, planned = job.get("error") or {}, job.get("plan") or {}
    total = progress.get("total_steps")
    reason = job.get("device_reason")
    return facts({
        "job": job["id"],
        "name": job.get("name"),
        "status": describe(job) if job["status"] == "queued" else job["status"],
        "reason": job.get("status_reason"),
        "kind": job.get("kind") if job.get("kind") != "training" else None,
        "model": job.get("model"),
        "compresses": job.get("source_adapter"),
        "dataset": job.get("dataset"),
        "retention dataset": job.get("retention_dataset"),
        "preset": job.get("preset"),
        "device": f"{job.get('device')} ({reason})" if reason else job.get("device"),
        "layers": planned.get("layers"),
        "parameters": planned.get("trainable_parameters"),
        "warnings": " ".join(planned.get("warnings") or []) or None,
        "attempt": f"{job.get('attempt')} of {job.get('max_attempts')}",
        "created (UTC)": when(job.get("created_at")),
        "finished (UTC)": when(job.get("finished_at")),
        "steps": f"{progress.get('step', 0)} of {total}" if total else None,
        "progress": numbers(progress) or None,
        "time": duration(progress.get("elapsed_seconds")),
        "adapter": result.get("adapter"),
        "final loss": result.get("final_loss"),
        **_render_changes(result),
        "error": f"{error.get('code')}: {error.get('message')}" if error else None,
        "hint": error.get("hint"),
    })


def _render_changes(result: "Result") -> dict[str, str | None]:
    """What a job kept of the model's old task, and what it cut: before -> after."""
    retention, cut = result.get("retention") or {}, result.get("compaction") or {}
    kept = _change(retention.get("loss_before"), retention.get("loss_after"))
    before, after = cut.get("parameters_before"), cut.get("parameters_after")
    parameters = None
    if before and after is not None:
        parameters = f"{before:,} -> {after:,} parameters ({after / before - 1:+.0%})"
        if (predicted := cut.get("predicted_kl")) is not None:
            parameters += f", predicted KL {predicted:.3g} of at most {cut.get('max_kl'):.3g}"
    return {
        "retention loss": kept,
        "compaction": parameters,
        "loss when compacted": _change(cut.get("eval_loss_before"), cut.get("eval_loss_after")),
    }


def _change(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    return f"{before:.4f} -> {after:.4f}"
