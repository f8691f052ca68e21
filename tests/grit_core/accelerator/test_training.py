"""Every way to train gives on a device what it gives on the CPU, and resumes to the same bytes.

A mix of devices, a float64 on the device or a generator of the CPU there raises by itself.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from grit_core.checkpoints import load_checkpoint
from grit_core.events import CheckpointSaved, StepCompleted, StepSkipped, TrainingEvent
from grit_core.training import train
from grit_core.training_job import TrainingJob
from grit_core.training_run import TrainingRun
from tests.accelerator import Accelerator
from tests.grit_core.accelerator.variants import VARIANTS, variant_job

TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-3, "float16": 2e-4}
"""Relative, of a step's loss. The device sums in the CPU's order, but it adds float32 losses to a
float32 total, and scales or autocasts other operations than the CPU in half precision."""

PRODUCT_TOLERANCE = 2e-3
"""Of B A against its own length. The matrices themselves may differ in the signs of singular
vectors, and Adam's steps have the size of their sign where a gradient is hardly more than
rounding."""


pytestmark = pytest.mark.usefixtures("accelerator")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("variants")


def products(job: TrainingJob) -> dict[str, Tensor]:
    """B A of every layer of the written adapter."""
    tensors = load_file(job.work_dir / "adapter" / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


def losses(events: Sequence[TrainingEvent]) -> list[float]:
    return [event.train_loss for event in events if isinstance(event, StepCompleted)]


def result(job: TrainingJob) -> bytes:
    return (job.work_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def last_checkpoint(job: TrainingJob) -> list[bytes]:
    folder = job.work_dir / "checkpoints" / f"step-{job.training.max_steps}"
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def train_keeping(job: TrainingJob) -> list[TrainingEvent]:
    """Train and keep every checkpoint, of which a job itself keeps two."""
    events = []
    for event in train(job):
        events.append(event)
        if isinstance(event, CheckpointSaved):
            shutil.copytree(event.folder, job.work_dir / "kept" / Path(event.folder).name)
    return events


def resume(job: TrainingJob, step: int) -> TrainingJob:
    """Continue a job from one of its checkpoints, in another folder."""
    work = job.work_dir.with_name(f"{job.work_dir.name}-from-{step}")
    again = dataclasses.replace(job, work_dir=work)
    list(train(again, resume_from=job.work_dir / "kept" / f"step-{step}"))
    return again


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_variant_is_the_cpus_on_a_device_and_resumes_to_the_same_bytes(
    tmp: Path, name: str
) -> None:
    steps = {"ekfac": 4, "compaction": 2}.get(name, 3)
    settings: dict[str, Any] = {"max_steps": steps, "checkpoint_every_steps": 1}
    if name == "ekfac":
        settings["eval_fraction"] = 0.2
    here, there = (variant_job(tmp, name, device=device, **settings) for device in ("cpu", "sim"))
    events = train_keeping(there)
    # ekfac at every step boundary, the last one (before the export) included; the cut adapter from
    # before the cut.
    for step in range(1, steps + 1) if name == "ekfac" else (2,):
        again = resume(there, step)
        assert result(again) == result(there), step
        if step < steps:
            assert last_checkpoint(again) == last_checkpoint(there), step
    if name == "dropout":
        return  # each device draws its own
    expected = list(train(here))
    assert losses(events) == pytest.approx(losses(expected), rel=TOLERANCES[here.precision])
    assert type(events[-1]) is type(expected[-1])
    if here.precision == "float32":
        for layer, product in products(here).items():
            difference = (products(there)[layer] - product).norm()
            assert difference < PRODUCT_TOLERANCE * product.norm(), layer


def test_dropout_goes_on_where_the_checkpoint_was_taken(
    accelerator: Accelerator, tmp: Path
) -> None:
    job = variant_job(tmp, "dropout", device="sim", work_suffix="-state", max_steps=2)
    list(train(job))
    saved = load_checkpoint(job.work_dir / "checkpoints" / "step-2").tensors["random"]
    assert set(saved) == {"cpu", "sim"}
    accelerator.generator.manual_seed(99)
    run = TrainingRun(job, num_threads=1)
    try:
        run.restore(load_checkpoint(job.work_dir / "checkpoints" / "step-2"))
        assert torch.equal(accelerator.generator.get_state(), saved["sim"])
    finally:
        run.close()


@pytest.mark.parametrize(
    ("name", "scale"), [("float16", 2.0**24), ("float16_random_start", 2.0**13)]
)
def test_float16_lowers_a_scale_that_overflows_and_resumes_with_it(
    tmp: Path, monkeypatch: pytest.MonkeyPatch, name: str, scale: float
) -> None:
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: real(device, init_scale=scale))
    job = variant_job(
        tmp, name, device="sim", work_suffix="-scaled", max_steps=6, checkpoint_every_steps=2
    )
    events = train_keeping(job)
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    # A start from the gradient has lowered the scale before the first step.
    assert bool(skipped) == (name == "float16_random_start")
    assert losses(events)
    assert result(resume(job, 4)) == result(job)
