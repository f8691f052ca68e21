"""For any chat of any family, labels are exactly the answers and their ends.

What is expected is found without the product: the prompt is what transformers renders for the chat
before an answer, and what a family writes between and after is stated by hand in the corpus.
"""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from grit_core.data.chat_template import ChatRenderer
from grit_core.data.encoder import IGNORED, ChatEncoder
from grit_core.data.image_decoding import decode_image
from grit_core.errors import InvalidDataset
from grit_core.records import (
    ChatRecord,
    ImagePart,
    Message,
    Role,
    TextPart,
    no_images,
    parse_record,
)
from tests.grit_core.data.template_corpus import BY_NAME, FAMILIES, Family, processor
from tests.tiny_models import png_data_url

SENTINEL = "W0rdOfTheTest"
ENCODERS: dict[tuple[str, str], ChatEncoder] = {}


def encoder_for(name: str, tokens: str) -> ChatEncoder:
    key = (name, tokens)
    if key not in ENCODERS:
        ENCODERS[key] = ChatEncoder(processor(name, tokens))
    return ENCODERS[key]


def written(one: Family, message: Message) -> dict[str, Any]:
    """A message as the family's template reads it."""
    role = message.role.value
    if one.image_token is None or role in one.text_roles:
        parts = [p.text if isinstance(p, TextPart) else one.image_token for p in message.content]
        return {"role": role, "content": "".join(map(str, parts))}
    if role == "assistant":
        return {"role": role, "content": [{"type": "text", "text": message.text}]}
    kinds = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
        for part in message.content
    ]
    return {"role": role, "content": kinds}


def rendered(one: Family, tokens: str, messages: list[dict[str, Any]], *, asks: bool) -> str:
    text = processor(one.name, tokens).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=asks
    )
    bos = one.bos if one.adds_bos else ""
    return text if text.startswith(bos) else bos + text


def expected_before(one: Family, tokens: str, messages: tuple[Message, ...]) -> str:
    """What inference sends for the answer that follows `messages`."""
    chat = [written(one, message) for message in messages]
    if any(message.role is Role.USER for message in messages):
        return rendered(one, tokens, chat, asks=True)
    answer = Message(Role.ASSISTANT, (TextPart(SENTINEL),))
    text = rendered(one, tokens, [*chat, written(one, answer)], asks=False)
    before = text[: text.index(SENTINEL)]
    return before.removesuffix(one.blank).removesuffix(one.dropped).removesuffix(one.unlabelled)


def prompt_ids(one: Family, tokens: str, record: ChatRecord, before: str, count: int) -> list[int]:
    """The ids of a text with the first `count` images of the record, by the processor itself."""
    made = processor(one.name, tokens)
    if one.image_token is None:
        return list(made(before, add_special_tokens=False)["input_ids"])
    images = [decode_image(data, index=0) for data in record.images[:count]]
    options = {"images": [images]} if images else {}
    return list(made(text=[before], add_special_tokens=False, **options)["input_ids"][0])


def decoded(made: Any, ids: list[int]) -> str:
    """The text of tokens in the middle of a chat: every blank counts."""
    tokenizer = getattr(made, "tokenizer", made)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    if tokenizer.backend_tokenizer.token_to_id("▁") is None:
        return str(tokenizer.decode(ids, skip_special_tokens=False))
    data = b"".join(
        bytes([int(token[3:5], 16)])
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        else token.replace("▁", " ").encode()
        for token in tokens
    )
    return data.decode(errors="replace")


def is_written_after(made: Any, before: str, text: str, ids: list[int]) -> bool:
    """Tell whether ids are those of a text after another.

    The tokens of both together decide, where they part at the border; else the text does.
    """
    tokenizer = getattr(made, "tokenizer", made)
    first = tokenizer(before, add_special_tokens=False)["input_ids"]
    both = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if both[: len(first)] == first:
        return bool(ids == both[len(first) :])
    return are_equal(made, decoded(made, ids), text)


def are_equal(made: Any, first: str, second: str) -> bool:
    """Compare texts as pieces: `▁` is a blank, and one may follow every special token."""
    control = ChatRenderer(made).control
    texts = [text.replace("▁", " ") for text in (first, second)]
    return len({re.sub(f"({control.pattern}) ", r"\1", text) for text in texts}) == 1


