"""Conversations with tools as one model's template writes them, or in a form of our own.

A template that shows tools and writes calls in JSON is used as it is. For the others, the tools
stand in the system text (or before the user's first words where there is none), calls in the
assistant's text and results in messages of the user: `grit_core.tools.call_format.FALLBACK`.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Final

from grit_core.data.answer_placement import AnswerPlacer
from grit_core.data.chat_template import ChatRenderer
from grit_core.data.content_format import WORD
from grit_core.data.tool_format import ToolFormat, find_tool_format, parts_or_text
from grit_core.errors import InvalidDataset
from grit_core.records import Message, Role, TextPart
from grit_core.tools.call_format import FALLBACK, ID_PATTERN, CallFormat, call_text
from grit_core.tools.definitions import Tool, ToolCall

_log = logging.getLogger(__name__)

_ID_LENGTH: Final = 9
_INTRODUCTION: Final = (
    "You can call functions. They are described here, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and a JSON object of its arguments within <tool_call> tags, once"
    " for each call:\n"
    '<tool_call>\n{{"name": "...", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class ToolPrompt:
    """A prompt that shows tools."""

    text: str
    calls: CallFormat
    """How the answer writes calls."""


class ToolChat:
    """Writes conversations with tools for one model."""

    def __init__(self, renderer: ChatRenderer, placer: AnswerPlacer) -> None:
        """Write with the template of `renderer`."""
        self._renderer, self._placer = renderer, placer

    @cached_property
    def own_format(self) -> ToolFormat | None:
        """How the template writes tools; `None` where it does not, or not in JSON."""
        try:
            user = self._renderer.writer.write(self._placer.question("Hello"))
            end = self._placer.end_of_turn().strip()
        except InvalidDataset:
            return None
        tokens = self._renderer.end_tokens.findall(end)
        ends = [end, *tokens, self._renderer.tokenizer.eos_token or ""]
        return find_tool_format(self._render, user, ends=ends)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolPrompt:
        """Return a chat that the assistant is to answer, by calls of tools or otherwise.

        A chat that the template refuses, or one whose texts, calls or tools hold a control token,
        raises `InvalidDataset`.

        Args:
            messages: The chat; with calls and results of tools, or without.
            tools: Those that may be called; none for a chat that goes on after calls.
        """
        self._renderer.check(messages)
        self._check_tools(messages, tools)
        messages = _results_in_order(messages)
        own = self.own_format
        if own is not None:
            shown = [tool.to_json() for tool in tools] or None
            try:
                text = self._render(self._write(messages, own), shown, add_generation_prompt=True)
            except InvalidDataset as error:
                _log.info("the chat template refuses these tools: %s", error)
            else:
                return ToolPrompt(text, own.calls)
        plain = self._plain(messages, tools)
        return ToolPrompt(self._renderer.render(plain, add_generation_prompt=True), FALLBACK)

    def _render(
        self,
        written: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> str:
        return self._renderer.render_written(written, add_generation_prompt, tools)

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Refuse control tokens in what is not a message's text.

        Raises:
            InvalidDataset: There is one.
        """
        calls = [call for message in messages for call in message.tool_calls]
        texts = {f"the tool {tool.name}": _dump(tool.to_json()) for tool in tools}
        texts |= {f"the call of {call.name}": call.arguments_text for call in calls}
        for what, text in texts.items():
            if found := self._renderer.control.search(text):
                raise InvalidDataset(
                    f"{what} holds {found.group()!r}, which the model reads as a control token and"
                    " not as text; remove it or write it otherwise"
                )

    # --- in the template's own form

    def _write(self, messages: Sequence[Message], own: ToolFormat) -> list[dict[str, Any]]:
        if own.calls.between is None:
            messages = _one_call_each(messages)
        names: dict[str, str] = {}
        written = []
        for message in messages:
            # In their order: some clients count the calls of each turn from 0.
            names |= {call.id: call.name for call in message.tool_calls}
            written.append(self._write_message(message, own, names))
        return written

    def _write_message(
        self, message: Message, own: ToolFormat, names: dict[str, str]
    ) -> dict[str, Any]:
        if message.role is Role.TOOL:
            return {
                "role": "tool",
                "content": parts_or_text(message.text, parts=own.results_are_parts),
                "tool_call_id": _template_id(message.tool_call_id, own.calls),
                "name": names.get(message.tool_call_id, ""),
            }
        if not message.tool_calls:
            return self._renderer.writer.write(message)
        has_text = bool(message.text.strip())
        plain = self._renderer.writer.write(message) if has_text else {}
        return {
            "role": "assistant",
            "content": own.empty_content,
            **plain,
            "tool_calls": [
                {
                    "type": "function",
                    "id": _template_id(call.id, own.calls),
                    "function": {
                        "name": call.name,
                        "arguments": _template_arguments(call, own.calls),
                    },
                }
                for call in message.tool_calls
            ],
        }

    # --- in our own form

    def _plain(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """Return the chat as messages of text, the user's joined where results make them many."""
        plain = _join_turns([_plain_message(message) for message in messages])
        if not tools:
            return plain
        lines = "\n".join(_dump(tool.to_json()["function"]) for tool in tools)
        introduction = _INTRODUCTION.format(tools=lines)
        first = plain[0]
        if first.role is Role.SYSTEM:
            return [_with_paragraph(first, introduction, after=True), *plain[1:]]
        if self._takes_system:
            return [Message(Role.SYSTEM, (TextPart(introduction),)), *plain]
        at = next(index for index, each in enumerate(plain) if each.role is Role.USER)
        return [*plain[:at], _with_paragraph(plain[at], introduction), *plain[at + 1 :]]

    @cached_property
    def _takes_system(self) -> bool:
        chat = (Message(Role.SYSTEM, (TextPart(WORD),)), self._placer.question("Hello"))
        try:
            return WORD in self._renderer.render(chat, add_generation_prompt=True)
        except InvalidDataset:
            return False


def _results_in_order(messages: Sequence[Message]) -> list[Message]:
    """Return a chat with the results of calls in the order of the calls.

    Most templates write no ids: which call a result is of, its place tells. Clients that make calls
    side by side send the results as they come.
    """
    ordered: list[Message] = []
    places: dict[str, int] = {}
    for is_result, group in groupby(messages, lambda message: message.role is Role.TOOL):
        turns = list(group)
        if is_result:
            turns.sort(key=lambda turn: places.get(turn.tool_call_id, len(places)))
        elif turns[-1].tool_calls:
            places = {call.id: place for place, call in enumerate(turns[-1].tool_calls)}
        ordered += turns
    return ordered


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Return a chat in which each call has a message of its own, with its result after it."""
    written: list[Message] = []
    moved: set[int] = set()
    for at, message in enumerate(messages):
        if at in moved:
            continue
        if len(message.tool_calls) < 2:
            written.append(message)
            continue
        results = _results_after(messages, at)
        for index, call in enumerate(message.tool_calls):
            text = message.content if index == 0 else ()
            written.append(replace(message, content=text, tool_calls=(call,)))
            if call.id in results:
                moved.add(results[call.id])
                written.append(messages[results[call.id]])
    return written


def _results_after(messages: Sequence[Message], at: int) -> dict[str, int]:
    """Return where the results of a message's calls stand: before the next calls."""
    found: dict[str, int] = {}
    for index in range(at + 1, len(messages)):
        message = messages[index]
        if message.tool_calls:
            break
        if message.role is Role.TOOL:
            found.setdefault(message.tool_call_id, index)
    return found


def _plain_message(message: Message) -> Message:
    """Return a message whose calls, or whose being a result, stands in its text."""
    if message.role is Role.TOOL:
        text = f"<tool_response>\n{message.text}\n</tool_response>"
        return Message(Role.USER, (TextPart(text),))
    if not message.tool_calls:
        return message
    calls = [(call.name, call.arguments_text) for call in message.tool_calls]
    texts = [message.text.strip(), call_text(FALLBACK, calls)]
    return Message(Role.ASSISTANT, (TextPart("\n".join(filter(None, texts))),))


def _join_turns(messages: Sequence[Message]) -> list[Message]:
    """Join messages of the user that follow one another: many templates want turns to alternate."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role is Role.USER is joined[-1].role:
            content = (*joined[-1].content, TextPart("\n"), *message.content)
            joined[-1] = replace(joined[-1], content=content)
        else:
            joined.append(message)
    return joined


def _with_paragraph(message: Message, text: str, *, after: bool = False) -> Message:
    """Return a message with a paragraph before its content, or after it."""
    if after:
        return replace(message, content=(*message.content, TextPart(f"\n\n{text}")))
    return replace(message, content=(TextPart(f"{text}\n\n"), *message.content))


def _template_arguments(call: ToolCall, calls: CallFormat) -> dict[str, Any] | str:
    """Return the arguments of a call as the template takes them."""
    if calls.arguments_as_text or isinstance(call.arguments, str):
        return call.arguments_text
    return dict(call.arguments)


def _template_id(call_id: str, calls: CallFormat) -> str:
    """Return the id of a call as the template takes it: where it writes ids, of nine characters."""
    if not calls.has_ids or re.fullmatch(ID_PATTERN, call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_ID_LENGTH]


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
