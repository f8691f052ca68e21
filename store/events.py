"""The event log of a job, and the numbers its attempts report."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from store.database_time import database_now
from store.dialects import upsert
from store.errors import LeaseLost, NotFound
from store.lifecycle import ACTIVE
from store.models import Event, Job, LayerStatistics, Metric

PROGRESS: Final = "progress"
"""Type of the one event that stands for a batch of steps."""
_MEASURES: Final = (
    "epoch",
    "train_loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "num_tokens",
    "tokens_per_second",
    "elapsed_seconds",
    "modalities",
)
# Told otherwise: a stored checkpoint by `save_checkpoint_pointer`, the adapter by the job's result.
_UNTOLD: Final = frozenset({"rows_checked", "step_completed", "checkpoint_saved", "adapter_saved"})


def append(
    session: Session,
    job_id: str,
    type: str,  # noqa: A002 - the wire's word
    payload: Mapping[str, Any],
    attempt: int | None = None,
) -> Event:
    """Append a fact with the next number; with an `attempt`, only while that is the current one.

    Raises:
        NotFound: If there is no such job.
        LeaseLost: If the attempt is no longer the current one.
    """
    last = _advance(session, job_id, attempt, by=1)
    event = Event(job_id=job_id, sequence=last, type=type, payload=finite(payload), attempt=attempt)
    session.add(event)
    session.flush()
    return event


def read(session: Session, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
    """Return a job's events after a sequence number, in order."""
    return list(
        session.scalars(
            select(Event)
            .where(Event.job_id == job_id, Event.sequence > after)
            .order_by(Event.sequence)
            .limit(limit)
        )
    )


def record_progress(
    session: Session, job_id: str, attempt: int, events: Sequence[Mapping[str, Any]]
) -> None:
    """Record what training told, as JSON events (`grit_core.events.event_to_json`), in order.

    `step_completed` and `evaluated` become metrics of their step, and with `rows_checked` one
    `progress` event for the whole batch; `curvature_observed` becomes layer statistics; the others
    become events of their own. `training_started` removes what lies past its `start_step`, so that
    nothing is doubled, and sets the job's `training.precision` to that of its device.

    Raises:
        LeaseLost: If the attempt is no longer the current one; nothing is recorded.
    """
    # The first statement takes the row, so that a lost lease is known before anything is written.
    _advance(session, job_id, attempt, by=0)
    told: list[tuple[str, Any]] = []
    steps: dict[int, dict[str, Any]] = {}
    layers: dict[int, Any] = {}
    progress: dict[str, Any] = dict(session.scalars(_progress_of(job_id)).one() or {})
    moved = False
    for event in map(finite, events):
        kind = event["type"]
        if kind == "rows_checked":
            progress |= {"checked_rows": event["done"], "rows_to_check": event["total"]}
            moved = True
        if kind == "training_started":
            truncate_after(session, job_id, step=event["start_step"])
            progress = _restarted(progress, event)
            _settle_precision(session, job_id, event)
        if kind in {"step_completed", "evaluated", "curvature_observed"}:
            steps.setdefault(event["step"], {}).update(_measures(event))
            progress = _moved(progress, event)
            moved = True
        if kind == "curvature_observed":
            layers[event["step"]] = event.get("layers", {})
        elif kind not in _UNTOLD:
            told.append((kind, {name: event[name] for name in event if name not in _PRIVATE}))
    if moved:
        told.append((PROGRESS, progress))
    _save_measures(session, job_id, attempt, steps, layers)
    last = _advance(session, job_id, attempt, by=len(told), progress=progress or None)
    session.add_all(
        Event(job_id=job_id, sequence=number, type=kind, payload=payload, attempt=attempt)
        for number, (kind, payload) in enumerate(told, start=last - len(told) + 1)
    )
    session.flush()


def truncate_after(session: Session, job_id: str, *, step: int) -> None:
    """Remove the numbers of steps past one that an attempt resumes from."""
    for table in (Metric, LayerStatistics):
        session.execute(
            delete(table).where(table.job_id == job_id, table.step > step),
            execution_options={"synchronize_session": False},
        )


def read_metrics(
    session: Session, job_id: str, *, after_step: int = -1, limit: int | None = None
) -> list[Metric]:
    """Return a job's metrics in the order of their steps."""
    return list(
        session.scalars(
            select(Metric)
            .where(Metric.job_id == job_id, Metric.step > after_step)
            .order_by(Metric.step)
            .limit(limit)
        )
    )


