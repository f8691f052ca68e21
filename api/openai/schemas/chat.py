"""`/v1/chat/completions` on the wire."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic import model_validator as whole

from api.openai.schemas.client_body import ClientBody
from api.openai.schemas.response_format import ResponseFormat
from api.openai.schemas.unsupported import Unsupported, refuse
from api.schemas.fields import Answer, ModelName, Text
from api.schemas.infer import (
    MAX_NEW_TOKENS,
    ImageUrl,
    InferAnswer,
    InferUsage,
    Words,
    as_parts,
    content_schema,
    refuse_empty,
)
from api.schemas.tools import (
    AnsweredCall,
    AnyToolChoice,
    MessageToolCalls,
    ToolCallId,
    Tools,
)
from grit_core.records.row_reader import MAX_CHAT_MESSAGES

_OLD_CALLS: Final = "functions are `tools` now, and their choice is `tool_choice`"
_SAMPLER: Final = "sampling has temperature, top_p and seed"
UNSUPPORTED: Final = {
    "audio": Unsupported("answers are text"),
    "frequency_penalty": Unsupported(_SAMPLER, (0,)),
    "function_call": Unsupported(_OLD_CALLS, ("none", "auto")),
    "functions": Unsupported(_OLD_CALLS, ([],)),
    "logit_bias": Unsupported(_SAMPLER, ({},)),
    "logprobs": Unsupported("answers carry no probabilities", (False,)),
    "modalities": Unsupported("answers are text", (["text"],)),
    "moderation": Unsupported("nothing is moderated"),
    "n": Unsupported("a request has one answer", (1,)),
    "presence_penalty": Unsupported(_SAMPLER, (0,)),
    "reasoning_effort": Unsupported("the models do not reason apart from their answers", ("none",)),
    "service_tier": Unsupported("there is one tier", ("auto", "default")),
    "store": Unsupported("answers are not stored", (False,)),
    "top_logprobs": Unsupported("answers carry no probabilities", (0,)),
    "verbosity": Unsupported("the models have no such control", ("medium",)),
    "web_search_options": Unsupported("nothing is searched"),
}
"""Parameters that are refused unless they change nothing."""

UNSUPPORTED_IN_MESSAGES: Final = {
    "audio": Unsupported("messages are text and images"),
    "function_call": Unsupported(_OLD_CALLS),
    "images": Unsupported("models write no images", ([],)),
}
"""Fields of messages, likewise: a message of an answer can be sent back as it came."""

_THOUGHTS: Final = frozenset({
    *("reasoning", "reasoning_content"),
    *("thinking", "redacted_thinking"),
})
"""Kinds of parts in which clients keep what a model thought before it answered."""


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ChatPart(ClientBody):
    """A text or an image."""

    type: Literal["text", "image_url"]
    """`text` with `text`, or `image_url` with `image_url`."""
    text: Words | None = None
    """The text of a part of type `text`."""
    image_url: Annotated[ImageUrl, BeforeValidator(_as_object)] | None = None
    """The image of a part of type `image_url`."""
    annotations: Any = None
    """Not read: sources of a text."""
    cache_control: Any = None
    """Not read: what can be reused is reused."""
    id: Any = None
    """Not read."""
    index: Any = None
    """Not read: parts are read in their order."""

    @whole(mode="after")
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


def _as_parts(value: Any) -> Any:
    parts = as_parts(value)
    if not isinstance(parts, list):
        return parts
    return [{"type": "text", "text": each} if isinstance(each, str) else each for each in parts]


ChatContent = Annotated[
    list[ChatPart],
    Field(max_length=64, default_factory=list, validate_default=True),
    BeforeValidator(_as_parts),
    content_schema("ChatPart"),
]


class ChatMessage(ClientBody):
    """One turn."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    """`developer` is OpenAI's newer word for `system`, and is read as it."""
    content: ChatContent
    """A text or parts. An answer may have been empty: null, an empty text or no part."""
    refusal: Text | None = None
    """Read as the text of an answer that has none."""

    annotations: Any = None
    """Not read: sources of a text."""
    cache_control: Any = None
    """Not read: what can be reused is reused."""
    name: Any = None
    """Not read: chat templates know roles and no names."""
    parsed: Any = None
    """Not read: the content of a parsed answer is its text."""
    provider_specific_fields: Any = None
    """Not read: LiteLLM keeps in it what OpenAI's shape has no place for."""
    reasoning: Any = None
    """Not read, as the other fields of thoughts: models see the answers of earlier turns only."""
    reasoning_content: Any = None
    """Not read."""
    reasoning_details: Any = None
    """Not read."""
    thinking_blocks: Any = None
    """Not read."""

    audio: Any = None
    """Not supported: send null, or leave it out."""
    function_call: Any = None
    """Not supported: send null, or leave it out."""
    images: Any = None
    """Not supported: send null or `[]`, or leave it out."""
    tool_calls: MessageToolCalls | None = None
    """The calls of an earlier answer, as it held them."""
    tool_call_id: ToolCallId | None = None
    """Of a tool: the call whose result the message is."""

    @whole(mode="before")
    @classmethod
    def _as_answered(cls, value: Any) -> Any:
        """Read the parts of an answer that are no text or image: thoughts and refusals."""
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        content, refusal = value.get("content"), value.get("refusal")
        if isinstance(content, list):
            content = [_answered(part) for part in content if not _is_thought(part)]
        return {**value, "content": content or refusal}

    @field_validator("content")
    @classmethod
    def _is_written(cls, value: list[ChatPart], info: ValidationInfo) -> list[ChatPart]:
        return refuse_empty(value, info)

    @field_validator(*UNSUPPORTED_IN_MESSAGES)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED_IN_MESSAGES, info.field_name, value)


