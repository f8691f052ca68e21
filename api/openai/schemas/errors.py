"""The one shape of every error under `/v1`."""

from pydantic import Field

from api.schemas.fields import Answer


class OpenAIError(Answer):
    """What went wrong."""

    message: str
    """In words; every fault of the request, not the first alone."""
    type: str = Field(examples=["invalid_request_error"])
    """`invalid_request_error`, `permission_error`, `rate_limit_error` or `server_error`."""
    param: str | None
    """The parameter that the first fault is about, such as `messages[0].content`."""
    code: str
    """Stable name for programs: OpenAI's where it has one, ours otherwise."""


class OpenAIErrorAnswer(Answer):
    """The body of every error under `/v1`."""

    error: OpenAIError
    """What went wrong, and in which parameter."""
