"""What is asked of the engine and what it answers: plain values."""

from dataclasses import dataclass
from pathlib import Path

from grit_core.records import ChatRecord
from grit_core.tools.definitions import ToolUse, WrittenCall


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """What to answer and how."""

    chat: ChatRecord
    """Ends with the user's turn."""
    max_new_tokens: int = 64
    shorten_to_fit: bool = False
    """Where the context has no room for so many tokens after the prompt, take as many as it has."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """0 takes the likeliest token each time, too."""
    seed: int | None = None
    """With a temperature: the same seed gives the same answer."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    grammar: str = ""
    """What the answer is held to (`grit_core.grammars`); nothing for free text."""
    tools: ToolUse | None = None
    """The tools that the answer may or must call; free text before calls is held to `grammar`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One answer."""

    text: str
    finish_reason: str
    """`stop`: the model or a stop text ended it; `tool_calls`: it did so after whole calls;
    `length`: `max_new_tokens` did."""
    prompt_tokens: int
    """Image tokens included."""
    image_tokens: int
    completion_tokens: int
    load_seconds: float
    """Spent on loading the base model or the adapter; near 0 when both were there."""
    first_token_seconds: float
    """From the request's arrival at the engine to its first token, waiting included."""
    image_cached: bool = False
    """The features of the images were there already."""
    cached_prompt_tokens: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    tool_calls: tuple[WrittenCall, ...] = ()
    """The last one is cut off where the answer is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSource:
    """An adapter on disk."""

    id: str
    folder: Path
    """A PEFT folder with safetensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine holds and has done."""

    num_active: int
    """Requests between their first and their last token."""
    num_waiting: int
    resident_adapters: int
    adapter_bytes: int
    """Tables of the slots and the copies in main memory."""
    cache_bytes: int
    """Keys and values, image features and prefixes."""
    image_hits: int
    image_misses: int
    prefix_hits: int
