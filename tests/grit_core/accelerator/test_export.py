"""The end of a job on a device: compaction, export and check; one base model at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_core import artifacts
from grit_core.events import AdapterSaved, CheckpointSaved, Compacted
from grit_core.models.pretrained import load_base_model
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.accelerator import Accelerator
from tests.grit_core.training_jobs import CAUSAL_CONFIG, tiny_job, with_dropout


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grit_core.compaction.NUM_DRAWS", 2)


def compacting_job(tmp: Path, device: str = "sim") -> TrainingJob:
    job = tiny_job(
        tmp,
        text_only=True,
        num_rows=4,
        work=device,
        compaction_max_kl=1e-3,
        max_steps=2,
        learning_rate=2e-2,
        optimizer="adamw",
    )
    still = with_dropout(CAUSAL_CONFIG, 0.0)  # dropout would draw from the device's own state
    return dataclasses.replace(job, device=device, config=still)


def test_a_job_on_a_device_ends_as_on_the_cpu(tmp_path: Path, accelerator: Accelerator) -> None:
    here, there = (list(train(compacting_job(tmp_path, device))) for device in ("cpu", "sim"))
    (expected,), (found,) = (
        [event for event in events if isinstance(event, Compacted)] for events in (here, there)
    )
    # The two trained weights differ by rounding, and directions at the limit with them.
    assert found.parameters_after == pytest.approx(expected.parameters_after, rel=0.15)
    assert found.parameters_after < found.parameters_before
    assert found.measured_kl is not None
    assert 0 < found.measured_kl <= 1e-3
    (saved,) = [event for event in there if isinstance(event, AdapterSaved)]
    assert saved.max_logit_difference <= 1e-5
    assert accelerator.caches_emptied >= 1


def test_the_base_model_is_gone_before_the_check_loads_it_again(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        held.append(accelerator.allocated_bytes)  # without a collection: what a card would hold
        return load_base_model(*args, **kwargs)

    monkeypatch.setattr(artifacts, "load_base_model", noting)
    job = compacting_job(tmp_path)
    before = accelerator.measure()
    base = load_base_model(job.model, device="sim")
    base_bytes = accelerator.measure() - before
    del base
    list(train(job))
    assert len(held) == 1
    assert held[0] - before < 0.1 * base_bytes


@pytest.mark.parametrize(
    ("share", "reason"),
    [(0.02, "compacting the adapter takes"), (0.999, "checking the saved adapter on a fresh base")],
)
def test_memory_that_runs_out_at_the_end_leaves_no_adapter_and_the_checkpoint_goes_on(
    tmp_path: Path, accelerator: Accelerator, share: float, reason: str
) -> None:
    job = compacting_job(tmp_path)
    run_out_after_checkpoints(job, accelerator, 0)
    num_allocations = accelerator.num_allocations
    short = dataclasses.replace(job, work_dir=tmp_path / "short")
    with pytest.raises(torch.OutOfMemoryError, match=reason):
        run_out_after_checkpoints(short, accelerator, int(share * num_allocations))
    assert [path.name for path in short.work_dir.iterdir()] == ["checkpoints"]
    accelerator.run_out_at(0)
    events = list(train(short, resume_from=short.work_dir / "checkpoints" / "step-2"))
    assert [type(event) for event in events[-3:-1]] == [Compacted, AdapterSaved]


def run_out_after_checkpoints(job: TrainingJob, accelerator: Accelerator, first: int) -> None:
    for event in train(job):
        if isinstance(event, CheckpointSaved):
            accelerator.run_out_at(first)
