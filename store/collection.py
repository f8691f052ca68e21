"""Deletes what is not needed any more: objects without a row, old checkpoints, keys, failed models.

An object is kept while a row refers to it, and while it is younger than `collect_after_seconds`:
its row may be on its way. Each run leaves the same token in the rows and in the object store. Where
the two differ, rows and objects are not of the same time, as after a restore from a backup: then
nothing is deleted for `collect_after_seconds`, and what would have been is told in the log, so that
somebody can look. Where the last run is long past, the same holds for what was written since.
"""

import json
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog
from sqlalchemy import Engine, delete, select, text, tuple_, type_coerce, update
from sqlalchemy.orm import Session

from store import base_models
from store.database import run_in_transaction, transaction
from store.database_time import database_now, database_time_in
from store.dialects import insert_unless_there
from store.errors import ObjectMissing
from store.lifecycle import ENDED
from store.models import Checkpoint, Collection, IdempotencyKey, Job, UtcDateTime
from store.objects import Objects
from store.orphans import DATASETS, Group, find_orphans, names_with_rows
from store.settings import Settings

MARK_KEY: Final = "collection/mark.json"
MAX_GROUPS: Final = 2000
"""Datasets, adapters, checkpoints and logs that one run deletes at most."""
MAX_ROWS: Final = 5000
"""Checkpoints, and idempotency keys, that one run deletes at most."""
_RUN_SECONDS: Final = 1800.0
"""A run that has not ended after so long was killed."""
_RUNS: Final = 10
"""After so many missed runs the last one is long past."""
_NAMED: Final = 20
"""Groups that a report names."""
_EVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
_log = structlog.get_logger(__name__)


@dataclass(kw_only=True)
class Report:
    """What a run did, or would do."""

    dry_run: bool
    held_until: datetime | None = None
    """Until when `num_flagged` are kept, because rows and objects may not be of the same time."""
    num_flagged: int = 0
    num_groups: int = 0
    """Datasets, adapters, checkpoints and logs without a row, deleted."""
    num_objects: int = 0
    size_bytes: int = 0
    num_torn: int = 0
    """Files of interrupted writes."""
    num_checkpoints: int = 0
    """Checkpoints of jobs that ended long ago."""
    num_idempotency_keys: int = 0
    num_models: int = 0
    """Base models that cannot be used and that nothing names."""
    names: tuple[str, ...] = ()
    """The first of the groups, flagged or deleted."""

    def add(self, group: Group, *, flagged: bool) -> None:
        """Count a group."""
        if len(self.names) < _NAMED:
            self.names += (group.name,)
        if flagged:
            self.num_flagged += 1
            return
        self.num_groups += 1
        self.num_objects += group.num_objects
        self.size_bytes += group.size_bytes

    def to_json(self) -> dict[str, Any]:
        """Return what a log line or a terminal shows."""
        held_until = None if self.held_until is None else self.held_until.isoformat()
        return {**asdict(self), "held_until": held_until, "names": list(self.names)}


@dataclass(frozen=True, kw_only=True)
class Hold:
    """What was written since a moment is kept until another, whatever the rows say."""

    since: datetime
    until: datetime

    @property
    def is_total(self) -> bool:
        """Whether everything is kept."""
        return self.since == _EVER

    def covers(self, group: Group) -> bool:
        """Whether a group is kept."""
        return group.youngest >= self.since


def collect_if_due(engine: Engine, objects: Objects, settings: Settings) -> Report | None:
    """Run once in `collect_seconds` over all processes, and log it; none if it is not due."""
    report = _collect(engine, objects, settings, after_seconds=settings.collect_seconds)
    if report is not None:
        _tell(report)
    return report


def collect(engine: Engine, objects: Objects, settings: Settings) -> Report | None:
    """Run now; none if another process is at it."""
    return _collect(engine, objects, settings, after_seconds=0.0)


def preview(engine: Engine, objects: Objects, settings: Settings) -> Report:
    """Return what a run would do; nothing changes."""
    now = _now(engine)
    with transaction(engine, read_only=True) as session:
        row = session.get(Collection, 1)
        token = None if row is None else row.token
    hold = _hold(objects, settings, token=token, now=now)
    report = Report(dry_run=True, held_until=None if hold is None else hold.until)
    for group in find_orphans(engine, objects, before=_cutoff(now, settings)):
        report.add(group, flagged=hold is not None and hold.covers(group))
    with transaction(engine, read_only=True) as session:
        report.num_checkpoints = len(_old_checkpoints(session, settings))
        report.num_idempotency_keys = len(_old_keys(session, settings))
    return report


