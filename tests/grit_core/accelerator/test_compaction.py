"""Compaction on a device: it cuts what the CPU cuts, seldom waits, and tells of short memory."""

import pytest
import torch
from peft import PeftModel

from grit_core.calibration import Calibration
from grit_core.compaction import Compaction, compact
from grit_core.models.lora_folder import load_lora_folder
from grit_core.models.pretrained import load_base_model
from grit_core.models.vlm_adapter import lora_layers
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.accelerator import Accelerator
from tests.grit_core.adapted_models import rows_of
from tests.grit_core.training_jobs import tiny_job

NUM_ROWS = 4

# Of two orders of adding up float32 numbers, and of the same in half precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.03}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    job = tiny_job(
        tmp_path_factory.mktemp("compaction-on-a-device"),
        num_rows=NUM_ROWS,
        max_steps=6,
        learning_rate=2e-2,
        optimizer="adamw",
    )
    list(train(job))
    return job


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grit_core.compaction.NUM_DRAWS", 4)


def load(job: TrainingJob, device: str, precision: str = "float32") -> PeftModel:
    base = load_base_model(job.model, device=device, dtype=precision)
    return load_lora_folder(base, job.work_dir / "adapter")


def calibration_on(model: PeftModel, job: TrainingJob, precision: str = "float32") -> Calibration:
    return Calibration(model, rows_of(job, range(NUM_ROWS), size=2), precision=precision)


def cut(job: TrainingJob, device: str, precision: str = "float32") -> tuple[Compaction, PeftModel]:
    model = load(job, device, precision)
    return compact(calibration_on(model, job, precision), max_kl=1e-3), model


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "precision",
    # Half precision is compared in test_compression.py too.
    ["float32", *(pytest.param(half, marks=pytest.mark.slow) for half in ("bfloat16", "float16"))],
)
def test_a_device_cuts_what_the_cpu_cuts(job: TrainingJob, precision: str) -> None:
    (here, on_cpu), (there, on_device) = (cut(job, name, precision) for name in ("cpu", "sim"))
    assert here.parameters_after < here.parameters_before
    assert here.kept == there.kept
    assert there.predicted_kl == pytest.approx(here.predicted_kl, rel=TOLERANCE[precision])
    assert there.measured_kl == pytest.approx(here.measured_kl, rel=TOLERANCE[precision])
    for name, layer in lora_layers(on_device).items():
        expected = lora_layers(on_cpu)[name]
        found, wanted = (
            each.lora_B.default.weight.detach().cpu() @ each.lora_A.default.weight.detach().cpu()
            for each in (layer, expected)
        )
        assert (found - wanted).norm() <= TOLERANCE[precision] * wanted.norm()


@pytest.mark.usefixtures("accelerator")
def test_every_measure_of_a_device_is_that_of_the_cpu(job: TrainingJob) -> None:
    here, there = (calibration_on(load(job, device), job) for device in ("cpu", "sim"))
    assert there.loss() == pytest.approx(here.loss(), rel=1e-5)
    dropped = {name: torch.arange(layer.r["default"]) == 1 for name, layer in here.layers.items()}
    assert there.divergence(dropped) == pytest.approx(here.divergence(dropped), rel=1e-3)
    assert there.divergence({}) == 0.0
    torch.testing.assert_close(
        there.gate_gradients(num_draws=2), here.gate_gradients(num_draws=2), rtol=1e-3, atol=1e-5
    )


def test_a_pass_waits_once_and_gate_gradients_once_a_batch(
    job: TrainingJob, accelerator: Accelerator
) -> None:
    calibration = calibration_on(load(job, "sim"), job)
    dropped = {
        name: torch.arange(layer.r["default"]) == 1 for name, layer in calibration.layers.items()
    }
    for num_waits, measure in (
        (0, calibration.observe_factors),
        (2, lambda: calibration.gate_gradients(num_draws=5)),
        (1, lambda: calibration.divergence(dropped)),
        (1, calibration.loss),
    ):
        with accelerator.waits() as waits:
            measure()
        own = [wait for wait in waits if wait.place.startswith("grit_core/calibration.py")]
        assert sum(wait.kind != "upload" for wait in own) == num_waits, waits
        assert all(wait.numel <= 5 * sum(calibration_ranks(calibration)) for wait in own), waits


def test_what_a_compaction_does_once_waits_for_no_layer_by_itself(
    job: TrainingJob, accelerator: Accelerator
) -> None:
    calibration = calibration_on(load(job, "sim"), job)
    with accelerator.waits() as waits:
        compact(calibration, max_kl=1e-3)
    once = ("grit_core/compaction.py", "grit_core/transfer.py")
    downloads = [wait for wait in waits if wait.place.startswith(once) and wait.kind != "upload"]
    num_ranks = len(set(calibration_ranks(calibration)))
    assert len(downloads) <= 2 + 2 * num_ranks < len(calibration.layers), waits


def calibration_ranks(calibration: Calibration) -> list[int]:
    return [int(layer.r["default"]) for layer in calibration.layers.values()]


def test_memory_that_runs_out_is_reported_and_leaves_the_model_as_it_was_hooked(
    job: TrainingJob, accelerator: Accelerator
) -> None:
    model = load(job, "sim")
    calibration = calibration_on(model, job)
    weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    accelerator.run_out_at(0)
    expected = compact(calibration, max_kl=1e-3)
    num_allocations = accelerator.num_allocations
    for first in (
        torch.rand(3, generator=torch.Generator().manual_seed(0)) * num_allocations
    ).tolist():
        restore(model, weights)
        accelerator.run_out_at(1 + int(first))
        with pytest.raises(torch.OutOfMemoryError):
            compact(calibration_on(model, job), max_kl=1e-3)
        hooked = [n for n, m in lora_layers(model).items() if m.lora_A.default._forward_hooks]
        assert hooked == []
    restore(model, weights)
    accelerator.run_out_at(0)
    assert compact(calibration_on(model, job), max_kl=1e-3) == expected


def restore(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    for layer in lora_layers(model).values():
        layer.set_scale("default", 1.0)
