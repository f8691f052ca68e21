"""Room for checkpoints and adapter is looked for before an attempt, and missed in numbers."""

import dataclasses
from pathlib import Path

from sqlalchemy import Engine

from grit_core.checkpoints import load_checkpoint
from grit_core.estimate import checkpoint_bytes
from grit_core.training import train
from store.models import JobKind
from tests.builders import queued_job
from tests.grit_core.training_jobs import tiny_job
from tests.worker.test_inputs import PLAN, TRAINING
from worker.space import needed, shortage


def test_a_job_that_fits_has_no_shortage_and_one_that_does_not_has_it_in_numbers(
    sqlite_engine: Engine, tmp_path: Path
) -> None:
    columns = {"training": dataclasses.asdict(TRAINING), "plan": PLAN.to_json()}
    job = queued_job(sqlite_engine, **columns)
    assert shortage(job, tmp_path) is None
    job.plan = {**job.plan, "trainable_parameters": 10**15}
    failure = shortage(job, tmp_path)
    assert failure is not None
    assert (failure.code, failure.retryable) == ("storage_full", True)
    assert f"{needed(job):,}" in failure.message
    assert str(tmp_path) in failure.message
    job.kind = JobKind.COMPRESSION
    assert shortage(job, tmp_path) is None


def test_the_estimate_of_a_checkpoint_is_near_what_one_takes(tmp_path: Path) -> None:
    job = tiny_job(tmp_path, max_steps=3, checkpoint_every_steps=3)
    list(train(job))
    checkpoint = load_checkpoint(job.work_dir / "checkpoints" / "step-3")
    actual = sum(
        tensor.numel() * tensor.element_size()
        for name in ("adapter", "optimizer")
        for tensor in checkpoint.tensors[name].values()
    )
    assert 0.7 < checkpoint_bytes(job.plan, job.training) / actual < 1.5
