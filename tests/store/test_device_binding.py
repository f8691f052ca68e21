"""A job that named a strategy is bound by the worker that claims it, not by its submission."""

from typing import Any

import pytest
from sqlalchemy import Engine, update

from store import attempts, jobs, workers
from store.attempts import Claim, Failure
from store.database import transaction
from store.database_time import database_time_in
from store.device_binding import DeviceOption, device_columns
from store.models import Job, JobStatus, Team, Worker
from tests.builders import TEAM, claim, end_wait, queued_job

CUDA_FIRST = ("cuda", "mps", "cpu")
BATCH_SIZES = {"cuda": 8, "mps": 4, "cpu": 2}


def options(*devices: str) -> dict[str, Any]:
    """The columns of a job that waits for any of some devices, the best first."""
    return device_columns(
        "auto_performance",
        "decided at the claim",
        [
            DeviceOption(
                device=device,
                reason=f"{device} it is",
                training={"epochs": 1, "batch_size": BATCH_SIZES[device]},
            )
            for device in devices
        ],
    )


def open_job(engine: Engine, *devices: str, **changes: Any) -> Job:
    training = {"epochs": 1, "batch_size": BATCH_SIZES[devices[0]]}
    return queued_job(engine, **options(*devices), training=training, **changes)


def start_worker(engine: Engine, queue: str, *, stopping: bool = False) -> str:
    """Register a live worker of a queue, and return its id."""
    with transaction(engine) as session:
        made = workers.register_worker(
            session, hostname="here", process_id=1, queues=[queue], device=queue
        )
        workers.beat(session, made.id, stopping=stopping)
    return made.id


def silence(engine: Engine, worker_id: str) -> None:
    with transaction(engine) as session:
        session.execute(
            update(Worker).where(Worker.id == worker_id).values(seen_at=database_time_in(-60))
        )


def claim_if_any(engine: Engine, queue: str) -> Claim | None:
    with transaction(engine) as session:
        return attempts.claim_next(session, queue=queue, worker_id=f"wrk_{queue}", lease_seconds=60)


def fail(engine: Engine, claimed: Claim) -> None:
    failure = Failure(code="killed", message="Killed.", retryable=True)
    with transaction(engine) as session:
        attempts.fail(session, job_id=claimed.job.id, attempt=claimed.attempt, failure=failure)
    end_wait(engine, claimed.job.id)


def read(engine: Engine, job: Job) -> Job:
    with transaction(engine, read_only=True) as session:
        return jobs.get_job(session, job.id, team=job.team)


def test_a_job_is_bound_to_the_device_of_the_worker_that_claims_it(engine: Engine) -> None:
    job = open_job(engine, *CUDA_FIRST)
    assert (job.device, job.queue) == ("auto_performance", "auto:cuda,mps,cpu")
    claimed = claim(engine, queue="cpu").job
    assert (claimed.id, claimed.device, claimed.queue) == (job.id, "cpu", "cpu")
    assert claimed.device_reason == "cpu it is"
    assert claimed.training == {"epochs": 1, "batch_size": 2}


@pytest.mark.parametrize("worker", ["cuda", "mps"])
def test_a_worker_leaves_a_job_to_a_live_worker_of_a_better_device(
    engine: Engine, worker: str
) -> None:
    job = open_job(engine, *CUDA_FIRST)
    named = queued_job(engine, device="cpu", queue="cpu")
    start_worker(engine, worker)
    first = claim_if_any(engine, "cpu")
    assert first is not None
    assert first.job.id == named.id
    assert claim_if_any(engine, "cpu") is None
    assert claim(engine, queue=worker).job.id == job.id


def test_a_worker_that_was_alive_at_submission_and_is_not_any_more_is_not_waited_for(
    engine: Engine,
) -> None:
    gone = start_worker(engine, "cuda")
    open_job(engine, *CUDA_FIRST)
    assert claim_if_any(engine, "cpu") is None
    silence(engine, gone)
    assert claim(engine, queue="cpu").job.device == "cpu"


def test_a_worker_that_stops_or_whose_device_is_in_quarantine_is_not_waited_for(
    engine: Engine,
) -> None:
    start_worker(engine, "cuda", stopping=True)
    open_job(engine, *CUDA_FIRST)
    assert claim(engine, queue="cpu").job.device == "cpu"


