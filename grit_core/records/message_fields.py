"""Fields of messages and kinds of parts that other programs write, and what to do about each."""

from typing import Any, Final

from grit_core.records.chat import ROW_ROLES
from grit_core.records.faults import holds_false, is_empty

IGNORED: Final = frozenset({"name"})
"""No template of the supported families writes it; it is reported as `messages.name`."""
_NO_TOOLS: Final = (
    "Tool calls are not rendered: write the call into `content` as the model's template does, or"
    " drop the field."
)
_NO_REASONING: Final = (
    "Reasoning in a field of its own is not rendered: write it into `content` as the model's"
    " template does, or drop the field."
)
_BY_WEIGHT: Final = "Give the message `weight` 0 if it is not to be learned, and drop the field."
_FIXES: Final[dict[str, str]] = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools"), _NO_TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _NO_REASONING),
    **dict.fromkeys(("loss", "train", "training", "train_on", "loss_weight", "mask"), _BY_WEIGHT),
    **dict.fromkeys(
        ("images", "image", "videos", "audio"),
        "Write an image as a part of `content`; video and audio are not supported.",
    ),
    "refusal": "Write the refusal as the `content`, or drop the field.",
}
_SWITCHES: Final = frozenset(name for name, fix in _FIXES.items() if fix == _BY_WEIGHT)
_DROP: Final = "A message has `role`, `content` and, of the assistant, `weight`; drop the field."

_OTHER_ROLES: Final[dict[str, str]] = {
    "human": "Write user.",
    **dict.fromkeys(("gpt", "bot", "model", "chatbot", "ai"), "Write assistant."),
    "developer": "Write system.",
    **dict.fromkeys(
        ("tool", "function", "ipython", "observation", "tool_response"),
        "Results of tools are not rendered: write them into a user's message.",
    ),
}

_OTHER_PARTS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("video", "video_url", "input_video"),
        "Videos are not supported; write their frames as image parts.",
    ),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "Audio is not supported."),
    **dict.fromkeys(
        ("file", "input_file", "document"), "Files are not supported; write their text."
    ),
    **dict.fromkeys(
        ("tool_use", "tool_result", "tool_call", "function_call"),
        "Tool calls are not supported; write them as text as the model's template does.",
    ),
    **dict.fromkeys(
        ("thinking", "reasoning"), "Write reasoning as text, as the model's template does."
    ),
    "refusal": "Write the refusal as text.",
}


def fix_for_field(name: str) -> str:
    """Return what to do about a field of a message that is not read."""
    return _FIXES.get(name, _DROP)


def switched_off(value: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a message that are false and mean it, and those that may mean nothing.

    `train: false` says that an answer is not to be learned, whatever other fields say by a false.
    """
    names = {str(key): item for key, item in value.items() if is_empty(item) and holds_false(item)}
    meant = {name: item for name, item in names.items() if name in _SWITCHES}
    return meant, [name for name in names if name not in _FIXES]


def fix_for_role(role: str) -> str:
    """Return what to write instead of another program's role."""
    known = role.strip().lower()
    return f"Write {known}." if known in ROW_ROLES else _OTHER_ROLES.get(known, "")


def fix_for_part(kind: str) -> str:
    """Return what to do about a kind of part that is not read."""
    return _OTHER_PARTS.get(kind, "")


def fields(value: dict[Any, Any]) -> dict[str, Any]:
    """Return the fields of a message or part that hold something."""
    return {str(key): item for key, item in value.items() if not is_empty(item)}
