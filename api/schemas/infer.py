"""Inference on the wire."""

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictStr,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.schemas.fields import Answer, Body, Id, ModelName, Text
from api.schemas.tools import (
    AnsweredCall,
    AnyToolChoice,
    MessageToolCalls,
    ToolCallId,
    Tools,
)
from grit_core.records.row_reader import MAX_CHAT_MESSAGES

MAX_TEXT = 200_000
MAX_IMAGES = 8
MAX_NEW_TOKENS = 1_000_000
"""Of any deployment; each has a bound of its own (`GRIT_INFER_MAX_NEW_TOKENS`)."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def _printable(text: str) -> str:
    """Return a URL as it is.

    Raises:
        ValueError: It has characters that are neither printable nor white space.
    """
    if _CONTROL.search(text):
        raise ValueError("only printable characters are allowed in a URL")
    return text


Words = Annotated[Text, Field(max_length=MAX_TEXT)]
ImageText = Annotated[StrictStr, AfterValidator(_printable), Field(min_length=1)]
"""A URL: printable, but for the line ends and tabs that tools write into base64."""


class ImageUrl(Body):
    """An image as a data URL."""

    url: ImageText
    """`data:image/png;base64,...`; nothing is ever fetched."""
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted for the OpenAI shape; every image is read at the model's own resolution."""


class ContentPart(Body):
    """A text or an image."""

    type: Literal["text", "image_url", "image"]
    """`text` with `text`, `image_url` with `image_url`, or `image`: the next one of `images`."""
    text: Words | None = None
    """The text of a part of type `text`."""
    image_url: ImageUrl | None = None
    """The image of a part of type `image_url`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check that the part has what its type needs and nothing else.

        Raises:
            ValueError: If it does not.
        """
        if (self.text is not None) != (self.type == "text"):
            raise ValueError("`text` belongs to a part of type text, and only there")
        if (self.image_url is not None) != (self.type == "image_url"):
            raise ValueError("`image_url` belongs to a part of type image_url, and only there")
        return self


