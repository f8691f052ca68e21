from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_core.data.encoder import ChatEncoder
from grit_core.data.processor import find_image_token_ids
from grit_core.data.rows import EncodedRows
from grit_core.errors import InvalidDataset
from grit_core.models.pretrained import load_processor
from grit_core.row_file import RowFile
from tests.families.chats import training_rows
from tests.families.vlm_fixed import build_vipllava
from tests.families.vlm_tiled import build_aya_vision, build_mllama, build_ovis2
from tests.tiny_models import byte_tokenizer, tiny_vlm_processor, write_jsonl

BUILDERS: dict[str, Callable[[Path], None]] = {
    "<IMG_ATOM>": build_ovis2,
    "<|IMG_PATCH|>": build_aya_vision,
    "<image>": build_vipllava,
    "<|image|>": build_mllama,
}


@pytest.mark.parametrize("token", BUILDERS)
def test_the_tokens_of_images_are_those_of_the_model_s_config(tmp_path: Path, token: str) -> None:
    BUILDERS[token](tmp_path)
    processor: Any = load_processor(tmp_path)
    ids = find_image_token_ids(processor)
    assert ids.tolist() == [processor.tokenizer.convert_tokens_to_ids(token)]


def test_a_processor_without_a_config_tells_by_its_placeholder() -> None:
    processor = tiny_vlm_processor()
    assert find_image_token_ids(processor).tolist() == [processor.image_token_id]
    tokenizer = byte_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert find_image_token_ids(tokenizer).shape == (0,)


def test_a_row_is_never_cut_through_an_image_whose_tokens_have_another_name(
    tmp_path: Path,
) -> None:
    build_ovis2(tmp_path)
    encoder = ChatEncoder(load_processor(tmp_path))
    path = write_jsonl(tmp_path / "rows.jsonl", training_rows((1,)))
    [whole] = EncodedRows(RowFile(path), encoder, max_length=1000).row(0)
    shown = torch.isin(whole.input_ids, encoder.image_token_ids).nonzero().flatten().tolist()
    rows = EncodedRows(
        RowFile(path), encoder, max_length=shown[len(shown) // 2], on_long_rows="truncate"
    )
    with pytest.raises(InvalidDataset, match="would cut an image"):
        rows.row(0)


def test_a_cut_row_has_its_attention_to_images_cut_alike(tmp_path: Path) -> None:
    build_mllama(tmp_path)
    encoder = ChatEncoder(load_processor(tmp_path))
    path = write_jsonl(tmp_path / "rows.jsonl", training_rows((2,)))
    [whole] = EncodedRows(RowFile(path), encoder, max_length=1000).row(0)
    length = len(whole.input_ids) - 1
    [cut] = EncodedRows(RowFile(path), encoder, max_length=length, on_long_rows="truncate").row(0)
    mask = cut.features["cross_attention_mask"]
    assert mask.shape == (1, length, 2, 4)
    assert torch.equal(mask, whole.features["cross_attention_mask"][:, :length])
