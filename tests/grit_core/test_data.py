"""Chats to batches: which tokens have a label, how rows are padded, and what is refused."""

import base64
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
from grit_core.data.rows import EncodedRows
from grit_core.data.stream import StepStream
from grit_core.errors import InvalidDataset
from grit_core.models.pretrained import load_processor
from grit_core.records import ChatRecord, no_images, parse_record
from grit_core.row_file import RowFile
from grit_core.sampler import Sampler, split_rows
from tests.tiny_models import (
    IMAGE_TOKENS,
    byte_tokenizer,
    png_data_url,
    tiny_causal_folder,
    tiny_chat_rows,
    tiny_vlm_folder,
    tiny_vlm_processor,
    write_jsonl,
)

PROCESSOR = tiny_vlm_processor()
ENCODER = ChatEncoder(PROCESSOR)
IMAGE = (
    ["<fake_token_around_image>", "<global-img>"]
    + ["<image>"] * IMAGE_TOKENS
    + ["<fake_token_around_image>"]
)


def record_of(*turns: tuple[str, Any]) -> ChatRecord:
    messages = [{"role": role, "content": content} for role, content in turns]
    return parse_record({"messages": messages}, line=1, resolve_image=no_images)


def image_part(index: int = 0) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_data_url(index)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


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
    return ids, labels


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
            ["one<|im_end|>", "(think)\n\n(/think)\ntwo<|im_end|>"],
            id="thoughts in the last turn alone",
        ),
        pytest.param(LLAVA_TEMPLATE, [" one", " two<|im_end|>"], id="no end of turn of its own"),
        pytest.param(LLAMA2_TEMPLATE, [" one <|im_end|>", " two <|im_end|>"], id="brackets"),
    ],
)
def test_labels_follow_whatever_template_a_model_has(template: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    (row,) = ChatEncoder(tokenizer).encode(
        record_of(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    )
    runs: list[list[int]] = []
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
    with pytest.raises(InvalidDataset, match="reads text alone"):
        encoder.encode(record_of(("user", [image_part()]), ("assistant", "1")))


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("token", ["<image>", "<end_of_utterance>", "<|im_start|>"])
def test_a_control_token_written_as_text_is_refused(role: str, token: str) -> None:
    turns = {"user": "hello", "assistant": "one"} | {role: f"x{token}y"}
    with pytest.raises(InvalidDataset, match="control token"):
        ENCODER.encode(record_of(*turns.items()))


def test_padding_has_neither_attention_nor_labels() -> None:
    rows = [
        ENCODER.encode(record_of(("user", [image_part()]), ("assistant", answer)))[0]
        for answer in ("1", "a longer answer")
    ]
    batch = collate(rows, pad_token_id=ENCODER.pad_token_id)
    short = len(rows[0].input_ids)
    assert batch.labels.shape == batch.inputs["input_ids"].shape == (2, len(rows[1].input_ids))
    assert batch.inputs["attention_mask"][0].tolist() == [1] * short + [0] * (
        len(rows[1].input_ids) - short
    )
    assert (batch.labels[0, short:] == IGNORED).all()
    assert batch.inputs["pixel_values"].shape[:2] == (2, 1)


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
        text=[ENCODER.renderer.conversation(record.messages).text for record in records],
        images=[[Image.open(io.BytesIO(image)) for image in record.images] for record in records],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    assert joined.inputs.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(joined.inputs[name], tensor), name


def rows_of(path: Path, *, max_length: int = 1000, on_long_rows: str = "reject") -> EncodedRows:
    return EncodedRows(RowFile(path), ENCODER, max_length=max_length, on_long_rows=on_long_rows)


def test_a_row_that_is_too_long_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = tiny_chat_rows(3)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 2: .*max_length is 200"):
        rows_of(path, max_length=200).step_rows([0, 1, 2], batch_size=2)


def test_a_job_may_leave_long_rows_out_and_they_are_counted(tmp_path: Path) -> None:
    data = tiny_chat_rows(3)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    step = rows_of(path, max_length=200, on_long_rows="skip").step_rows([0, 1, 2], batch_size=2)
    assert step.skipped_lines == (2,)
    assert sum(len(batch.labels) for batch in step.batches) == 2


def test_a_job_may_cut_long_rows_and_they_are_counted(tmp_path: Path) -> None:
    data = tiny_chat_rows(2)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    rows = rows_of(path, max_length=200, on_long_rows="truncate")
    step = rows.step_rows([0, 1], batch_size=2)
    assert step.cut_lines == (2,)
    assert step.skipped_lines == ()
    assert step.batches[0].labels.shape == (2, 200)
    with pytest.raises(InvalidDataset, match=r"line 1: .* would cut an image"):
        rows_of(path, max_length=8, on_long_rows="truncate").row(0)


def test_a_broken_row_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(2))
    path.write_bytes(path.read_bytes() + b'\n{"messages": [\n')
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 4"):
        rows_of(path).row(2)


def test_a_broken_image_names_the_file_the_line_and_the_image(tmp_path: Path) -> None:
    data = tiny_chat_rows(1)
    png = base64.b64decode(png_data_url(0).partition(",")[2])
    url = "data:image/png;base64," + base64.b64encode(png[:120]).decode()
    data[0]["messages"][0]["content"][0]["image_url"]["url"] = url
    with pytest.raises(InvalidDataset, match=r"line 1: image 0 cannot be decoded"):
        rows_of(write_jsonl(tmp_path / "rows.jsonl", data)).row(0)


def test_images_beside_the_file_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "one.png")
    user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "one.png"}}]}
    row = {"messages": [user, {"role": "assistant", "content": "1"}]}
    (encoded,) = rows_of(write_jsonl(tmp_path / "rows.jsonl", [row])).row(0)
    assert encoded.features["pixel_values"].shape == (1, 1, 3, 16, 16)