def _collect(
    engine: Engine, objects: Objects, settings: Settings, *, after_seconds: float
) -> Report | None:
    token = secrets.token_hex(16)
    begun = run_in_transaction(
        engine, lambda session: _begin(session, token=token, after_seconds=after_seconds)
    )
    if begun is None:
        return None
    now = _now(engine)
    hold = _hold(objects, settings, token=begun.token, now=now)
    _leave_mark(objects, token=token, now=now, hold=hold)
    report = Report(dry_run=False, held_until=None if hold is None else hold.until)
    _collect_rows(engine, objects, settings, report, held=hold is not None and hold.is_total)
    for group in find_orphans(engine, objects, before=_cutoff(now, settings)):
        if report.num_groups == MAX_GROUPS:
            break
        flagged = hold is not None and hold.covers(group)
        if flagged or _delete(engine, objects, group):
            report.add(group, flagged=flagged)
    report.num_torn = objects.delete_torn(before=_cutoff(now, settings))
    run_in_transaction(engine, lambda session: _end(session, token=token))
    return report


# --- one process at a time, and rows and objects of the same time


@dataclass(frozen=True, kw_only=True)
class _Begun:
    token: str | None
    """Of the run before; none before the first."""


def _begin(session: Session, *, token: str, after_seconds: float) -> _Begun | None:
    """Take the turn of the next run, by compare-and-set; none if it is not due."""
    values = {"id": 1, "token": token, "started_at": database_now()}
    if insert_unless_there(session, Collection, values):
        return _Begun(token=None)
    row = session.scalars(
        select(Collection).where(Collection.id == 1).with_for_update(),
        execution_options={"populate_existing": True},
    ).one()
    if row.token == token:  # the commit of this very transaction was not answered
        return _Begun(token=None)
    due = Collection.started_at <= database_time_in(-after_seconds)
    ended = Collection.finished_at.is_not(None) | (
        Collection.started_at < database_time_in(-_RUN_SECONDS)
    )
    before = row.token
    taken = session.scalars(
        update(Collection)
        .where(Collection.id == 1, Collection.token == before, due, ended)
        .values(token=token, started_at=database_now(), finished_at=None)
        .returning(Collection.id),
        execution_options={"synchronize_session": False},
    ).one_or_none()
    return None if taken is None else _Begun(token=before)


def _end(session: Session, *, token: str) -> None:
    session.execute(
        update(Collection)
        .where(Collection.id == 1, Collection.token == token)
        .values(finished_at=database_now()),
        execution_options={"synchronize_session": False},
    )


def _hold(objects: Objects, settings: Settings, *, token: str | None, now: datetime) -> Hold | None:
    """Return what may not be deleted although no row refers to it; none if all may be."""
    until = now + timedelta(seconds=settings.collect_after_seconds)
    try:
        mark = json.loads(objects.get_bytes(MARK_KEY))
        left_at, told = datetime.fromisoformat(mark["at"]), mark["token"]
        hold = Hold(
            since=datetime.fromisoformat(mark["held_since"]),
            until=datetime.fromisoformat(mark["held_until"]),
        )
    except (ObjectMissing, ValueError, KeyError, TypeError):
        return Hold(since=_EVER, until=until)
    if told != token:
        return Hold(since=_EVER, until=until)
    patience_seconds = max(settings.collect_after_seconds, _RUNS * settings.collect_seconds)
    is_held = hold.until > now
    if now - left_at > timedelta(seconds=patience_seconds):
        return Hold(since=min(hold.since, left_at) if is_held else left_at, until=until)
    return hold if is_held else None


def _leave_mark(objects: Objects, *, token: str, now: datetime, hold: Hold | None) -> None:
    hold = hold or Hold(since=now, until=now)
    mark = {
        "token": token,
        "at": now.isoformat(),
        "held_since": hold.since.isoformat(),
        "held_until": hold.until.isoformat(),
    }
    objects.put_bytes(MARK_KEY, json.dumps(mark).encode())


