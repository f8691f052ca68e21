"""Whose job is next on a queue."""

from sqlalchemy import BigInteger, Select, func, literal, or_, select

from store.database_time import database_now
from store.lifecycle import ACTIVE
from store.models import Job, JobStatus, Team


def next_job(queue: str, *, max_running_jobs: int | None) -> Select[str]:
    """Select the job of a queue that is next: priority, then fairness between teams, then age."""
    # Counted once for all teams, not once for every waiting job.
    busy = (
        select(Job.team, func.count().label("jobs"))
        .where(Job.queue == queue, Job.status.in_(ACTIVE))
        .group_by(Job.team)
        .subquery("busy")
    )
    running = func.coalesce(busy.c.jobs, 0)
    # The type is told, because PostgreSQL cannot tell it of a null.
    bound = func.coalesce(Team.max_running_jobs, literal(max_running_jobs, BigInteger()))
    return (
        select(Job.id)
        .join(Team, Team.name == Job.team)
        .outerjoin(busy, busy.c.team == Job.team)
        .where(
            Job.queue == queue,
            Job.status == JobStatus.QUEUED,
            or_(Job.not_before.is_(None), Job.not_before <= database_now()),
            or_(bound.is_(None), running < bound),
        )
        .order_by(
            Job.priority.desc(),
            running,
            Team.last_claimed_at.asc().nulls_first(),
            Job.created_at,
            Job.id,
        )
        .limit(1)
    )
