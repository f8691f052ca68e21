"""Compares how a template writes calls with what our grammar takes and our reader reads."""

import json
from dataclasses import replace
from typing import Any

import llguidance.hf
from llguidance import LLMatcher

from grit_core.data.encoder import ChatEncoder
from grit_core.data.tool_chat import ToolPrompt
from grit_core.records import Message, Role, TextPart
from grit_core.tools.call_reader import CallReader
from grit_core.tools.definitions import Tool, ToolCall, ToolMode, ToolUse
from grit_core.tools.tool_grammar import ToolGrammar
from tests.templates.check import Finding

_WEATHER = Tool(
    name="look_up-weather2",
    description="Tell the weather of a place.",
    parameters={
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "A town."},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["place"],
    },
)
_TOOLS = (_WEATHER, Tool(name="stop"))
_CALLS = (
    ToolCall(id="call_1", name=_WEATHER.name, arguments={"place": 'Zü"rich}\n', "days": [1, 2]}),
    ToolCall(id="call_2", name="stop", arguments={}),
)
_RESULT = "result-7, sunny"


def check_tools(tokenizer: Any) -> Finding:
    """Write chats with tools and compare; `own` or `fallback` where all is right."""
    encoder = ChatEncoder(tokenizer)
    own = encoder.tool_chat.own_format
    question = encoder.placer.question("What is the weather?")
    prompt = encoder.tool_chat.prompt([question], _TOOLS)
    missing = [tool.name for tool in _TOOLS if tool.name not in prompt.text]
    if missing:
        return Finding("tools missing", repr(missing))
    several = prompt.calls.between is not None
    for calls in [_CALLS[:1], _CALLS] if several else [_CALLS[:1]]:
        answer = _write(encoder, question, calls, prompt)
        found = _read_back(tokenizer, answer, calls, prompt)
        if found:
            return Finding("other calls", f"{found} in {answer!r}")
        chat = [question, Message(Role.ASSISTANT, (TextPart(""),), tool_calls=calls)]
        chat += [Message(Role.TOOL, (TextPart(_RESULT),), tool_call_id=call.id) for call in calls]
        text = encoder.tool_chat.prompt(chat, _TOOLS).text
        if text.count(_RESULT) != len(calls) or answer.strip() not in text:
            return Finding("chat not written", repr(text[-400:]))
    return Finding("fallback" if own is None else "own")


def _write(
    encoder: ChatEncoder, question: Message, calls: tuple[ToolCall, ...], prompt: ToolPrompt
) -> str:
    """Return a turn with calls as the template writes it, from the prompt's end to its own."""
    message = Message(Role.ASSISTANT, (TextPart(""),), tool_calls=calls)
    chat = encoder.tool_chat
    own = chat.own_format
    if own is None:
        plain = chat._plain([question, message], _TOOLS)
        text = encoder.renderer.render(plain)
    else:
        shown = [tool.to_json() for tool in _TOOLS]
        text = chat._render(
            chat._write([question, message], own), shown, add_generation_prompt=False
        )
    start = text.rindex(prompt.calls.first.strip())
    if len(calls) > 1:
        start = text.index(prompt.calls.first.strip() + calls[0].name)
    end = text.rindex(prompt.calls.last.split("\x00")[-1]) + len(
        prompt.calls.last.split("\x00")[-1]
    )
    return text[start:end]


def _read_back(tokenizer: Any, answer: str, calls: tuple[ToolCall, ...], prompt: ToolPrompt) -> str:
    """Return what is wrong with an answer; nothing where it is the calls."""
    added = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    call_format = replace(prompt.calls, lead="", first=prompt.calls.first.lstrip())
    for mode in ToolMode:
        use = ToolUse(tools=_TOOLS, mode=mode)
        grammar = ToolGrammar(call_format, token_ids=added).write(use)
        matcher = LLMatcher(llguidance.hf.from_tokenizer(tokenizer), grammar)
        if matcher.is_error():
            return matcher.get_error()
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        taken = matcher.try_consume_tokens(ids)
        if taken != len(ids) or not matcher.is_accepting():
            return f"{mode}: the grammar takes {tokenizer.decode(ids[:taken])!r}"
        reader = CallReader(call_format, forced=mode is ToolMode.REQUIRED)
        for character in answer:
            list(reader.add(character))
        list(reader.finish())
        read = [(call.name, json.loads(call.arguments)) for call in reader.calls]
        if read != [(call.name, dict(call.arguments)) for call in calls] or reader.text:
            return f"{mode}: read {read}"
    return ""
