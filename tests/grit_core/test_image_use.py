"""Which models surely read no image."""

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from grit_core.config import get_model_config
from grit_core.image_use import image_faults, image_warnings
from grit_core.plan import plan_adaptation
from tests.architectures import inventory_of_family, smolvlm_256m


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
