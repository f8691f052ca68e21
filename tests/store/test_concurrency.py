"""Races settled by the database: real threads and connections, on both databases."""

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, text

from store import attempts, events, jobs
from store.database import run_in_transaction, transaction
from store.errors import IdempotencyConflict, IllegalTransition, LeaseLost, QuotaExceeded
from store.models import Adapter, Event, Job, JobStatus
from tests.builders import (
    TEAM,
    claim,
    expire_lease,
    finish,
    new_job,
    prepare,
    queued_job,
    running_job,
)

RACERS = 8


def race(work: Callable[[int], Any], racers: int = RACERS) -> list[Any]:
    """Run the same work in threads that start together, and return values and errors."""
    barrier = threading.Barrier(racers)

    def run(number: int) -> Any:
        barrier.wait()
        try:
            return work(number)
        except (IllegalTransition, LeaseLost, IdempotencyConflict, QuotaExceeded) as error:
            return error

    with ThreadPoolExecutor(racers) as pool:
        return list(pool.map(run, range(racers)))


def _claim(
    engine: Engine, number: int, *, max_running_jobs: int | None = None
) -> attempts.Claim | None:
    return run_in_transaction(
        engine,
        lambda session: attempts.claim_next(
            session,
            queue="cpu",
            worker_id=f"wrk_{number}",
            lease_seconds=60,
            max_running_jobs=max_running_jobs,
        ),
    )


def test_one_of_many_claimers_wins_a_job(engine: Engine) -> None:
    for _ in range(5):
        job = queued_job(engine)
        claims = [won for won in race(lambda number: _claim(engine, number)) if won is not None]
        assert [(won.job.id, won.attempt) for won in claims] == [(job.id, 1)]


def test_without_the_lock_and_the_compare_two_claimers_would_win(engine: Engine) -> None:
    # The control: the same race with a claim that reads first and then writes what it read.
    both_have_read = threading.Barrier(2)
    job = queued_job(engine)

    def careless(_: int) -> bool:
        with transaction(engine, read_only=True) as session:
            status = session.scalars(select(Job.status)).one()
        both_have_read.wait()
        with transaction(engine) as session:
            session.execute(text("UPDATE jobs SET status = 'running', attempt = attempt + 1"))
        return bool(status == JobStatus.QUEUED)

    assert race(careless, racers=2) == [True, True]
    with transaction(engine, read_only=True) as session:
        assert session.get_one(Job, job.id).attempt == 2


def test_as_many_jobs_as_claimers_go_to_one_each(engine: Engine) -> None:
    queued = {queued_job(engine).id for _ in range(RACERS)}
    claims = race(lambda number: _claim(engine, number))
    # A claimer may find its candidate just taken; what is left is there for the next bell.
    won = [claimed.job.id for claimed in claims if claimed is not None]
    assert len(won) == len(set(won))
    while (more := _claim(engine, 0)) is not None:
        won.append(more.job.id)
    assert set(won) == queued


def test_workers_that_claim_at_once_share_their_turns_among_the_teams(engine: Engine) -> None:
    for team in ("first", "second"):
        for _ in range(RACERS):
            queued_job(engine, team=team)
    won = [claimed for claimed in race(lambda number: _claim(engine, number)) if claimed]
    assert Counter(claimed.job.team for claimed in won) == {
        "first": RACERS // 2,
        "second": RACERS // 2,
    }


def test_the_bound_of_running_jobs_holds_for_workers_that_claim_at_once(engine: Engine) -> None:
    for _ in range(RACERS):
        queued_job(engine)
    won = race(lambda number: _claim(engine, number, max_running_jobs=2))
    assert len([claimed for claimed in won if claimed is not None]) == 2


def test_one_idempotency_key_used_in_parallel_creates_one_job(engine: Engine) -> None:
    with transaction(engine) as session:
        spec = new_job(prepare(session))

    def create(_: int) -> tuple[str, bool]:
        job, replayed = run_in_transaction(
            engine,
            lambda session: jobs.create_job(
                session,
                team=TEAM,
                spec=spec,
                idempotency_key="k",
                request_hash="h",
                max_open_jobs=100,
            ),
        )
        return job.id, replayed

    answers = race(create)
    assert len({job_id for job_id, _ in answers}) == 1
    assert sorted(replayed for _, replayed in answers) == [False] + [True] * (RACERS - 1)
    with transaction(engine, read_only=True) as session:
        assert session.scalars(select(func.count()).select_from(Job)).one() == 1


