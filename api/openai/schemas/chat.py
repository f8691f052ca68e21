"""`/v1/chat/completions` on the wire."""

from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationInfo, WithJsonSchema, WrapValidator, field_validator
from pydantic import model_validator as whole

from api.openai.schemas.unsupported import Unsupported, refuse
from api.schemas.fields import Answer, Body, ModelName, Text
from api.schemas.infer import MAX_TEXT, ImageUrl, InferUsage, Words

DEFAULT_MAX_TOKENS: Final = 256
"""Of an answer whose request names no bound."""
MAX_TOKENS: Final = 2048

_NO_TOOLS: Final = "the models are not asked to call tools"
_PLAIN: Final = "answers are free text"
_SAMPLER: Final = "sampling has temperature, top_p and seed"
UNSUPPORTED: Final = {
    "audio": Unsupported("answers are text"),
    "frequency_penalty": Unsupported(_SAMPLER, (0,)),
    "function_call": Unsupported(_NO_TOOLS, ("none",)),
    "functions": Unsupported(_NO_TOOLS),
    "logit_bias": Unsupported(_SAMPLER, ({},)),
    "logprobs": Unsupported("answers carry no probabilities", (False,)),
    "modalities": Unsupported("answers are text", (["text"],)),
    "moderation": Unsupported("nothing is moderated"),
    "n": Unsupported("a request has one answer", (1,)),
    "parallel_tool_calls": Unsupported(_NO_TOOLS),
    "prediction": Unsupported("predicted outputs are not read"),
    "presence_penalty": Unsupported(_SAMPLER, (0,)),
    "reasoning_effort": Unsupported("the models do not reason apart from their answers"),
    "response_format": Unsupported(_PLAIN, ({"type": "text"},)),
    "service_tier": Unsupported("there is one tier", ("auto", "default")),
    "store": Unsupported("answers are not stored", (False,)),
    "tool_choice": Unsupported(_NO_TOOLS, ("none",)),
    "tools": Unsupported(_NO_TOOLS),
    "top_logprobs": Unsupported("answers carry no probabilities"),
    "verbosity": Unsupported("the models have no such control"),
    "web_search_options": Unsupported("nothing is searched"),
}
"""Parameters that are refused unless they change nothing."""

UNSUPPORTED_IN_MESSAGES: Final = {
    "annotations": Unsupported("messages are text and images", ([],)),
    "audio": Unsupported("messages are text and images"),
    "function_call": Unsupported(_NO_TOOLS),
    "name": Unsupported("the chat templates know roles and no names"),
    "refusal": Unsupported("a refusal is not told apart from other text"),
    "tool_calls": Unsupported(_NO_TOOLS),
}
"""Fields of messages, likewise: a message of an answer can be sent back as it came."""


class ChatPart(Body):
    """A text or an image."""

    type: Literal["text", "image_url"]
    """`text` with `text`, or `image_url` with `image_url`."""
    text: Words | None = None
    """The text of a part of type `text`."""
    image_url: ImageUrl | None = None
    """The image of a part of type `image_url`."""

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


def _as_parts(value: Any, handler: Callable[[Any], Any]) -> Any:
    return handler([{"type": "text", "text": value}] if isinstance(value, str) else value)


ChatContent = Annotated[
    list[ChatPart],
    Field(min_length=1, max_length=64),
    WrapValidator(_as_parts),
    WithJsonSchema({
        "anyOf": [
            {"type": "string", "maxLength": MAX_TEXT},
            {
                "type": "array",
                "items": {"$ref": "#/components/schemas/ChatPart"},
                "minItems": 1,
                "maxItems": 64,
            },
        ]
    }),
]


class ChatMessage(Body):
    """One turn."""

    role: Literal["developer", "system", "user", "assistant"]
    """`developer` is OpenAI's newer word for `system`, and is read as it."""
    content: ChatContent
    """A text, or a list of texts and images in their order."""
    annotations: Any = None
    """Accepted as null or `[]`, so that an answer can be sent back."""
    audio: Any = None
    """Not supported: send null, or leave it out."""
    function_call: Any = None
    """Not supported: send null, or leave it out."""
    name: Any = None
    """Not supported: send null, or leave it out."""
    refusal: Any = None
    """Not supported: send null, or leave it out."""
    tool_calls: Any = None
    """Not supported: send null, or leave it out."""

    @field_validator(*UNSUPPORTED_IN_MESSAGES)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse(UNSUPPORTED_IN_MESSAGES, info.field_name, value)


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: Annotated[bool, Field(strict=True)] | None = None
    """A last chunk without choices tells the tokens."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are never padded."""


def _as_list(value: Any, handler: Callable[[Any], Any]) -> Any:
    return handler([value] if isinstance(value, str) else value)


_StopText = Annotated[Text, Field(min_length=1, max_length=100)]
StopTexts = Annotated[
    list[_StopText],
    Field(max_length=8),
    WrapValidator(_as_list),
    WithJsonSchema({
        "anyOf": [
            {"type": "string", "minLength": 1, "maxLength": 100},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": 100},
                "maxItems": 8,
            },
        ]
    }),
]
MaxTokens = Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)]


class ChatCompletionRequest(Body):
    """A conversation to answer."""

    model: ModelName
    """A base model or an adapter, as `GET /v1/models` lists them."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64)]
    """A conversation whose last turn is the user's."""
    max_completion_tokens: MaxTokens | None = None
    """Longest answer, in tokens; 256 when it is left out."""
    max_tokens: MaxTokens | None = None
    """The older name of `max_completion_tokens`."""
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    """As OpenAI's, 1 when it is left out (`POST /infer` takes 0, the likeliest tokens)."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    """Samples from the likeliest tokens that together have this probability; 1 takes all."""
    seed: Annotated[int, Field(strict=True, ge=0, le=2**63 - 1)] | None = None
    """The same seed and request give the same answer."""
    stop: StopTexts | None = None
    """Texts that end the answer, and are not part of it."""
    stream: Annotated[bool, Field(strict=True)] | None = None
    """Answer with server-sent events as the text comes."""
    stream_options: StreamOptions | None = None
    """Only with `stream: true`."""

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
    parallel_tool_calls: Any = None
    """Not supported."""
    prediction: Any = None
    """Not supported."""
    presence_penalty: Any = None
    """Not supported: send 0, or leave it out."""
    reasoning_effort: Any = None
    """Not supported."""
    response_format: Any = None
    """Not supported: send `{"type": "text"}`, or leave it out."""
    service_tier: Any = None
    """There is one tier: send `auto` or `default`, or leave it out."""
    store: Any = None
    """Answers are not stored: send false, or leave it out."""
    tool_choice: Any = None
    """Not supported: send `none`, or leave it out."""
    tools: Any = None
    """Not supported."""
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

    @whole(mode="after")
    def _agrees(self) -> Self:
        """Check that the parameters fit together.

        Raises:
            ValueError: If they do not.
        """
        bounds = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(bounds) > 1:
            raise ValueError(
                "`max_tokens` and `max_completion_tokens` are two names of one bound; send one"
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for `stream: true`; leave it out, or stream")
        return self

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
    content: str
    """The text of the answer."""
    refusal: None = None
    """Always null."""


class ChatChoice(Answer):
    """An answer; there is one."""

    index: int = 0
    """Always 0."""
    message: ChatAnswerMessage
    """What the model answered."""
    finish_reason: str
    """`stop`: the model or a stop text ended it; `length`: the bound did."""
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
