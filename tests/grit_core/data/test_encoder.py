"""Chats to tokens: which of them have a label, and what is refused."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grit_core.data.collate import collate
from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.errors import InvalidDataset
from grit_core.models.pretrained import load_processor
from tests.grit_core.data.chats import image_part, record_of, text_part
from tests.tiny_models import (
    IMAGE_TOKENS,
    byte_tokenizer,
    tiny_causal_folder,
    tiny_vlm_folder,
    tiny_vlm_processor,
)

PROCESSOR = tiny_vlm_processor()
ENCODER = ChatEncoder(PROCESSOR)
IMAGE = (
    ["<fake_token_around_image>", "<global-img>"]
    + ["<image>"] * IMAGE_TOKENS
    + ["<fake_token_around_image>"]
)


def ids_of(text: str) -> list[int]:
    ids: list[int] = PROCESSOR.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def by_hand(*turns: tuple[str, Any]) -> tuple[list[int], list[int]]:
    """SmolVLM's chat put together piece by piece; the test tokenizer never merges across pieces."""
    ids, labels = ids_of("<|im_start|>"), [IGNORED]
    for role, content in turns:
        parts = [text_part(content)] if isinstance(content, str) else content
        header = ids_of(role.capitalize() + ":")
        space = [] if parts[0]["type"] == "image_url" else ids_of(" ")
        body: list[int] = []
        for part in parts:
            words = part["text"] if part["type"] == "text" else "".join(IMAGE)
            body += ids_of(words)
        said = [*space, *body, *ids_of("<end_of_utterance>")]
        ids += header + said + ids_of("\n")
        kept = said if role == "assistant" else [IGNORED] * len(said)
        labels += [IGNORED] * len(header) + kept + [IGNORED]
    last = max(at for at, label in enumerate(labels) if label != IGNORED)
    return ids[: last + 1], labels[: last + 1]


def label_text(row: EncodedRow) -> str:
    return str(PROCESSOR.tokenizer.decode(row.labels[row.labels != IGNORED]))


def test_labels_cover_the_answer_and_its_end_of_turn_alone() -> None:
    (row,) = ENCODER.encode(
        record_of(("user", [image_part(), text_part("Which digit?")]), ("assistant", "7"))
    )
    assert label_text(row) == " 7<end_of_utterance>"


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1).filter(
    lambda text: bool(text.strip())
)
USER = st.lists(st.one_of(WORDS.map(text_part), st.just(image_part())), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(USER, WORDS), min_size=1, max_size=3), st.booleans())
def test_labels_of_any_chat_are_those_of_a_chat_put_together_by_hand(
    pairs: list[tuple[list[dict[str, Any]], str]], ends_with_a_question: bool
) -> None:
    turns: list[tuple[str, Any]] = []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    if ends_with_a_question:
        turns.append(("user", "And now?"))
    (row,) = ENCODER.encode(record_of(*turns))
    ids, labels = by_hand(*turns)
    assert row.input_ids.tolist() == ids
    assert row.labels.tolist() == labels


def test_image_tokens_never_carry_a_label() -> None:
    turns = [
        ("user", [image_part(), image_part(1)]),
        ("assistant", "one"),
        ("user", [image_part(2)]),
    ]
    (row,) = ENCODER.encode(record_of(*turns, ("assistant", "two")))
    image_ids = torch.tensor(ids_of("".join(set(IMAGE))))
    assert torch.isin(row.input_ids, image_ids).sum() == 3 * len(IMAGE)
    assert not torch.isin(row.labels, image_ids).any()


def test_a_prompt_is_the_beginning_of_the_trained_chat() -> None:
    turns = [("user", [image_part(), text_part("Which digit?")]), ("assistant", "7")]
    record = record_of(*turns)
    (row,) = ENCODER.encode(record)
    image = Image.open(io.BytesIO(record.images[0])).convert("RGB")
    prompt = ENCODER.encode_prompt(record.messages[:1], [image])
    length = prompt["input_ids"].shape[1]
    assert row.input_ids[:length].tolist() == prompt["input_ids"][0].tolist()
    assert (row.labels[:length] == IGNORED).all()
    assert (row.labels[length : length + 2] != IGNORED).all()


