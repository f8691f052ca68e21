"""The one shape of every error: RFC 9457 problem documents."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

PROBLEM_MEDIA_TYPE = "application/problem+json"


class ProblemItem(BaseModel):
    """One fault of a request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    pointer: str | None = None
    """JSON pointer into the body; absent for a fault outside of the body."""
    parameter: str | None = None
    """`query.limit`, `path.job_id` or `header.idempotency-key`; absent for a fault of the body."""
    code: str
    """Stable name of the reason."""
    detail: str
    """What is wrong, the bound, and the fix."""
    input: str | int | float | bool | None = None
    """The value that was sent, when it is a short scalar that is no secret."""
    line: int | None = None
    """Line of an uploaded dataset."""
    image: int | None = None
    """Index of the image within the line."""


class ProblemDocument(BaseModel):
    """What went wrong, with every fault of the request."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str = Field(examples=["https://grit.invalid/problems/not_found"])
    """Identifies the kind of problem; the last part is `code`."""
    title: str
    """The kind of problem in words."""
    status: int = Field(ge=400, le=599)
    """The HTTP status."""
    detail: str
    """This problem in words."""
    code: str
    """Stable name for programs."""
    request_id: str
    """Also in the `X-Request-Id` header and in the service's log."""
    errors: list[ProblemItem] = []
    """Every fault of the request, not the first alone."""
    allowed: list[str] | None = None
    """For `illegal_transition`: the statuses that the job may move to."""
    dataset: str | None = None
    """For `dataset_rejected`: the dataset whose report lists every bad row."""
    report: str | None = None
    """For `dataset_rejected`: where that report is."""


def problem_type(code: str) -> str:
    """Return the URI of a kind of problem; it is a name and answers no request."""
    return f"https://grit.invalid/problems/{code}"


def safe_input(value: Any) -> str | int | float | bool | None:
    """Return a value that may be echoed: a short finite scalar that does not look like a secret."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        finite = value == value and abs(value) < 2**63  # noqa: PLR0124 - NaN differs from itself
        return value if finite else None
    if not isinstance(value, str) or len(value) > 200:
        return None
    if not value.isprintable() or _looks_secret(value):
        return None
    return value


def _looks_secret(text: str) -> bool:
    lowered = text.lower()
    marks = ("grit_", "bearer ", "hf_", "sk-", "akia", "-----begin", "password", "://", "data:")
    if any(mark in lowered for mark in marks):
        return True
    # A long run without a space or a dot is more likely a token than a name.
    return any(len(run) >= 40 for run in text.replace(".", " ").replace("/", " ").split())
