"""What went wrong in an attempt, in words that a user can act on.

An exception or an exit status becomes a `TrainingFailed`. The stack trace goes to the attempt's log
and nowhere else. `retryable` says whether the same attempt, repeated, could end otherwise: a lost
device or a full disk may pass; a diverged loss or a bad row will not.
"""

from __future__ import annotations

import errno
import signal
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from grit_core.errors import (
    AdapterInvalid,
    CheckpointCorrupt,
    DeviceUnavailable,
    InvalidConfig,
    InvalidDataset,
    InvalidRows,
    ModelUnavailable,
    PlanMismatch,
    TrainingDiverged,
)
from grit_core.events import TrainingFailed
from grit_core.library_errors import (
    DeviceFault,
    find_device_fault,
    ran_out_of_device_memory,
    ran_out_of_memory,
)
from store.errors import StorageFull

EXIT_STOPPED = 75
"""The child's exit status after it was asked to stop and has saved a checkpoint (EX_TEMPFAIL)."""
EXIT_FAILED = 1
"""The child's exit status after it has reported a `TrainingFailed`."""

_STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FailureCode(StrEnum):
    """Stable codes of `job.error.code`."""

    OUT_OF_MEMORY_DEVICE = "out_of_memory_device"
    OUT_OF_MEMORY_HOST = "out_of_memory_host"
    DIVERGED = "diverged"
    DATASET_INVALID = "dataset_invalid"
    MODEL_UNAVAILABLE = "model_unavailable"
    PLAN_CHANGED = "plan_changed"
    CONFIG_INVALID = "config_invalid"
    DEVICE_UNAVAILABLE = "device_unavailable"
    DEVICE_ASSERTION = "device_assertion"
    DEVICE_LOST = "device_lost"
    STORAGE_FULL = "storage_full"
    STORAGE_FAILED = "storage_failed"
    CHECKPOINT_CORRUPT = "checkpoint_corrupt"
    ADAPTER_INVALID = "adapter_invalid"
    STALLED = "stalled"
    KILLED = "killed"
    INTERRUPTED = "interrupted"
    UNEXPECTED = "unexpected"


def failure_of(error: BaseException) -> TrainingFailed:
    """Return what a user reads when training ended in `error`."""
    return (
        # First: an error of memory or of a device stays one, whatever was made of it.
        _memory_failure(error)
        or _device_failure(error)
        or _library_failure(error)
        or _system_failure(error)
        or _unexpected(error)
    )


def name_memory_share(failure: TrainingFailed, share: float | None) -> TrainingFailed:
    """Return a failure whose hint names the bound on the device's memory, if there is one."""
    if failure.code != FailureCode.OUT_OF_MEMORY_DEVICE or share is None:
        return failure
    bound = f"Training may use {share:g} of the device's memory: GRIT_TRAIN_DEVICE_MEMORY_SHARE."
    return replace(failure, hint=f"{failure.hint} {bound}")


def failure_of_exit(returncode: int, *, steps: int, killed_for_memory: bool) -> TrainingFailed:
    """Return the failure of a child that ended without reporting one.

    Args:
        returncode: As `subprocess.Popen.returncode`: negative is the signal that ended it.
        steps: Optimizer steps that it reported before.
        killed_for_memory: Whether the kernel's count of out-of-memory kills rose while it ran.
    """
    where = f"after step {steps}" if steps else "before its first step"
    if returncode == -signal.SIGKILL and killed_for_memory:
        return _failed(
            FailureCode.OUT_OF_MEMORY_HOST,
            f"The machine ran out of memory and ended the training process {where}.",
            hint="Lower training.batch_size or training.max_length, or give the worker memory.",
            category="user",
            retryable=True,
        )
    if returncode < 0:
        name = _signal_name(-returncode)
        return _failed(
            FailureCode.KILLED,
            f"The training process was ended by {name} {where}.",
            hint="The attempt's log holds its last lines. SIGKILL often means a lack of memory.",
            retryable=True,
        )
    if returncode == EXIT_STOPPED:
        return _failed(
            FailureCode.INTERRUPTED,
            f"The training process was asked to stop by someone other than the service {where}.",
            hint="Nothing to do: it continues from its last checkpoint.",
            retryable=True,
        )
    return _failed(
        FailureCode.UNEXPECTED,
        f"The training process ended with status {returncode} {where} and gave no reason.",
        hint="The attempt's log holds its last lines.",
        retryable=True,
    )


def stalled(*, stall_seconds: float, steps: int) -> TrainingFailed:
    """Return the failure of a child that made no progress for `stall_seconds`."""
    return _failed(
        FailureCode.STALLED,
        f"Training made no progress for {stall_seconds:g} s after step {steps} and was ended.",
        hint="If single steps really take this long, raise GRIT_STALL_SECONDS.",
        retryable=True,
    )


def no_room(folder: Path, *, needed_bytes: int, free_bytes: int) -> TrainingFailed:
    """Return the failure of an attempt that would fill the disk of its worker."""
    return _failed(
        FailureCode.STORAGE_FULL,
        f"The worker's disk has {free_bytes:,} bytes free in {folder}; the job's checkpoints and"
        f" adapter need about {needed_bytes:,}.",
        hint="Free space in the worker's home folder (GRIT_HOME), or lower the ranks.",
        retryable=True,
    )


