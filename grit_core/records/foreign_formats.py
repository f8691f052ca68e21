"""Rows of other programs' formats, named with the way to convert them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from grit_core.records.faults import is_empty, shown_name

_EXAMPLE: Final = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
_PREFERENCES: Final = (
    f"Preferences are not trained on; write the preferred answer as a chat: {_EXAMPLE}"
)

_PARTS_OF_CHATS: Final = frozenset({"messages", "prompt", "completion", "input", "history"})
"""Columns whose turns are not the whole chat."""


@dataclass(frozen=True, slots=True)
class ForeignFormat:
    """A known format that is not read, and what to do about it."""

    name: str
    fix: str
    column: str | None = None
    """The column that tells it, where it is one."""

    @property
    def detail(self) -> str:
        """Return the sentences for a fault."""
        return f"The row is in {self.name}, which is not read. {self.fix}"


def foreign_format(row: Mapping[Any, Any]) -> ForeignFormat | None:
    """Return the format that a row without usable `messages` is in, if it is a known one."""
    named = {str(key): value for key, value in row.items() if not is_empty(value)}
    names = {name.lower() for name in named}
    for tell in (_preference, _from_value, _gemini, _batch_request, _other_chat):
        found = tell(named, names)
        if found is not None:
            return found
    return next(
        (
            ForeignFormat(name, fix)
            for columns, name, fix in _BY_COLUMNS
            if all(names & set(column.split("|")) for column in columns)
        ),
        None,
    )


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of turns, in our words or in ShareGPT's."""
    return _is_list_of(value, "role", "content") or _is_list_of(value, "from", "value")


def is_sharegpt(value: Any) -> bool:
    """Tell whether a value is a list of turns with `from` and `value`."""
    return _is_list_of(value, "from", "value")


def _is_list_of(value: Any, *keys: str) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(item, Mapping) and all(key in item for key in keys) for item in value)


def _preference(named: Mapping[str, Any], names: set[str]) -> ForeignFormat | None:
    del named
    if {"chosen", "rejected"} <= names:
        return ForeignFormat("the format of preference pairs (DPO: chosen, rejected)", _PREFERENCES)
    if {"prompt", "completion", "label"} <= names:
        return ForeignFormat("the KTO format (prompt, completion, label)", _PREFERENCES)
    return None


def _from_value(named: Mapping[str, Any], names: set[str]) -> ForeignFormat | None:
    column = next((name for name, value in named.items() if is_sharegpt(value)), None)
    if column is None:
        return None
    texts = [item["value"] for item in named[column]]
    shows = names & {"image", "images"} or any("<image>" in str(text) for text in texts)
    name = "the LLaVA format" if shows else "the ShareGPT format"
    keep = " Keep `image`, and `<image>` in the user's text." if shows else ""
    fix = (
        "Rename the list to `messages`, in each turn `from` to `role` (human: user, gpt:"
        f" assistant, system: system) and `value` to `content`.{keep}"
    )
    shown = f"{name} (`{shown_name(column)}` with `from` and `value`)"
    return ForeignFormat(shown, fix, column)


def _gemini(named: Mapping[str, Any], names: set[str]) -> ForeignFormat | None:
    del names
    if not _is_list_of(named.get("contents"), "role", "parts"):
        return None
    fix = (
        "Rename `contents` to `messages`, the role `model` to `assistant` and `parts` to"
        ' `content`, with {"type": "text", "text": "..."} for each part.'
    )
    return ForeignFormat("Gemini's format (`contents` with `role` and `parts`)", fix, "contents")


def _batch_request(named: Mapping[str, Any], names: set[str]) -> ForeignFormat | None:
    body = named.get("body")
    if "custom_id" not in names or not isinstance(body, Mapping):
        return None
    fix = "Write `messages` of its body as the row, with the answer as the assistant's message."
    return ForeignFormat("the format of OpenAI's batch requests (custom_id, body)", fix, "body")


def _other_chat(named: Mapping[str, Any], names: set[str]) -> ForeignFormat | None:
    del names
    column = next(
        (
            name
            for name, value in named.items()
            if name not in _PARTS_OF_CHATS and _is_list_of(value, "role", "content")
        ),
        None,
    )
    if column is None:
        return None
    shown = shown_name(column)
    fix = f"Rename the column `{shown}` to `messages`."
    return ForeignFormat(f"a chat format whose turns are in `{shown}`", fix, column)


_CONVERT: Final = f"Write it as a chat: {_EXAMPLE}"
_BY_COLUMNS: Final[tuple[tuple[tuple[str, ...], str, str], ...]] = (
    (("input_ids",), "a tokenized format (input_ids)", f"Send the text. {_CONVERT}"),
    (
        ("instruction", "output", "history"),
        "the Alpaca format of LLaMA-Factory (instruction, output, history)",
        f"Join instruction and input as the user's text; history are earlier turns. {_CONVERT}",
    ),
    (
        ("instruction", "output|response|completion"),
        "the Alpaca format (instruction, input, output)",
        f"Join instruction and input as the user's text; the output is the assistant's. {_CONVERT}",
    ),
    (
        ("query", "response"),
        "the format of MS-Swift (query, response)",
        f"The query is the user's text, the response the assistant's. {_CONVERT}",
    ),
    (
        ("prompt", "completion|completions"),
        "the format of prompt and completion (OpenAI's completions, TRL)",
        f"The prompt is the user's text, the completion the assistant's. {_CONVERT}",
    ),
    (
        ("prompt|question|problem|input", "answer|answers|response|output|solution|target"),
        "a format of questions and answers in two columns",
        f"The question is the user's text, the answer the assistant's. {_CONVERT}",
    ),
    (
        ("question|prompt|instruction", "image|images"),
        "a format of images and questions",
        f"Keep `image`; write question and answer as a chat: {_EXAMPLE}",
    ),
    (
        ("image|images|file_name", "text|caption|captions"),
        "a format of images and captions",
        f"Keep `image`; write a question and the caption as a chat: {_EXAMPLE}",
    ),
    (("segments",), "Axolotl's format of segments", _CONVERT),
    (
        ("text|content",),
        "the format of plain text (text)",
        f"Plain text is not trained on; write it as a chat: {_EXAMPLE}",
    ),
)
"""Columns (one of several with `|`), the format that they tell, and how to convert it."""
