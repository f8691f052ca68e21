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
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out_of_memory_device", False),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "out_of_memory_host",
            False,
        ),
        (MemoryError(), "out_of_memory_host", False),
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
    failure = failures.failure_of_exit(
        -signal.SIGSEGV, steps=12, killed_for_memory=False, attempt=1
    )

    assert failure.code == "killed"
    assert failure.retryable
    assert "SIGSEGV" in failure.message
    assert "step 12" in failure.message


def test_a_second_kill_for_memory_is_final() -> None:
    outcomes = [
        failures.failure_of_exit(-signal.SIGKILL, steps=0, killed_for_memory=True, attempt=attempt)
        for attempt in (1, 2)
    ]

    assert [outcome.code for outcome in outcomes] == ["out_of_memory_host"] * 2
    assert [outcome.retryable for outcome in outcomes] == [True, False]


def test_an_exit_without_a_word_is_tried_again() -> None:
    failure = failures.failure_of_exit(3, steps=0, killed_for_memory=False, attempt=1)

    assert failure.code == "unexpected"
    assert failure.retryable
    assert "status 3" in failure.message