# --- deleting


def _delete(engine: Engine, objects: Objects, group: Group) -> bool:
    """Delete a group; false if a row came to refer to it."""
    if group.kind != DATASETS:
        # Nothing is ever written again under these names, nor does a new row take one up.
        _delete_objects(objects, group)
        return True

    # An upload takes up the object of an equal one, however old: no row may come meanwhile.
    def work(session: Session) -> bool:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("LOCK TABLE datasets IN SHARE ROW EXCLUSIVE MODE"))
        if names_with_rows(session, [group]):
            return False
        _delete_objects(objects, group)
        return True

    return run_in_transaction(engine, work)


def _delete_objects(objects: Objects, group: Group) -> None:
    if group.is_object:
        objects.delete(group.name)
    else:
        objects.delete_prefix(f"{group.name}/")


def _collect_rows(
    engine: Engine, objects: Objects, settings: Settings, report: Report, *, held: bool
) -> None:
    """Delete old keys and failed models and, unless held, checkpoints of jobs ended long ago."""
    report.num_idempotency_keys = run_in_transaction(
        engine, lambda session: _forget_keys(session, settings)
    )
    report.num_models = run_in_transaction(
        engine,
        lambda session: base_models.delete_failed(
            session, after_seconds=settings.keep_failed_models_seconds
        ),
    )
    with transaction(engine, read_only=True) as session:
        old = _old_checkpoints(session, settings)
    if held:
        report.num_checkpoints = len(old)
        return
    for job_id in sorted({job_id for job_id, _ in old}):
        prefixes = run_in_transaction(
            engine,
            lambda session, job_id=job_id: _forget_checkpoints(session, job_id, settings),  # type: ignore[misc] # a default binds the loop's value
        )
        for prefix in prefixes:
            objects.delete_prefix(f"{prefix.rstrip('/')}/")
        report.num_checkpoints += len(prefixes)


def _old_checkpoints(session: Session, settings: Settings) -> list[tuple[str, int]]:
    ended = Job.finished_at < database_time_in(-settings.keep_checkpoints_seconds)
    found = session.execute(
        select(Checkpoint.job_id, Checkpoint.step)
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.status.in_(ENDED), ended)
        .limit(MAX_ROWS)
    )
    return [(job_id, step) for job_id, step in found]


def _forget_checkpoints(session: Session, job_id: str, settings: Settings) -> list[str]:
    """Remove a job's checkpoints, unless it was retried; its row is held meanwhile."""
    ended = Job.finished_at < database_time_in(-settings.keep_checkpoints_seconds)
    held = session.scalars(
        select(Job.id).where(Job.id == job_id, Job.status.in_(ENDED), ended).with_for_update()
    ).one_or_none()
    if held is None:
        return []
    return list(
        session.scalars(
            delete(Checkpoint).where(Checkpoint.job_id == job_id).returning(Checkpoint.prefix),
            execution_options={"synchronize_session": False},
        )
    )


def _old_keys(session: Session, settings: Settings) -> list[tuple[str, str, str]]:
    old = IdempotencyKey.created_at < database_time_in(-settings.keep_idempotency_keys_seconds)
    found = session.execute(
        select(IdempotencyKey.team, IdempotencyKey.route, IdempotencyKey.key)
        .where(old)
        .limit(MAX_ROWS)
    )
    return [(team, route, key) for team, route, key in found]


def _forget_keys(session: Session, settings: Settings) -> int:
    columns = tuple_(IdempotencyKey.team, IdempotencyKey.route, IdempotencyKey.key)
    old = _old_keys(session, settings)
    for start in range(0, len(old), 500):
        session.execute(
            delete(IdempotencyKey).where(columns.in_(old[start : start + 500])),
            execution_options={"synchronize_session": False},
        )
    return len(old)


# --- small parts


def _now(engine: Engine) -> datetime:
    with transaction(engine, read_only=True) as session:
        found: datetime = session.scalars(select(type_coerce(database_now(), UtcDateTime()))).one()
    return found


def _cutoff(now: datetime, settings: Settings) -> datetime:
    return now - timedelta(seconds=settings.collect_after_seconds)


def _tell(report: Report) -> None:
    if report.num_flagged:
        _log.warning("collected", **report.to_json())
    else:
        _log.info("collected", **report.to_json())