def test_an_empty_or_missing_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InvalidDataset, match="holds no row"):
        RowFile(tmp_path / "empty.jsonl")
    with pytest.raises(InvalidDataset, match="cannot be read"):
        RowFile(tmp_path / "nowhere.jsonl")


def test_rows_beyond_the_cache_are_read_again_with_the_same_result(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(3))
    none_kept = EncodedRows(RowFile(path), ENCODER, max_length=1000, cache_bytes=0)
    (first,), (second,) = none_kept.row(1), none_kept.row(1)
    assert first is not second
    assert torch.equal(first.features["pixel_values"], second.features["pixel_values"])
    kept = rows_of(path)
    assert kept.row(1) is kept.row(1)


def test_the_stream_gives_a_steps_rows_whatever_was_asked_before(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(5))
    sampler = Sampler(rows=tuple(range(5)), rows_per_step=2, seed=3)
    streams = [StepStream(rows_of(path), sampler, batch_size=2) for _ in range(2)]
    try:
        in_order = [streams[0].rows_of(step) for step in range(4)]
        alone = streams[1].rows_of(3, last=True)
    finally:
        for stream in streams:
            stream.close()
    assert torch.equal(in_order[3].batches[0].labels, alone.batches[0].labels)
    assert in_order[3].num_tokens == alone.num_tokens


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_every_epoch_sees_every_row_once(num_rows: int, rows_per_step: int, seed: int) -> None:
    sampler = Sampler(rows=tuple(range(num_rows)), rows_per_step=rows_per_step, seed=seed)
    for epoch in range(2):
        first = epoch * sampler.steps_per_epoch
        seen = [
            row
            for step in range(first, first + sampler.steps_per_epoch)
            for row in sampler.rows_of(step)
        ]
        assert sorted(seen) == list(range(num_rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(Sampler(rows=tuple(range(20)), rows_per_step=20, seed=seed).rows_of(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@given(st.integers(1, 200), st.floats(0, 0.9), st.integers(0, 2**63 - 1))
def test_the_evaluation_split_is_disjoint_and_complete(
    num_rows: int, fraction: float, seed: int
) -> None:
    train, held_out = split_rows(num_rows, eval_fraction=fraction, seed=seed)
    assert sorted(train + held_out) == list(range(num_rows))
    assert train
    assert bool(held_out) == (fraction > 0 and num_rows > 1)
    assert (train, held_out) == split_rows(num_rows, eval_fraction=fraction, seed=seed)


def test_a_folder_loads_the_processor_that_the_tests_use(tmp_path: Path) -> None:
    loaded = ChatEncoder(load_processor(tiny_vlm_folder(tmp_path)))
    record = record_of(("user", [image_part(), text_part("?")]), ("assistant", "1"))
    assert torch.equal(loaded.encode(record)[0].input_ids, ENCODER.encode(record)[0].input_ids)
