"""Whose job is next on a device: the team's turn first, then priority inside of the team, then age.

A team's turn comes by how few jobs it runs on the device, then by how long ago it was given one
there. So a team cannot come before the others by a priority of its own choosing.
"""

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    and_,
    func,
    literal,
    literal_column,
    or_,
    select,
    union_all,
)
from sqlalchemy.orm import Session

from store.database_time import database_now
from store.dialects import take_turn, upsert
from store.lifecycle import ACTIVE
from store.models import Job, JobStatus, Team, Turn

IS_QUEUED: Final = Job.status == literal_column(f"'{JobStatus.QUEUED.value}'")
"""Written out, so that the database sees that `ix_jobs_turns` holds all that is asked for."""
_IS_READY: Final = and_(IS_QUEUED, or_(Job.not_before.is_(None), Job.not_before <= database_now()))
_INSIDE_OF_TEAM: Final = (Job.priority.desc(), Job.created_at, Job.id)


def take_next(
    session: Session, *, device: str, queues: Sequence[str], max_running_jobs: int | None
) -> Job | None:
    """Lock the next job of a device and note its team's turn; none if no job is ready.

    The claims of a device come one after the other, so that each sees what the others took: else
    workers that are woken at once would give all of their turns to one team, beyond its bound. A
    job that another process changes at this moment is passed over.

    Args:
        session: The caller's transaction.
        device: The queue of the device, on which running jobs and turns are counted.
        queues: The queues that the device serves now, its own among them.
        max_running_jobs: Of one team on the device, unless its own row says otherwise.
    """
    take_turn(session, f"claims of {device}")
    heads = _select_heads(device, queues, max_running_jobs=max_running_jobs)
    for team, queue in session.execute(heads):
        job = session.scalars(_select_first(team, queue)).first()
        if job is not None:
            turn = {"queue": device, "team": team, "last_claimed_at": database_now()}
            upsert(session, Turn, [turn])
            return job
    return None


def count_running(device: str) -> Select[str, int]:
    """Select the number of running jobs of each team on a device, of the teams that have any."""
    return (
        select(Job.team, func.count().label("jobs"))
        .where(Job.queue == device, Job.status.in_(ACTIVE))
        .group_by(Job.team)
    )


def _select_heads(
    device: str, queues: Sequence[str], *, max_running_jobs: int | None
) -> Select[str, str]:
    """Select the teams whose turn may be now, in that order, each with the queues of its jobs.

    One look into the index for each team and queue, however many jobs wait.
    """
    heads = union_all(*(select(*_head(queue)) for queue in queues)).subquery("heads")
    busy = count_running(device).subquery("busy")
    running = func.coalesce(busy.c.jobs, 0)
    # The type is given, because PostgreSQL cannot derive it from a null.
    bound = func.coalesce(Team.max_running_jobs, literal(max_running_jobs, BigInteger()))
    return (
        select(heads.c.team, heads.c.queue)
        .join(Job, Job.id == heads.c.job_id)
        .join(Team, Team.name == heads.c.team)
        .outerjoin(busy, busy.c.team == heads.c.team)
        .outerjoin(Turn, and_(Turn.team == heads.c.team, Turn.queue == device))
        .where(or_(bound.is_(None), running < bound))
        .order_by(running, Turn.last_claimed_at.asc().nulls_first(), *_INSIDE_OF_TEAM)
    )


def _head(queue: str) -> tuple[ColumnElement[Any], ...]:
    first = (
        select(Job.id)
        .where(Job.team == Team.name, Job.queue == queue, _IS_READY)
        .order_by(*_INSIDE_OF_TEAM)
        .limit(1)
        .correlate(Team)
        .scalar_subquery()
    )
    return Team.name.label("team"), literal(queue).label("queue"), first.label("job_id")


def _select_first(team: str, queue: str) -> Select[Job]:
    return (
        select(Job)
        .where(Job.team == team, Job.queue == queue, _IS_READY)
        .order_by(*_INSIDE_OF_TEAM)
        .limit(1)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
