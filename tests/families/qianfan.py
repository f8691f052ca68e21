"""Qianfan-OCR: tiles as InternVL reads them."""

from pathlib import Path

from transformers import (
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.families.case import FamilyCase
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.vlm_parts import (
    PLAIN_NORM,
    square,
    text_part,
    tower_part,
)
from tests.families.weights import save_random

QIANFAN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    FamilyCase(model_type="qianfan_ocr", reads_images=True, build=build_qianfan_ocr),
)