def _is_thought(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _THOUGHTS


def _answered(part: Any) -> Any:
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part


class StreamOptions(ClientBody):
    """How an answer is streamed."""

    include_usage: Annotated[bool, Field(strict=True)] | None = None
    """A last chunk without choices tells the tokens."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are never padded."""


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value] if value else []
    return value


_StopText = Annotated[Text, Field(min_length=1, max_length=100)]
StopTexts = Annotated[
    list[_StopText],
    Field(max_length=8),
    BeforeValidator(_as_list),
    WithJsonSchema({
        "anyOf": [
            {"type": "string", "maxLength": 100},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": 100},
                "maxItems": 8,
            },
        ]
    }),
]
MaxTokens = Annotated[int, Field(strict=True, ge=1, le=MAX_NEW_TOKENS)]


class ChatCompletionRequest(ClientBody):
    """A conversation to answer."""

    model: ModelName
    """A base model or an adapter, as `GET /v1/models` lists them."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_CHAT_MESSAGES)]
    """A conversation whose last turn is the user's. System messages come first; several are read
    as one, with a blank line between them."""
    max_completion_tokens: MaxTokens | None = None
    """Longest answer, in tokens: as long as the model's context has room for when it is left out,
    in either case at most what the deployment allows (`GRIT_INFER_MAX_NEW_TOKENS`)."""
    max_tokens: MaxTokens | None = None
    """The older name of `max_completion_tokens`."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    """As OpenAI's, 1 when it is left out (`POST /infer` takes 0, the likeliest tokens)."""
    top_p: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    """The likeliest tokens of which together have this probability; 0 is the likeliest token."""
    seed: Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)] | None = None
    """The same seed and request give the same answer."""
    stop: StopTexts | None = None
    """Texts that end the answer, and are not part of it."""
    stream: Annotated[bool, Field(strict=True)] | None = None
    """Answer with server-sent events as the text comes."""
    stream_options: StreamOptions | None = None
    """Of an answer that is streamed; says nothing of another."""
    response_format: ResponseFormat | None = None
    """What the answer is held to: any JSON object, or JSON of a schema."""
    tools: Tools | None = None
    """Functions that the answer may call."""
    tool_choice: AnyToolChoice | None = None
    """As OpenAI's; with `none` the tools are not shown to the model."""
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None
    """False for one call at most."""

    metadata: Any = None
    """Not read."""
    user: Any = None
    """Not read."""
    safety_identifier: Any = None
    """Not read."""
    prompt_cache_key: Any = None
    """Not read: what can be reused is reused."""
    prompt_cache_options: Any = None
    """Not read."""
    prompt_cache_retention: Any = None
    """Not read."""
    prediction: Any = None
    """Not read: it would make an answer come sooner and not another one."""

    audio: Any = None
    """Not supported: answers are text."""
    frequency_penalty: Any = None
    """Not supported: send 0, or leave it out."""
    function_call: Any = None
    """Not supported: send `none`, or leave it out."""
    functions: Any = None
    """Not supported."""
    logit_bias: Any = None
    """Not supported: send `{}`, or leave it out."""
    logprobs: Any = None
    """Not supported: send false, or leave it out."""
    modalities: Any = None
    """Not supported: send `["text"]`, or leave it out."""
    moderation: Any = None
    """Not supported."""
    n: Any = None
    """Only 1: a request has one answer."""
    presence_penalty: Any = None
    """Not supported: send 0, or leave it out."""
    reasoning_effort: Any = None
    """Not supported."""
    service_tier: Any = None
    """There is one tier: send `auto` or `default`, or leave it out."""
    store: Any = None
    """Answers are not stored: send false, or leave it out."""
    top_logprobs: Any = None
    """Not supported."""
    verbosity: Any = None
    """Not supported."""
    web_search_options: Any = None
    """Not supported."""

    @field_validator(*UNSUPPORTED)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED, info.field_name, value)

    @field_validator("max_tokens")
    @classmethod
    def _agrees(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Check that the two names of the bound say the same.

        Raises:
            ValueError: If they do not.
        """
        newer = info.data.get("max_completion_tokens")
        if newer is not None and value not in {None, newer}:
            raise ValueError(
                f"it says {value} and `max_completion_tokens`, its newer name, {newer}; send one"
            )
        return value

    @property
    def names_function(self) -> bool:
        """Whether the caller has named the function to call."""
        return self.tool_choice is not None and self.tool_choice.type == "function"

    @property
    def bound_name(self) -> str:
        """The name under which the caller knows the bound of the answer."""
        old = self.max_tokens is not None and self.max_completion_tokens is None
        return "max_tokens" if old else "max_completion_tokens"


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Those that did not have to be read again."""
    image_tokens: int
    """Tokens that stand for images."""


class ChatUsage(Answer):
    """Tokens."""

    prompt_tokens: int
    """Tokens of the prompt, those of its images included."""
    completion_tokens: int
    """Tokens of the answer."""
    total_tokens: int
    """Both together."""
    prompt_tokens_details: PromptTokensDetails
    """What the prompt's tokens were."""

    @classmethod
    def of(cls, usage: InferUsage) -> Self:
        """Return the tokens of an answer as OpenAI counts them."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=usage.cached_prompt_tokens, image_tokens=usage.image_tokens
            ),
        )


class ChatAnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    """Always `assistant`."""
    content: str | None
    """The text of the answer; null where the answer is calls only."""
    refusal: None = None
    """Always null."""
    tool_calls: Annotated[
        list[AnsweredCall] | None, Field(exclude_if=lambda value: value is None)
    ] = None
    """The calls of an answer that has some; left out of others."""

    @classmethod
    def of(cls, answer: InferAnswer) -> Self:
        """Return the message of an answer."""
        content = answer.output or None if answer.tool_calls else answer.output
        return cls(content=content, tool_calls=answer.tool_calls)


class ChatChoice(Answer):
    """An answer; there is one."""

    index: int = 0
    """Always 0."""
    message: ChatAnswerMessage
    """What the model answered."""
    finish_reason: str
    """`stop`: the model or a stop text ended it, or the call of the function that the request
    names; `tool_calls`: other calls; `length`: the bound did."""
    logprobs: None = None
    """Always null."""


class ChatCompletion(Answer):
    """An answered conversation."""

    id: str
    """Id of the answer."""
    object: Literal["chat.completion"] = "chat.completion"
    """Always `chat.completion`."""
    created: int
    """Seconds since 1970."""
    model: str
    """As it was asked for."""
    choices: list[ChatChoice]
    """The answer, in a list of one."""
    usage: ChatUsage
    """Tokens that were read and written."""
