"""Newer vision-language families, before text models of several kinds."""

import json
from pathlib import Path

from transformers import (
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.vlm_parts import (
    PLAIN_NORM,
    save_processor_files,
    square,
    text_part,
    tower_part,
)
from tests.families.weights import save_random

EXAONE_TEMPLATE = (
    "{% for message in messages %}[|{{ message.role }}|]{{ '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<vision><|image_pad|></vision>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "[|endofturn|]{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]\n' }}{% endif %}"
)
QIANFAN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_exaone4_5(folder: Path) -> None:
    """Write an EXAONE 4.5: a tower of windows before layers with and without positions."""
    tokenizer = byte_tokenizer(
        (
            *("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[|system|]", "[|user|]", "[|assistant|]"),
            *("[|endofturn|]", "<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"),
        ),
        bos="[BOS]",
        eos="[|endofturn|]",
        pad="[PAD]",
        unk="[UNK]",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    config = Exaone4_5_Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config=text_part(
            "exaone4",
            tokenizer,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
        ),
        **token_ids(tokenizer),
    )
    save_random(Exaone4_5_ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    pixels = {"shortest_edge": 64, "longest_edge": 1024}
    shared = {"size": pixels, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    save_processor_files(
        folder,
        tokenizer,
        processor="Exaone4_5_Processor",
        image_processor={"image_processor_type": "Qwen2VLImageProcessor", **shared, **PLAIN_NORM},
        chat_template=EXAONE_TEMPLATE,
    )
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", **shared, **PLAIN_NORM}
    path = folder / "video_preprocessor_config.json"
    path.write_text(json.dumps(videos, indent=2), encoding="utf-8")


def build_qianfan_ocr(folder: Path) -> None:
    """Write a Qianfan-OCR: InternVL's tiles, and a placeholder that is no token."""
    tokenizer = byte_tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    )
    images = GotOcr2ImageProcessorPil(
        size=square(), crop_to_patches=True, min_patches=1, max_patches=4, **PLAIN_NORM
    )
    processor = QianfanOCRProcessor(
        images, tokenizer, image_seq_length=4, chat_template=QIANFAN_TEMPLATE
    )
    config = QianfanOCRConfig(
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        vision_config=tower_part(
            "qianfan_ocr_vision", image_size=[16, 16], patch_size=[4, 4], drop_path_rate=0.0
        ),
        text_config=text_part("qwen3", tokenizer, head_dim=16),
        **token_ids(tokenizer),
    )
    save_random(QianfanOCRForConditionalGeneration, config, folder, tokenizer=tokenizer)
    processor.save_pretrained(folder)


CASES: tuple[FamilyCase, ...] = (
    FamilyCase(
        model_type="exaone4_5",
        reads_images=True,
        build=build_exaone4_5,
        traits=frozenset({"sliding_window"}),
    ),
    FamilyCase(model_type="qianfan_ocr", reads_images=True, build=build_qianfan_ocr),
)
