"""How a chat template writes tools, calls and their results: found out by rendering.

A template is its own documentation: chats with words of ours as the name, the arguments and the id
of a call show what stands around them. What is found is used only when all of it is: the tools in
the prompt, calls whose arguments are one JSON object, and results. Everything else has our own
form (`grit_core.tools.call_format.FALLBACK`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Final, Protocol

from grit_core.data.answer_placement import EMPTY_THOUGHT
from grit_core.errors import InvalidDataset
from grit_core.tools.call_format import ID_MARK, CallFormat

_NAMES: Final = ("zq7look7qz", "zq7take7qz", "zq7send7qz")
_IDS: Final = ("Zq7Aid7qz", "Zq7Bid7qz", "Zq7Cid7qz")
_ARGUMENTS: Final = {"zq7key7qz": "zq7value7qz", "zq7count7qz": [7, 8]}
_DESCRIPTION: Final = "zq7describe7qz"
_PARAMETER: Final = "zq7wanted7qz"
_RESULT: Final = "zq7result7qz"
_CONTENTS: Final[tuple[Any, ...]] = ("", None, [])
_OPEN_THOUGHT: Final = re.compile(r"<(\w+)>\s*\Z|\[([A-Z]+)\]\s*\Z")
_TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": _DESCRIPTION,
            "parameters": {
                "type": "object",
                "properties": {_PARAMETER: {"type": "string", "description": "A word."}},
                "required": [_PARAMETER],
            },
        },
    }
    for name in _NAMES
]


class RenderTools(Protocol):
    """Renders with a template; what it refuses raises `InvalidDataset`."""

    def __call__(
        self,
        written: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """Return the chat as the template writes it."""
        ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one template reads tool messages and writes calls."""

    calls: CallFormat
    empty_content: Any
    """`content` of a message that holds calls only."""
    results_are_parts: bool
    """Whether the content of a result is a list of parts."""


