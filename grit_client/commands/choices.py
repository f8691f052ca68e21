"""Values that an option may have, as the command line lists and completes them."""

from enum import StrEnum


class JobStatus(StrEnum):
    """Of `--status`; a test compares it with the service's own."""

    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Scope(StrEnum):
    """Of `--scope`; a test compares it with the service's own."""

    READ = "read"
    WRITE = "write"
    INFER = "infer"
    ADMIN = "admin"


class OnBadRows(StrEnum):
    """Of `--on-bad-rows`."""

    REJECT = "reject"
    SKIP = "skip"


class Layout(StrEnum):
    """Of `--layout`."""

    PEFT = "peft"
    VLLM = "vllm"
