import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grit_core.data.collate import collate, collate_batches
from grit_core.data.encoder import IGNORED, ChatEncoder, EncodedRow
from grit_core.loss import label_loss_sum
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import ChatRecord, parse_record
from tests.families.chats import training_rows
from tests.families.vlm_tiled import build_mllama


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mllama")
    build_mllama(folder)
    return folder


def records(*counts: int) -> list[ChatRecord]:
    def no_file(name: str) -> bytes:
        raise LookupError(name)

    return [
        parse_record(row, line=line, resolve_image=no_file)
        for line, row in enumerate(training_rows(counts), 1)
    ]


def encoded(encoder: ChatEncoder, *counts: int) -> list[EncodedRow]:
    return [row for record in records(*counts) for row in encoder.encode(record)]


def test_rows_that_attend_to_unequal_numbers_of_images_get_batches_of_their_own(
    mllama: Path,
) -> None:
    encoder = ChatEncoder(load_processor(mllama))
    rows = encoded(encoder, 1, 2, 0, 1, 2, 1)
    batches = collate_batches(rows, batch_size=2, pad_token_id=encoder.pad_token_id)
    shapes = [
        tuple(batch.inputs.get("pixel_values", torch.empty(0)).shape[:3]) for batch in batches
    ]
    assert shapes == [(2, 1, 4), (1, 1, 4), (2, 2, 4), (0,)]
    assert sum(len(batch.labels) for batch in batches) == len(rows)
    labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    assert labels == sum(int((row.labels != IGNORED).sum()) for row in rows)


def test_rows_that_attend_to_unequal_numbers_of_images_never_share_a_batch_in_silence(
    mllama: Path,
) -> None:
    encoder = ChatEncoder(load_processor(mllama))
    for counts in ((1, 2), (1, 0)):
        with pytest.raises(ValueError, match="cannot share a batch"):
            collate(encoded(encoder, *counts), pad_token_id=encoder.pad_token_id)


def test_a_row_without_image_would_have_another_loss_beside_one_with_an_image(
    mllama: Path,
) -> None:
    """Why the batches above are apart: transformers' own batch changes the loss of a text row."""
    processor: Any = load_processor(mllama)
    encoder = ChatEncoder(processor)
    [shown], [text] = encoded(encoder, 1), encoded(encoder, 0)
    model = load_base_model(mllama)
    whole = processor(
        text=[processor.tokenizer.decode(row.input_ids) for row in (shown, text)],
        images=[[Image.open(io.BytesIO(records(1)[0].images[0]))], []],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    width = len(text.input_ids)
    with torch.no_grad():
        beside = model(**whole).logits[1, :width]
        lone = model(input_ids=text.input_ids[None]).logits[0]
    assert not torch.allclose(beside, lone, rtol=1e-3, atol=1e-3)


def test_a_batch_of_cross_attending_rows_has_the_losses_of_its_rows(mllama: Path) -> None:
    encoder = ChatEncoder(load_processor(mllama))
    model = load_base_model(mllama)
    rows = encoded(encoder, 2, 2, 2)
    batch = collate(rows, pad_token_id=encoder.pad_token_id)
    width = batch.labels.shape[1]
    assert len({len(row.input_ids) for row in rows}) > 1
    assert batch.inputs["cross_attention_mask"].shape == (3, width, 2, 4)
    with torch.no_grad():
        together = label_loss_sum(model, batch)
        lone = sum(
            label_loss_sum(model, collate([row], pad_token_id=encoder.pad_token_id)) for row in rows
        )
    assert float(together) == pytest.approx(float(lone), rel=1e-4)


def test_features_of_one_number_per_row_are_joined() -> None:
    rows = [
        EncodedRow(
            input_ids=torch.arange(length),
            labels=torch.arange(length),
            features={"sizes": torch.tensor([length]), "mm_token_type_ids": torch.ones(1, length)},
        )
        for length in (3, 5)
    ]
    batch = collate(rows, pad_token_id=0)
    assert batch.inputs["sizes"].tolist() == [3, 5]
    assert batch.inputs["mm_token_type_ids"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_images_that_a_model_takes_side_by_side_are_joined_along_their_last_axis() -> None:
    def row(width: int) -> EncodedRow:
        features = {
            "pixel_values": torch.full((1, 3, 4, 4 * width), float(width)),
            "target_sizes": torch.tensor([[1, width]]),
        }
        ids = torch.tensor([1, 2])
        return EncodedRow(input_ids=ids, labels=ids, features=features)

    inputs = collate([row(2), row(5)], pad_token_id=0).inputs
    assert inputs["target_sizes"].tolist() == [[1, 2], [1, 5]]
    assert inputs["pixel_values"].shape == (1, 3, 4, 28)
    assert inputs["pixel_values"][0, 0, 0].tolist() == [2.0] * 8 + [5.0] * 20