def find_tool_format(
    render: RenderTools, user: dict[str, Any], *, ends: Sequence[str]
) -> ToolFormat | None:
    """Find out how a template writes tools; `None` where it does not, or not in JSON.

    Args:
        render: Renders with the template.
        user: A message of the user that the template takes.
        ends: Tokens that end a turn of the assistant.
    """
    try:
        plain = render([user], None, add_generation_prompt=True)
        prompt = render([user], _TOOLS, add_generation_prompt=True)
    except InvalidDataset:
        return None
    words = (*_NAMES, _DESCRIPTION, _PARAMETER)
    if any(word in plain for word in words) or any(word not in prompt for word in words):
        return None
    for as_text, content in product((False, True), _CONTENTS):
        shape = _Shape(render, user, as_text=as_text, content=content)
        try:
            found = shape.find(prompt, ends)
        except InvalidDataset:
            continue
        if found is not None:
            return found
    return None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The text of a turn with calls, in pieces around names and arguments."""

    first: str
    middles: tuple[str, ...]
    betweens: tuple[str, ...]
    rest: str


class _Shape:
    """One way to hand calls to a template."""

    def __init__(
        self, render: RenderTools, user: dict[str, Any], *, as_text: bool, content: Any
    ) -> None:
        self._render, self._user = render, user
        self._as_text, self._content = as_text, content

    def find(self, prompt: str, ends: Sequence[str]) -> ToolFormat | None:
        """Return the format, if this is the way."""
        lead, one = self._answer(prompt, 1)
        if one is None or not (one.middles[0] and one.rest.strip()):
            return None
        results_are_parts = self._find_results()
        if results_are_parts is None:
            return None
        between, last = self._find_several(prompt, one)
        return ToolFormat(
            CallFormat(
                first=one.first,
                middle=one.middles[0],
                between=between,
                last=_before_end(last, ends),
                lead=lead,
                arguments_as_text=self._as_text,
            ),
            self._content,
            results_are_parts,
        )

    def _find_several(self, prompt: str, one: _Answer) -> tuple[str | None, str]:
        """Return what stands between two calls, and after the last one."""
        try:
            _, two = self._answer(prompt, 2)
            _, three = self._answer(prompt, 3)
        except InvalidDataset:
            return None, one.rest
        if two is None or three is None:
            return None, one.rest
        same = {one.first, two.first, three.first}, {one.rest, two.rest, three.rest}
        middles = {*one.middles, *two.middles, *three.middles}
        betweens = {*two.betweens, *three.betweens}
        if any(len(each) != 1 for each in (*same, middles, betweens)):
            return None, one.rest
        return two.betweens[0], one.rest

    def _answer(self, prompt: str, num_calls: int) -> tuple[str, _Answer | None]:
        """Return what closes an open thought, and a turn's text after the prompt."""
        chat = [self._user, self._calls(num_calls)]
        text = self._render(chat, _TOOLS, add_generation_prompt=False)
        lead = ""
        if not text.startswith(prompt) and (opened := _OPEN_THOUGHT.search(prompt)):
            # The prompt opens a thought that a finished turn drops.
            tag = opened.group().strip()
            prompt, lead = prompt[: opened.start()], f"\n{tag[0]}/{tag[1:]}\n\n"
        if not text.startswith(prompt):
            return "", None
        text = text[len(prompt) :]
        opened = _OPEN_THOUGHT.search(prompt)
        if opened and (closed := re.match(rf"\s*[<\[]/{opened[1] or opened[2]}[>\]]\s*", text)):
            lead, text = closed.group(), text[closed.end() :]
        elif thought := EMPTY_THOUGHT.match(text):
            text = text[thought.end() :]
        return lead, _split(text, num_calls)

    def _calls(self, num_calls: int) -> dict[str, Any]:
        arguments: Any = json.dumps(_ARGUMENTS) if self._as_text else _ARGUMENTS
        calls = [
            {"type": "function", "id": id_, "function": {"name": name, "arguments": arguments}}
            for name, id_ in list(zip(_NAMES, _IDS, strict=True))[:num_calls]
        ]
        return {"role": "assistant", "content": self._content, "tool_calls": calls}

    def _find_results(self) -> bool | None:
        """Tell whether the content of a result is a list; `None` where none is written."""
        for parts in (False, True):
            content: Any = [{"type": "text", "text": _RESULT}] if parts else _RESULT
            result = {"role": "tool", "content": content, "tool_call_id": _IDS[0]}
            chat = [self._user, self._calls(1), {**result, "name": _NAMES[0]}]
            try:
                text = self._render(chat, _TOOLS, add_generation_prompt=True)
            except InvalidDataset:
                continue
            # A template that expects a text writes Python's `repr` of a list.
            if text.count(_RESULT) == 1 and "'type': 'text'" not in text:
                return parts
        return None


def _split(text: str, num_calls: int) -> _Answer | None:
    """Split a turn at its names and arguments; `None` where they are not as expected."""
    places = list(_places(text, num_calls))
    if len(places) != num_calls:
        return None
    pieces = [text[: places[0][0]]]
    for (_, _, _, before), (start, *_others) in pairwise(places):
        pieces.append(text[before:start])
    marked = [_mark_ids(piece) for piece in (*pieces, text[places[-1][3] :])]
    if any(name in piece for name in _NAMES for piece in marked):
        return None
    middles = [_mark_ids(text[name_end:start]) for _, name_end, start, _ in places]
    return _Answer(marked[0], tuple(middles), tuple(marked[1:-1]), marked[-1])


def _places(text: str, num_calls: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield start and end of each name and of its arguments."""
    at = 0
    for name in _NAMES[:num_calls]:
        start = text.find(name, at)
        brace = text.find("{", start + len(name))
        if start < 0 or brace < 0:
            return
        try:
            value, end = json.JSONDecoder().raw_decode(text, brace)
        except ValueError:
            return
        if value != _ARGUMENTS:
            return
        yield start, start + len(name), brace, end
        at = end


def _mark_ids(text: str) -> str:
    for id_ in _IDS:
        text = text.replace(id_, ID_MARK)
    return text


def _before_end(rest: str, ends: Sequence[str]) -> str:
    """Return what the model writes after the last call, less the end of its turn."""
    found = [rest.index(end) for end in ends if end and end in rest]
    return rest[: min(found, default=len(rest))].rstrip()


def parts_or_text(text: str, *, parts: bool) -> Any:
    """Return a content as a list of parts or as a text."""
    return [{"type": "text", "text": text}] if parts else text