def as_parts(value: Any) -> Any:
    """Return the content of a message as its parts: a text is one, null and an empty text none.

    Raises:
        PydanticCustomError: If it is something else.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "it is neither a text nor a list of parts")
    return value


def content_schema(part: str) -> WithJsonSchema:
    """Return the JSON schema of a content whose parts have the schema of that name."""
    parts = {"type": "array", "items": {"$ref": f"#/components/schemas/{part}"}, "maxItems": 64}
    return WithJsonSchema({
        "anyOf": [{"type": "string", "maxLength": MAX_TEXT}, parts, {"type": "null"}]
    })


def refuse_empty(parts: list[Any], info: ValidationInfo) -> list[Any]:
    """Return the parts of a message, which a user's has to have.

    Raises:
        PydanticCustomError: If it has none.
    """
    if not parts and info.data.get("role") == "user":
        raise PydanticCustomError(
            "too_short", "a message of the user has a text or an image; only others may be empty"
        )
    return parts


Content = Annotated[
    list[ContentPart],
    Field(max_length=64, default_factory=list, validate_default=True),
    BeforeValidator(as_parts),
    content_schema("ContentPart"),
]


class InferMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    """Who speaks: `system`, `user`, `assistant`, or `tool` with the result of a call."""
    content: Content
    """A text or parts. An answer may have been empty: null, an empty text or no part."""
    tool_calls: MessageToolCalls | None = None
    """Of the assistant: the calls of an earlier answer, as it held them."""
    tool_call_id: ToolCallId | None = None
    """Of a tool: the call whose result the message is."""

    @field_validator("content")
    @classmethod
    def _is_written(cls, value: list[ContentPart], info: ValidationInfo) -> list[ContentPart]:
        return refuse_empty(value, info)


class InferRequest(Body):
    """What to answer, with which adapter."""

    adapter: Id | None = None
    """An adapter (`GET /adapters`)."""
    job: Id | None = None
    """A succeeded job, in place of its adapter."""
    model: ModelName | None = None
    """A base model, when neither adapter nor job is given."""
    messages: (
        Annotated[list[InferMessage], Field(min_length=1, max_length=MAX_CHAT_MESSAGES)] | None
    ) = None
    """A conversation whose last turn is the user's, or the result of a tool. System messages come
    first; several are read as one, with a blank line between them."""
    prompt: Annotated[Text, Field(min_length=1, max_length=MAX_TEXT)] | None = None
    """A single user turn, in place of `messages`."""
    images: Annotated[list[ImageText], Field(default_factory=list, max_length=MAX_IMAGES)]
    """Data URLs: shown before `prompt`, or taken by the `image` parts of `messages` in order."""
    max_new_tokens: Annotated[int, Field(strict=True, ge=1, le=MAX_NEW_TOKENS)] | None = None
    """Longest answer. As long as the model's context has room for when it is left out; in either
    case at most what the deployment allows (`GRIT_INFER_MAX_NEW_TOKENS`, by default 2048)."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] = 0
    """0 takes the likeliest token each time."""
    top_p: Annotated[float, Field(strict=True, ge=0, le=1)] = 1
    """0 takes the likeliest token each time, too."""
    seed: Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)] | None = None
    """Seed of the sampling; the same seed and request give the same answer."""
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=100)]],
        Field(default_factory=list, max_length=8),
    ]
    """Texts that end the answer, and are not part of it."""
    answer_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """A JSON schema that the answer is held to: JSON that the schema allows, if it is whole."""
    tools: Tools | None = None
    """Functions that the answer may call."""
    tool_choice: AnyToolChoice | None = None
    """`auto`: text or calls, as the model chooses (the default with tools); `required`: one call or
    more; a named function: one call of it; `none`: the tools are not shown to the model."""
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None
    """False for one call at most."""
    stream: Annotated[bool, Field(strict=True)] = False
    """Answer with server-sent events: `delta` for each piece of text, `tool_call` for each piece of
    a call, `done` with the answer."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        """Check that one target and one input are given.

        Raises:
            ValueError: If there are none or several.
        """
        if self.adapter is not None and self.job is not None:
            raise ValueError("send `adapter` or `job`, not both")
        if self.adapter is None and self.job is None and self.model is None:
            raise ValueError("send `adapter`, `job` or `model`")
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("send either `messages` or `prompt`")
        return self


class InferUsage(Answer):
    """Tokens."""

    prompt_tokens: int
    """Tokens of the prompt, those of its images included."""
    image_tokens: int = 0
    """Tokens of the prompt that stand for images."""
    completion_tokens: int
    """Tokens of the answer."""
    cached_prompt_tokens: int = 0
    """Tokens of the prompt that did not have to be read again."""
    image_cached: bool = False
    """Whether the features of all images were there already."""


class InferTiming(Answer):
    """Seconds."""

    queue_seconds: float | None = None
    """From the request until a worker took it."""
    load_seconds: float | None = None
    """Loading of the base model and the adapter; near 0 when both were in memory."""
    first_token_seconds: float | None = None
    """From when a worker began with it to the first token."""
    total_seconds: float | None = None
    """From the request to the last token."""


class InferAnswer(Answer):
    """An answer."""

    id: str
    """Id of the answer."""
    model: str
    """The base model that answered."""
    adapter: str | None
    """The adapter that answered; null: the base model without one."""
    output: str
    """The text of the answer; with tools, what stands before the calls."""
    tool_calls: list[AnsweredCall] | None = None
    """The calls of an answer that has some."""
    finish_reason: str
    """`stop`: the model or a stop text ended it; `length`: `max_new_tokens` did; `tool_calls`: it
    ends with whole calls."""
    usage: InferUsage
    """Tokens that were read and written."""
    timing: InferTiming
    """How long each part took."""


class InferDelta(Answer):
    """A piece of an answer that is sent as it comes."""

    text: str
    """The next piece of the answer."""