def test_a_key_used_in_parallel_for_two_bodies_serves_one_of_them(engine: Engine) -> None:
    with transaction(engine) as session:
        spec = new_job(prepare(session))

    def create(number: int) -> str:
        return run_in_transaction(
            engine,
            lambda session: jobs.create_job(
                session, team=TEAM, spec=spec, idempotency_key="k", request_hash=f"{number % 2}"
            ),
        )[0].id

    answers = race(create)
    served = {answer for answer in answers if isinstance(answer, str)}
    assert len(served) == 1
    refused = [answer for answer in answers if isinstance(answer, IdempotencyConflict)]
    assert len(refused) == RACERS // 2


def test_the_quota_of_open_jobs_holds_under_parallel_creation(engine: Engine) -> None:
    with transaction(engine) as session:
        spec = new_job(prepare(session))

    def create(_: int) -> Job:
        return run_in_transaction(
            engine,
            lambda session: jobs.create_job(session, team=TEAM, spec=spec, max_open_jobs=3),
        )[0]

    answers = race(create)
    assert sum(isinstance(answer, Job) for answer in answers) == 3
    assert sum(isinstance(answer, QuotaExceeded) for answer in answers) == RACERS - 3


def test_events_written_in_parallel_are_numbered_without_gaps(engine: Engine) -> None:
    job = running_job(engine)

    def append(number: int) -> None:
        for _ in range(5):
            run_in_transaction(
                engine,
                lambda session: events.append(session, job.id, "warned", {"by": number}, 1),
            )

    race(append)
    with transaction(engine, read_only=True) as session:
        found = session.scalars(select(Event.sequence).order_by(Event.sequence)).all()
        assert found == list(range(1, 2 + RACERS * 5 + 1))
        assert session.get_one(Job, job.id).last_sequence == found[-1]


@pytest.mark.parametrize("start", ["cancel first", "complete first"])
def test_a_cancel_and_a_completion_at_once_leave_one_end(engine: Engine, start: str) -> None:
    for _ in range(3):
        queued_job(engine)
        claimed = claim(engine)

        def cancel(job_id: str = claimed.job.id) -> str:
            return run_in_transaction(
                engine, lambda session: jobs.request_cancel(session, job_id, team=TEAM)
            ).status

        def complete(claimed: attempts.Claim = claimed) -> str:
            return run_in_transaction(engine, lambda session: finish(session, claimed)).status

        sides = [cancel, complete] if start == "cancel first" else [complete, cancel]
        answers = race(lambda number, sides=sides: sides[number](), racers=2)  # type: ignore[misc] # bound now
        assert sum(isinstance(answer, IllegalTransition) for answer in answers) == 1
        with transaction(engine) as session:
            job = session.get_one(Job, claimed.job.id)
            adapters = session.scalars(select(Adapter).where(Adapter.job_id == job.id)).all()
            if job.status == JobStatus.CANCELLING:
                assert adapters == []
                attempts.hand_back(session, job_id=job.id, attempt=1, reason="stopped")
            else:
                assert job.status == JobStatus.SUCCEEDED
                assert len(adapters) == 1


def test_many_reapers_take_an_expired_lease_back_once(engine: Engine) -> None:
    ids = [running_job(engine).id for _ in range(4)]
    for job_id in ids:
        expire_lease(engine, job_id)
    reaped = race(lambda _: run_in_transaction(engine, attempts.reap_expired))
    assert sorted(job_id for batch in reaped for job_id in batch) == sorted(ids)
    with transaction(engine, read_only=True) as session:
        rows = session.execute(select(Job.attempt, Job.status)).all()
    assert set(map(tuple, rows)) == {(1, JobStatus.QUEUED)}


def test_a_reaper_and_a_heartbeat_at_once_agree_on_who_holds_the_job(engine: Engine) -> None:
    for _ in range(4):
        job = running_job(engine)
        expire_lease(engine, job.id)

        def beat(job_id: str = job.id) -> object:
            return run_in_transaction(
                engine,
                lambda session: attempts.heartbeat(
                    session, job_id=job_id, attempt=1, worker_id="wrk_1", lease_seconds=60
                ),
            )

        sides: list[Callable[[], object]] = [
            beat,
            lambda: run_in_transaction(engine, attempts.reap_expired),
        ]
        kept, reaped = race(lambda number, sides=sides: sides[number](), racers=2)  # type: ignore[misc] # bound now
        assert isinstance(kept, LeaseLost) == (reaped == [job.id])
        with transaction(engine) as session:
            if reaped == [job.id]:
                jobs.request_cancel(session, job.id, team=TEAM)
            else:
                attempts.fail(
                    session,
                    job_id=job.id,
                    attempt=1,
                    failure=attempts.Failure(code="diverged", message="x"),
                )
