"""Every move from every status, on both databases."""

import contextlib

import pytest
from sqlalchemy import Engine

from store import events, lifecycle
from store.database import transaction
from store.errors import IllegalTransition, LeaseLost, NotFound
from store.lifecycle import ACTIVE, ENDED, TRANSITIONS, transition
from store.models import Job, JobStatus
from tests.builders import job_in, running_job


def test_every_status_has_its_row_in_the_table_of_transitions() -> None:
    assert set(TRANSITIONS) == set(JobStatus)


def test_every_status_can_be_reached_and_an_ended_job_moves_only_by_a_retry() -> None:
    reachable = {to for allowed in TRANSITIONS.values() for to in allowed}
    assert reachable | {JobStatus.CREATED} == set(JobStatus)
    assert all(TRANSITIONS[status] <= {JobStatus.QUEUED} for status in ENDED)


@pytest.mark.parametrize("status", list(JobStatus))
def test_each_status_allows_exactly_the_moves_of_the_table(
    engine: Engine, status: JobStatus
) -> None:
    job = job_in(engine, status)
    assert job.status == status
    for to in JobStatus:
        if to in TRANSITIONS[status]:
            assert _move_and_undo(engine, job.id, to) == to
        else:
            with pytest.raises(IllegalTransition) as caught:
                _move(engine, job.id, to)
            assert set(caught.value.allowed) == TRANSITIONS[status]
            assert str(status) in str(caught.value)
    with transaction(engine, read_only=True) as session:
        found = session.get_one(Job, job.id)
        assert (found.status, found.last_sequence) == (status, job.last_sequence)


def test_a_move_writes_its_event_in_the_same_transaction(engine: Engine) -> None:
    job = running_job(engine)
    with transaction(engine) as session:
        moved = transition(session, job.id, to=JobStatus.CANCELLING, reason="enough")
        last = events.read(session, job.id)[-1]
    assert (last.sequence, last.type) == (moved.last_sequence, lifecycle.STATUS_CHANGED)
    assert last.payload == {"from": "running", "to": "cancelling", "reason": "enough"}
    _move_and_undo(engine, job.id, JobStatus.CANCELLED)
    with transaction(engine, read_only=True) as session:
        assert len(events.read(session, job.id)) == moved.last_sequence


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_stale_attempt_moves_nothing(engine: Engine, status: JobStatus) -> None:
    job = job_in(engine, status)
    for to in JobStatus:
        with pytest.raises(LeaseLost):
            _move(engine, job.id, to, attempt=job.attempt + 1)
        if status not in ACTIVE:
            with pytest.raises(LeaseLost):
                _move(engine, job.id, to, attempt=job.attempt)


def test_a_job_that_is_not_there_cannot_move(engine: Engine) -> None:
    with pytest.raises(NotFound):
        _move(engine, "job_none", JobStatus.QUEUED)


@pytest.mark.parametrize("status", sorted(ENDED))
def test_an_ended_job_holds_no_lease_and_has_a_finishing_time(
    engine: Engine, status: JobStatus
) -> None:
    job = job_in(engine, status)
    assert job.finished_at is not None
    assert (job.lease_expires_at, job.worker_id, job.phase) == (None, None, None)


class _Undo(Exception):
    """Rolls a transaction back."""


def _move_and_undo(engine: Engine, job_id: str, to: JobStatus) -> str:
    moved = ""
    with contextlib.suppress(_Undo), transaction(engine) as session:
        moved = transition(session, job_id, to=to).status
        raise _Undo
    return moved


def _move(engine: Engine, job_id: str, to: JobStatus, *, attempt: int | None = None) -> None:
    with transaction(engine) as session:
        transition(session, job_id, to=to, expected_attempt=attempt)
