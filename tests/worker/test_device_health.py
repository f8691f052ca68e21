"""A device that fails gets no further job; one that computes does."""

from pathlib import Path

import pytest
import torch

from worker.device_check import NoMemory, find_fault
from worker.device_health import DeviceHealth

FULL_CARD = """
class OutOfMemoryError(RuntimeError): ...
class AcceleratorError(RuntimeError): ...
def ones(*_, device):
    raise {error}
"""


@pytest.fixture
def torch_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examining process imports as torch."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "torch.py"


def test_one_job_that_loses_the_device_again_and_again_never_closes_it() -> None:
    health = DeviceHealth("cpu")
    for _ in range(5):
        health.note("device_lost", job_id="bad")
        assert health.quarantine is None


def test_different_jobs_in_a_row_that_lost_the_device_close_it() -> None:
    health = DeviceHealth("cpu")
    for code in ("device_lost", None, "device_lost", "diverged", "device_lost"):
        health.note(code, job_id="one")
        assert health.quarantine is None
    health.note("device_unavailable", job_id="two")
    assert health.quarantine is not None
    assert "'cpu' takes no more jobs: 2 jobs in a row lost it" in health.quarantine
    assert not health.fit()
    health.note(None, job_id="three")
    assert not health.fit()


@pytest.mark.parametrize("code", ["device_assertion", "out_of_memory_device", "dataset_invalid"])
def test_what_is_the_jobs_own_fault_does_not_count_against_the_device(code: str) -> None:
    health = DeviceHealth("cpu")
    for number in range(5):
        health.note(code, job_id=f"job_{number}")
    assert health.quarantine is None


@pytest.mark.slow
def test_a_device_that_passes_its_examination_between_two_jobs_that_lost_it_stays_open() -> None:
    health = DeviceHealth("cpu")
    for number in range(3):
        health.note("device_lost", job_id=f"job_{number}")
        assert health.fit()
    assert health.quarantine is None


def test_a_device_that_other_processes_fill_is_not_closed_for_it(torch_that_raises: Path) -> None:
    torch_that_raises.write_text(FULL_CARD.format(error="OutOfMemoryError('CUDA out of memory.')"))
    health = DeviceHealth("cuda")
    health.note("device_lost", job_id="one")
    assert health.fit()
    # Nor is it known to be sound: another job that loses it counts.
    health.note("device_lost", job_id="two")
    assert not health.fit()


def test_a_device_whose_every_call_fails_is_closed_by_its_examination(
    torch_that_raises: Path,
) -> None:
    error = "AcceleratorError('CUDA error: uncorrectable ECC error encountered')"
    torch_that_raises.write_text(FULL_CARD.format(error=error))
    health = DeviceHealth("cuda")
    health.note("device_lost", job_id="one")
    assert not health.fit()
    assert health.quarantine is not None
    assert "failed its examination: AcceleratorError: CUDA error: uncorrect" in health.quarantine


def test_an_examination_without_memory_finds_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`")

    assert find_fault("cpu") is None
    monkeypatch.setattr(torch, "ones", refuse)
    with pytest.raises(NoMemory):
        find_fault("cpu")


@pytest.mark.slow
def test_after_one_loss_a_device_that_does_not_compute_is_closed() -> None:
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    health = DeviceHealth(missing)
    assert health.fit()  # nothing is examined before anything was lost
    health.note("device_lost", job_id="one")
    assert not health.fit()
    assert health.quarantine is not None
    assert "it failed its examination: " in health.quarantine
    assert len(health.quarantine.partition("examination: ")[2]) > 20
