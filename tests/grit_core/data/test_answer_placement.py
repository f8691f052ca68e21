"""What is learned of an answer, and what is refused because it is not certain."""

from pathlib import Path
from typing import Any

import pytest

from grit_core.data.encoder import IGNORED, ChatEncoder
from grit_core.data.end_of_turn import describe_chat_format
from grit_core.errors import InvalidDataset
from grit_core.records import ChatRecord, Message, Role, TextPart
from tests.grit_core.data.chats import image_part, record_of, text_part
from tests.grit_core.data.template_corpus import processor
from tests.grit_core.data.tokenizers import byte_level, wrap

QUESTION = ("user", "Why?")


def learned(made: Any, record: ChatRecord) -> list[str]:
    """The text of every run of labels."""
    tokenizer = getattr(made, "tokenizer", made)
    found: list[str] = []
    for row in ChatEncoder(made).encode(record):
        labels, run = row.labels.tolist(), []
        for label in [*labels, IGNORED]:
            if label != IGNORED:
                run.append(label)
            elif run:
                found.append(tokenizer.decode(run))
                run = []
    return found


def trained_text(made: Any, record: ChatRecord) -> list[str]:
    tokenizer = getattr(made, "tokenizer", made)
    return [tokenizer.decode(row.input_ids) for row in ChatEncoder(made).encode(record)]


def with_template(template: str, *specials: str) -> Any:
    made = wrap(byte_level(["<s>", "</s>", *specials]), bos="<s>", eos="</s>")
    made.chat_template = template
    return made


def test_a_chat_that_the_assistant_opens_has_its_first_answer_learned() -> None:
    record = record_of(("assistant", "Ahoy!"), ("user", "Name a fruit"), ("assistant", "Apple"))
    assert learned(processor("yi"), record) == ["Ahoy!<|im_end|>", "Apple<|im_end|>"]
    (text, *more) = trained_text(processor("qwen2"), record_of(("assistant", "Ahoy!")))
    assert text.endswith("<|im_start|>assistant\nAhoy!<|im_end|>")
    assert "You are a helpful assistant." in text
    assert more == []


@pytest.mark.parametrize("name", ["mistral_v3", "mistral_nemo", "pixtral"])
def test_a_system_text_that_moves_is_in_every_prompt_and_in_no_label(name: str) -> None:
    record = record_of(
        ("system", "Be brief."), QUESTION, ("assistant", "one"), ("user", "b"), ("assistant", "two")
    )
    made = processor(name)
    assert [text.strip() for text in learned(made, record)] == ["one</s>", "two</s>"]
    for text, question in zip(trained_text(made, record), ("Why?", "b"), strict=True):
        assert f"Be brief.\n\n{question}[/INST]" in text


def test_an_empty_thought_is_left_out_and_an_answer_may_begin_like_a_tag() -> None:
    record = record_of(
        ("user", "q1"),
        ("assistant", "<answer>one</answer>"),
        ("user", "q2"),
        ("assistant", "<answer>two</answer>"),
    )
    assert learned(processor("qwen3"), record) == [
        "<answer>one</answer><|im_end|>",
        "<answer>two</answer><|im_end|>",
    ]
    assert all("think" not in text for text in trained_text(processor("qwen3"), record))


def test_thoughts_of_an_answer_are_learned_as_the_template_writes_them() -> None:
    thoughtful = "<think>hm</think>yes"
    record = record_of(
        QUESTION, ("assistant", thoughtful), ("user", "b"), ("assistant", thoughtful)
    )
    written = "<think>\nhm\n</think>\n\nyes<|im_end|>"
    assert learned(processor("qwen3"), record) == [written, written]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_thinking", "hm\n</think>\n\nyes<|im_end|>"),
        ("deepseek_r1", "hm</think>yes<|end_of_sentence|>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_learned_from_there(name: str, expected: str) -> None:
    made = processor(name)
    record = record_of(QUESTION, ("assistant", "<think>\nhm</think>yes"))
    (text,) = trained_text(made, record)
    assert learned(made, record) == [expected]
    assert text.endswith(f"<think>\n{expected}")


def test_a_template_that_drops_thoughts_is_refused_rather_than_trained() -> None:
    made = with_template(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(InvalidDataset, match=r"rewrites the answer .* or drops a part of it"):
        learned(made, record_of(QUESTION, ("assistant", "<think>hm</think>yes")))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{{ m.content + ' | ' + m.content }}", "more than once"),
        ("{{ 'secret' if m.role == 'assistant' else m.content }}", "does not write the text of a"),
        ("{{ m.content | upper }}", "does not write the text of a user message"),
        ("{{ m.content | replace('yes', 'no') }}", "rewrites the answer"),
        ("{{ m.content.surprise() }}", "refuses the chat"),
    ],
)
def test_an_answer_that_is_not_certain_is_refused_with_the_reason(content: str, match: str) -> None:
    made = with_template(
        "{% for m in messages %}{{ '<' + m.role + '>' }}" + content + "{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(InvalidDataset, match=match):
        learned(made, record_of(QUESTION, ("assistant", "yes")))


MARKED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}BODY"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "body",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
        "{% generation %}{{ ' ' + m.content }}{% endgeneration %}",
    ],
)
def test_marks_agree_with_or_without_the_blank_and_the_end_of_a_turn(body: str) -> None:
    made = with_template(MARKED.replace("BODY", body))
    (text,) = learned(made, record_of(QUESTION, ("assistant", "yes")))
    assert text.strip() == "yes</s>"


