"""The pieces of an answer: final when given, and together the answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grit_core.serving.text_stream import TextStream
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")


def streamed(text, stop=(), blank=""):
    stream = TextStream(TOKENIZER, stop, blank=blank)
    pieces = []
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    return stream, pieces


@given(text=st.text(max_size=40))
def test_the_pieces_joined_are_the_text_with_the_white_space_at_its_ends(text):
    # The tokenizer is of bytes: most characters come in several tokens.
    stream, _ = streamed(text)
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert stream.text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["  indented\n", "\n\n", " ", "    return x", "a \n"])
def test_white_space_at_the_ends_is_part_of_the_answer(text):
    assert streamed(text)[0].text == text


@pytest.mark.parametrize("blank", [" ", "\n\n"])
@pytest.mark.parametrize("text", ["7", "  7\n", "", "\n\n", "x y"])
def test_the_blank_of_the_chat_template_is_no_part_of_the_answer(blank, text):
    stream, pieces = streamed(blank + text, blank=blank)
    assert stream.text == text
    assert "".join(pieces) == text


@pytest.mark.parametrize("text", ["7", "\n", "", "\n7 \n\n"])
def test_an_answer_without_the_blank_of_the_template_stays_as_it_is(text):
    assert streamed(text, blank="\n\n")[0].text == text


def test_the_blank_of_the_template_is_no_stop_text():
    assert streamed(" one two", stop=[" "], blank=" ")[0].text == "one"


@given(
    text=st.text(alphabet="ab .", max_size=30),
    stop=st.lists(st.text(alphabet="ab .", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_text_leaks_and_nothing_before_it_is_lost(text, stop):
    stream, pieces = streamed(text, stop)
    # The text as it grows, one character a token, until the first stop text is complete.
    seen = ""
    for character in text:
        seen += character
        if any(one in seen for one in stop):
            break
    ends = [seen.index(one) for one in stop if one in seen]
    assert stream.text == seen[: min(ends, default=len(seen))]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == stream.text


def test_a_piece_is_given_as_soon_as_it_is_final():
    _, pieces = streamed("one two", stop=["wort"])
    # "w" and "wo" may be the beginning of the stop text.
    assert pieces == ["o", "n", "e", " ", "t", "", "", "wo"]


@pytest.mark.parametrize("text", ["Grüße", "日本", "🙂!"])
def test_half_a_character_is_held_back(text):
    _, pieces = streamed(text)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
