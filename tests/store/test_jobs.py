"""Jobs as their team sees them, on both databases."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, select
from sqlalchemy.orm import Session

from store import adapters, datasets, events, jobs
from store.database import transaction
from store.errors import (
    IdempotencyConflict,
    IllegalTransition,
    InvalidCursor,
    NotFound,
    QuotaExceeded,
    StillReferenced,
)
from store.jobs import JobFilters
from store.models import Event, Job, JobStatus, Metric
from tests.builders import TEAM, claim, finish, job_in, new_job, prepare, queued_job

VERBS: dict[str, Callable[..., Job]] = {
    "cancel": jobs.request_cancel,
    "pause": jobs.request_pause,
    "resume": jobs.resume_job,
    "start": jobs.start_job,
    "retry": jobs.retry_job,
}
S = JobStatus
EXPECTED: dict[str, dict[JobStatus, JobStatus]] = {
    "cancel": {
        S.CREATED: S.CANCELLED,
        S.QUEUED: S.CANCELLED,
        S.RUNNING: S.CANCELLING,
        S.PAUSING: S.CANCELLING,
        S.PAUSED: S.CANCELLED,
        S.CANCELLING: S.CANCELLING,
        S.CANCELLED: S.CANCELLED,
    },
    "pause": {
        S.QUEUED: S.PAUSED,
        S.RUNNING: S.PAUSING,
        S.PAUSING: S.PAUSING,
        S.PAUSED: S.PAUSED,
    },
    "resume": {S.PAUSED: S.QUEUED, S.QUEUED: S.QUEUED, S.RUNNING: S.RUNNING},
    "start": {S.CREATED: S.QUEUED, S.QUEUED: S.QUEUED, S.RUNNING: S.RUNNING},
    "retry": {
        S.FAILED: S.QUEUED,
        S.CANCELLED: S.QUEUED,
        S.QUEUED: S.QUEUED,
        S.RUNNING: S.RUNNING,
    },
}


def _ask(engine: Engine, verb: str, job: Job, *, team: str = TEAM) -> Job:
    with transaction(engine) as session:
        return VERBS[verb](session, job.id, team=team)


@pytest.mark.parametrize("status", list(JobStatus))
def test_each_verb_moves_as_promised_or_names_what_is_allowed(
    engine: Engine, status: JobStatus
) -> None:
    for verb, expected in EXPECTED.items():
        job = job_in(engine, status, queue=f"{verb}")
        if status in expected:
            moved = _ask(engine, verb, job)
            assert moved.status == expected[status], verb
            again = _ask(engine, verb, job)
            assert (again.status, again.last_sequence) == (moved.status, moved.last_sequence)
        else:
            with pytest.raises(IllegalTransition, match=r"it can become|it has ended"):
                _ask(engine, verb, job)


def test_another_teams_job_is_not_there(engine: Engine) -> None:
    job = queued_job(engine)
    queued_job(engine, team="other")
    for verb in VERBS:
        with pytest.raises(NotFound):
            _ask(engine, verb, job, team="other")
    with transaction(engine) as session:
        for ask in (jobs.get_job, jobs.delete_job):
            with pytest.raises(NotFound):
                ask(session, job.id, team="other")
        assert jobs.get_job(session, job.id, team=TEAM).status == S.QUEUED
        assert [row.team for row in jobs.list_jobs(session, team="other").rows] == ["other"]
    with pytest.raises(NotFound):
        _create(engine, team="other", dataset_id=job.dataset_id)


def _create(engine: Engine, *, team: str = TEAM, dataset_id: str, **options: Any) -> Job:
    with transaction(engine) as session:
        return jobs.create_job(session, team=team, spec=new_job(dataset_id), **options)[0]


def test_a_key_used_again_gives_the_same_job_and_another_body_is_refused(engine: Engine) -> None:
    with transaction(engine) as session:
        spec = new_job(prepare(session))
        prepare(session, team="other")

    def create(request_hash: str, **options: str) -> tuple[Job, bool]:
        with transaction(engine) as session:
            return jobs.create_job(
                session,
                team=TEAM,
                spec=spec,
                idempotency_key="k",
                request_hash=request_hash,
                max_open_jobs=2,
                **options,  # type: ignore[arg-type] # only `route`
            )

    first, replayed = create("a")
    assert not replayed
    assert create("a")[0].id == first.id
    with pytest.raises(IdempotencyConflict):
        create("b")
    assert create("b", route="POST /v1/fine_tuning/jobs")[0].id != first.id
    # The quota is full now, and a replay is answered all the same.
    job, replayed = create("a")
    assert (job.id, replayed) == (first.id, True)
    with pytest.raises(QuotaExceeded, match="2 of at most 2"):
        _create(engine, dataset_id=spec.dataset_id, max_open_jobs=2)


def test_pages_neither_repeat_nor_miss_a_job_while_new_ones_arrive(engine: Engine) -> None:
    before = [queued_job(engine).id for _ in range(7)]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        with transaction(engine, read_only=True) as session:
            page = jobs.list_jobs(session, team=TEAM, cursor=cursor, limit=3)
        seen += [job.id for job in page.rows]
        queued_job(engine)
        cursor = page.next
        if cursor is None:
            break
    assert seen == before[::-1]


@pytest.mark.parametrize("cursor", ["", "x", "MTpq\n", "é", "a" * 500, "MjpqbwAA"])
def test_a_cursor_that_is_not_ours_is_refused(engine: Engine, cursor: str) -> None:
    with transaction(engine, read_only=True) as session, pytest.raises(InvalidCursor):
        jobs.list_jobs(session, team=TEAM, cursor=cursor)


def test_jobs_are_narrowed_by_every_filter(engine: Engine) -> None:
    first = queued_job(engine, metadata={"team": "ocr", 'od"d': "x"}, device="cpu")
    time.sleep(0.01)
    second = job_in(engine, S.CANCELLED, metadata={"team": "nlp"}, device="cuda")

    def found(**filters: Any) -> list[str]:
        with transaction(engine, read_only=True) as session:
            page = jobs.list_jobs(session, team=TEAM, filters=JobFilters(**filters))
        return [job.id for job in page.rows]

    assert found() == [second.id, first.id]
    assert found(statuses=(S.QUEUED,)) == [first.id]
    assert found(statuses=(S.QUEUED, S.CANCELLED)) == [second.id, first.id]
    assert found(device="cuda") == [second.id]
    assert found(model="org/other") == []
    assert found(metadata={"team": "ocr"}) == [first.id]
    assert found(metadata={'od"d': "x"}) == [first.id]
    assert found(metadata={"team": "ocr", "absent": "x"}) == []
    assert found(created_after=first.created_at) == [second.id]
    assert found(created_before=second.created_at) == [first.id]


def test_a_created_job_can_be_read_after_its_transaction(engine: Engine) -> None:
    job = queued_job(engine)
    columns = {column.key: getattr(job, column.key) for column in inspect(Job).column_attrs}
    assert columns["queued_at"] == columns["created_at"]
    assert (columns["version"], columns["last_sequence"], columns["attempt"]) == (1, 1, 0)


def test_a_retry_has_a_fresh_budget_and_keeps_the_fencing_token(engine: Engine) -> None:
    job = job_in(engine, S.FAILED, max_attempts=1)
    again = _ask(engine, "retry", job)
    assert (again.charged_attempts, again.attempt, again.error) == (0, 1, None)
    assert again.finished_at is None
    assert claim(engine).attempt == 2


def test_deleting_an_ended_job_takes_its_history_and_leaves_its_adapter(engine: Engine) -> None:
    running = job_in(engine, S.RUNNING)
    with pytest.raises(IllegalTransition), transaction(engine) as session:
        jobs.delete_job(session, running.id, team=TEAM)
    queued_job(engine, queue="cuda")
    claimed = claim(engine, queue="cuda")
    with transaction(engine) as session:
        events.record_progress(
            session, claimed.job.id, 1, [{"type": "evaluated", "step": 1, "eval_loss": 1.0}]
        )
        adapter_id = (finish(session, claimed).result or {})["adapter"]
    with transaction(engine) as session:
        assert jobs.delete_job(session, claimed.job.id, team=TEAM) == f"jobs/{claimed.job.id}/"
    with transaction(engine, read_only=True) as session:
        for table in (Event, Metric):
            rows = select(table).where(table.job_id == claimed.job.id)
            assert session.scalars(rows).all() == []
        assert adapters.get_adapter(session, adapter_id, team=TEAM).job_id is None


def test_a_dataset_that_a_job_names_stays(engine: Engine) -> None:
    job = job_in(engine, S.CANCELLED)

    def delete(session: Session) -> str | None:
        return datasets.delete_dataset(session, job.dataset_id, team=TEAM)

    with pytest.raises(StillReferenced, match=job.id), transaction(engine) as session:
        delete(session)
    with transaction(engine) as session:
        jobs.delete_job(session, job.id, team=TEAM)
        assert delete(session) is None
    with pytest.raises(NotFound), transaction(engine) as session:
        delete(session)


@pytest.mark.parametrize("column", ["eval_dataset_id", "retention_dataset_id"])
def test_a_dataset_that_a_job_only_evaluates_on_stays_too(engine: Engine, column: str) -> None:
    with transaction(engine) as session:
        other = prepare(session)
    job = job_in(engine, S.CANCELLED, **{column: other})
    with pytest.raises(StillReferenced, match=job.id), transaction(engine) as session:
        datasets.delete_dataset(session, other, team=TEAM)
    with transaction(engine) as session:
        assert getattr(jobs.get_job(session, job.id, team=TEAM), column) == other
        jobs.delete_job(session, job.id, team=TEAM)
        datasets.delete_dataset(session, other, team=TEAM)


def test_another_teams_retention_dataset_is_not_there(engine: Engine) -> None:
    with transaction(engine) as session:
        foreign = prepare(session, team="other")
        own = prepare(session)
    spec = new_job(own, retention_dataset_id=foreign)
    with pytest.raises(NotFound, match=foreign), transaction(engine) as session:
        jobs.create_job(session, team=TEAM, spec=spec)


def test_a_job_without_its_model_or_team_is_refused(engine: Engine) -> None:
    with transaction(engine) as session:
        dataset_id = prepare(session)
    for options in ({"team": "nobody"}, {"team": TEAM, "model": "org/unknown"}):
        team = options.pop("team")
        with pytest.raises(NotFound), transaction(engine) as session:
            jobs.create_job(session, team=team, spec=new_job(dataset_id, **options))


def test_jobs_are_counted_by_queue_and_status(engine: Engine) -> None:
    queued_job(engine)
    job_in(engine, S.RUNNING, queue="cuda")
    with transaction(engine, read_only=True) as session:
        assert jobs.count_by_status(session) == {("cpu", "queued"): 1, ("cuda", "running"): 1}
