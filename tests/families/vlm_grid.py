"""Vision-language families that read an image at its own resolution, as a grid of patches."""

import json
from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LightOnOcrProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLProcessor,
)
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.vlm_parts import (
    PLAIN_NORM,
    save_processor_files,
    text_part,
    tower_part,
)
from tests.families.weights import save_random

GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>{{ '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PIXTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% elif message.role == 'user' %}[INST]{% for part in message.content %}"
    "{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{{ message.content[0].text + eos_token }}{% endif %}{% endfor %}"
)
LIGHTON_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image_pad|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PADDLE_TEMPLATE = (
    "{{ cls_token }}{% for message in messages %}{% if message.role == 'system' %}"
    "{{ message.content[0].text + '\n' }}{% else %}"
    "{{ 'User: ' if message.role == 'user' else 'Assistant:\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '\n' if message.role == 'user' else eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
GLM_TOKENS = (
    *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>"),
    *("<|end_of_video|>", "<|video|>"),
)
PIXTRAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]"),
    *("[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
GLM_PIXELS = {"shortest_edge": 2 * 64, "longest_edge": 2 * 1024}
"""Bounds of an image's pixels, times the two frames of a patch."""


def _glm_tokenizer() -> Any:
    return byte_tokenizer(
        GLM_TOKENS,
        eos="<|endoftext|>",
        named={"image_token": "<|image|>", "video_token": "<|video|>"},
    )


def _glm_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _glm_tower(model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "intermediate_size": 64,
    }


def _glm_positions() -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }


def _save_glm_files(folder: Path, tokenizer: Any, *, name: str) -> None:
    """Write the processor's files, those for videos among them, as every such folder has them."""
    shared = {
        "size": GLM_PIXELS,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **PLAIN_NORM,
    }
    save_processor_files(
        folder,
        tokenizer,
        processor=f"{name}Processor",
        image_processor={"image_processor_type": f"{name}ImageProcessor", **shared},
        chat_template=GLM_TEMPLATE,
    )
    videos = {"video_processor_type": f"{name}VideoProcessor", **shared}
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps(videos, indent=2), encoding="utf-8")