def check_labels(one: Family, tokens: str, record: ChatRecord) -> None:
    made = processor(one.name, tokens)
    rows = encoder_for(one.name, tokens).encode(record)
    runs = []
    for row in rows:
        labels = row.labels.tolist()
        edges = [
            at
            for at in range(len(labels) + 1)
            if (at < len(labels) and labels[at] != IGNORED)
            != (at > 0 and labels[at - 1] != IGNORED)
        ]
        ids = row.input_ids.tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            assert labels[start:end] == ids[start:end]
            runs.append((ids[:start], ids[start:end], end == len(ids)))
    for index, message in enumerate(record.messages):
        if message.role is not Role.ASSISTANT:
            continue
        before = expected_before(one, tokens, record.messages[:index])
        shown = sum(
            isinstance(p, ImagePart) for each in record.messages[:index] for p in each.content
        )
        prompt = prompt_ids(one, tokens, record, before, shown)
        mine = [
            run
            for run in runs
            if run[0][: len(prompt)] == prompt
            and are_equal(made, decoded(made, run[0][len(prompt) :]), one.unlabelled)
        ]
        answer = one.blank + one.trims(message.text)
        history_end = one.end if one.history_end is None else one.history_end
        assert len(mine) == 1, f"{len(mine)} runs for the answer {index} {answer!r}: {runs}"
        _, ids, is_last = mine[0]
        text = answer + (one.end if is_last else history_end)
        assert is_written_after(made, before + one.unlabelled, text, ids), (
            f"{decoded(made, ids)!r} for the answer {index} {text!r}"
        )
        runs.remove(mine[0])
    assert runs == [], "labels on something else"


FIRST = [
    "<",
    "<a>",
    " ",
    "  ",
    "\n",
    "\n\n",
    "7",
    "é",
    "e\u0301",
    "\u0301",
    "😀",
    "[",
    "{",
    "{{",
    "▁",
    "Ġ",
    "-",
    "ASSISTANT",
    ":",
    "</",
    "答",
    "\t",
    "\u00a0",
    "\u200d",
    "",
]
REST = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n \t<>[]|/"),
    max_size=6,
)
WORDS = st.builds(
    lambda first, word, rest: first + word + rest,
    st.sampled_from(FIRST),
    st.sampled_from(["a", "one", "<answer>two</answer>", "x y", "3"]),
    REST,
)


@st.composite
def chats(draw: st.DrawFn, one: Family) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if "system" not in one.refuses and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    opens = "opening" not in one.refuses and draw(st.booleans())
    count = draw(st.integers(1, 6))
    shown = 0
    for number in range(count):
        if (number % 2 == 0) != opens:
            parts: list[dict[str, Any]] = [{"type": "text", "text": draw(WORDS)}]
            for _ in range(draw(st.integers(0, 2)) if one.image_token else 0):
                url = {"url": png_data_url(shown)}
                parts.insert(0, {"type": "image_url", "image_url": url})
                shown += 1
            messages.append({"role": "user", "content": parts})
        else:
            messages.append({"role": "assistant", "content": draw(WORDS)})
    if not any(message["role"] == "assistant" for message in messages):
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return messages


SETTINGS = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def record_of(messages: list[dict[str, Any]]) -> ChatRecord:
    return parse_record({"messages": messages}, line=1, resolve_image=no_images)


@pytest.mark.parametrize("name", [one.name for one in FAMILIES])
@SETTINGS
@given(data=st.data())
def test_labels_of_any_chat_are_the_answers_and_their_ends(name: str, data: st.DataObject) -> None:
    one = BY_NAME[name]
    record = record_of(data.draw(chats(one)))
    tokens = data.draw(st.sampled_from(["bytes", "merges", "pieces", "legacy pieces"]))
    control = encoder_for(name, tokens).renderer.control
    assume(not any(control.search(message.text) for message in record.messages))
    check_labels(one, tokens, record)


@pytest.mark.parametrize("name", [one.name for one in FAMILIES])
def test_an_answer_may_begin_with_any_character(name: str) -> None:
    one = BY_NAME[name]
    for first in FIRST:
        words = ("a", f"{first}one", "b", f"{first}2")
        roles = ("user", "assistant", "user", "assistant")
        record = record_of([
            {"role": role, "content": text} for role, text in zip(roles, words, strict=True)
        ])
        check_labels(one, "merges", record)


@pytest.mark.parametrize("name", [one.name for one in FAMILIES if one.refuses])
def test_a_chat_that_a_template_refuses_is_refused_with_its_words(name: str) -> None:
    one = BY_NAME[name]
    answer = {"role": "assistant", "content": "a"}
    refused = {
        "opening": [answer, {"role": "user", "content": "b"}, answer],
        "system": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}, answer],
    }
    for kind in one.refuses:
        with pytest.raises(InvalidDataset, match=r"template refuses the chat: .*[Rr]ole"):
            encoder_for(name, "bytes").encode(record_of(refused[kind]))