def test_a_device_outside_of_the_jobs_options_never_claims_it(engine: Engine) -> None:
    job = open_job(engine, "cuda", "mps")
    assert claim_if_any(engine, "cpu") is None
    assert claim(engine, queue="mps").job.id == job.id


def test_the_order_is_the_strategys_own(engine: Engine) -> None:
    start_worker(engine, "cpu")
    job = open_job(engine, "cpu", "cuda", "mps")
    assert claim_if_any(engine, "cuda") is None
    assert claim(engine, queue="cpu").job.id == job.id


def test_an_attempt_without_a_checkpoint_leaves_the_job_free_for_another_device(
    engine: Engine,
) -> None:
    job = open_job(engine, *CUDA_FIRST)
    fail(engine, claim(engine, queue="cuda"))
    waiting = read(engine, job)
    assert (waiting.device, waiting.queue) == ("auto_performance", "auto:cuda,mps,cpu")
    again = claim(engine, queue="cpu").job
    assert (again.attempt, again.device, again.training["batch_size"]) == (2, "cpu", 2)


def test_a_checkpoint_binds_the_job_to_its_device_for_good(engine: Engine) -> None:
    job = open_job(engine, *CUDA_FIRST)
    claimed = claim(engine, queue="cuda")
    with transaction(engine) as session:
        attempts.save_checkpoint_pointer(
            session, job_id=job.id, attempt=1, step=5, prefix="jobs/x/step-5"
        )
    fail(engine, claimed)
    assert claim_if_any(engine, "cpu") is None
    again = claim(engine, queue="cuda")
    assert again.checkpoint is not None
    assert (again.job.device, again.job.training["batch_size"]) == ("cuda", 8)


def test_a_job_that_is_paused_before_its_first_step_is_free_when_it_goes_on(
    engine: Engine,
) -> None:
    job = open_job(engine, *CUDA_FIRST)
    claimed = claim(engine, queue="cuda")
    with transaction(engine) as session:
        jobs.request_pause(session, job.id, team=TEAM)
        attempts.hand_back(session, job_id=job.id, attempt=claimed.attempt, reason="paused")
    with transaction(engine) as session:
        assert jobs.resume_job(session, job.id, team=TEAM).queue == "auto:cuda,mps,cpu"
    assert claim(engine, queue="mps").job.device == "mps"


def test_a_bound_of_running_jobs_counts_bound_jobs_on_their_device(engine: Engine) -> None:
    for _ in range(3):
        open_job(engine, *CUDA_FIRST)
    with transaction(engine) as session:
        session.execute(update(Team).values(max_running_jobs=1))
    assert claim(engine, queue="cuda").job.queue == "cuda"
    assert claim_if_any(engine, "cuda") is None
    assert claim(engine, queue="cpu").job.queue == "cpu"


def test_priority_and_age_hold_across_named_and_free_jobs_of_a_team(engine: Engine) -> None:
    free = open_job(engine, *CUDA_FIRST)
    named = queued_job(engine)
    urgent = open_job(engine, "cuda", "cpu", priority=1)
    assert [claim(engine).job.id for _ in range(3)] == [urgent.id, free.id, named.id]


def test_the_bell_of_a_free_job_rings_where_it_can_be_claimed(engine: Engine) -> None:
    job = open_job(engine, *CUDA_FIRST)

    def ring() -> list[str]:
        with transaction(engine) as session:
            return attempts.queues_to_ring(session, again_after_seconds=30)

    assert ring() == []
    assert read(engine, job).last_rung_at is None
    start_worker(engine, "cpu")
    gpu = start_worker(engine, "cuda")
    assert ring() == ["cuda"]
    assert ring() == []
    silence(engine, gpu)
    with transaction(engine) as session:
        session.execute(update(Job).values(last_rung_at=database_time_in(-60)))
    assert ring() == ["cpu"]


def test_a_job_that_names_its_device_stays_bound_whatever_becomes_of_it(engine: Engine) -> None:
    queued_job(engine, device="cuda", queue="cuda")
    claimed = claim(engine, queue="cuda")
    fail(engine, claimed)
    assert read(engine, claimed.job).queue == "cuda"
    assert read(engine, claimed.job).status == JobStatus.QUEUED
    assert claim_if_any(engine, "cpu") is None
