"""Chats with tools under templates that write them, that write them otherwise, and that do not."""

import pytest

from grit_core.data.encoder import ChatEncoder
from grit_core.errors import InvalidDataset
from grit_core.records import parse_prompt
from grit_core.tools.call_format import FALLBACK as FALLBACK_FORMAT
from grit_core.tools.definitions import Tool
from tests.grit_core.data.tool_templates import (
    ALTERNATING,
    BRACKETED,
    FALLBACK,
    OWN,
    PLAIN,
    TAGGED,
    THINKING,
    UNTAGGED,
)
from tests.templates.tokenizer import build_tokenizer
from tests.templates.tools import check_tools

SCHEMA = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL = Tool(name="look_up", description="Tell the weather.", parameters=SCHEMA)
CALLS = [
    {"id": "call_inf_1_0", "name": "look_up", "arguments": {"place": "Bern"}},
    {"id": "call_inf_1_1", "name": "look_up", "arguments": {"place": "Zürich"}},
]


def encoder_of(template: str) -> ChatEncoder:
    return ChatEncoder(build_tokenizer(template, merges=False))


def turn(role: str, text: str, **fields: object) -> dict[str, object]:
    return {"role": role, "content": text, **fields}


ASKED = [turn("user", "What is the weather?")]
ANSWERED = [
    *ASKED,
    turn("assistant", "", tool_calls=CALLS),
    turn("tool", "rain", tool_call_id="call_inf_1_0"),
    turn("tool", "snow", tool_call_id="call_inf_1_1"),
]


def prompt(template: str, messages: list[dict[str, object]], *tools: Tool) -> str:
    chat = parse_prompt(messages)
    return encoder_of(template).tool_chat.prompt(chat.messages, tools or (TOOL,)).text


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_calls_read_back_as_the_template_itself_writes_them(name: str, merges: bool) -> None:
    assert check_tools(build_tokenizer(OWN[name], merges=merges)).kind == "own"


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("name", FALLBACK)
def test_a_template_without_tools_in_json_gets_the_documented_form(name: str, merges: bool) -> None:
    assert check_tools(build_tokenizer(FALLBACK[name], merges=merges)).kind == "fallback"
    assert (
        encoder_of(FALLBACK[name]).tool_chat.prompt(parse_prompt(ASKED).messages, (TOOL,)).calls
        == FALLBACK_FORMAT
    )


def test_the_tools_of_the_documented_form_stand_after_the_system_text() -> None:
    text = prompt(PLAIN, [turn("system", "Be brief."), *ASKED])
    system, _, rest = text.partition("<|im_end|>")
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert '{"name": "look_up", "description": "Tell the weather."' in system
    assert rest == "\n<|im_start|>user\nWhat is the weather?<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_system_message_the_tools_get_one_of_their_own() -> None:
    assert prompt(PLAIN, ASKED).startswith("<|im_start|>system\nYou can call functions.")


def test_without_a_system_role_the_tools_stand_before_the_first_question() -> None:
    text = prompt(ALTERNATING, ASKED)
    assert text.startswith("<s>[INST]You can call functions.")
    assert text.endswith("</tool_call>\n\nWhat is the weather?[/INST]")


def test_results_are_turns_of_the_user_where_no_role_of_tools_is_known() -> None:
    messages = [*ANSWERED, turn("user", "And now?")]
    assert prompt(ALTERNATING, messages).endswith(
        '[/INST]<tool_call>\n{"name": "look_up", "arguments": {"place": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look_up", "arguments": {"place": "Zürich"}}\n</tool_call></s>'
        "[INST]<tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n</tool_response>\n"
        "And now?[/INST]"
    )


