"""Rows to batches: how they are padded, cut and ordered, and what is refused."""

import base64
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grit_core import transfer
from grit_core.data.collate import collate
from grit_core.data.encoder import IGNORED, ChatEncoder
from grit_core.data.rows import EncodedRows
from grit_core.data.stream import StepStream
from grit_core.errors import InvalidDataset
from grit_core.row_file import RowFile
from grit_core.sampler import Sampler, split_rows
from tests.grit_core.data.chats import image_part, record_of
from tests.tiny_models import (
    png_data_url,
    tiny_chat_rows,
    tiny_vlm_processor,
    write_jsonl,
)

ENCODER = ChatEncoder(tiny_vlm_processor())


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


def rows_of(path: Path, *, max_length: int = 1000, on_long_rows: str = "reject") -> EncodedRows:
    return EncodedRows(RowFile(path), ENCODER, max_length=max_length, on_long_rows=on_long_rows)


def test_a_row_that_is_too_long_is_an_error_that_names_it(tmp_path: Path) -> None:
    data = tiny_chat_rows(3)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    with pytest.raises(InvalidDataset, match=r"rows\.jsonl, line 2: .*max_length is 200"):
        rows_of(path, max_length=200).step_rows([0, 1, 2], batch_size=2)


def test_a_job_may_leave_long_rows_out(tmp_path: Path) -> None:
    data = tiny_chat_rows(3)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    step = rows_of(path, max_length=200, on_long_rows="skip").step_rows([0, 1, 2], batch_size=2)
    assert sum(len(batch.labels) for batch in step.batches) == 2


def test_a_job_may_cut_long_rows(tmp_path: Path) -> None:
    data = tiny_chat_rows(2)
    data[1]["messages"][1]["content"] = "x" * 300
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    rows = rows_of(path, max_length=200, on_long_rows="truncate")
    step = rows.step_rows([0, 1], batch_size=2)
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
    streams = [
        StepStream(rows_of(path), sampler, batch_size=2, device=torch.device("cpu"))
        for _ in range(2)
    ]
    try:
        in_order = [streams[0].rows_of(step) for step in range(4)]
        alone = streams[1].rows_of(3, last=True)
    finally:
        for stream in streams:
            stream.close()
    assert torch.equal(in_order[3].batches[0].labels, alone.batches[0].labels)
    assert in_order[3].num_tokens == alone.num_tokens


def test_rows_for_cuda_are_pinned_on_the_thread_that_makes_them_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        threads.append(threading.current_thread().name)
        return tensor.clone()

    monkeypatch.setattr(transfer, "pinned_copy", copy)
    path = write_jsonl(tmp_path / "rows.jsonl", tiny_chat_rows(4))
    sampler = Sampler(rows=tuple(range(4)), rows_per_step=2, seed=3)
    for kind, expected in (("mps", 0), ("cpu", 0), ("cuda", 1)):
        stream = StepStream(rows_of(path), sampler, batch_size=2, device=torch.device(kind))
        (batch,) = stream.rows_of(0, last=True).batches
        stream.close()
        assert len(threads) == expected * (len(batch.inputs) + 2)
    assert all(name.startswith("grit-rows") for name in threads)


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
