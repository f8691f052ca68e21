"""Tools, their choice and calls of them on the wire; OpenAI's shapes, on all paths."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.schemas.fields import Answer, Body, Line, Text

MAX_TOOLS: Final = 128
MAX_CALLS: Final = 128
"""Of one message."""
MAX_ARGUMENTS: Final = 200_000

_WORDS: Final = ("none", "auto", "required")
_SYNONYMS: Final = {"any": "required"}
"""Other services' words."""

FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(Body):
    """A function that a model may call."""

    name: FunctionName
    """The name that a call has."""
    description: Annotated[Text, Field(max_length=20_000)] | None = None
    """What it does, and when to call it."""
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments: an object. None for a function without parameters."""
    strict: StrictBool | None = None
    """Not read: arguments are held to `parameters` in any case."""

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        """Check that the parameters are those of an object.

        Raises:
            PydanticCustomError: They are not.
        """
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            words = f"`parameters.type` is {kind!r}; arguments are an object: write `object`"
            raise PydanticCustomError("value_invalid", "{words}", {"words": words})
        return self


class ToolDefinition(Body):
    """A tool."""

    type: Literal["function"]
    """Always `function`."""
    function: FunctionDefinition
    """Its name, its parameters and what it is for."""


class NamedFunction(Body):
    """The function to call."""

    name: FunctionName
    """One of the names in `tools`."""


class ToolChoice(Body):
    """Whether an answer calls tools, and which."""

    type: Literal["none", "auto", "required", "function"]
    """`function` where one is named."""
    function: NamedFunction | None = None
    """Which function is called, and no other."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check that a function is named where one is chosen.

        Raises:
            ValueError: It is not, or where none is chosen.
        """
        if (self.type == "function") != (self.function is not None):
            raise ValueError('name a function: {"type": "function", "function": {"name": ...}}')
        return self


def _as_choice(value: Any) -> Any:
    """Return a word as the choice that it is.

    Raises:
        PydanticCustomError: There is no such word.
    """
    if not isinstance(value, str):
        return value
    word = _SYNONYMS.get(value, value)
    if word not in _WORDS:
        words = f"{value!r} is not one of none, auto, required; or name a function"
        raise PydanticCustomError("value_unknown", "{words}", {"words": words})
    return {"type": word}


AnyToolChoice = Annotated[
    ToolChoice,
    BeforeValidator(_as_choice),
    WithJsonSchema({
        "anyOf": [
            {"type": "string", "enum": [*_WORDS, *_SYNONYMS]},
            {
                "type": "object",
                "properties": {
                    "type": {
                        "type": "string",
                        "const": "function",
                        "description": "Always `function`.",
                    },
                    "function": {
                        "type": "object",
                        "description": "Which function is called, and no other.",
                        "properties": {
                            "name": {
                                "type": "string",
                                "description": "One of the names in `tools`.",
                            }
                        },
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
        ]
    }),
]
Tools = Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)]


class CalledFunction(Body):
    """The function that was called."""

    name: FunctionName
    """The name that was called."""
    arguments: Annotated[StrictStr, Field(max_length=MAX_ARGUMENTS)]
    """JSON text of an object. Any other text, of a call that was cut off, is shown as it is."""
    parsed_arguments: Any = None
    """Not read: OpenAI's helpers add it."""


class MessageToolCall(Body):
    """A call of an earlier answer."""

    id: Annotated[Line, Field(min_length=1, max_length=200)]
    """Id of the call, which the message with its result names."""
    type: Literal["function"] = "function"
    """Always `function`."""
    function: CalledFunction
    """What was called, with its arguments."""
    index: Any = None
    """Not read: helpers that put streams together leave it."""


MessageToolCalls = Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS)]
ToolCallId = Annotated[Line, Field(min_length=1, max_length=200)]


class AnsweredFunction(Answer):
    """The function that a model calls."""

    name: str
    """One of the names in `tools`."""
    arguments: str
    """JSON text of an object that `parameters` allows; cut off where the answer was."""


class AnsweredCall(Answer):
    """A call in an answer."""

    id: str
    """Id of the call; the message with its result names it."""
    type: Literal["function"] = "function"
    """Always `function`."""
    function: AnsweredFunction
    """What is called, with its arguments."""


class ToolCallDelta(Answer):
    """A piece of a call that is sent as it comes; the first of a call has no arguments yet."""

    index: int
    """Of the call in its answer, from 0."""
    id: str
    """Id of the call."""
    name: str
    """The function that is called."""
    arguments: str
    """More of the arguments' JSON text."""
