"""InternVL in the form of transformers: tiles of one size, an image as a run of context tokens."""

from pathlib import Path

from transformers import InternVLConfig, InternVLForConditionalGeneration

from tests.families.case import FamilyCase
from tests.families.folders import write_processor
from tests.families.parts import CHATML_TOKENS, NORMALIZATION, language_model, vision_tower
from tests.families.tokenizers import byte_tokenizer
from tests.families.weights import save_random

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_internvl(folder: Path) -> None:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(
        (*CHATML_TOKENS, *named.values()), eos="<|im_end|>", pad="<|endoftext|>", named=named
    )
    config = InternVLConfig(
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
        vision_config=vision_tower(image_size=[16, 16], patch_size=[4, 4]),
        text_config=language_model("qwen2", tokenizer),
    )
    save_random(InternVLForConditionalGeneration, config, folder, tokenizer=tokenizer)
    write_processor(
        folder,
        processor_class="InternVLProcessor",
        tokenizer=tokenizer,
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "size": {"height": 16, "width": 16},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 3,
            **NORMALIZATION,
        },
        chat_template=TEMPLATE,
        settings={"image_seq_length": 4},
        video_processor={
            "video_processor_type": "InternVLVideoProcessor",
            "size": {"height": 16, "width": 16},
        },
    )


CASES = (FamilyCase(model_type="internvl", reads_images=True, build=build_internvl),)