def build_glm4v(folder: Path) -> None:
    """Write a GLM-4.1V: its turns end where the next begins, and no token says so."""
    tokenizer = _glm_tokenizer()
    config = Glm4vConfig(
        **_glm_ids(tokenizer),
        vision_config=_glm_tower("glm4v_vision"),
        text_config=text_part("glm4v_text", tokenizer, rope_parameters=_glm_positions()),
        **token_ids(tokenizer),
    )
    save_random(Glm4vForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_glm_files(folder, tokenizer, name="Glm4v")


def build_glm4v_moe(folder: Path) -> None:
    """Write a GLM-4.5V: the same with experts."""
    tokenizer = _glm_tokenizer()
    config = Glm4vMoeConfig(
        **_glm_ids(tokenizer),
        vision_config=_glm_tower("glm4v_moe_vision"),
        text_config=text_part(
            "glm4v_moe_text",
            tokenizer,
            num_hidden_layers=2,
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            rope_parameters=_glm_positions(),
        ),
        **token_ids(tokenizer),
    )
    save_random(Glm4vMoeForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_glm_files(folder, tokenizer, name="Glm4v")


def build_glm46v(folder: Path) -> None:
    """Write a GLM-4.6V Flash: GLM-4.1V's model under another processor."""
    tokenizer = _glm_tokenizer()
    config = Glm46VConfig(
        **_glm_ids(tokenizer),
        vision_config=_glm_tower("glm4v_vision"),
        text_config=text_part("glm4v_text", tokenizer, rope_parameters=_glm_positions()),
        **token_ids(tokenizer),
    )
    save_random(Glm46VForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_glm_files(folder, tokenizer, name="Glm46V")


def _pixtral_tower() -> dict[str, Any]:
    return tower_part("pixtral", image_size=32, head_dim=16)


def _save_pixtral_files(folder: Path, tokenizer: Any, *, spatial_merge_size: int) -> None:
    save_processor_files(
        folder,
        tokenizer,
        processor="PixtralProcessor",
        image_processor={
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": 4, "width": 4},
            "size": {"longest_edge": 32},
            **PLAIN_NORM,
        },
        chat_template=PIXTRAL_TEMPLATE,
        patch_size=4,
        spatial_merge_size=spatial_merge_size,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )


def _pixtral_tokenizer() -> Any:
    return byte_tokenizer(
        PIXTRAL_TOKENS, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", add_bos=True
    )


def build_mistral3(folder: Path) -> None:
    """Write a Mistral Small 3.1: Pixtral's tower, four patches merged to a token."""
    tokenizer = _pixtral_tokenizer()
    config = Mistral3Config(
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        vision_config=_pixtral_tower(),
        text_config=text_part("mistral", tokenizer, head_dim=16),
        **token_ids(tokenizer),
    )
    save_random(Mistral3ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_pixtral_files(folder, tokenizer, spatial_merge_size=2)


def build_mistral3_latent(folder: Path) -> None:
    """Write a Mistral Small 4: the same before experts and latent attention."""
    tokenizer = _pixtral_tokenizer()
    text = text_part(
        "mistral4",
        tokenizer,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    config = Mistral3Config(
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
        vision_config=_pixtral_tower(),
        text_config={**text, "num_key_value_heads": 2},
        **token_ids(tokenizer),
    )
    save_random(Mistral3ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_pixtral_files(folder, tokenizer, spatial_merge_size=2)


def build_pixtral(folder: Path) -> None:
    """Write a Pixtral 12B in small, whose model type is LLaVA's."""
    tokenizer = _pixtral_tokenizer()
    config = LlavaConfig(
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
        vision_config=_pixtral_tower(),
        text_config=text_part("mistral", tokenizer, head_dim=16),
        **token_ids(tokenizer),
    )
    save_random(LlavaForConditionalGeneration, config, folder, tokenizer=tokenizer)
    _save_pixtral_files(folder, tokenizer, spatial_merge_size=1)


def build_lighton_ocr(folder: Path) -> None:
    """Write a LightOnOCR: Pixtral's tower before a Qwen3."""
    tokenizer = byte_tokenizer(
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|image_pad|>",
            "<|vision_pad|>",
            "<|vision_end|>",
        ),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={
            "image_token": "<|image_pad|>",
            "image_break_token": "<|vision_pad|>",
            "image_end_token": "<|vision_end|>",
        },
    )
    images = PixtralImageProcessorPil(
        size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}, **PLAIN_NORM
    )
    processor = LightOnOcrProcessor(
        images, tokenizer, patch_size=4, spatial_merge_size=2, chat_template=LIGHTON_TEMPLATE
    )
    config = LightOnOcrConfig(
        image_token_id=processor.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
        vision_config=_pixtral_tower(),
        text_config=text_part("qwen3", tokenizer, head_dim=16),
        **token_ids(tokenizer),
    )
    save_random(LightOnOcrForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


def build_paddleocr_vl(folder: Path) -> None:
    """Write a PaddleOCR-VL: a tower for any resolution before an ERNIE 4.5."""
    tokenizer = byte_tokenizer(
        (
            "<unk>",
            "<s>",
            "</s>",
            "<|begin_of_sentence|>",
            "<|end_of_sentence|>",
            "<|IMAGE_PLACEHOLDER|>",
            "<|IMAGE_START|>",
            "<|IMAGE_END|>",
            "<|video_pad|>",
        ),
        bos="<s>",
        eos="</s>",
        pad="<unk>",
        unk="<unk>",
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        cls_token="<|begin_of_sentence|>",
    )
    images = PaddleOCRVLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 1024},
        patch_size=4,
        temporal_patch_size=1,
        merge_size=2,
        **PLAIN_NORM,
    )
    processor = PaddleOCRVLProcessor(images, tokenizer, chat_template=PADDLE_TEMPLATE)
    config = PaddleOCRVLConfig(
        image_token_id=processor.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_START|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|IMAGE_END|>"),
        tie_word_embeddings=False,
        vision_config=tower_part("paddleocr_vl_vision", image_size=32, spatial_merge_size=2),
        text_config=text_part(
            "paddleocr_vl_text",
            tokenizer,
            head_dim=16,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
        ),
        **token_ids(tokenizer),
    )
    save_random(PaddleOCRVLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


CASES: tuple[FamilyCase, ...] = (
    FamilyCase(model_type="glm4v", reads_images=True, build=build_glm4v, ends_every_turn=False),
    FamilyCase(
        model_type="glm4v_moe",
        reads_images=True,
        build=build_glm4v_moe,
        ends_every_turn=False,
        traits=frozenset({"moe"}),
    ),
    FamilyCase(model_type="glm46v", reads_images=True, build=build_glm46v, ends_every_turn=False),
    FamilyCase(
        model_type="mistral3",
        reads_images=True,
        build=build_mistral3,
    ),
    FamilyCase(
        model_type="mistral3",
        variant="4",
        reads_images=True,
        build=build_mistral3_latent,
        traits=frozenset({"moe", "latent_attention"}),
    ),
    FamilyCase(
        model_type="llava",
        variant="pixtral",
        reads_images=True,
        build=build_pixtral,
    ),
    FamilyCase(model_type="lighton_ocr", reads_images=True, build=build_lighton_ocr),
    FamilyCase(model_type="paddleocr_vl", reads_images=True, build=build_paddleocr_vl),
)
