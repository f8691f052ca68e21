"""Jobs as answers show them: the columns that they need, without plan and request.

A plan is several kilobytes a job, of which an answer shows two numbers and the warnings;
PostgreSQL takes them out.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from sqlalchemy import Select, Text, any_, bindparam, case, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from store.models import Job, JobKind


class JobRow(NamedTuple):
    """A job without what only its training needs."""

    id: str
    kind: str
    status: str
    phase: str | None
    status_reason: str | None
    model: str
    dataset_id: str
    eval_dataset_id: str | None
    retention_dataset_id: str | None
    source_adapter_id: str | None
    preset: str | None
    config: dict[str, Any]
    training: dict[str, Any]
    device: str
    device_reason: str | None
    name: str | None
    user_metadata: dict[str, Any]
    priority: int
    team: str
    attempt: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None
    progress: dict[str, Any] | None
    queue: str
    plan_hash: str
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    compression: dict[str, Any] | None
    """What was asked for; only of a compression."""
    num_layers: int | None
    trainable_parameters: int | None
    warnings: list[str] | None


_OF_PLAN: Final = ("compression", "num_layers", "trainable_parameters", "warnings")
_PLAIN: Final = tuple(getattr(Job, name) for name in JobRow._fields if name not in _OF_PLAN)
_COMPRESSION: Final = case((Job.kind == JobKind.COMPRESSION, Job.request))
_PARAMETERS: Final = Job.plan["trainable_parameters"]
_WARNINGS: Final = Job.plan["warnings"]


def select_rows(session: Session) -> Select[Any]:
    """Select what `JobRow` is made of; for the caller to narrow."""
    if session.get_bind().dialect.name == "postgresql":
        return _POSTGRESQL
    return _SQLITE


_POSTGRESQL: Final = select(
    *_PLAIN, _COMPRESSION, func.jsonb_array_length(Job.plan["layers"]), _PARAMETERS, _WARNINGS
)
_SQLITE: Final = select(
    *_PLAIN, _COMPRESSION, func.json_array_length(Job.plan, "$.layers"), _PARAMETERS, _WARNINGS
)
# One text for any number of ids, so that the server plans it once.
_BY_IDS: Final = _POSTGRESQL.where(Job.id == any_(bindparam("ids", type_=ARRAY(Text))))


def read_rows(session: Session, ids: Sequence[str]) -> dict[str, JobRow]:
    """Return the jobs of some ids that are there, of whatever team."""
    if session.get_bind().dialect.name == "postgresql":
        found = session.execute(_BY_IDS, {"ids": list(ids)})
    else:
        found = session.execute(_SQLITE.where(Job.id.in_(ids)))
    rows = map(JobRow._make, cast("Sequence[Sequence[Any]]", found.all()))
    return {row.id: row for row in rows}
