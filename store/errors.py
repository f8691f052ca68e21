"""What can go wrong in the store.

No HTTP in here: `api/errors.py` maps these types to problem documents.

StoreError
    NotFound              no such row for this team
    IllegalTransition     the job's status does not allow the move
    LeaseLost             the attempt that writes is no longer the current one
    IdempotencyConflict   the key was used for another request
    InvalidKey            the API key is unknown, revoked or expired
    KeyEnded              the API key is revoked, expired or replaced, and cannot be rotated
    QuotaExceeded         a team's bound is reached
    AuditBroken           a row of the audit was altered or removed
    StillReferenced       the row is needed by another row
    InvalidCursor         a page cursor that we did not write
    ObjectMissing         nothing is stored under the key
    ObjectCorrupt         what is stored differs from its manifest
    ObjectExists          the key is taken, and was to be free
    QueueUnavailable      the broker does not answer
    QueueFull             as many requests wait for an answer as may
    StorageUnavailable    the database or the object store does not answer
    StorageFull           no space is left
"""

from collections.abc import Iterable
from typing import Final

STORED_BYTES: Final = "stored bytes"
"""The quota that time alone does not give back."""


class StoreError(Exception):
    """Base of everything the store raises on purpose."""


class NotFound(StoreError):
    """No such row for this team; another team's row looks the same."""

    def __init__(self, kind: str, id: str) -> None:  # noqa: A002 - the vocabulary's word for it
        super().__init__(f"There is no {kind} {id!r}.")
        self.kind = kind
        self.id = id


class IllegalTransition(StoreError):
    """The job's status does not allow the move."""

    def __init__(self, job_id: str, *, status: str, to: str, allowed: Iterable[str]) -> None:
        self.job_id = job_id
        self.status = status
        self.to = to
        self.allowed = tuple(sorted(allowed))
        moves = (
            f"it can become {', '.join(self.allowed)}" if self.allowed else "it has ended for good"
        )
        super().__init__(f"Job {job_id} is {status} and cannot become {to}; {moves}.")


class LeaseLost(StoreError):
    """The attempt that writes is no longer the current one; its process must stop."""

    def __init__(self, job_id: str, *, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} of job {job_id} no longer holds the lease.")
        self.job_id = job_id
        self.attempt = attempt


class IdempotencyConflict(StoreError):
    """The idempotency key was used before, for a request with another body."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Idempotency-Key {key!r} was used for another request body; use a new key for it."
        )
        self.key = key


class InvalidKey(StoreError):
    """The API key is unknown, malformed, revoked or expired."""


class KeyEnded(StoreError):
    """The API key is revoked, expired or replaced already, and cannot be rotated."""

    def __init__(self, key_id: str, why: str) -> None:
        super().__init__(f"The key {key_id} {why}.")
        self.key_id = key_id


class QuotaExceeded(StoreError):
    """A team's bound is reached."""

    def __init__(
        self, team: str, *, quota: str, value: int, bound: int, more: str = "", advice: str = ""
    ) -> None:
        told = f"Team {team!r} has {value} of at most {bound} {quota}{more}."
        super().__init__(f"{told} {advice}".rstrip())
        self.team = team
        self.quota = quota
        self.value = value
        self.bound = bound


class AuditBroken(StoreError):
    """A row of the audit was altered, removed or put in by somebody else."""

    def __init__(self, sequence: int, what: str) -> None:
        super().__init__(f"The audit is broken at row {sequence}: {what}.")
        self.sequence = sequence


class StillReferenced(StoreError):
    """The row is needed by another row."""

    def __init__(self, kind: str, id: str, *, by: str) -> None:  # noqa: A002 - as in NotFound
        super().__init__(f"The {kind} {id} is still used by {by}.")
        self.kind = kind
        self.id = id
        self.by = by


class InvalidCursor(StoreError):
    """A page cursor that this service did not write."""


class ObjectMissing(StoreError):
    """Nothing is stored under the key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"No object is stored under {key!r}.")
        self.key = key


class ObjectCorrupt(StoreError):
    """What is stored under the key differs from what its manifest says."""

    def __init__(self, key: str, detail: str) -> None:
        super().__init__(f"The object {key!r} is corrupt: {detail}")
        self.key = key
        self.detail = detail


class ObjectExists(StoreError):
    """The key is taken, and was to be free."""

    def __init__(self, key: str) -> None:
        super().__init__(f"An object is already stored under {key!r}.")
        self.key = key


class QueueUnavailable(StoreError):
    """The broker does not answer."""


class QueueFull(StoreError):
    """As many inference requests wait as may, in all or of one team."""

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class StorageUnavailable(StoreError):
    """The database or the object store does not answer."""

    def __init__(self, message: str, *, passing: bool = True) -> None:
        super().__init__(message)
        self.passing = passing
        """Whether the same request may well succeed a moment later."""


class StorageFull(StoreError):
    """No space is left for rows or objects."""
