"""SmolVLM, SmolVLM2 and Idefics3: images split into tiles, each a run of image tokens."""

from pathlib import Path
from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import NORMALIZATION, language_model, vision_tower
from tests.families.tokenizers import byte_tokenizer, token_ids
from tests.families.weights import save_random

TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<image>"),
    *("<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _build(
    folder: Path, config_class: Any, model_class: Any, *, name: str, splitting: bool
) -> None:
    tokenizer = byte_tokenizer(
        TOKENS,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
    )
    config = config_class(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        vision_config=vision_tower(),
        text_config=language_model("llama", tokenizer),
        **token_ids(tokenizer),
    )
    save_random(model_class, config, folder, tokenizer=tokenizer)
    video = {"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 8, "fps": 1}
    write_processor(
        folder,
        processor_class=f"{name}Processor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": f"{name}ImageProcessor",
            "size": {"longest_edge": 32 if splitting else 16},
            "max_image_size": {"longest_edge": 16},
            "do_image_splitting": splitting,
            **NORMALIZATION,
        },
        chat_template=TEMPLATE,
        settings={"image_seq_len": 4},
        video_processor=video if name == "SmolVLM" else None,
    )


def build_idefics3(folder: Path) -> None:
    _build(
        folder, Idefics3Config, Idefics3ForConditionalGeneration, name="Idefics3", splitting=False
    )


def build_idefics3_tiled(folder: Path) -> None:
    _build(
        folder, Idefics3Config, Idefics3ForConditionalGeneration, name="Idefics3", splitting=True
    )


def build_smolvlm(folder: Path) -> None:
    _build(folder, SmolVLMConfig, SmolVLMForConditionalGeneration, name="SmolVLM", splitting=True)


CASES = (
    FamilyCase(model_type="idefics3", reads_images=True, build=build_idefics3),
    FamilyCase(
        model_type="idefics3", variant="tiles", reads_images=True, build=build_idefics3_tiled
    ),
    FamilyCase(model_type="smolvlm", reads_images=True, build=build_smolvlm),
)
