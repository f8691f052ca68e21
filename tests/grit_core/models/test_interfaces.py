from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from grit_core.errors import ModelUnavailable
from grit_core.models.interfaces import OTHER_INTERFACES
from grit_core.models.inventory import build_inventory
from tests.tiny_models import tiny_causal_folder

ENCODER_DECODERS = (
    "florence2",
    "pix2struct",
    "udop",
    "t5gemma2",
    "pp_formulanet",
    "bart",
    "marian",
)


def folder_of(tmp_path: Path, model_type: str, **options: Any) -> Path:
    AutoConfig.for_model(model_type, **options).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_decoder_is_refused_in_words(tmp_path: Path, model_type: str) -> None:
    reason = rf"\({model_type}\) is an encoder-decoder; only decoder models"
    with pytest.raises(ModelUnavailable, match=reason):
        build_inventory(folder_of(tmp_path, model_type))


def test_a_model_whose_text_part_encodes_first_is_refused_as_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "blip-2", text_config={"model_type": "t5"})
    with pytest.raises(ModelUnavailable, match="is an encoder-decoder"):
        build_inventory(folder)


@pytest.mark.parametrize("model_type", sorted(OTHER_INTERFACES))
def test_a_model_that_answers_no_chat_is_refused_with_the_reason(
    tmp_path: Path, model_type: str
) -> None:
    with pytest.raises(ModelUnavailable, match="answers no chat: ") as refusal:
        build_inventory(folder_of(tmp_path, model_type))
    assert OTHER_INTERFACES[model_type] in str(refusal.value)


def test_a_model_that_sees_is_never_taken_for_a_text_model(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"vision_config and audio_config, .*would not see"):
        build_inventory(folder_of(tmp_path, "phi4_multimodal"))


def test_a_decoder_is_not_refused(tmp_path: Path) -> None:
    assert build_inventory(tiny_causal_folder(tmp_path)).model_type == "llama"
