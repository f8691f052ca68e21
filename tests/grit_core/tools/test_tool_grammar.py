"""What an answer with tools may be, token by token."""

from collections.abc import Sequence
from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from grit_core.grammars import json_schema_grammar
from grit_core.tools.call_format import FALLBACK, ID_MARK, CallFormat
from grit_core.tools.definitions import Tool, ToolMode, ToolUse
from grit_core.tools.tool_grammar import MAX_CALLS, ToolGrammar
from tests.templates.tokenizer import build_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = (
    Tool(name="get", parameters=SCHEMA),
    Tool(name="get_all", parameters=SCHEMA),
    Tool(name="stop"),
)
BRACKETED = CallFormat(
    first='[TOOL_CALLS] [{"name": "',
    middle='", "arguments": ',
    between=f', "id": "{ID_MARK}"}}, {{"name": "',
    last=f', "id": "{ID_MARK}"}}]',
)
UNTAGGED = CallFormat(
    first='{"name": "', middle='", "parameters": ', between=None, last="}<|im_end|>"
)
ONE = '<tool_call>\n{"name": "get_all", "arguments": {"a": 1, "b": "x"}}\n</tool_call>'
NONE = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module", params=["special", "added", "spelled"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """One for which the tags are control tokens, added tokens, or text."""
    made = build_tokenizer("<|im_start|>[TOOL_CALLS]<|im_end|>", merges=True)
    if request.param != "spelled":
        made.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=request.param == "special")
    return made


class Grammar:
    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, call_format: CallFormat, use: ToolUse, answer: str
    ) -> None:
        added = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
        self.tokenizer = tokenizer
        grammar = ToolGrammar(call_format, token_ids=added, stop_token_ids=[tokenizer.eos_token_id])
        engine = llguidance.hf.from_tokenizer(tokenizer)
        self.matcher = LLMatcher(engine, grammar.write(use, answer=answer))
        assert not self.matcher.is_error(), self.matcher.get_error()

    def takes(self, text: str) -> bool:
        """Whether the text is a whole answer, in the tokenizer's tokens and in bytes."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled = [
            id_
            for character in text
            for id_ in self.tokenizer(character, add_special_tokens=False)["input_ids"]
        ]
        found = {self._takes(ids), self._takes(spelled)}
        assert len(found) == 1, text
        return found.pop()

    def _takes(self, ids: Sequence[int]) -> bool:
        matcher = self.matcher.deep_copy()
        return matcher.try_consume_tokens(list(ids)) == len(ids) and matcher.is_accepting()


def grammar_of(
    tokenizer: PreTrainedTokenizerFast,
    call_format: CallFormat = FALLBACK,
    *,
    answer: str = "",
    **use: Any,
) -> Grammar:
    return Grammar(tokenizer, call_format, ToolUse(tools=TOOLS, **use), answer)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("", True),
        ("Just text, even <tool_cal l or [TOOL.", True),
        (ONE, True),
        (f"Let me see.\n{ONE}", True),
        (f"{ONE}\n{NONE}\n{ONE}", True),
        (f"{ONE} and text", False),
        ("<tool_call>", False),
        ("text <tool_call> more text", False),
        (ONE.replace("get_all", "gets"), False),
        (ONE.replace('"a": 1', '"a": "1"'), False),
        (ONE.replace(', "b": "x"', ""), False),
        (NONE.replace("{}", '{"a": 1}'), False),
    ],
)
def test_auto_is_text_and_then_calls_of_the_tools(
    tokenizer: PreTrainedTokenizerFast, text: str, taken: bool
) -> None:
    assert grammar_of(tokenizer).takes(text) == taken


@pytest.mark.parametrize(
    ("text", "taken"),
    [("", False), ("text", False), (ONE, True), (f"{ONE}\n{NONE}", True), (f"so {ONE}", False)],
)
def test_required_is_one_call_or_more_and_nothing_before(
    tokenizer: PreTrainedTokenizerFast, text: str, taken: bool
) -> None:
    assert grammar_of(tokenizer, mode=ToolMode.REQUIRED).takes(text) == taken


@pytest.mark.parametrize(
    ("text", "taken"),
    [("text", False), (ONE, False), (ONE.replace("get_all", "get"), True), (NONE, False)],
)
def test_a_named_function_is_the_only_one_and_called_once(
    tokenizer: PreTrainedTokenizerFast, text: str, taken: bool
) -> None:
    grammar = grammar_of(tokenizer, mode=ToolMode.REQUIRED, name="get")
    assert grammar.takes(text) == taken
    assert not grammar.takes(f"{text}\n{text}")


def test_without_parallel_calls_there_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    for mode in ToolMode:
        grammar = grammar_of(tokenizer, mode=mode, parallel=False)
        assert grammar.takes(ONE)
        assert not grammar.takes(f"{ONE}\n{NONE}")


def test_calls_are_bounded(tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = grammar_of(tokenizer, mode=ToolMode.REQUIRED)
    assert grammar.takes("\n".join([NONE] * MAX_CALLS))
    assert not grammar.takes("\n".join([NONE] * (MAX_CALLS + 1)))


def test_a_list_behind_a_control_token_has_an_id_for_each_call(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    grammar = grammar_of(tokenizer, BRACKETED)
    calls = (
        '[TOOL_CALLS] [{"name": "get", "arguments": {"a":1,"b":""}, "id": "abcdefghi"},'
        ' {"name": "stop", "arguments": {}, "id": "123456789"}]'
    )
    assert grammar.takes(calls)
    assert grammar.takes(f"So: {calls}")
    assert not grammar.takes(calls.replace("123456789", "1234"))
    assert not grammar.takes("So: [TOOL_CALLS] no")


def test_an_untagged_call_is_known_by_the_start_of_the_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    grammar = grammar_of(tokenizer, UNTAGGED)
    call = '{"name": "get", "parameters": {"a":1,"b":""}}'
    assert grammar.takes(call)
    assert grammar.takes('A text with {"name": "get"')
    assert grammar.takes('{"names": 1}')
    assert not grammar.takes('{"name": "me"}')
    assert not grammar.takes(call + call)


def test_free_text_may_hold_other_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert grammar_of(tokenizer).takes(f"<|im_start|>thought<|im_start|>{ONE}")
    assert grammar_of(tokenizer, UNTAGGED).takes("<|im_start|>thought")
    assert not grammar_of(tokenizer, mode=ToolMode.REQUIRED).takes(f"<|im_start|>{ONE}")


def test_with_a_schema_an_answer_without_calls_is_held_to_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    grammar = grammar_of(tokenizer, answer=json_schema_grammar(SCHEMA))
    assert grammar.takes('{"a": 1, "b": "x"}')
    assert grammar.takes(ONE)
    assert not grammar.takes("text")
    assert not grammar.takes('{"a": "1"}')
