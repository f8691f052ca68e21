"""What a user reads when an attempt has failed."""

import errno
import signal

import pytest
import torch

from grit_core.errors import (
    DeviceUnavailable,
    Fault,
    InvalidDataset,
    InvalidRows,
    ModelUnavailable,
    PlanMismatch,
    TrainingDiverged,
)
from store.errors import StorageFull, StorageUnavailable
from worker import failures


def test_a_diverged_loss_is_the_users_and_is_not_tried_again() -> None:
    failure = failures.failure_of(TrainingDiverged("The loss of step 7 is nan."))

    assert (failure.code, failure.category, failure.retryable) == ("diverged", "user", False)
    assert failure.message == "The loss of step 7 is nan."
    assert "learning_rate" in failure.hint


def test_all_bad_rows_of_a_dataset_go_with_the_failure() -> None:
    details = {"num_bad_rows": 1, "bad_rows": [{"file": "a.jsonl", "line": 3, "detail": "No."}]}
    failure = failures.failure_of(InvalidRows("a.jsonl, line 3: No.", details=details))

    assert (failure.code, failure.category, failure.retryable) == ("dataset_invalid", "user", False)
    assert failure.details == details
    assert "GET /jobs/{id}/attempts" in failure.hint


@pytest.mark.parametrize(
    ("error", "code", "retryable"),
    [
        (InvalidDataset("rows.jsonl, line 3: no assistant message"), "dataset_invalid", False),
        (ModelUnavailable("/models/x is not there"), "model_unavailable", False),
        (
            PlanMismatch([Fault(pointer="", code="plan_mismatch", detail="other layers")]),
            "plan_changed",
            False,
        ),
        (DeviceUnavailable("no cuda"), "device_unavailable", True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out_of_memory_device", True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
            "out_of_memory_device",
            True,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out_of_memory_device", True),
        (torch.AcceleratorError("CUDA error: out of memory"), "out_of_memory_device", True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "out_of_memory_host",
            True,
        ),
        (MemoryError(), "out_of_memory_host", True),
        (RuntimeError("CUDA error: device-side assert triggered"), "device_assertion", False),
        (RuntimeError("CUDA error: an illegal memory access"), "device_lost", True),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "storage_full", True),
        (ZeroDivisionError("division by zero"), "unexpected", True),
    ],
)
def test_each_error_has_its_code_and_says_whether_to_retry(
    error: Exception, code: str, *, retryable: bool
) -> None:
    failure = failures.failure_of(error)

    assert (failure.code, failure.retryable) == (code, retryable)
    assert failure.message
    assert "Traceback" not in failure.message


def test_a_full_store_and_a_full_disk_are_both_named_as_such() -> None:
    for error in (StorageFull("No space for 'x'."), OSError(errno.EFBIG, "File too large", "/x")):
        failure = failures.storage_failed("adapter", error)
        assert (failure.code, failure.retryable) == ("storage_full", True)
        assert "Free space" in failure.hint
    failure = failures.storage_failed("adapter", StorageUnavailable("It is away."))
    assert (failure.code, failure.retryable) == ("storage_failed", True)


def test_a_killed_process_names_its_signal_and_its_last_step() -> None:
    failure = failures.failure_of_exit(-signal.SIGSEGV, steps=12, killed_for_memory=False)

    assert failure.code == "killed"
    assert failure.retryable
    assert "SIGSEGV" in failure.message
    assert "step 12" in failure.message


def test_a_kill_for_memory_is_tried_again_as_a_refused_allocation_is() -> None:
    failure = failures.failure_of_exit(-signal.SIGKILL, steps=0, killed_for_memory=True)

    assert (failure.code, failure.category) == ("out_of_memory_host", "user")
    assert failure.retryable  # of how many attempts, the row says


def test_a_model_that_could_not_be_loaded_for_lack_of_memory_is_no_missing_model() -> None:
    made = ModelUnavailable("the model of /models/x cannot be loaded: OutOfMemoryError")
    made.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    failure = failures.failure_of(made)

    assert (failure.code, failure.retryable) == ("out_of_memory_device", True)
    assert "/models/x" in failure.message


def test_the_hint_of_a_lack_of_memory_names_the_share_of_the_device() -> None:
    full = failures.failure_of(torch.OutOfMemoryError("CUDA out of memory."))

    assert "GRIT_TRAIN_DEVICE_MEMORY_SHARE" not in full.hint
    bounded = failures.name_memory_share(full, 0.6)
    assert "0.6 of the device's memory: GRIT_TRAIN_DEVICE_MEMORY_SHARE" in bounded.hint
    host = failures.failure_of(MemoryError())
    assert failures.name_memory_share(host, 0.6) == host


def test_an_exit_without_a_word_is_tried_again() -> None:
    failure = failures.failure_of_exit(3, steps=0, killed_for_memory=False)

    assert failure.code == "unexpected"
    assert failure.retryable
    assert "status 3" in failure.message