def test_an_answer_that_is_written_twice_is_refused_in_spite_of_marks() -> None:
    body = "{{ '(' + m.content + ')' }}{% generation %}{{ m.content }}{% endgeneration %}"
    made = with_template(MARKED.replace("BODY", body))
    with pytest.raises(InvalidDataset, match="more than once"):
        learned(made, record_of(QUESTION, ("assistant", "yes")))


def test_an_answer_outside_of_the_templates_own_marks_is_refused() -> None:
    body = "{% generation %}{{ 'Sure. ' }}{% endgeneration %}{{ m.content }}"
    with pytest.raises(InvalidDataset, match="outside of what the model's chat template marks"):
        learned(
            with_template(MARKED.replace("BODY", body)), record_of(QUESTION, ("assistant", "yes"))
        )


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("command_r7b", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("aya_vision", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("phi3", "<|end|>\n<|endoftext|>"),
        ("phi4_mini", "<|end|><|endoftext|>"),
        ("harmony", "<|return|>"),
        ("llava", "</s>"),
        ("glm4", "<|endoftext|>"),
    ],
)
def test_the_last_answer_ends_with_every_token_that_ends_its_turn(name: str, end: str) -> None:
    (text,) = learned(processor(name), record_of(QUESTION, ("assistant", "yes")))
    assert text.strip() == f"yes{end}"


