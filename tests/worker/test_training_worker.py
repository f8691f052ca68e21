"""What a training worker does when it cannot even begin."""

import shutil

import pytest
from sqlalchemy import Engine

from store import jobs
from store.database import transaction
from store.models import JobStatus
from store.objects import Objects
from store.settings import Settings
from tests.builders import TEAM, queued_job
from worker.training_worker import TrainingWorker


@pytest.mark.slow
def test_an_attempt_without_a_process_fails_at_once_and_the_worker_lives(
    sqlite_engine: Engine, embedded_settings: Settings
) -> None:
    worker = TrainingWorker(
        embedded_settings,
        sqlite_engine,
        Objects(embedded_settings),
        worker_id="wrk_1",
        queue="cpu",
    )
    worker.open()
    try:
        job = queued_job(sqlite_engine)
        assert worker._spare is not None
        worker._spare.dismiss()
        shutil.rmtree(worker._workbench.scratch.folder)  # as a disk that takes no more folders
        worker.claim_until_empty()
        with transaction(sqlite_engine, read_only=True) as session:
            (attempt,) = jobs.list_attempts(session, job.id)
            job = jobs.get_job(session, job.id, team=TEAM)
        assert attempt.outcome == "failed"
        assert attempt.failure is not None
        assert "No such file" in attempt.failure["message"]
        assert (job.status, job.charged_attempts) == (JobStatus.QUEUED, 1)
    finally:
        worker.close()
