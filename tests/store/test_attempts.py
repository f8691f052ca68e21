"""Executions of jobs on both databases: fencing, retries, hand-backs and the reaper."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text, update
from sqlalchemy.orm import Session

from store import attempts, events, jobs
from store.attempts import Failure, NewAdapter, RetryPolicy
from store.database import transaction
from store.errors import IllegalTransition, LeaseLost
from store.models import Adapter, AttemptOutcome, Job, JobStatus, Team
from tests.builders import (
    TEAM,
    claim,
    end_wait,
    expire_lease,
    finish,
    job_in,
    queued_job,
    running_job,
)

CRASH = Failure(code="killed", message="The training process was killed.", retryable=True)
DIVERGED = Failure(code="diverged", message="The loss is not finite.", category="user")


def _job(engine: Engine, job_id: str) -> Job:
    with transaction(engine, read_only=True) as session:
        return session.get_one(Job, job_id)


def _fail(engine: Engine, job: Job, failure: Failure = CRASH, **policy: Any) -> Job:
    with transaction(engine) as session:
        return attempts.fail(
            session,
            job_id=job.id,
            attempt=job.attempt,
            failure=failure,
            policy=RetryPolicy(**policy),
        )


def _outcomes(engine: Engine, job_id: str) -> list[str]:
    with transaction(engine, read_only=True) as session:
        return [row.outcome for row in jobs.list_attempts(session, job_id)]


# --- the claim


def test_a_claim_counts_the_attempt_and_leases_by_the_databases_clock(engine: Engine) -> None:
    queued_job(engine)
    claimed = claim(engine, lease_seconds=60)
    assert (claimed.attempt, claimed.job.status, claimed.job.worker_id) == (1, "running", "wrk_1")
    assert claimed.job.started_at is not None
    assert claimed.job.lease_expires_at is not None
    lease = claimed.job.lease_expires_at - claimed.job.updated_at
    assert timedelta(seconds=59) < lease < timedelta(seconds=61)


def test_a_claim_of_an_empty_queue_is_none(engine: Engine) -> None:
    queued_job(engine, queue="cuda")
    with transaction(engine) as session:
        assert attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=1) is None


def test_jobs_are_claimed_by_priority_and_then_by_age(engine: Engine) -> None:
    first = queued_job(engine)
    second = queued_job(engine)
    urgent = queued_job(engine, priority=5)
    assert [claim(engine).job.id for _ in range(3)] == [urgent.id, first.id, second.id]


def test_a_team_with_one_job_does_not_wait_behind_a_team_with_many(engine: Engine) -> None:
    noisy = [queued_job(engine, team="noisy") for _ in range(4)]
    quiet = queued_job(engine, team="quiet")
    assert claim(engine).job.id == noisy[0].id
    assert claim(engine).job.id == quiet.id


def test_a_team_takes_turns_also_on_a_single_worker(engine: Engine) -> None:
    noisy = [queued_job(engine, team="noisy") for _ in range(3)]
    quiet = queued_job(engine, team="quiet")
    order = []
    for _ in range(3):
        claimed = claim(engine)
        order.append(claimed.job.id)
        with transaction(engine) as session:
            finish(session, claimed)
    assert order == [noisy[0].id, quiet.id, noisy[1].id]


def test_a_high_priority_comes_first_in_its_team_and_not_before_other_teams(
    engine: Engine,
) -> None:
    late = queued_job(engine, team="loud", priority=99)
    loud = [queued_job(engine, team="loud", priority=100) for _ in range(3)]
    quiet = [queued_job(engine, team="quiet", priority=-100) for _ in range(2)]
    order = []
    for _ in range(6):
        claimed = claim(engine)
        order.append(claimed.job.id)
        with transaction(engine) as session:  # one worker: no team ever has a job running
            finish(session, claimed)
    turns = [loud[0], quiet[0], loud[1], quiet[1], loud[2], late]
    assert order == [job.id for job in turns]


def test_a_turn_on_one_device_is_no_turn_on_another(engine: Engine) -> None:
    """A team that is busy on the GPU was once passed over on the CPU for as long."""
    cpu = [queued_job(engine, team="steady") for _ in range(3)]
    both = queued_job(engine, team="both")
    for _ in range(3):
        queued_job(engine, team="both", queue="cuda")
    order = []
    for _ in range(3):
        claimed = claim(engine)
        order.append(claimed.job.id)
        with transaction(engine) as session:
            finish(session, claimed)
        with transaction(engine) as session:
            finish(session, _claim_on(session, "cuda"))
    assert order == [cpu[0].id, both.id, cpu[1].id]


def _claim_on(session: Session, queue: str) -> attempts.Claim:
    claimed = attempts.claim_next(session, queue=queue, worker_id="wrk_gpu", lease_seconds=60)
    assert claimed is not None
    return claimed


def test_a_team_at_its_bound_of_running_jobs_is_passed_over(engine: Engine) -> None:
    queued_job(engine, team="bounded")
    queued_job(engine, team="bounded")

    def claim_within(default: int | None) -> attempts.Claim | None:
        with transaction(engine) as session:
            return attempts.claim_next(
                session, queue="cpu", worker_id="w", lease_seconds=1, max_running_jobs=default
            )

    with transaction(engine) as session:
        session.execute(update(Team).values(max_running_jobs=1))
    claim(engine)
    assert claim_within(None) is None
    assert claim_within(9) is None
    # Without a bound of its own the deployment's holds.
    with transaction(engine) as session:
        session.execute(update(Team).values(max_running_jobs=None))
    assert claim_within(1) is None
    assert claim_within(2) is not None


def test_a_job_is_not_claimed_before_its_wait_is_over(engine: Engine) -> None:
    job = running_job(engine)
    assert _fail(engine, job).status == JobStatus.QUEUED
    with transaction(engine) as session:
        assert attempts.claim_next(session, queue="cpu", worker_id="w", lease_seconds=1) is None
    end_wait(engine, job.id)
    assert claim(engine).attempt == 2


# --- the lease


def test_a_heartbeat_extends_the_lease_and_tells_what_the_user_wants(engine: Engine) -> None:
    job = running_job(engine)

    def beat(worker_id: str = "wrk_1") -> attempts.Orders:
        with transaction(engine) as session:
            return attempts.heartbeat(
                session, job_id=job.id, attempt=1, worker_id=worker_id, lease_seconds=300
            )

    assert beat() == attempts.Orders(cancel=False, pause=False)
    later = _job(engine, job.id).lease_expires_at
    assert job.lease_expires_at is not None
    assert later is not None
    assert later > job.lease_expires_at + timedelta(seconds=200)
    with transaction(engine) as session:
        jobs.request_pause(session, job.id, team=TEAM)
    assert beat() == attempts.Orders(cancel=False, pause=True)
    with transaction(engine) as session:
        jobs.request_cancel(session, job.id, team=TEAM)
    assert beat() == attempts.Orders(cancel=True, pause=False)
    with pytest.raises(LeaseLost):
        beat(worker_id="wrk_2")


def _writes(job_id: str, attempt: int) -> dict[str, Callable[[Session], object]]:
    """Every fenced write, as an attempt would make it."""
    held: dict[str, Any] = {"job_id": job_id, "attempt": attempt}
    step = {
        "type": "step_completed",
        "step": 1,
        "total_steps": 2,
        "epoch": 0.5,
        "train_loss": 666.0,
        "learning_rate": 0.1,
        "grad_norm": 1.0,
        "num_tokens": 1,
        "tokens_per_second": 1.0,
        "elapsed_seconds": 1.0,
    }
    return {
        "heartbeat": lambda s: attempts.heartbeat(s, **held, worker_id="wrk_1", lease_seconds=60),
        "set_phase": lambda s: attempts.set_phase(s, **held, phase="training"),
        "save_checkpoint_pointer": lambda s: attempts.save_checkpoint_pointer(
            s, **held, step=1, prefix="zombie/"
        ),
        "forget_checkpoint": lambda s: attempts.forget_checkpoint(s, **held, step=1),
        "complete": lambda s: attempts.complete(
            s, **held, adapter=NewAdapter(id="adp_zombie", prefix="zombie/"), result={}
        ),
        "fail": lambda s: attempts.fail(s, **held, failure=CRASH),
        "hand_back": lambda s: attempts.hand_back(s, **held, reason="drain"),
        "append": lambda s: events.append(s, job_id, "warned", {}, attempt),
        "record_progress": lambda s: events.record_progress(s, job_id, attempt, [step]),
    }


WRITES = sorted(_writes("", 0))


def _rows(engine: Engine) -> list[list[Any]]:
    tables = ["jobs", "attempts", "events", "metrics", "checkpoints", "adapters"]
    with transaction(engine, read_only=True) as session:
        return [
            sorted(map(str, session.execute(text(f"SELECT * FROM {table}")).all()))  # noqa: S608
            for table in tables
        ]


def _write(engine: Engine, job_id: str, attempt: int, name: str) -> None:
    with transaction(engine) as session:
        _writes(job_id, attempt)[name](session)


@pytest.mark.parametrize("name", WRITES)
def test_a_zombie_writes_nothing_after_its_job_went_to_another(engine: Engine, name: str) -> None:
    job = running_job(engine)
    expire_lease(engine, job.id)
    with transaction(engine) as session:
        assert attempts.reap_expired(session) == [job.id]
    before = _rows(engine)
    with pytest.raises(LeaseLost):  # while it waits for the next attempt
        _write(engine, job.id, 1, name)
    assert _rows(engine) == before
    end_wait(engine, job.id)
    assert claim(engine).attempt == 2
    before = _rows(engine)
    with pytest.raises(LeaseLost):  # while the next attempt runs, on the very same worker
        _write(engine, job.id, 1, name)
    assert _rows(engine) == before
    # The control: the attempt that holds the lease may do all of this, so the fence is what held.
    _write(engine, job.id, 2, name)
    if name != "forget_checkpoint":  # there was none
        assert _rows(engine) != before


# --- the end


def test_completing_publishes_the_adapter_and_ends_the_job(engine: Engine) -> None:
    queued_job(engine, name="invoices")
    claimed = claim(engine)
    with transaction(engine) as session:
        job = finish(session, claimed)
        adapter = session.get_one(Adapter, job.result["adapter"])  # type: ignore[index] # just set
    assert (job.status, job.error) == (JobStatus.SUCCEEDED, None)
    assert (adapter.job_id, adapter.team, adapter.name) == (job.id, TEAM, "invoices")
    assert _outcomes(engine, job.id) == [AttemptOutcome.SUCCEEDED]


def test_a_completion_whose_answer_was_lost_can_be_repeated(engine: Engine) -> None:
    job = running_job(engine)

    def complete() -> Job:
        with transaction(engine) as session:
            return attempts.complete(
                session,
                job_id=job.id,
                attempt=1,
                adapter=NewAdapter(id="adp_1", prefix="adapters/adp_1/"),
                result={},
            )

    assert complete().last_sequence == complete().last_sequence


def test_a_cancelled_job_publishes_no_adapter(engine: Engine) -> None:
    queued_job(engine)
    claimed = claim(engine)
    with transaction(engine) as session:
        jobs.request_cancel(session, claimed.job.id, team=TEAM)
    with pytest.raises(IllegalTransition, match="cancelling"), transaction(engine) as session:
        finish(session, claimed)
    with transaction(engine) as session:
        assert session.get(Adapter, "adp_1") is None
        job = attempts.hand_back(session, job_id=claimed.job.id, attempt=1, reason="stopped")
    assert job.status == JobStatus.CANCELLED
    assert _outcomes(engine, job.id) == [AttemptOutcome.CANCELLED]


def test_a_failure_that_cannot_pass_ends_the_job_at_once(engine: Engine) -> None:
    job = _fail(engine, running_job(engine), DIVERGED)
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["category"]) == ("diverged", "user")
    assert job.error["attempts"] == [
        {"attempt": 1, "outcome": "failed", "code": "diverged", "message": DIVERGED.message}
    ]


def test_the_details_of_a_failure_stay_with_its_attempt(engine: Engine) -> None:
    details = {"bad_rows": [{"file": "rows.jsonl", "line": 3, "detail": "No."}]}
    failure = Failure(code="dataset_invalid", message="No.", category="user", details=details)
    job = _fail(engine, running_job(engine), failure)
    assert job.error is not None
    assert job.error["details"] == {}
    with transaction(engine, read_only=True) as session:
        (attempt,) = jobs.list_attempts(session, job.id)
    assert attempt.failure is not None
    assert attempt.failure["details"] == details


def test_a_poison_job_is_tried_as_often_as_allowed_and_names_every_reason(engine: Engine) -> None:
    job = running_job(engine, max_attempts=3)
    for attempt in (1, 2):
        assert _fail(engine, _job(engine, job.id)).status == JobStatus.QUEUED
        end_wait(engine, job.id)
        assert claim(engine).attempt == attempt + 1
    expire_lease(engine, job.id)
    with transaction(engine) as session:
        attempts.reap_expired(session)
    ended = _job(engine, job.id)
    assert ended.status == JobStatus.FAILED
    assert ended.error is not None
    assert [told["code"] for told in ended.error["attempts"]] == ["killed", "killed", "worker_lost"]
    assert _outcomes(engine, job.id) == ["failed", "failed", "lost"]


def _unexpected(message: str) -> Failure:
    return Failure(code="unexpected", message=message, retryable=True)


def test_an_unknown_failure_that_comes_back_word_for_word_is_not_tried_again(
    engine: Engine,
) -> None:
    job = running_job(engine, max_attempts=5)
    first = _fail(engine, job, _unexpected("KeyError: 'x'"))
    assert first.status == JobStatus.QUEUED
    end_wait(engine, job.id)
    claim(engine)
    ended = _fail(engine, _job(engine, job.id), _unexpected("KeyError: 'x'"))
    assert ended.status == JobStatus.FAILED
    assert ended.error is not None
    assert ended.error["retryable"] is False
    assert "twice in a row" in ended.error["hint"]
    assert len(ended.error["attempts"]) == 2


@pytest.mark.parametrize("code", ["out_of_memory_device", "out_of_memory_host"])
def test_a_lack_of_memory_is_tried_once_more_whatever_came_between(
    engine: Engine, code: str
) -> None:
    full = Failure(code=code, message="step 3: out of memory", category="user", retryable=True)
    job = running_job(engine, max_attempts=9)
    for failure in (_unexpected("KeyError: 'x'"), full, _unexpected("KeyError: 'x'")):
        assert _fail(engine, _job(engine, job.id), failure).status == JobStatus.QUEUED
        end_wait(engine, job.id)
        claim(engine)
    ended = _fail(engine, _job(engine, job.id), full)
    assert ended.status == JobStatus.FAILED
    assert ended.error is not None
    assert (ended.error["code"], ended.error["category"]) == (code, "user")
    assert ended.error["retryable"] is False


def test_a_lack_of_memory_is_tried_once_more_after_a_retry_by_the_user_too(engine: Engine) -> None:
    full = Failure(code="out_of_memory_device", message="full", category="user", retryable=True)
    job = running_job(engine, max_attempts=9)
    for _ in range(2):  # runs of the user
        assert _fail(engine, _job(engine, job.id), full).status == JobStatus.QUEUED
        end_wait(engine, job.id)
        attempt = claim(engine).attempt
        with transaction(engine) as session:  # the worker stops meanwhile: not charged
            attempts.hand_back(session, job_id=job.id, attempt=attempt, reason="drained")
        claim(engine)
        assert _fail(engine, _job(engine, job.id), full).status == JobStatus.FAILED
        with transaction(engine) as session:
            jobs.retry_job(session, job.id, team=TEAM)
        claim(engine)


@pytest.mark.parametrize(
    "second",
    [
        _unexpected("KeyError: 'y'"),
        Failure(code="killed", message="KeyError: 'x'", retryable=True),
    ],
)
def test_another_failure_is_tried_again(engine: Engine, second: Failure) -> None:
    job = running_job(engine, max_attempts=5)
    _fail(engine, job, _unexpected("KeyError: 'x'"))
    end_wait(engine, job.id)
    claim(engine)
    assert _fail(engine, _job(engine, job.id), second).status == JobStatus.QUEUED


def test_an_unknown_failure_after_further_steps_is_tried_again(engine: Engine) -> None:
    job = running_job(engine, max_attempts=5)
    _fail(engine, job, _unexpected("KeyError: 'x'"))
    end_wait(engine, job.id)
    claim(engine)
    with transaction(engine) as session:
        session.get_one(Job, job.id).progress = {"step": 7}
    again = _fail(engine, _job(engine, job.id), _unexpected("KeyError: 'x'"))
    assert again.status == JobStatus.QUEUED


def test_the_wait_between_attempts_doubles_up_to_its_cap(engine: Engine) -> None:
    job = running_job(engine, max_attempts=9)
    waits = []
    for _ in range(4):
        failed = _fail(
            engine, _job(engine, job.id), backoff_first_seconds=10, backoff_cap_seconds=35
        )
        assert failed.not_before is not None
        waits.append(round((failed.not_before - failed.updated_at).total_seconds()))
        end_wait(engine, job.id)
        claim(engine)
    assert waits == [10, 20, 35, 35]


def test_a_drained_attempt_is_not_charged_but_too_many_of_them_end_the_job(engine: Engine) -> None:
    job = running_job(engine, max_attempts=1)
    policy = RetryPolicy(max_infra_failures=2)

    def hand_back(attempt: int) -> Job:
        with transaction(engine) as session:
            return attempts.hand_back(
                session, job_id=job.id, attempt=attempt, reason="deploy", policy=policy
            )

    for attempt in (1, 2):
        back = hand_back(attempt)
        assert (back.status, back.charged_attempts, back.not_before) == ("queued", 0, None)
        assert claim(engine).attempt == attempt + 1
    ended = hand_back(3)
    assert ended.status == JobStatus.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "interrupted_too_often"


def test_a_pause_keeps_the_budget_and_a_resume_goes_on(engine: Engine) -> None:
    job = job_in(engine, JobStatus.PAUSING, max_attempts=1)
    with transaction(engine) as session:
        attempts.save_checkpoint_pointer(session, job_id=job.id, attempt=1, step=4, prefix="p/")
        paused = attempts.hand_back(session, job_id=job.id, attempt=1, reason="paused")
        assert (paused.status, paused.charged_attempts) == (JobStatus.PAUSED, 0)
    with transaction(engine) as session:
        jobs.resume_job(session, job.id, team=TEAM)
    claimed = claim(engine)
    assert claimed.attempt == 2
    assert claimed.checkpoint is not None
    assert (claimed.checkpoint.step, claimed.checkpoint.prefix) == (4, "p/")


# --- the reaper


@pytest.mark.parametrize(
    ("status", "becomes"),
    [
        (JobStatus.RUNNING, JobStatus.QUEUED),
        (JobStatus.PAUSING, JobStatus.PAUSED),
        (JobStatus.CANCELLING, JobStatus.CANCELLED),
    ],
)
def test_an_expired_lease_is_taken_back_once(
    engine: Engine, status: JobStatus, becomes: JobStatus
) -> None:
    job = job_in(engine, status)
    with transaction(engine) as session:
        assert attempts.reap_expired(session) == []
    expire_lease(engine, job.id)
    with transaction(engine) as session:
        assert attempts.reap_expired(session) == [job.id]
    with transaction(engine) as session:
        assert attempts.reap_expired(session) == []
    assert _job(engine, job.id).status == becomes


def test_a_heartbeat_after_the_lease_expired_keeps_the_job_if_nobody_took_it(
    engine: Engine,
) -> None:
    job = running_job(engine)
    expire_lease(engine, job.id)
    _write(engine, job.id, 1, "heartbeat")
    with transaction(engine) as session:
        assert attempts.reap_expired(session) == []


# --- checkpoints and the bell


def test_the_newest_checkpoint_that_is_left_is_the_one_to_resume_from(engine: Engine) -> None:
    job = running_job(engine)
    with transaction(engine) as session:
        for step in (2, 4):
            attempts.save_checkpoint_pointer(
                session, job_id=job.id, attempt=1, step=step, prefix=f"step-{step}/"
            )
        assert [point.step for point in attempts.list_checkpoints(session, job.id)] == [2, 4]
        forgotten = attempts.forget_checkpoint(session, job_id=job.id, attempt=1, step=4)
        assert forgotten == "step-4/"
        assert attempts.forget_checkpoint(session, job_id=job.id, attempt=1, step=4) is None
    _fail(engine, _job(engine, job.id))
    end_wait(engine, job.id)
    claimed = claim(engine)
    assert claimed.checkpoint is not None
    assert claimed.checkpoint.step == 2


def test_every_ready_row_is_rung_for_once_and_again_only_after_a_while(engine: Engine) -> None:
    queued_job(engine)
    queued_job(engine)
    queued_job(engine, queue="cuda")
    running_job(engine, priority=1)

    def due(again_after_seconds: float) -> list[str]:
        with transaction(engine) as session:
            return attempts.queues_to_ring(session, again_after_seconds=again_after_seconds)

    assert due(30.0) == ["cpu", "cpu", "cuda"]
    assert due(30.0) == []
    assert due(0.0) == ["cpu", "cpu", "cuda"]


def test_a_job_that_waits_for_its_next_attempt_is_not_rung(engine: Engine) -> None:
    job = running_job(engine)
    _fail(engine, job)
    with transaction(engine) as session:
        assert attempts.queues_to_ring(session, again_after_seconds=0.0) == []
    end_wait(engine, job.id)
    with transaction(engine) as session:
        assert attempts.queues_to_ring(session, again_after_seconds=0.0) == ["cpu"]


def test_a_long_queue_is_claimed_from_quickly_and_rung_for_in_parts(engine: Engine) -> None:
    queued_job(engine, queue="cuda")
    queued_job(engine)
    columns = [column.name for column in Job.__table__.columns if column.name != "id"]
    listed = ", ".join(columns)
    copied = f"substr(id, 2) || :digit, {listed}"  # every copy has an id of its own
    double = f"INSERT INTO jobs (id, {listed}) SELECT {copied} FROM jobs WHERE queue = 'cpu'"  # noqa: S608
    with transaction(engine) as session:
        for number in range(11):  # 2,048 rows
            session.execute(text(double), {"digit": f"{number:x}"})
    with transaction(engine) as session:
        rung = attempts.queues_to_ring(session, again_after_seconds=30)
        assert rung == ["cpu"] * 8 + ["cuda"]
        again = attempts.queues_to_ring(session, again_after_seconds=30)
        assert again == ["cpu"] * 8
    claim(engine)
    began = time.monotonic()
    assert claim(engine).attempt == 1
    # Counting a team's running jobs once for every waiting row took seconds here.
    assert time.monotonic() - began < 1.0