def test_a_template_with_tools_is_used_as_it_is() -> None:
    assert prompt(TAGGED, [turn("system", "Be brief."), *ANSWERED]).endswith(
        "<|im_start|>user\nWhat is the weather?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "look_up", "arguments": {"place": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look_up", "arguments": {"place": "Zürich"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nsnow<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_text_before_calls_stays() -> None:
    messages = [*ASKED, turn("assistant", "I look.", tool_calls=CALLS[:1]), ANSWERED[2]]
    assert "assistant\nI look.\n<tool_call>" in prompt(TAGGED, messages)
    assert "assistant\nI look.\n<tool_call>" in prompt(PLAIN, messages)


def test_ids_are_shortened_for_a_template_that_wants_nine_characters() -> None:
    text = prompt(BRACKETED, ANSWERED)
    assert text.count("[TOOL_RESULTS]") == 2
    called = [part.partition('"')[0] for part in text.split('"id": "')[1:]]
    answered = [part.partition('"')[0] for part in text.split('"call_id": "')[1:]]
    assert called == answered
    assert len(set(called)) == 2
    assert {len(each) for each in called} == {9}


def test_calls_are_parted_for_a_template_that_writes_one_at_a_time() -> None:
    text = prompt(UNTAGGED, ANSWERED)
    bern, zurich = text.index('"place": "Bern"'), text.index('"place": "Zürich"')
    assert bern < text.index('ipython<|end_header|>"rain"') < zurich < text.index('"snow"')
    assert (
        encoder_of(UNTAGGED).tool_chat.prompt(parse_prompt(ASKED).messages, (TOOL,)).calls.between
        is None
    )


@pytest.mark.parametrize("template", [TAGGED, UNTAGGED, BRACKETED, PLAIN])
def test_results_stand_in_the_order_of_their_calls(template: str) -> None:
    assert prompt(template, [*ANSWERED[:2], *reversed(ANSWERED[2:])]) == prompt(template, ANSWERED)


@pytest.mark.parametrize("template", [TAGGED, UNTAGGED, PLAIN])
def test_ids_may_count_the_calls_of_each_turn_from_0(template: str) -> None:
    later = [
        {**message, "content": text}
        for message, text in zip(ANSWERED[2:], ("sun", "fog"), strict=True)
    ]
    text = prompt(template, [*ANSWERED, turn("user", "And now?"), ANSWERED[1], *later])
    places = [text.index(word) for word in ("rain", "snow", "And now?", "sun", "fog")]
    assert places == sorted(places)
    assert all(text.count(word) == 1 for word in ("rain", "snow", "sun", "fog"))


def test_a_chat_goes_on_after_calls_without_tools() -> None:
    encoder = encoder_of(TAGGED)
    text = encoder.tool_chat.prompt(parse_prompt(ANSWERED).messages, ()).text
    assert "Functions:" not in text
    assert "<|im_start|>tool\nrain<|im_end|>" in text


def test_a_call_after_an_open_thought_closes_it() -> None:
    calls = encoder_of(THINKING).tool_chat.prompt(parse_prompt(ASKED).messages, (TOOL,)).calls
    assert calls.lead.strip() == "</think>"
    assert calls.marker == "<tool_call>"


def test_tools_that_a_template_refuses_are_shown_in_the_documented_form() -> None:
    refusing = TAGGED.replace(
        "{% for tool in tools %}",
        "{% for tool in tools %}{% if tool.function.name == 'odd' %}"
        "{{ raise_exception('odd') }}{% endif %}",
    )
    odd = Tool(name="odd")
    chat = encoder_of(refusing).tool_chat
    assert chat.own_format is not None
    assert chat.prompt(parse_prompt(ASKED).messages, (odd,)).calls == FALLBACK_FORMAT


@pytest.mark.parametrize("template", [*OWN.values(), *FALLBACK.values()])
def test_a_call_that_was_cut_off_is_shown_as_it_is(template: str) -> None:
    cut = {**CALLS[0], "arguments": '{"place": "Be'}
    messages = [*ASKED, turn("assistant", "", tool_calls=[cut]), ANSWERED[2]]
    assert "place" in prompt(template, messages).rpartition("What is the weather?")[2]


@pytest.mark.parametrize("template", [TAGGED, PLAIN])
@pytest.mark.parametrize(
    ("messages", "tool", "named"),
    [
        (ASKED, Tool(name="look_up", description="<|im_end|>"), "the tool look_up"),
        (
            [
                *ASKED,
                turn(
                    "assistant",
                    "",
                    tool_calls=[{**CALLS[0], "arguments": {"place": "<|im_start|>system"}}],
                ),
                ANSWERED[2],
            ],
            TOOL,
            "the call of look_up",
        ),
        (
            [*ANSWERED[:3], turn("tool", "<|im_end|>", tool_call_id="x")],
            TOOL,
            "the text of the tool",
        ),
    ],
)
def test_a_control_token_is_refused_wherever_it_stands(
    template: str, messages: list[dict[str, object]], tool: Tool, named: str
) -> None:
    with pytest.raises(InvalidDataset, match=f"{named} holds '<.im_"):
        prompt(template, messages, tool)
