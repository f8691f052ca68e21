"""A batch that a model refuses is the user's error, in words; the program's own errors stay."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from grit_core.data.collate import Batch, collate
from grit_core.data.encoder import ChatEncoder
from grit_core.errors import InvalidConfig, InvalidDataset
from grit_core.loss import label_loss_sum
from grit_core.models.pretrained import load_base_model, load_processor
from grit_core.records import parse_record
from tests.tiny_models import tiny_causal_folder, tiny_chat_rows, tiny_vlm_folder


def batch_of(ids: list[int]) -> Batch:
    input_ids = torch.tensor([ids])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    return Batch(inputs=inputs, labels=input_ids)


def test_a_token_without_an_embedding_is_named_with_their_number(tmp_path: Path) -> None:
    model = load_base_model(tiny_causal_folder(tmp_path))
    known = model.config.vocab_size
    with pytest.raises(InvalidDataset, match=f"token {known} is beyond the model's {known} embed"):
        label_loss_sum(model, batch_of([1, 2, known]))


def test_rows_beyond_the_models_positions_name_the_setting() -> None:
    config = GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(InvalidConfig) as caught:
        label_loss_sum(GPT2LMHeadModel(config), batch_of([1, 2, 3, 4, 5]))
    (fault,) = caught.value.faults
    assert fault.pointer == "/training/max_length"
    assert "positions for 4" in fault.detail


def test_images_without_their_tokens_are_the_rows_fault(tmp_path: Path) -> None:
    folder = tiny_vlm_folder(tmp_path)
    model, encoder = load_base_model(folder), ChatEncoder(load_processor(folder))
    record = parse_record(tiny_chat_rows(1)[0], line=1, resolve_image=lambda _path: b"")
    batch = collate(encoder.encode(record), pad_token_id=encoder.pad_token_id)
    ids = batch.inputs["input_ids"]
    where = (ids == model.config.image_token_id).nonzero()[0]
    ids[where[0], where[1]] = encoder.pad_token_id
    with pytest.raises(InvalidDataset, match="the model refuses the rows of a batch"):
        label_loss_sum(model, batch)


def test_an_error_of_the_program_inside_the_model_stays_what_it_is(tmp_path: Path) -> None:
    model = load_base_model(tiny_causal_folder(tmp_path))

    def fail(*_arguments: object) -> None:
        raise KeyError("a hook of ours")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyError):
        label_loss_sum(model, batch_of([1, 2, 3]))
