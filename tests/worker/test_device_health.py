"""A device that fails gets no further job; one that computes does."""

import pytest
import torch

from worker.device_health import DeviceHealth


def test_two_attempts_in_a_row_that_lost_the_device_close_it() -> None:
    health = DeviceHealth("cpu")
    for code in ("device_lost", None, "device_lost", "diverged", "device_lost"):
        health.note(code)
        assert health.quarantine is None
    health.note("device_unavailable")
    assert health.quarantine is not None
    assert "'cpu' takes no more jobs: 2 attempts in a row lost it" in health.quarantine
    assert not health.fit()
    health.note(None)
    assert not health.fit()


@pytest.mark.slow
def test_after_one_loss_a_device_that_computes_is_given_jobs_again() -> None:
    health = DeviceHealth("cpu")
    health.note("device_lost")
    assert health.fit()
    assert health.quarantine is None


@pytest.mark.slow
def test_after_one_loss_a_device_that_does_not_compute_is_closed() -> None:
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    health = DeviceHealth(missing)
    assert health.fit()  # nothing is examined before anything was lost
    health.note("device_lost")
    assert not health.fit()
    assert health.quarantine is not None
    assert "it failed its examination: " in health.quarantine
    assert len(health.quarantine.partition("examination: ")[2]) > 20
