"""Real transformers classes of every known family, built small or on the meta device."""

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from grit_core.inventory import ModelInventory
from grit_core.models.inventory import inventory_of

VISION_BLOCKS = 6
TEXT_BLOCKS = 10

_DEPTH_FIELDS = ("num_hidden_layers", "depth")

_MIXED = ["mamba", "mamba", "attention", "mamba", "mamba"] * (TEXT_BLOCKS // 5)
_SETTINGS: dict[str, dict[str, Any]] = {
    # Gemma 4 has a vision tower only where its config says so.
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "granitemoehybrid": {"num_hidden_layers": TEXT_BLOCKS, "layer_types": _MIXED},
    "bamba": {"attn_layer_indices": [2, 7]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_vl": {
        "text_config": {
            "model_type": "lfm2",
            "layer_types": ["conv", "full_attention"] * 16,
            "num_hidden_layers": 32,
        }
    },
}
"""What configs leave open that every member of the family states."""


def config_of(model_type: str) -> Any:
    """A family's own config with its own sizes, only the depths cut."""
    config = AutoConfig.for_model(model_type, **_SETTINGS.get(model_type, {}))
    _cut(getattr(config, "vision_config", None), VISION_BLOCKS)
    _cut(config.get_text_config(), TEXT_BLOCKS)
    if model_type in {"qwen3_vl", "qwen3_vl_moe"}:
        config.vision_config.deepstack_visual_indexes = [1, 3, 5]
    if model_type == "aya_vision":
        config.vision_config.num_attention_heads = 16  # 14 by default, which does not divide 1152
    if model_type == "mllama":
        config.text_config.cross_attention_layers = [3, 8]
    return config


def smolvlm_256m_config() -> Any:
    """The true shape of HuggingFaceTB/SmolVLM-256M-Instruct."""
    return smolvlm_config("idefics3", text_hidden_size=576, text_blocks=30, heads=9, kv_heads=3)


def smolvlm_config(
    model_type: str,
    *,
    text_hidden_size: int,
    text_blocks: int,
    heads: int,
    kv_heads: int,
    vision_hidden_size: int = 768,
    vision_blocks: int = 12,
    intermediate_size: int = 1536,
) -> Any:
    """A member of the SmolVLM family by its sizes."""
    return AutoConfig.for_model(
        model_type,
        scale_factor=4,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": vision_hidden_size,
            "num_hidden_layers": vision_blocks,
            "num_attention_heads": vision_hidden_size // 64,
            "intermediate_size": 4 * vision_hidden_size,
            "patch_size": 16,
            "image_size": 512,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": text_hidden_size,
            "num_hidden_layers": text_blocks,
            "intermediate_size": intermediate_size,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": 49280,
        },
    )


def on_meta(config: Any) -> Any:
    """The model of a config without memory for its weights."""
    seeing = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    auto = AutoModelForImageTextToText if seeing else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


@cache
def smolvlm_256m() -> ModelInventory:
    """The layers of SmolVLM-256M under their true names."""
    return inventory_of(on_meta(smolvlm_256m_config()))


@cache
def inventory_of_family(model_type: str) -> ModelInventory:
    """The layers of a family's own class."""
    return inventory_of(on_meta(config_of(model_type)))


def _cut(part: Any, blocks: int) -> None:
    for name in _DEPTH_FIELDS:
        if hasattr(part, name):
            setattr(part, name, blocks)
    if getattr(part, "layer_types", None):
        # Some types derive it from the depth, and it cannot be set.
        with suppress(AttributeError):
            part.layer_types = part.layer_types[:blocks]


def small_smolvlm_config() -> Any:
    """SmolVLM-256M's depth and layer names in a few hundred thousand parameters."""
    return AutoConfig.for_model(
        "idefics3",
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "patch_size": 4,
            "image_size": 16,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 30,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "pad_token_id": 0,
        },
        pad_token_id=0,
        image_token_id=1,
    )
