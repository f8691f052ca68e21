"""Compression on a device: what it cuts and writes, how many base models it holds, short memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grit_core import artifacts, compression
from grit_core.compression import compress
from grit_core.compression_job import CompressionJob
from grit_core.errors import AdapterInvalid
from grit_core.events import AdapterSaved, Compacted, TrainingEvent
from grit_core.models.lora_folder import load_lora_folder
from grit_core.models.pretrained import load_base_model
from grit_core.training import train
from grit_core.training_job import TrainingJob
from tests.accelerator import Accelerator
from tests.grit_core.training_jobs import tiny_job


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    job = tiny_job(
        tmp_path_factory.mktemp("compression-on-a-device"),
        text_only=True,
        num_rows=6,
        max_steps=6,
        learning_rate=2e-2,
        eval_fraction=0.3,
        optimizer="adamw",
    )
    list(train(job))
    return job


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grit_core.compaction.NUM_DRAWS", 2)


def compression_job(job: TrainingJob, work_dir: Path, **options: Any) -> CompressionJob:
    values: dict[str, Any] = {
        "model": job.model,
        "model_name": "tiny/model",
        "adapter": job.work_dir / "adapter",
        "dataset": job.dataset,
        "work_dir": work_dir,
        "max_kl": 1e-3,
        "num_threads": 1,
        "device": "sim",
    }
    return CompressionJob(**{**values, **options})


def only(events: Iterable[TrainingEvent], kind: type) -> Any:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_device_writes_the_adapter_that_the_cpu_writes(
    trained: TrainingJob, tmp_path: Path, precision: str
) -> None:
    here, there = (
        list(compress(compression_job(trained, tmp_path / name, device=name, precision=precision)))
        for name in ("cpu", "sim")
    )
    cut, expected = only(there, Compacted), only(here, Compacted)
    # In half precision a direction at the limit may fall on either side of it.
    slack = 0 if precision == "float32" else 0.15
    assert cut.parameters_after == pytest.approx(expected.parameters_after, rel=slack)
    assert cut.parameters_after < cut.parameters_before
    assert 0 < cut.measured_kl <= 1e-3
    assert cut.eval_loss_after == pytest.approx(expected.eval_loss_after, rel=1e-2)
    found, wanted = (
        load_file(Path(only(events, AdapterSaved).folder) / "adapter_model.safetensors")
        for events in (there, here)
    )
    if precision == "float32":
        assert cut.ranks == expected.ranks
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            # The gauge turns a direction's sign as rounding has it.
            torch.testing.assert_close(tensor.abs(), wanted[name].abs(), rtol=1e-2, atol=1e-4)


def test_the_device_never_holds_two_base_models(
    trained: TrainingJob, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        held.append(accelerator.allocated_bytes)  # without a collection: what a card would hold
        return load_base_model(*args, **kwargs)

    for module in (artifacts, compression):
        monkeypatch.setattr(module, "load_base_model", noting)
    before = accelerator.measure()
    base = load_base_model(trained.model, device="sim")
    base_bytes = accelerator.measure() - before
    del base
    list(compress(compression_job(trained, tmp_path)))
    assert len(held) == 2
    assert max(held) - before < 0.1 * base_bytes
    assert accelerator.caches_emptied >= 1


def test_memory_that_runs_out_leaves_nothing_and_the_next_run_is_right(
    trained: TrainingJob, tmp_path: Path, accelerator: Accelerator
) -> None:
    accelerator.run_out_at(0)
    expected = only(list(compress(compression_job(trained, tmp_path / "whole"))), Compacted)
    num_allocations = accelerator.num_allocations
    shares = torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
    for first in (1 + int(share * num_allocations) for share in shares):
        refuse_at(accelerator, first, trained, tmp_path / f"short-{first}")
    refuse_at(accelerator, num_allocations, trained, tmp_path / "last")
    accelerator.run_out_at(0)
    found = only(list(compress(compression_job(trained, tmp_path / "last"))), Compacted)
    assert found == expected


def refuse_at(accelerator: Accelerator, first: int, job: TrainingJob, work_dir: Path) -> None:
    accelerator.run_out_at(first)
    with pytest.raises(torch.OutOfMemoryError, match=r"SIM out of memory. Tried to allocate"):
        list(compress(compression_job(job, work_dir)))
    assert accelerator.num_refusals >= 1
    assert not work_dir.exists() or list(work_dir.iterdir()) == []


def test_what_asked_for_the_memory_is_named(
    trained: TrainingJob, tmp_path: Path, accelerator: Accelerator
) -> None:
    events = compress(compression_job(trained, tmp_path))
    next(events)
    accelerator.run_out_at(1)
    with pytest.raises(torch.OutOfMemoryError, match="measuring the loss on 8 rows at a time: SIM"):
        next(events)


def test_a_folder_that_does_not_fit_the_memory_is_not_called_invalid(
    trained: TrainingJob, accelerator: Accelerator
) -> None:
    for first in (1, 3):
        base = load_base_model(trained.model, device="sim")
        accelerator.run_out_at(first)
        with pytest.raises(torch.OutOfMemoryError):
            load_lora_folder(base, trained.work_dir / "adapter")
        accelerator.run_out_at(0)


def test_an_adapter_is_read_onto_no_device_but_that_of_its_model(
    trained: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT takes the first card that it finds; here there is none to be found."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "cuda")
    base = load_base_model(trained.model)
    model = load_lora_folder(base, trained.work_dir / "adapter")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    events = list(compress(compression_job(trained, tmp_path, device="cpu")))
    assert only(events, AdapterSaved).max_logit_difference <= 1e-5


def test_an_adapter_that_fails_its_check_leaves_no_folder(
    trained: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grit_core.artifacts.LOGIT_TOLERANCE", {"float32": -1.0})
    with pytest.raises(AdapterInvalid, match="logits differ"):
        list(compress(compression_job(trained, tmp_path, device="cpu")))
    assert list(tmp_path.iterdir()) == []
