"""Qwen2-VL to Qwen3.5: images of any size as grids of patches, positions in three dimensions."""

from pathlib import Path
from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import CHATML_TOKENS, NORMALIZATION, language_model
from tests.families.tokenizers import PreTrainedTokenizerFast, byte_tokenizer
from tests.families.weights import save_random

TOKENS = (
    *CHATML_TOKENS,
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_CONTENT = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
QWEN2_TEMPLATE = (
    _CONTENT + "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ write(message.content) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = (
    _CONTENT + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ write(message.content) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts are written for the answers after the last question only.
QWEN3_5_TEMPLATE = (
    _CONTENT + "{% set last = namespace(user=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ message.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ write(message.content) | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
"""Half of a head of 16 numbers, over time, height and width."""
INTERLEAVED_ROPE = {**ROPE, "mrope_interleaved": True}

PATCHES = {
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "depth": 2,
    "num_heads": 2,
}


def _tokenizer(*more: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        (*TOKENS, *more),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("vision_start", "vision_end")
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names},
    }


def _write(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, name: str, template: str, **size: Any
) -> None:
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **NORMALIZATION}
    video = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    write_processor(
        folder,
        processor_class=f"{name}Processor",
        tokenizer=tokenizer,
        image_processor={"image_processor_type": "Qwen2VLImageProcessorFast", **patches, **size},
        chat_template=template,
        video_processor={"video_processor_type": video, **patches, **size},
    )


def build_qwen2_vl(folder: Path) -> None:
    tokenizer = _tokenizer()
    config = Qwen2VLConfig(
        vision_config={**PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config=language_model("qwen2_vl_text", tokenizer, rope_parameters=ROPE),
        **_ids(tokenizer),
    )
    save_random(Qwen2VLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    size = {"min_pixels": 256, "max_pixels": 1024}
    _write(folder, tokenizer, name="Qwen2VL", template=QWEN2_TEMPLATE, **size)


def build_qwen2_5_vl(folder: Path) -> None:
    tokenizer = _tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        vision_config={**PATCHES, **vision},
        text_config=language_model("qwen2_5_vl_text", tokenizer, rope_parameters=ROPE),
        **_ids(tokenizer),
    )
    save_random(Qwen2_5_VLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    size = {"min_pixels": 256, "max_pixels": 1024}
    _write(folder, tokenizer, name="Qwen2_5_VL", template=QWEN2_TEMPLATE, **size)


def _qwen3_vision(**options: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    return {**PATCHES, **sizes, "num_position_embeddings": 16, **options}


def _write_qwen3(folder: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    size = {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    _write(folder, tokenizer, name="Qwen3VL", template=template, **size)


def build_qwen3_vl(folder: Path) -> None:
    tokenizer = _tokenizer()
    text = language_model(
        "qwen3_vl_text", tokenizer, layers=3, head_dim=16, rope_parameters=INTERLEAVED_ROPE
    )
    config = Qwen3VLConfig(
        vision_config=_qwen3_vision(depth=3, deepstack_visual_indexes=[0, 1]),
        text_config=text,
        **_ids(tokenizer),
    )
    save_random(Qwen3VLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _write_qwen3(folder, tokenizer, QWEN3_TEMPLATE)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def build_qwen3_vl_moe(folder: Path) -> None:
    tokenizer = _tokenizer()
    text = language_model(
        "qwen3_vl_moe_text",
        tokenizer,
        layers=3,
        head_dim=16,
        rope_parameters=INTERLEAVED_ROPE,
        **MOE,
    )
    config = Qwen3VLMoeConfig(
        vision_config=_qwen3_vision(depth=3, deepstack_visual_indexes=[0, 1]),
        text_config=text,
        **_ids(tokenizer),
    )
    save_random(Qwen3VLMoeForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _write_qwen3(folder, tokenizer, QWEN3_TEMPLATE)


LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}


def _qwen3_5_text(model_type: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Any:
    rope = {**INTERLEAVED_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    return language_model(
        model_type,
        tokenizer,
        layers=4,
        head_dim=16,
        rope_parameters=rope,
        **LINEAR_ATTENTION,
        **more,
    )


def build_qwen3_5(folder: Path) -> None:
    tokenizer = _tokenizer("<think>", "</think>")
    config = Qwen3_5Config(
        vision_config=_qwen3_vision(),
        text_config=_qwen3_5_text("qwen3_5_text", tokenizer),
        **_ids(tokenizer),
    )
    save_random(Qwen3_5ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _write_qwen3(folder, tokenizer, QWEN3_5_TEMPLATE)


def build_qwen3_5_moe(folder: Path) -> None:
    tokenizer = _tokenizer("<think>", "</think>")
    moe = {**MOE, "shared_expert_intermediate_size": 16}
    config = Qwen3_5MoeConfig(
        vision_config=_qwen3_vision(),
        text_config=_qwen3_5_text("qwen3_5_moe_text", tokenizer, **moe),
        **_ids(tokenizer),
    )
    save_random(Qwen3_5MoeForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _write_qwen3(folder, tokenizer, QWEN3_5_TEMPLATE)


_HYBRID = frozenset({"hybrid", "linear_attention"})

CASES = (
    FamilyCase(model_type="qwen2_vl", reads_images=True, build=build_qwen2_vl),
    FamilyCase(model_type="qwen2_5_vl", reads_images=True, build=build_qwen2_5_vl),
    FamilyCase(model_type="qwen3_vl", reads_images=True, build=build_qwen3_vl),
    FamilyCase(
        model_type="qwen3_vl_moe",
        reads_images=True,
        build=build_qwen3_vl_moe,
        traits=frozenset({"moe"}),
    ),
    FamilyCase(model_type="qwen3_5", reads_images=True, build=build_qwen3_5, traits=_HYBRID),
    FamilyCase(
        model_type="qwen3_5_moe",
        reads_images=True,
        build=build_qwen3_5_moe,
        traits=_HYBRID | {"moe"},
    ),
)
