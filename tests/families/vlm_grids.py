"""EXAONE 4.5 and VideoLLaMA 3: images of any size as grids, positions as in a text."""

from pathlib import Path
from typing import Any

from transformers import (
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import CHATML_TOKENS, NORMALIZATION, language_model
from tests.families.tokenizers import byte_tokenizer
from tests.families.weights import save_random

EXAONE_TEMPLATE = (
    "{% for message in messages %}[|{{ message.role }}|]"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<vision><|image_pad|></vision>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}[|endofturn|]\n{% endfor %}"
    "{% if add_generation_prompt %}[|assistant|]{% endif %}"
)
VIDEO_LLAMA_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|image_pad|>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIXELS = {"min_pixels": 256, "max_pixels": 1024}


def _images(image_type: str, **options: Any) -> dict[str, Any]:
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, **PIXELS}
    return {"image_processor_type": image_type, **sizes, **NORMALIZATION, **options}


def build_exaone4_5(folder: Path) -> None:
    roles = ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]")
    images = ("<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(
        ("[PAD]", "[BOS]", *roles, *images), bos="[BOS]", eos="[|endofturn|]", pad="[PAD]"
    )
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "num_key_value_heads": 1,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    text = language_model(
        "exaone4",
        tokenizer,
        layers=4,
        sliding_window=8,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    )
    config = Exaone4_5_Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    save_random(Exaone4_5_ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="Exaone4_5_Processor",
        tokenizer=tokenizer,
        image_processor=_images("Qwen2VLImageProcessor"),
        chat_template=EXAONE_TEMPLATE,
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor", **PIXELS},
    )


def build_video_llama_3(folder: Path) -> None:
    tokenizer = byte_tokenizer(
        (*CHATML_TOKENS, "<|image_pad|>", "<|video_pad|>"), eos="<|im_end|>", pad="<|endoftext|>"
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 4,
    }
    config = VideoLlama3Config(
        vision_config=vision,
        text_config=language_model("qwen2", tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    save_random(VideoLlama3ForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="VideoLlama3Processor",
        tokenizer=tokenizer,
        image_processor=_images(
            "VideoLlama3ImageProcessor", temporal_patch_size=1, merge_size=1, max_pixels=512
        ),
        chat_template=VIDEO_LLAMA_TEMPLATE,
        video_processor={"video_processor_type": "VideoLlama3VideoProcessor", **PIXELS},
    )


CASES = (
    FamilyCase(
        model_type="exaone4_5",
        reads_images=True,
        build=build_exaone4_5,
        traits=frozenset({"sliding_window"}),
    ),
    FamilyCase(
        model_type="video_llama_3",
        reads_images=True,
        build=build_video_llama_3,
        needs="No videos: rows hold images.",
    ),
)