PHI_TEMPLATE = """\
{%- for m in messages %}{{ "<row_1_col_1>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<row_1_col_1>assistant\n' }}{% else %}<|endoftext|>{% endif %}"""
QWEN3_TEMPLATE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.last and m.role == 'assistant' %}{{ '(think)\n\n(/think)\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAVA_TEMPLATE = """\
{%- for m in messages %}{{ m.role | upper + ': ' + m.content + ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
LLAMA2_TEMPLATE = """\
{%- for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + ' <|im_end|>' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(
            PHI_TEMPLATE, ["one<|im_end|>", "two<|im_end|>"], id="text after the last turn"
        ),
        pytest.param(
            QWEN3_TEMPLATE,
            ["one<|im_end|>", "two<|im_end|>"],
            id="thoughts in the last turn alone",
        ),
        pytest.param(
            LLAVA_TEMPLATE, [" one<|im_end|>", " two<|im_end|>"], id="no end of turn of its own"
        ),
        pytest.param(LLAMA2_TEMPLATE, [" one <|im_end|>", " two <|im_end|>"], id="brackets"),
    ],
)
def test_labels_follow_whatever_template_a_model_has(template: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    rows = ChatEncoder(tokenizer).encode(
        record_of(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    )
    runs: list[list[int]] = []
    for row in rows:
        for index, label in enumerate(row.labels.tolist()):
            if label != IGNORED:
                if index == 0 or row.labels[index - 1] == IGNORED:
                    runs.append([])
                runs[-1].append(label)
    assert [tokenizer.decode(run) for run in runs] == expected


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_text_only_model_needs_only_its_tokenizer(tmp_path: Path, chat_template: bool) -> None:
    processor = load_processor(tiny_causal_folder(tmp_path, chat_template=chat_template))
    (row,) = ChatEncoder(processor).encode(record_of(("user", "hello"), ("assistant", "one")))
    labels = processor.decode(row.labels[row.labels != IGNORED])
    assert labels.strip() == "one<|im_end|>"
    assert row.features.keys() <= {"token_type_ids"}


def test_an_image_shown_to_a_text_only_model_is_refused(tmp_path: Path) -> None:
    encoder = ChatEncoder(load_processor(tiny_causal_folder(tmp_path)))
    with pytest.raises(InvalidDataset, match="reads text only"):
        encoder.encode(record_of(("user", [image_part()]), ("assistant", "1")))


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("token", ["<image>", "<end_of_utterance>", "<|im_start|>"])
def test_a_control_token_written_as_text_is_refused(role: str, token: str) -> None:
    turns = {"user": "hello", "assistant": "one"} | {role: f"x{token}y"}
    with pytest.raises(InvalidDataset, match="control token"):
        ENCODER.encode(record_of(*turns.items()))


def test_rows_joined_one_by_one_equal_the_processors_own_batch() -> None:
    chats = [
        [("user", [image_part(0), image_part(1)]), ("assistant", "two")],
        [("user", [image_part(2)]), ("assistant", "one")],
    ]
    records = [record_of(*chat) for chat in chats]
    joined = collate(
        [ENCODER.encode(record)[0] for record in records], pad_token_id=ENCODER.pad_token_id
    )
    whole = PROCESSOR(
        text=[ENCODER.renderer.render(record.messages).rstrip("\n") for record in records],
        images=[[Image.open(io.BytesIO(image)) for image in record.images] for record in records],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert joined.inputs.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(joined.inputs[name], tensor), name


def test_a_folder_loads_the_processor_that_the_tests_use(tmp_path: Path) -> None:
    loaded = ChatEncoder(load_processor(tiny_vlm_folder(tmp_path)))
    record = record_of(("user", [image_part(), text_part("?")]), ("assistant", "1"))
    assert torch.equal(loaded.encode(record)[0].input_ids, ENCODER.encode(record)[0].input_ids)
