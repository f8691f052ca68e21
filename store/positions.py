"""How many claims come before that of a waiting job, as the turns of the teams stand now."""

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from sqlalchemy import and_, exists, func, select
from sqlalchemy.orm import Session

from store.job_rows import JobRow
from store.models import Job, JobStatus, Team, Turn
from store.queue import candidate_devices, queues_served, serving_device
from store.turns import IS_QUEUED, count_running

MAX_POSITION: Final = 1000
"""A job that more others come before has no place that is shown."""


class _Standing(NamedTuple):
    """How a team stands on a device; the least is next."""

    running: int
    claimed_before: bool
    last_claimed_at: float


class Positions:
    """Places of waiting jobs, for one look at the rows. Not for use after its transaction."""

    def __init__(self, session: Session, live: Collection[str]) -> None:
        """Begin.

        Args:
            session: The caller's transaction.
            live: The queues that live workers serve.
        """
        self._session = session
        self._live = live
        self._lines: dict[str, tuple[list[str], dict[str, _Standing]]] = {}

    def place(self, job: Job | JobRow) -> int | None:
        """Return how many claims come before this waiting job, plus one.

        The team's own jobs before it, by priority and age, and of every other team as many as get a
        turn meanwhile if no running job ends. None when it does not wait, or more than
        `MAX_POSITION` come first: counting further would cost more the longer the queue is.
        """
        if job.status != JobStatus.QUEUED:
            return None
        queues, standings = self._line(job.queue)
        ahead = self._count_own(job, queues)
        if ahead > MAX_POSITION:
            return None
        # Claimed since it was read, perhaps: then its team may have nothing that waits.
        mine = standings.get(job.team, _Standing(0, claimed_before=False, last_claimed_at=0.0))
        turns = {
            team: ahead + mine.running - other.running + (other[1:] < mine[1:])
            for team, other in standings.items()
            if team != job.team
        }
        waiting = self._count_others([team for team in turns if turns[team] > 0], queues, turns)
        ahead += sum(min(count, turns[team]) for team, count in waiting.items())
        return ahead + 1 if ahead <= MAX_POSITION else None

    def _line(self, queue: str) -> tuple[list[str], dict[str, _Standing]]:
        """Return the queues that share a device with this one now, and their waiting teams."""
        device = serving_device(queue, self._live)
        if device is None:  # as if a worker of the device came that a plan assumes
            candidates = candidate_devices(queue)
            device = "cpu" if "cpu" in candidates else candidates[0]
        if device not in self._lines:
            found = queues_served(device, self._live)
            served = {each: serving_device(each, self._live) for each in found}
            queues = [each for each in found if each == device or served[each] in {None, device}]
            self._lines[device] = queues, self._standings(device, queues)
        return self._lines[device]

    def _standings(self, device: str, queues: Sequence[str]) -> dict[str, _Standing]:
        busy = count_running(device).subquery("busy")
        waits = exists(
            select(Job.id).where(Job.team == Team.name, Job.queue.in_(queues), IS_QUEUED)
        )
        rows = self._session.execute(
            select(Team.name, func.coalesce(busy.c.jobs, 0), Turn.last_claimed_at)
            .outerjoin(busy, busy.c.team == Team.name)
            .outerjoin(Turn, and_(Turn.team == Team.name, Turn.queue == device))
            .where(waits)
        )
        return {
            team: _Standing(running, at is not None, 0.0 if at is None else at.timestamp())
            for team, running, at in rows
        }

    def _count_own(self, job: Job | JobRow, queues: Sequence[str]) -> int:
        same_age = and_(Job.created_at == job.created_at, Job.id < job.id)
        # Each is a range of the index of turns, of which no more is read than is counted.
        ranges = (
            Job.priority > job.priority,
            and_(Job.priority == job.priority, Job.created_at < job.created_at),
            and_(Job.priority == job.priority, same_age),
        )
        firsts = [
            select(Job.id)
            .where(Job.team == job.team, Job.queue == queue, IS_QUEUED, ahead)
            .limit(MAX_POSITION + 1)
            .subquery()
            for ahead in ranges
            for queue in queues
        ]
        counts = [select(func.count()).select_from(first).scalar_subquery() for first in firsts]
        return sum(self._session.execute(select(*counts)).one())

    def _count_others(
        self, teams: Sequence[str], queues: Sequence[str], turns: dict[str, int]
    ) -> dict[str, int]:
        """Count the waiting jobs of teams, no further than the turns that they get."""
        if not teams:
            return {}
        most = min(max(turns[team] for team in teams), MAX_POSITION + 1)
        firsts = (
            select(Job.id)
            .where(Job.team == Team.name, Job.queue.in_(queues), IS_QUEUED)
            .limit(most)
            .correlate(Team)
            .subquery()
        )
        count = select(func.count()).select_from(firsts).correlate(Team).scalar_subquery()
        rows = self._session.execute(select(Team.name, count).where(Team.name.in_(teams)))
        return dict(rows.all())