def storage_failed(what: str, error: BaseException) -> TrainingFailed:
    """Return the failure of an attempt whose `what` could not be fetched or stored."""
    full = _system_failure(error)
    if full is not None:
        return full
    if isinstance(error, StorageFull):
        return _failed(
            FailureCode.STORAGE_FULL,
            str(error),
            hint="Free space in the object store.",
            retryable=True,
        )
    return _failed(
        FailureCode.STORAGE_FAILED,
        f"The {what} could not be exchanged with the object store: {error}",
        hint="Check that the object store is reachable and has room.",
        retryable=True,
    )


def oom_kills() -> int:
    """Return the kernel's count of out-of-memory kills since boot; 0 where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _library_failure(error: BaseException) -> TrainingFailed | None:
    for kind, code, category, hint, retryable in _LIBRARY:
        if isinstance(error, kind):
            failure = _failed(code, str(error), hint=hint, category=category, retryable=retryable)
            return replace(failure, details=getattr(error, "details", {}))
    return None


_LIBRARY: tuple[tuple[type[Exception], FailureCode, str, str, bool], ...] = (
    (
        TrainingDiverged,
        FailureCode.DIVERGED,
        "user",
        "Lower training.learning_rate, raise config.fisher_damping, or set training.max_grad_norm.",
        False,
    ),
    (
        InvalidRows,
        FailureCode.DATASET_INVALID,
        "user",
        "Correct the rows that are named; GET /jobs/{id}/attempts lists more in failure.details.",
        False,
    ),
    (
        InvalidDataset,
        FailureCode.DATASET_INVALID,
        "user",
        "The dataset's report lists its bad rows; upload a corrected one.",
        False,
    ),
    (
        ModelUnavailable,
        FailureCode.MODEL_UNAVAILABLE,
        "user",
        "Check that the model's folder or hub id can still be read by the worker.",
        False,
    ),
    (
        PlanMismatch,
        FailureCode.PLAN_CHANGED,
        "user",
        "The model's layers are no longer those that were planned: plan the job again.",
        False,
    ),
    (
        InvalidConfig,
        FailureCode.CONFIG_INVALID,
        "user",
        "Correct the fields that are named.",
        False,
    ),
    (
        DeviceUnavailable,
        FailureCode.DEVICE_UNAVAILABLE,
        "system",
        "Check the worker's device, or choose another one with `device`.",
        True,
    ),
    (
        CheckpointCorrupt,
        FailureCode.CHECKPOINT_CORRUPT,
        "system",
        "The next attempt starts from an earlier checkpoint.",
        True,
    ),
    (
        AdapterInvalid,
        FailureCode.ADAPTER_INVALID,
        "system",
        "Nothing was published: it does not fit its model, or does not answer alike in plain PEFT.",
        False,
    ),
)


def _memory_failure(error: BaseException) -> TrainingFailed | None:
    """Return the failure of a lack of memory.

    It is the job's, and yet worth another attempt: another process may have held the memory. The
    row allows one (`store.retries`).
    """
    if not ran_out_of_memory(error):
        return None
    on_device = ran_out_of_device_memory(error)
    place = "device" if on_device else "machine"
    code = FailureCode.OUT_OF_MEMORY_DEVICE if on_device else FailureCode.OUT_OF_MEMORY_HOST
    return _failed(
        code,
        f"The {place} ran out of memory: {_first_line(str(error))}",
        hint="Lower training.batch_size (and raise training.gradient_accumulation_steps),"
        " training.max_length, the ranks, or the size of the images.",
        category="user",
        retryable=True,
    )


def _device_failure(error: BaseException) -> TrainingFailed | None:
    fault = find_device_fault(error)
    said = _first_line(str(error))
    if fault is DeviceFault.ASSERTION:
        return _failed(
            FailureCode.DEVICE_ASSERTION,
            f"The device refused what it was given, most often an index out of range: {said}",
            hint="Train a few steps with `device` set to cpu: there the same error names the"
            " operation. Check that the model's tokenizer and embeddings belong together.",
            category="user",
            retryable=False,
        )
    if fault is DeviceFault.LOST:
        return _failed(
            FailureCode.DEVICE_LOST,
            f"The device failed: {said}",
            hint="The next attempt runs in a fresh process; if it fails again, check the device.",
            retryable=True,
        )
    return None


def _system_failure(error: BaseException) -> TrainingFailed | None:
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
        return _failed(
            FailureCode.STORAGE_FULL,
            f"No room is left to write {error.filename or 'a file'}: {error.strerror}.",
            hint="Free space in the worker's home folder (GRIT_HOME) or in the object store.",
            retryable=True,
        )
    return None


def _unexpected(error: BaseException) -> TrainingFailed:
    return _failed(
        FailureCode.UNEXPECTED,
        f"Training failed with {type(error).__name__}: {_first_line(str(error))}",
        hint="The attempt's log holds the details.",
        retryable=True,
    )


def _failed(
    code: FailureCode, message: str, *, hint: str, retryable: bool, category: str = "system"
) -> TrainingFailed:
    return TrainingFailed(
        code=code.value, category=category, message=message, hint=hint, retryable=retryable
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:500] if text.strip() else "no message"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
