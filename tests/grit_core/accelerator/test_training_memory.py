"""Where a device's memory runs out, a run ends with an error that says so, and nothing is lost."""

import dataclasses
from pathlib import Path

import pytest
import torch

from grit_core.checkpoints import latest_checkpoint
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.accelerator import Accelerator
from tests.accelerator.sweep import sweep_training
from tests.grit_core.accelerator.variants import variant_job

PLACES = (0.02, 0.6, 0.8, 0.97)
"""Of a job's allocations: the model is loaded, steps are done, the adapter is verified."""


def result(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def test_memory_that_runs_out_anywhere_in_a_step_ends_it_with_an_error(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    """`python -m tests.accelerator.sweep training` tries every allocation."""
    outcomes = sweep_training(tmp_path, accelerator, points=36)
    assert outcomes.others == []
    assert outcomes.counts["repeated"] >= 6
    for phase in ("start", "ordinary", "observed and reprojected", "evaluation", "checkpoint"):
        assert outcomes.counts[f"{phase}: out of memory"] > 0, outcomes.counts


def test_a_job_that_ran_out_of_memory_resumes_to_the_bytes_of_one_that_did_not(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    job = variant_job(
        tmp_path, "ekfac", device="sim", max_steps=3, checkpoint_every_steps=1, eval_fraction=0.2
    )
    accelerator.run_out_at(0)
    list(train(job))
    num_allocations = accelerator.num_allocations
    names: list[str | None] = []
    for place in PLACES:
        again = dataclasses.replace(job, work_dir=tmp_path / f"full-{place}")
        accelerator.run_out_at(int(place * num_allocations))
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            list(train(again))
        accelerator.run_out_at(0)
        found, passed_over = latest_checkpoint(again.work_dir / "checkpoints")
        assert passed_over == []
        names.append(None if found is None else found.name)
        list(train(again, resume_from=found))
        assert result(again) == result(job), place
    assert names[0] is None
    assert names[-1] == "step-3"
