"""What a team may have, what it has, and the refusal of what would be too much."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Executable, func, select, union_all
from sqlalchemy.orm import Session

from store.errors import STORED_BYTES, NotFound, QuotaExceeded
from store.lifecycle import ACTIVE, OPEN
from store.models import Adapter, Checkpoint, Dataset, Job, Team

_NAMED: Final = 3
"""So many of the largest things are named to who has to delete some."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a team has at present."""

    open_jobs: int = 0
    running_jobs: int = 0
    stored_bytes: int = 0


def hold_team(session: Session, team: str) -> Team:
    """Return a team, and let its creations come one after the other until the caller's commit.

    Raises:
        NotFound: If there is none.
    """
    row = session.scalars(
        select(Team).where(Team.name == team).with_for_update(key_share=True),
        execution_options={"populate_existing": True},
    ).one_or_none()
    if row is None:
        raise NotFound("team", team)
    return row


def usage_of(session: Session, team: str) -> Usage:
    """Count what a team has."""
    jobs = select(func.count()).where(Job.team == team)
    return Usage(
        open_jobs=session.scalars(jobs.where(Job.status.in_(OPEN))).one(),
        running_jobs=session.scalars(jobs.where(Job.status.in_(ACTIVE))).one(),
        stored_bytes=stored_bytes(session, team=team),
    )


def usage_by_team(session: Session) -> dict[str, Usage]:
    """Count what every team has that has something, in few statements whatever their number."""
    jobs = select(Job.team, func.count()).group_by(Job.team)
    opened = _by_team(session, jobs.where(Job.status.in_(OPEN)))
    running = _by_team(session, jobs.where(Job.status.in_(ACTIVE)))
    stored: dict[str, int] = {}
    for table in (Dataset, Adapter):
        summed = select(table.team, func.sum(table.size_bytes)).group_by(table.team)
        _add(stored, _by_team(session, summed))
    checkpoints = (
        select(Job.team, func.sum(Checkpoint.size_bytes))
        .join(Job, Job.id == Checkpoint.job_id)
        .group_by(Job.team)
    )
    _add(stored, _by_team(session, checkpoints))
    return {
        team: Usage(
            open_jobs=opened.get(team, 0),
            running_jobs=running.get(team, 0),
            stored_bytes=stored.get(team, 0),
        )
        for team in {*opened, *running, *stored}
    }


def stored_bytes(session: Session, *, team: str) -> int:
    """Return the bytes of a team's datasets, adapters and checkpoints.

    Two datasets of the same content count twice, though their object is stored once: a team is
    not to learn from its own sum what others have.
    """
    total = 0
    for table in (Dataset, Adapter):
        summed = select(func.coalesce(func.sum(table.size_bytes), 0)).where(table.team == team)
        total += int(session.scalars(summed).one() or 0)
    checkpoints = (
        select(func.coalesce(func.sum(Checkpoint.size_bytes), 0))
        .join(Job, Job.id == Checkpoint.job_id)
        .where(Job.team == team)
    )
    return total + int(session.scalars(checkpoints).one() or 0)


def refuse_bytes(session: Session, row: Team, *, adding: int, default: int | None) -> None:
    """Refuse what would take a team beyond its stored bytes.

    Args:
        session: The caller's transaction.
        row: Whose bytes they are. Where a row is to be added, from `hold_team`: then the sum is
            exact.
        adding: Bytes to come; with 0 a team that is at its bound already is refused.
        default: The bound of teams that have none of their own; none: no bound.

    Raises:
        QuotaExceeded: If they would be too many.
    """
    bound = row.max_stored_bytes if row.max_stored_bytes is not None else default
    if bound is None:
        return
    used = stored_bytes(session, team=row.name)
    if used + max(adding, 1) <= bound:
        return
    more = f", and this would add {adding}" if adding else ""
    raise QuotaExceeded(
        row.name,
        quota=STORED_BYTES,
        value=used,
        bound=bound,
        more=more,
        advice=_advice(session, row.name),
    )


def _advice(session: Session, team: str) -> str:
    """Say what may be deleted, the largest first."""
    sized = union_all(
        *(
            select(table.id.label("id"), table.size_bytes.label("size")).where(table.team == team)
            for table in (Dataset, Adapter)
        ),
        select(Job.id, func.sum(Checkpoint.size_bytes))
        .join(Checkpoint, Checkpoint.job_id == Job.id)
        .where(Job.team == team)
        .group_by(Job.id),
    ).subquery()
    largest = session.execute(
        select(sized.c.id, sized.c.size)
        .where(sized.c.size.is_not(None))
        .order_by(sized.c.size.desc(), sized.c.id)
        .limit(_NAMED)
    ).all()
    named = ", ".join(f"{row_id} ({size} bytes)" for row_id, size in largest)
    return (
        "Delete datasets, adapters or ended jobs (with their checkpoints)"
        + (f"; the largest: {named}" if named else "")
        + ". Or ask an administrator for a higher max_stored_bytes."
    )


def _by_team(session: Session, statement: Executable) -> dict[str, int]:
    rows = session.execute(statement)
    return {team: int(number or 0) for team, number in rows}


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for team, number in more.items():
        total[team] = total.get(team, 0) + number
