"""What an idempotency key already led to, without taking the key."""

from sqlalchemy.orm import Session

from store.errors import IdempotencyConflict
from store.jobs import get_job
from store.models import IdempotencyKey, Job


def find_replayed(
    session: Session,
    *,
    team: str,
    idempotency_key: str,
    request_hash: str,
    route: str = "POST /jobs",
) -> Job | None:
    """Return the job that an idempotency key led to; none while the key is free.

    A replay is answered from here before the request is weighed again, since what it names may be
    gone by now. `store.jobs.create_job` remains what settles a race.

    Raises:
        IdempotencyConflict: If the key was used for another request.
    """
    taken = session.get(IdempotencyKey, (team, route, idempotency_key))
    if taken is None:
        return None
    if taken.request_hash != request_hash:
        raise IdempotencyConflict(idempotency_key)
    return get_job(session, taken.job_id, team=team)
