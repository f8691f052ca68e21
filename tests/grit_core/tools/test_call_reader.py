"""Calls read out of answers that come piece by piece."""

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.tools.call_format import FALLBACK, CallFormat
from grit_core.tools.call_reader import CallPiece, CallReader
from tests.grit_core.tools.test_tool_grammar import BRACKETED, UNTAGGED

ARGUMENTS = '{"text": "a \\"b\\\\\\" } ] <tool_call> {", "list": [{"x": {}}, "\\\\"]}'


def tagged(*names: str) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {ARGUMENTS}}}\n</tool_call>'
        for name in names
    )


def read(
    pieces: Iterable[str],
    call_format: CallFormat = FALLBACK,
    *,
    forced: bool = False,
    only_at_start: bool = False,
) -> tuple[CallReader, list[str | CallPiece]]:
    reader = CallReader(call_format, forced=forced, only_at_start=only_at_start)
    found = [each for piece in pieces for each in reader.add(piece)]
    return reader, [*found, *reader.finish()]


@given(st.lists(st.integers(0, 400), max_size=12))
def test_pieces_joined_are_the_whole_however_the_answer_is_cut(cuts: list[int]) -> None:
    answer = f"Let me see. <tool\n\n{tagged('one', 'two')}"
    ends = sorted({0, *(cut for cut in cuts if cut < len(answer)), len(answer)})
    pieces = [answer[a:b] for a, b in itertools.pairwise(ends)]
    reader, found = read(pieces)
    assert [(call.name, call.arguments) for call in reader.calls] == [
        ("one", ARGUMENTS),
        ("two", ARGUMENTS),
    ]
    assert reader.is_whole
    assert (
        reader.text
        == "Let me see. <tool"
        == "".join(each for each in found if isinstance(each, str))
    )
    for index, name in enumerate(["one", "two"]):
        of_call = [each for each in found if isinstance(each, CallPiece) and each.index == index]
        assert (of_call[0].name, of_call[0].arguments) == (name, "")
        assert "".join(each.arguments for each in of_call) == ARGUMENTS


def test_text_is_given_out_as_it_comes_but_for_what_may_begin_a_call() -> None:
    reader = CallReader(FALLBACK, forced=False)
    assert list(reader.add("Hello ")) == ["Hello"]
    assert list(reader.add("you <tool_")) == [" you"]
    assert list(reader.add("box>")) == [" <tool_box>"]
    assert list(reader.add("  \n")) == []
    assert list(reader.finish()) == ["  \n"]
    assert reader.text == "Hello you <tool_box>  \n"
    assert reader.calls == ()
    assert not reader.is_whole


def test_a_call_that_was_cut_off_is_not_whole() -> None:
    for end in ('{"a', '{"a": [1, 2]', ""):
        answer = f'<tool_call>\n{{"name": "one", "arguments": {end}'
        reader, _ = read([answer])
        assert [(call.name, call.arguments) for call in reader.calls] == [("one", end)]
        assert not reader.is_whole


def test_a_name_that_was_cut_off_is_no_call() -> None:
    reader, found = read(['So\n<tool_call>\n{"name": "on'])
    assert (found, reader.calls, reader.is_whole) == (["So"], (), False)


def test_ids_in_the_text_are_passed_over() -> None:
    answer = (
        '[TOOL_CALLS] [{"name": "one", "arguments": {}, "id": "abcdefghi"},'
        ' {"name": "two", "arguments": {"a": 1}, "id": "123456789"}]'
    )
    reader, _ = read(answer, BRACKETED)
    assert [(call.name, call.arguments) for call in reader.calls] == [
        ("one", "{}"),
        ("two", '{"a": 1}'),
    ]


@pytest.mark.parametrize(
    ("answer", "text", "names"),
    [
        ('{"name": "one", "parameters": {}}', "", ["one"]),
        ('{"names": 1}', '{"names": 1}', []),
        ('So {"name": "one", "parameters": {}}', 'So {"name": "one", "parameters": {}}', []),
        ('{"na', '{"na', []),
        ('{"name": "Ann B.", "age": 7}', '{"name": "Ann B.", "age": 7}', []),
        ('{"name": "one"}', '{"name": "one"}', []),
        ('{"name": "one", "pages": 1}', '{"name": "one", "pages": 1}', []),
    ],
)
def test_an_untagged_call_is_the_whole_answer(answer: str, text: str, names: list[str]) -> None:
    for pieces in ([answer], list(answer)):
        reader, found = read(pieces, UNTAGGED)
        assert [call.name for call in reader.calls] == names
        assert reader.text == text == "".join(each for each in found if isinstance(each, str))


def test_the_texts_of_a_json_answer_may_hold_what_begins_a_call() -> None:
    answer = json.dumps({"name": "one", "text": tagged("one")})
    for call_format in (FALLBACK, UNTAGGED, BRACKETED):
        for pieces in ([answer], list(answer)):
            reader, _ = read(pieces, call_format, only_at_start=True)
            assert (reader.text, reader.calls) == (answer, ())
    for pieces in ([tagged("one", "two")], list(tagged("one", "two"))):
        reader, found = read(pieces, only_at_start=True)
        assert [call.name for call in reader.calls] == ["one", "two"]
        assert not any(isinstance(each, str) for each in found)


def test_a_forced_call_begins_with_what_closes_a_thought() -> None:
    thinking = CallFormat(
        lead="\n</think>\n\n",
        first=FALLBACK.first,
        middle=FALLBACK.middle,
        between=FALLBACK.between,
        last=FALLBACK.last,
    )
    for blank in ("\n", ""):  # the answer's first blank may be the template's
        reader, found = read(f"{blank}</think>\n\n{tagged('one')}", thinking, forced=True)
        assert [call.name for call in reader.calls] == ["one"]
        assert not any(isinstance(each, str) for each in found)
