"""Which models surely read no image."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from grit_core.config import get_model_config
from grit_core.image_use import find_images, image_faults, image_warnings
from grit_core.plan import plan_adaptation
from grit_core.row_file import RowFile
from tests.architectures import inventory_of_family, smolvlm_256m
from tests.grit_core.records.chats import RED, base64_text, chat


@pytest.mark.parametrize(
    "model_type", ["smolvlm", "llava", "gemma3", "fuyu", "llama", "qwen3", "mistral", "gemma3_text"]
)
def test_only_a_language_model_is_said_to_read_text_only(model_type: str) -> None:
    inventory = inventory_of_family(model_type)
    sees = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert inventory.is_text_only is not sees
    faults = image_faults(inventory, {"/dataset": 3, "/eval_dataset": 0, "/other": None})
    assert [fault.pointer for fault in faults] == ([] if sees else ["/dataset"])


def test_the_layers_that_read_images_are_counted_by_modality() -> None:
    plan = plan_adaptation(get_model_config("smolvlm_fast"), smolvlm_256m())
    [warning] = image_warnings(plan, num_images=0)
    assert "vision" in warning
    assert image_warnings(plan, num_images=5) == []
    assert image_warnings(plan, num_images=None) == []


def test_a_language_models_own_attention_to_images_is_counted_too() -> None:
    plan = plan_adaptation(get_model_config("mllama_fast"), inventory_of_family("mllama"))
    [warning] = image_warnings(plan, num_images=0)
    assert "cross_modal and" in warning
    assert "fusion layers adapt" in warning


def image_file(folder: Path, *rows: dict[str, Any]) -> RowFile:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return RowFile(path)


def test_the_images_of_a_local_file_are_found_or_known_to_be_none(tmp_path: Path) -> None:
    text = chat("x")
    seen = chat("x", image=base64_text(RED))
    assert find_images(image_file(tmp_path, text, seen, seen)) == 1
    assert find_images(image_file(tmp_path, text, text)) == 0
    assert find_images(image_file(tmp_path, text, {"messages": []})) is None
    assert find_images(image_file(tmp_path, *[text] * 1001)) is None