def trained_tokens(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """Return the tokens of all recorded steps of each job; a job without steps is left out."""
    rows = session.execute(
        select(Metric.job_id, func.sum(Metric.num_tokens))
        .where(Metric.job_id.in_(job_ids), Metric.num_tokens.is_not(None))
        .group_by(Metric.job_id)
    )
    return {job_id: int(total or 0) for job_id, total in rows}


def last_effective_ranks(session: Session, job_id: str) -> dict[str, float] | None:
    """Return each modality's effective rank when it was last observed; none if it never was."""
    modalities = session.scalars(
        select(Metric.modalities)
        .where(Metric.job_id == job_id, Metric.modalities.is_not(None))
        .order_by(Metric.step.desc())
    )
    found = next((one for one in modalities if one), None)
    if found is None:
        return None
    return {
        name: measures["effective_rank"]
        for name, measures in found.items()
        if "effective_rank" in measures
    }


def read_layer_statistics(session: Session, job_id: str) -> list[LayerStatistics]:
    """Return a job's layer statistics in the order of their steps."""
    return list(
        session.scalars(
            select(LayerStatistics)
            .where(LayerStatistics.job_id == job_id)
            .order_by(LayerStatistics.step)
        )
    )


_PRIVATE: Final = frozenset({"type", "folder"})
_CHECKING: Final = frozenset({"checked_rows", "rows_to_check"})
_SHOWN: Final = ("epoch", "train_loss", "eval_loss", "learning_rate", "tokens_per_second")


def _advance(session: Session, job_id: str, attempt: int | None, *, by: int, **columns: Any) -> int:
    """Take the next event numbers of a job, and return the last of them.

    Raises:
        NotFound: If there is no such job.
        LeaseLost: If the attempt is no longer the current one.
    """
    statement = update(Job).where(Job.id == job_id)
    if attempt is not None:
        statement = statement.where(Job.attempt == attempt, Job.status.in_(ACTIVE))
    changed: dict[str, Any] = {"version": Job.version + 1, "updated_at": database_now()}
    last = session.scalars(
        statement.values(
            last_sequence=Job.last_sequence + by, **(changed if by or columns else {}), **columns
        ).returning(Job.last_sequence),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    if last is None:
        if attempt is None:
            raise NotFound("job", job_id)
        raise LeaseLost(job_id, attempt=attempt)
    return last


def _progress_of(job_id: str) -> Any:
    return select(Job.progress).where(Job.id == job_id)


def _measures(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: event[name] for name in _MEASURES if event.get(name) is not None}


def _settle_precision(session: Session, job_id: str, event: Mapping[str, Any]) -> None:
    """Show the number format that a job computes in: `auto` is decided by the card that it got."""
    training = session.scalars(select(Job.training).where(Job.id == job_id)).one()
    precision = event.get("precision")
    if precision is not None and precision != training.get("precision"):
        session.execute(
            update(Job)
            .where(Job.id == job_id)
            .values(training={**training, "precision": precision}),
            execution_options={"synchronize_session": False},
        )


def _restarted(progress: dict[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    """Say where an attempt begins; what was measured before it stays shown until the next step."""
    start, total = event["start_step"], event["total_steps"]
    kept = {name: value for name, value in progress.items() if name not in _CHECKING}
    return {
        **kept,
        "step": start,
        "start_step": start,
        "total_steps": total,
        "percent": _percent(start, total),
        "elapsed_seconds": 0.0,
        "remaining_seconds": None,
    }


def _moved(progress: dict[str, Any], event: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: event[name] for name in _SHOWN if event.get(name) is not None}
    progress = {**progress, **shown}
    if event["type"] != "step_completed":
        return progress
    step, total, elapsed = event["step"], event["total_steps"], event["elapsed_seconds"]
    done = step - progress.get("start_step", 0)
    remaining = None
    if done > 0 and elapsed is not None:
        remaining = round(elapsed / done * (total - step), 3)
    return {
        **progress,
        "step": step,
        "total_steps": total,
        "percent": _percent(step, total),
        "elapsed_seconds": elapsed,
        "remaining_seconds": remaining,
    }


def _percent(step: int, total: int) -> float | None:
    return round(100.0 * step / total, 2) if total else None  # a compression has no steps


def _save_measures(
    session: Session,
    job_id: str,
    attempt: int,
    steps: Mapping[int, Mapping[str, Any]],
    layers: Mapping[int, Any],
) -> None:
    empty = dict.fromkeys(_MEASURES)
    rows = [
        {"job_id": job_id, "step": step, "attempt": attempt, **empty, **measures}
        for step, measures in steps.items()
    ]
    # A step's numbers may come in two batches: its loss first, its evaluation later.
    upsert(session, Metric, rows, keep=_MEASURES)
    upsert(
        session,
        LayerStatistics,
        [
            {"job_id": job_id, "step": step, "attempt": attempt, "layers": value}
            for step, value in layers.items()
        ],
    )


def finite(value: Any) -> Any:
    """Return JSON values with null for what JSON cannot say: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