def test_a_harmony_channel_is_context_and_its_message_is_learned() -> None:
    made = processor("harmony")
    record = record_of(QUESTION, ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    assert learned(made, record) == ["one<|return|>", "two<|return|>"]
    assert (
        "assistant<|channel|>final<|message|>one<|end|><|start|>user"
        in trained_text(made, record)[1]
    )


def test_earlier_answers_share_a_text_where_inference_would_send_the_same_prompt() -> None:
    turns = [QUESTION, ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    record = record_of(*turns)
    assert len(trained_text(processor("yi"), record)) == 1
    assert len(trained_text(processor("llama3"), record)) == 1
    assert len(trained_text(processor("llava"), record)) == 2
    assert len(trained_text(processor("mistral_v3"), record)) == 1
    assert len(trained_text(processor("mistral_v3"), record_of(("system", "s"), *turns))) == 2


def test_every_text_has_the_images_of_its_own_messages() -> None:
    record = record_of(
        ("user", [image_part(0), text_part("a")]),
        ("assistant", "one"),
        ("user", [image_part(1), image_part(2), text_part("b")]),
        ("assistant", "two"),
        ("user", [image_part(3), text_part("c")]),
    )
    rows = ChatEncoder(processor("llava")).encode(record)
    assert [len(row.features["pixel_values"]) for row in rows] == [1, 3]


def test_an_image_that_expands_otherwise_beside_others_gives_its_answer_a_text_of_its_own() -> None:
    """LLaVA-OneVision: one image takes several tiles, each of several images takes one."""
    turns = [
        ("user", [image_part(0), text_part("a")]),
        ("assistant", "one"),
        ("user", [image_part(1), text_part("b")]),
        ("assistant", "two"),
    ]
    made = processor("llava_onevision")
    rows = ChatEncoder(made).encode(record_of(*turns))
    counts = [int((row.input_ids == made.image_token_id).sum()) for row in rows]
    (lone,) = ChatEncoder(made).encode(record_of(*turns[:2]))
    assert counts[0] == int((lone.input_ids == made.image_token_id).sum())
    assert counts[1] < 2 * counts[0]
    assert learned(made, record_of(*turns)) == ["one<|im_end|>", "two<|im_end|>"]


def weighted(*messages: tuple[Role, str, int]) -> ChatRecord:
    return ChatRecord(
        line=1,
        messages=tuple(Message(role, (TextPart(text),), weight) for role, text, weight in messages),
        images=(),
    )


def test_an_answer_without_weight_is_context_and_has_no_label() -> None:
    record = weighted(
        (Role.USER, "a", 1),
        (Role.ASSISTANT, "one", 0),
        (Role.USER, "b", 1),
        (Role.ASSISTANT, "two", 1),
        (Role.USER, "c", 1),
        (Role.ASSISTANT, "three", 0),
    )
    made = processor("yi")
    assert learned(made, record) == ["two<|im_end|>"]
    (text,) = trained_text(made, record)
    assert "one" in text
    assert "three" not in text


def test_a_row_whose_answers_have_no_weight_is_refused() -> None:
    with pytest.raises(InvalidDataset, match="no token of the row is the assistant's"):
        learned(processor("yi"), weighted((Role.USER, "a", 1), (Role.ASSISTANT, "one", 0)))


def test_a_prompt_and_an_answer_that_the_tokenizer_would_join_stay_apart() -> None:
    """`assistant\\n` and an answer that begins with a line break: one token for both together."""
    made = processor("yi", "merges")
    record = record_of(QUESTION, ("assistant", "\n\n - one"), ("user", "b"), ("assistant", "\ntwo"))
    encoder = ChatEncoder(made)
    whole = made("assistant\n\n\n", add_special_tokens=False)["input_ids"]
    prompt = made("assistant\n", add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt, "the test's tokenizer joins them"
    assert learned(made, record) == ["\n\n - one<|im_end|>", "\ntwo<|im_end|>"]
    rows = encoder.encode(record)
    for row, count in zip(rows, (1, 3), strict=True):
        sent = encoder.encode_prompt(record.messages[:count], [])["input_ids"][0].tolist()
        assert row.input_ids[: len(sent)].tolist() == sent
        assert (row.labels[: len(sent)] == IGNORED).all()
        assert row.labels[len(sent)] != IGNORED


@pytest.mark.parametrize("name", ["zephyr", "plain", "plain_vlm", "llava", "solar", "llama31"])
def test_bos_comes_first_and_once_in_training_and_at_inference(name: str) -> None:
    made = processor(name)
    tokenizer = getattr(made, "tokenizer", made)
    record = record_of(QUESTION, ("assistant", "yes"))
    (row,) = ChatEncoder(made).encode(record)
    prompt = ChatEncoder(made).encode_prompt(record.messages[:1], [])["input_ids"][0]
    for ids in (row.input_ids.tolist(), prompt.tolist()):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_no_bos_is_added_where_the_tokenizer_adds_none() -> None:
    (text,) = trained_text(processor("yi"), record_of(QUESTION, ("assistant", "yes")))
    assert text.startswith("<|im_start|>user\nWhy?")


def test_a_vlm_without_a_template_reads_parts_and_shows_its_images() -> None:
    record = record_of(("user", [image_part(), text_part("Which?")]), ("assistant", "7"))
    (text,) = trained_text(processor("plain_vlm"), record)
    assert text == "<s>User: <image><image><image><image>Which?\nAssistant: 7</s>"


def test_a_template_that_expects_a_text_gets_the_image_token_in_its_place() -> None:
    record = record_of(("user", [text_part("Look: "), image_part()]), ("assistant", "7"))
    (text,) = trained_text(processor("llava_text"), record)
    assert text == "<s>USER: Look: <image><image><image><image> ASSISTANT: 7</s>"


def test_a_template_that_writes_nothing_for_an_image_is_refused_for_images_only() -> None:
    made = processor("plain_vlm")
    kept = made.chat_template
    made.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}"
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    try:
        assert learned(made, record_of(QUESTION, ("assistant", "7"))) == [" 7</s>"]
        with pytest.raises(InvalidDataset, match="writes nothing for an image"):
            learned(made, record_of(("user", [image_part(), text_part("?")]), ("assistant", "7")))
    finally:
        made.chat_template = kept


def test_a_template_that_needs_an_image_first_and_writes_bos_after_it_is_read() -> None:
    made = processor("plain_vlm")
    kept = made.chat_template
    made.chat_template = (
        "{% if messages[0].content[0].type != 'image' %}{{ raise_exception('images first') }}"
        "{% endif %}{% for m in messages %}"
        "{% for part in m.content if part.type == 'image' %}{{ '<image>' }}{% endfor %}"
        "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    )
    try:
        record = record_of(("user", [image_part(), text_part("?")]), ("assistant", "7"))
        assert trained_text(made, record) == ["<image><image><image><image><s>?\n7</s>"]
        assert learned(made, record) == ["7</s>"]
        described = describe_chat_format(made, [made.tokenizer.eos_token_id])
        assert (described.end_of_turn, described.accepts_system) == ("</s>", False)
        with pytest.raises(InvalidDataset, match="images first"):
            learned(made, record_of(QUESTION, ("assistant", "7")))
    finally:
        made.chat_template = kept


CASES = Path(__file__).parent / "templates"


def test_labels_follow_a_template_that_moves_the_system_text_without_any_special_token() -> None:
    """`[INST]` is plain text to this tokenizer, so nothing but BOS and EOS marks a turn."""
    made = with_template((CASES / "mistral_v3.jinja").read_text())
    record = record_of(("system", "Be brief."), ("user", "Name a fruit"), ("assistant", "Apple"))
    assert learned(made, record) == [" Apple</s>"]
    assert trained_text(made, record) == ["<s>[INST] Be brief.\n\nName a fruit[/INST] Apple</s>"]
